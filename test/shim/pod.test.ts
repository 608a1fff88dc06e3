// cedanad's side of a keeper's connection, with a keeper of the test's own: a real socket and the real protocol, and no engine behind it.

import fs from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import os from "node:os";
import path from "node:path";
import { pino } from "pino";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CheckpointUse } from "../../src/checkpoint/use.ts";
import { statusCode, Unavailable } from "../../src/errors/index.ts";
import { bootId } from "../../src/linux/proc.ts";
import { task as api } from "../../src/proto/index.ts";
import { decodeOptions } from "../../src/runtime/options.ts";
import { readTaskRecord, type TaskRecord, writeTaskRecord } from "../../src/shim/journal.ts";
import {
  encodeMessage,
  type FieldValues,
  type Message,
  MessageReader,
  type MessageType,
  messageType as type,
} from "../../src/shim/keeper-protocol.ts";
import { ShimServer } from "../../src/shim/shim-server.ts";
import { Task } from "../../src/shim/task.ts";
import { decodeFrame, decodeResponse, encodeFrame, encodeRequest, frameType } from "../../src/ttrpc/index.ts";
import { until } from "../live/harness/until.ts";

const operations = new Set<number>([
  type.SPAWN,
  type.SIGNAL,
  type.MOUNT,
  type.UNMOUNT,
  type.IO_OPEN,
  type.IO_DRAIN,
  type.IO_FREE,
  type.WATCH_OOM,
]);

class FakeKeeper {
  readonly log: Message[] = [];
  closed = false;
  readonly #socket: Socket;
  readonly #held = new Map<number, Message[]>();
  #now = 0;

  constructor(socket: Socket) {
    this.#socket = socket;
    const reader = new MessageReader();
    socket.on("data", (chunk: Buffer) => {
      for (const message of reader.push(chunk)) this.#take(message);
    });
    socket.on("error", () => {});
    socket.on("close", () => {
      this.closed = true;
    });
    this.send(type.HELLO, { versionMin: 1, versionMax: 2, pid: process.pid, namespace: "ns", id: "c1" });
  }

  /** Operations of the type are answered by `release` alone. */
  hold(operation: number): void {
    this.#held.set(operation, []);
  }

  release(operation: number): void {
    const held = this.#held.get(operation) ?? [];
    this.#held.delete(operation);
    for (const message of held) this.#answer(message);
  }

  #take(message: Message): void {
    this.log.push(message);
    if (!operations.has(message.type)) return;
    const held = this.#held.get(message.type);
    if (held) held.push(message);
    else this.#answer(message);
  }

  #answer(message: Message): void {
    this.send(type.RESULT, { request: message.int("request"), step: message.string("step"), pid: 1 });
  }

  send(what: MessageType, values: FieldValues = {}): void {
    this.#socket.write(encodeMessage(what, values));
  }

  call(
    request: number,
    method: string,
    payload: Uint8Array,
    more: FieldValues & { timeoutMs?: number } = {},
  ): void {
    const { timeoutMs, ...fields } = more;
    const body = encodeRequest({ service: "containerd.task.v2.Task", method, payload, timeoutMs });
    const frame = encodeFrame({ streamId: 2 * request + 1, type: frameType.request, flags: 0 }, body);
    this.send(type.REQUEST, { request, connection: 1, deliveries: 1, taken: 0, ageMs: 0, ...fields, frame });
  }

  async takes(what: MessageType, fits: (message: Message) => boolean = () => true): Promise<Message> {
    return await until(() => this.log.find((message) => message.type === what && fits(message)), {
      what: () => `message ${what}; came: ${this.log.map((message) => message.type)}`,
    });
  }

  /** The status code of a request's response. */
  async response(request: number): Promise<number> {
    const message = await this.takes(type.RESPONSE, (one) => one.int("request") === request);
    return decodeResponse(decodeFrame(message.bytes("frame")).payload!).status.code;
  }

  /** Everything that was sent before has been dealt with. */
  async settled(): Promise<void> {
    const nonce = ++this.#now;
    this.send(type.PING, { nonce });
    await this.takes(type.PONG, (message) => message.int("nonce") === nonce);
  }
}

let directory: string;
let server: Server;
let shim: ShimServer;
let keeper: FakeKeeper;
beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "pod-"));
  shim = new ShimServer({
    log: pino({ level: "silent" }),
    runDirectory: directory,
    build: "test",
    beginRuntime: () => {
      throw new Error("no wrapper here");
    },
  });
  const socketPath = path.join(directory, "socket");
  server = createServer((socket) => shim.accept(socket));
  await new Promise<void>((resolve) => server.listen(socketPath, resolve));
  const socket = connect(socketPath);
  keeper = new FakeKeeper(socket);
  close = () => socket.destroy();
});
let close = () => {};
afterEach(async () => {
  close();
  await new Promise((resolve) => server.close(resolve));
  fs.rmSync(directory, { recursive: true, force: true });
});

/** A task in a bundle of its own, as the cedanad before us has left it. */
function record(id: string, more: Partial<TaskRecord>): string {
  const bundle = path.join(directory, id);
  fs.mkdirSync(bundle);
  const spec = { linux: { cgroupsPath: "not-absolute", namespaces: [{ type: "pid" }] } };
  fs.writeFileSync(path.join(bundle, "config.json"), JSON.stringify(spec));
  writeTaskRecord({
    version: 1,
    id,
    namespace: "ns",
    bundle,
    state: "created",
    pid: 0,
    terminal: false,
    stdin: "",
    stdout: "",
    stderr: "",
    options,
    rootfsMounted: false,
    oomKills: 0,
    execs: [],
    answers: [],
    ...more,
  });
  keeper.send(type.TASK, { id, bundle, pid: more.pid ?? 0 });
  return bundle;
}

const tagOf = (message: Message) => ({ request: message.int("request"), step: message.string("step") });
const options = await decodeOptions(undefined);
const exit = { status: 0, atNs: "1" };

describe("a call whose time is over", () => {
  it("and that starts a process all the same learns of its exit", async () => {
    const exec = { execId: "e1", serial: 3, state: "created", pid: 0 };
    const stdio = { terminal: false, stdin: "", stdout: "", stderr: "" };
    const bundle = record("c1", { state: "running", execs: [{ ...exec, ...stdio }] });
    keeper.send(type.END);
    keeper.hold(type.SPAWN);
    keeper.call(9, "Start", api.StartRequest.encode({ id: "c1", execId: "e1" }), { timeoutMs: 20 });
    expect(await keeper.response(9)).toBe(statusCode.DEADLINE_EXCEEDED);
    const atNs = BigInt(Date.now()) * 1_000_000n;
    keeper.send(type.EXIT, { sequence: 1, pid: 4242, waitStatus: 5 << 8, atNs });
    await keeper.settled();
    expect(keeper.log.some((message) => message.type === type.ACK)).toBe(false);
    fs.writeFileSync(path.join(bundle, "exec-3.pid"), "4242");
    keeper.release(type.SPAWN);
    await keeper.takes(type.ACK, (message) => message.int("sequence") === 1);
    const events = keeper.log.filter((message) => message.type === type.EVENT);
    expect(events.map((message) => message.string("eventKey"))).toEqual(["exec-started:9", "exit:1"]);
  });

  it("and that deletes a task all the same forgets it", async () => {
    record("c1", { state: "stopped", pid: 4242, exit });
    keeper.send(type.END);
    keeper.hold(type.IO_FREE);
    keeper.call(9, "Delete", api.DeleteRequest.encode({ id: "c1" }), { timeoutMs: 20 });
    expect(await keeper.response(9)).toBe(statusCode.DEADLINE_EXCEEDED);
    keeper.release(type.IO_FREE);
    expect((await keeper.takes(type.TASK_GONE)).string("id")).toBe("c1");
  });
});

describe("an exec", () => {
  const stdio = { terminal: false, stdin: "", stdout: "", stderr: "" };
  const spec = JSON.stringify({
    args: ["true"],
    env: ["CEDANA_KILL_SIGNAL=INT", `BIG=${"x".repeat(100_000)}`],
  });

  it.each([
    ["a log file", { stdout: "file:///no/such/log" }],
    ["a log file for its errors alone", { stderr: "file:///no/such/log" }],
    ["a log program", { stdout: "binary:///no/such" }],
  ])("runs no sooner than %s is there for its output, and not at all without it", async (_what, output) => {
    const exec = { execId: "e1", serial: 3, state: "created", pid: 0 };
    record("c1", { state: "running", execs: [{ ...exec, ...stdio, ...output }] });
    keeper.send(type.END);
    keeper.hold(type.IO_OPEN);
    keeper.call(9, "Start", api.StartRequest.encode({ id: "c1", execId: "e1" }));
    const { request, step } = tagOf(await keeper.takes(type.IO_OPEN));
    keeper.send(type.RESULT, { request, step, errno: 2, message: "open /no/such/log: No such file" });
    expect(await keeper.response(9)).toBe(statusCode.INTERNAL);
    await keeper.settled();
    expect(keeper.log.filter((message) => message.type === type.SPAWN)).toEqual([]);
  });

  it("is deleted when the limit of its output has passed once, which begins with its end", async () => {
    record("c1", {
      state: "running",
      execs: [{ execId: "e1", serial: 3, state: "running", pid: 4242, ...stdio }],
    });
    keeper.send(type.END);
    keeper.hold(type.IO_DRAIN);
    keeper.send(type.EXIT, { sequence: 1, pid: 4242, waitStatus: 0, atNs: 1n });
    const { request, step } = tagOf(await keeper.takes(type.IO_DRAIN));
    keeper.call(9, "Delete", api.DeleteRequest.encode({ id: "c1", execId: "e1" }));
    await keeper.settled();
    expect(keeper.log.some((message) => message.type === type.RESPONSE)).toBe(false);
    keeper.send(type.RESULT, { request, step, errno: 110, message: "output is still open" });
    expect(await keeper.response(9)).toBe(statusCode.OK);
    expect(keeper.log.filter((message) => message.type === type.IO_DRAIN)).toHaveLength(1);
  });

  it("makes the record of its task no longer by what it executes", async () => {
    const bundle = record("c1", { state: "running" });
    keeper.send(type.END);
    const value = Buffer.from(spec);
    const payload = api.ExecProcessRequest.encode({ id: "c1", execId: "e1", spec: { typeUrl: "p", value } });
    keeper.call(9, "Exec", payload);
    expect(await keeper.response(9)).toBe(statusCode.OK);
    expect(fs.readFileSync(path.join(bundle, "exec-9.json"), "utf8")).toBe(spec);
    expect(fs.statSync(path.join(bundle, "exec-9.json")).mode & 0o777).toBe(0o600);
    expect(fs.statSync(path.join(bundle, "cedana-task.json")).size).toBeLessThan(2_000);
  });

  it.each(["file", "record"])(
    "is signalled as its process says, which the next cedanad has from a %s",
    async (where) => {
      const exec = { execId: "e1", serial: 3, state: "running", pid: 4242, ...stdio };
      const fromRecord = where === "record" && { spec };
      const bundle = record("c1", { state: "running", execs: [{ ...exec, ...fromRecord }] });
      if (where === "file") fs.writeFileSync(path.join(bundle, "exec-3.json"), spec);
      keeper.send(type.END);
      keeper.call(9, "Kill", api.KillRequest.encode({ id: "c1", execId: "e1", signal: 15 }));
      expect(await keeper.response(9)).toBe(statusCode.OK);
      expect((await keeper.takes(type.SIGNAL)).int("signal")).toBe(2);
      expect(fs.readFileSync(path.join(bundle, "exec-3.json"), "utf8")).toBe(spec);
    },
  );
});

describe("a Create whose keeper ends in the middle of it", () => {
  it("leaves the note by which the launcher deletes the container", async () => {
    const bundle = path.join(directory, "c1");
    fs.mkdirSync(bundle);
    fs.writeFileSync(path.join(bundle, "config.json"), "{}");
    keeper.send(type.END);
    keeper.hold(type.SPAWN);
    await keeper.settled();
    const work = { request: 9, repeated: false, sinceNs: 0n, tag: (step: string) => ({ request: 9, step }) };
    const stdio = { terminal: false, stdin: "", stdout: "", stderr: "" };
    const request = {
      id: "c1",
      bundle,
      rootfs: [],
      stdio,
      checkpoint: "",
      options: undefined,
    };
    const created = Task.create([...shim.pods][0]!, work, request, () => new Uint8Array());
    created.catch(() => {});
    await keeper.takes(type.SPAWN);
    close();
    await expect(created).rejects.toThrow(Unavailable);
    expect(fs.readFileSync(path.join(bundle, "cedana-engine"), "utf8")).toMatch(/^runc\n\/.*\nc1\n$/);
  });
});

describe("the claim on the checkpoint of a container whose restore fails", () => {
  /** The start's promise, and whether the checkpoint is claimed. */
  async function restore(
    onRestoreFailure: "fail" | "fresh" = "fail",
  ): Promise<{ started: Promise<number>; isClaimed: () => boolean; bundle: string }> {
    const checkpoint = path.join(directory, "store", "generation");
    fs.mkdirSync(checkpoint, { recursive: true });
    const claim = { path: checkpoint, by: "c1 bundle" };
    fs.writeFileSync(`${checkpoint}.claim`, JSON.stringify({ by: claim.by, bootId: bootId(), begun: false }));
    const bundle = record("c1", {
      state: "createdFromCheckpoint",
      restoreFrom: checkpoint,
      restoreAsked: "annotation",
      onRestoreFailure,
      claim,
    });
    keeper.send(type.END);
    await keeper.settled();
    const work = { request: 9, repeated: false, sinceNs: 0n, tag: (step: string) => ({ request: 9, step }) };
    const started = [...shim.pods][0]!.tasks.get("c1")!.start(work);
    started.catch(() => {});
    return { started, isClaimed: () => fs.existsSync(`${checkpoint}.claim`), bundle };
  }

  it("is given back", async () => {
    const { started, isClaimed } = await restore();
    await expect(started).rejects.toThrow();
    expect(isClaimed()).toBe(false);
  });

  it("is kept when the keeper has gone: nobody knows whether its engine is at work still", async () => {
    const { started, isClaimed } = await restore();
    close();
    await expect(started).rejects.toThrow();
    expect([...shim.pods]).toEqual([]);
    expect(isClaimed()).toBe(true);
  });

  it.each(["fail", "fresh"] as const)(
    "and its record are left to the task that the keeper gets when it comes back (on failure: %s)",
    async (onFailure) => {
      const { started, bundle } = await restore(onFailure);
      const before = readTaskRecord(bundle);
      close();
      await expect(started).rejects.toThrow();
      expect(readTaskRecord(bundle)).toEqual(before);
    },
  );
});

describe("the checkpoint of a task that is yet to be restored", () => {
  it("may be removed when the keeper has gone", async () => {
    const checkpoint = path.join(directory, "generation");
    fs.mkdirSync(checkpoint);
    record("c1", { state: "createdFromCheckpoint", restoreFrom: checkpoint });
    keeper.send(type.END);
    const removable = async () => {
      using use = await CheckpointUse.remove(checkpoint);
      return use !== undefined;
    };
    keeper.call(9, "State", api.StateRequest.encode({ id: "c1" }));
    expect(await keeper.response(9)).toBe(statusCode.OK); // it has been taken up
    expect(await removable()).toBe(false);
    close();
    await until(removable, { what: () => "the end of the task's lock" });
  });
});

describe("a Create that fails at its first file", () => {
  it("is undone whole", async () => {
    const bundle = path.join(directory, "c1");
    fs.mkdirSync(bundle);
    fs.writeFileSync(path.join(bundle, "config.json"), "{}");
    fs.symlinkSync("nowhere/there", path.join(bundle, "cedana-engine"));
    keeper.send(type.END);
    keeper.call(9, "Create", api.CreateTaskRequest.encode({ id: "c1", bundle }));
    expect(await keeper.response(9)).toBe(statusCode.INTERNAL);
    expect((await keeper.takes(type.TASK_GONE)).string("id")).toBe("c1");
    expect(fs.readdirSync(bundle)).toEqual(["config.json"]);
  });
});

describe("a pod that can't be taken up", () => {
  it("has to come again, and keeps nobody else from being served", async () => {
    const socket = connect(path.join(directory, "socket"));
    const other = new FakeKeeper(socket);
    try {
      await other.settled();
      other.send(type.END);
      record("c1", { state: "running", pid: 4242 });
      await keeper.settled();
      const [pod] = [...shim.pods].filter((one) => one.tasks.size > 0);
      pod!.arrived = () => Promise.reject(new Error("a mistake of ours"));
      keeper.send(type.END);
      await until(() => keeper.closed, { what: () => "the end of the connection" });
      await other.settled();
      expect(other.closed).toBe(false);
      expect([...shim.pods]).toHaveLength(1);
    } finally {
      socket.destroy();
    }
  });
});

describe("a task's record", () => {
  const file = (bundle: string) => path.join(bundle, "cedana-task.json");

  it("that can't be read now is not taken for lost: the keeper has to come again", async () => {
    const bundle = record("c1", { state: "running", pid: 4242 });
    fs.rmSync(file(bundle));
    fs.mkdirSync(file(bundle));
    keeper.send(type.END);
    await until(() => keeper.closed, { what: () => "the end of the connection" });
    expect(keeper.log.some((message) => message.type === type.TASK_GONE)).toBe(false);
  });

  it("that is gone with its bundle, or broken, tells that the task is", async () => {
    fs.rmSync(record("c1", { state: "running", pid: 4242 }), { recursive: true });
    fs.writeFileSync(file(record("c2", { state: "running", pid: 4243 })), "{");
    keeper.send(type.END);
    for (const id of ["c1", "c2"])
      await keeper.takes(type.TASK_GONE, (message) => message.string("id") === id);
  });
});

describe("a task whose Delete is on record when a keeper comes back", () => {
  it("is forgotten when the Delete was answered, whatever else the pod waits for", async () => {
    record("c1", { state: "deleted", pid: 4242, exit, answers: [{ request: 7, payload: "" }] });
    record("c2", { state: "created" });
    keeper.call(5, "Wait", api.WaitRequest.encode({ id: "c2" }), { deliveries: 2 });
    keeper.send(type.END);
    expect((await keeper.takes(type.TASK_GONE)).string("id")).toBe("c1");
    keeper.call(8, "State", api.StateRequest.encode({ id: "c1" }));
    expect(await keeper.response(8)).toBe(statusCode.NOT_FOUND);
  });

  it("answers the Delete again when it was not, and is forgotten then", async () => {
    record("c1", { state: "deleted", pid: 4242, exit, answers: [{ request: 7, payload: "" }] });
    keeper.call(7, "Delete", api.DeleteRequest.encode({ id: "c1" }), { deliveries: 2, taken: 1 });
    keeper.send(type.END);
    expect(await keeper.response(7)).toBe(statusCode.OK);
    await keeper.takes(type.TASK_GONE);
    const order = keeper.log.map((message) => message.type);
    expect(order.indexOf(type.RESPONSE)).toBeLessThan(order.indexOf(type.TASK_GONE));
  });
});
