// The management API as other programs see it: gRPC by the .proto file, for root alone, and no way to disturb the shims.

import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import {
  chmodSync,
  copyFileSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { connect, type Socket } from "node:net";
import { join } from "node:path";
import { promisify } from "node:util";
import * as grpc from "@grpc/grpc-js";
import protobuf from "protobufjs";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { fromDetailedStatus, STATUS_DETAILS_KEY } from "../../src/daemon/api/status.ts";
import { isControl, Live } from "./harness/live.ts";
import { skipUnless } from "./harness/matrix.ts";
import { repository } from "./harness/programs.ts";
import { entries } from "./harness/system.ts";
import { until } from "./harness/until.ts";

const run = promisify(execFile);
const NOBODY = 65_534;
/** cedanad's budget, proportional set size; and what gRPC may add to it once it is asked. */
const MAX_PSS_BYTES = 70e6;
const MAX_PSS_OF_API_BYTES = 15e6;

type AnyClient = grpc.Client & Record<string, (...args: unknown[]) => unknown>;

describe.skipIf(isControl)("the management API", () => {
  let live: Live;
  let client: AnyClient;

  beforeAll(async () => {
    live = await Live.start({ containerd: "1.7", engine: "runc" });
    await using task = await live.run(["sleeper"]); // starts cedanad
    await task.kill(9);
    await task.wait();
    client = new (grpc.makeClientConstructor(definition(), "Management"))(
      `unix:${socketPath()}`,
      grpc.credentials.createInsecure(),
    ) as unknown as AnyClient;
  });
  afterAll(async () => {
    client?.close();
    try {
      // Once: the threads that hash keep their descriptors for some seconds.
      await live?.expectNoLeftovers();
    } finally {
      await live?.stop();
    }
  });

  /** By the .proto file and a library of somebody else's, as another program would. */
  function definition(): grpc.ServiceDefinition {
    const root = protobuf.loadSync(join(repository, "proto/cedana_api.proto"));
    const service = root.lookupService("cedana.api.v1.Management");
    const methods = service.methodsArray.map((method) => {
      const [request, response] = [method.requestType, method.responseType].map((name) =>
        root.lookupType(`cedana.api.v1.${name}`),
      );
      const definition: grpc.MethodDefinition<object, object> = {
        path: `/cedana.api.v1.Management/${method.name}`,
        requestStream: false,
        responseStream: method.responseStream === true,
        requestSerialize: (message) => Buffer.from(request!.encode(request!.fromObject(message)).finish()),
        requestDeserialize: (bytes) => request!.decode(bytes),
        responseSerialize: (message) => Buffer.from(response!.encode(message).finish()),
        responseDeserialize: (bytes) =>
          response!.toObject(response!.decode(bytes), { longs: Number, defaults: true }),
      };
      return [method.name, definition];
    });
    return Object.fromEntries(methods);
  }

  function socketPath(): string {
    return join(live.runDir, entries(live.runDir).find((name) => /^api.*\.sock$/.test(name))!);
  }

  const cedanadPid = () => live.cedanad()!.pid;

  function call(name: string, request: object): Promise<Record<string, unknown>> {
    return new Promise((resolve, reject) => {
      client[name]!(request, (error: Error | null, answer: Record<string, unknown>) =>
        error ? reject(error) : resolve(answer),
      );
    });
  }

  function events(name: string, request: object): grpc.ClientReadableStream<Record<string, unknown>> {
    return client[name]!(request) as grpc.ClientReadableStream<Record<string, unknown>>;
  }

  it("is root's alone: the directory, the socket", () => {
    expect(statSync(live.runDir).mode & 0o777).toBe(0o700);
    expect(statSync(socketPath()).mode & 0o777).toBe(0o600);
  });

  it("hangs up on another user who gets at the socket all the same", async (context) => {
    const opened: [string, number][] = [live.runDir, socketPath()].map((path) => [
      path,
      statSync(path).mode & 0o777,
    ]);
    const dirMode = statSync(live.dir).mode & 0o777;
    try {
      chmodSync(live.dir, 0o755);
      chmodSync(live.runDir, 0o755);
      chmodSync(socketPath(), 0o666);
      const program = `
        const socket = require("node:net").connect(${JSON.stringify(socketPath())}, () => {
          console.log("connected as", process.getuid());
          socket.write("PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n");
        });
        let bytes = 0;
        socket.on("data", (chunk) => (bytes += chunk.length)).on("error", () => {}).on("close", () => console.log("closed after", bytes));
      `;
      const node = join(live.dir, "node"); // the repository need not be readable for others
      copyFileSync(process.execPath, node);
      chmodSync(node, 0o755);
      const asNobody = run(node, ["-e", program], {
        uid: NOBODY,
        gid: NOBODY,
        cwd: "/",
        timeout: 20_000,
      }).catch((error: NodeJS.ErrnoException) => error);
      const result = await asNobody;
      skipUnless(
        context,
        !(result instanceof Error),
        `this machine starts no program of another user: ${(result as Error).message}`,
      );
      expect((result as { stdout: string }).stdout).toBe(`connected as ${NOBODY}\nclosed after 0\n`);
      await until(() => live.cedanadLog().includes("a connection from another user is refused"), {
        what: () => "the refusal in cedanad's log",
      });
    } finally {
      rmSync(join(live.dir, "node"), { force: true });
      chmodSync(live.dir, dirMode);
      for (const [path, mode] of opened) chmodSync(path, mode);
    }
    expect(await call("Status", {})).toMatchObject({ pid: cedanadPid() });
  });

  it("tells what cedanad knows", async () => {
    await using task = await live.run(["sleeper"]);
    const { pods } = (await call("Status", {})) as { pods: { namespace: string; tasks: { id: string }[] }[] };
    expect(pods.flatMap((pod) => pod.tasks.map((one) => [pod.namespace, one.id]))).toContainEqual([
      live.namespace,
      task.id,
    ]);
  });

  it("sends signals as the container wants them", async () => {
    const annotations = { "cedana.io/kill-signal": "HUP" };
    const trapping = "trap 'exit 3' HUP; trap 'echo int' INT; echo up; while :; do sleep 0.02; done";
    await using task = await live.run(["sh", "-c", trapping], { annotations });
    expect(await task.stdout.line()).toBe("up");
    await expect(live.cedana("kill", "containerd", task.id, "BLAH")).rejects.toThrow(/"BLAH" is no signal/);
    const nobody = call("KillContainer", { id: task.id, execId: "nobody" });
    await expect(nobody).rejects.toMatchObject({ code: grpc.status.NOT_FOUND });
    await call("KillContainer", { id: task.id, signal: "2" });
    expect(await task.stdout.line()).toBe("int");
    const exec = await task.exec(["sh", "-c", trapping], { env: ["CEDANA_KILL_SIGNAL=INT"] });
    expect(await exec.stdout.line()).toBe("up");
    await call("KillContainer", { id: task.id, execId: exec.execId });
    expect(await exec.stdout.line()).toBe("int");
    await exec.kill(9);
    await exec.wait();
    await exec.delete();
    expect(await live.cedana("kill", "containerd", task.id)).toBe(`${task.id} has been sent TERM\n`);
    expect(await task.wait()).toBe(3);
    await expect(call("KillContainer", { id: task.id })).rejects.toMatchObject({
      code: grpc.status.NOT_FOUND,
    });
  });

  it("freezes and continues a container, which containerd sees, and shows its processes", async () => {
    await using task = await live.run(["counter"]);
    await task.nextNumber();
    expect(await live.cedana("freeze", "containerd", task.id)).toBe(`${task.id} is paused\n`);
    expect(await task.status()).toBe("PAUSED");
    await live.events.waitFor(task.id, "paused");
    const again = call("FreezeContainer", { id: task.id });
    await expect(again).rejects.toMatchObject({ code: grpc.status.FAILED_PRECONDITION });
    expect(await live.cedana("query", "containerd", task.id, "--tree")).toMatch(
      new RegExp(`^${live.namespace}/${task.id}  paused .*\n  ${task.pid} \\(1\\)  [A-Z]  counter`),
    );
    expect(await call("UnfreezeContainer", { id: task.id })).toMatchObject({ state: "running" });
    expect(await task.status()).toBe("RUNNING");
    const before = await task.nextNumber();
    expect(await task.nextNumber()).toBe(before + 1);
    await expect(call("UnfreezeContainer", { id: task.id })).rejects.toThrow(/is not frozen/);
    expect(await call("QueryContainers", { ids: [task.id, "nobody"] })).toMatchObject({
      containers: [{ id: task.id, state: "running", checkpoints: [] }],
      missing: ["nobody"],
    });
  });

  it("fails with the status of the error's class, and its details", async () => {
    const missing = { checkpoint: { namespace: "x", name: "nothing" } };
    const error = (await call("InspectCheckpoint", missing).catch((one) => one)) as grpc.ServiceError;
    expect(error.code).toBe(grpc.status.NOT_FOUND);
    const [details] = error.metadata.get(STATUS_DETAILS_KEY);
    expect(fromDetailedStatus(error.code, error.details, details as Buffer)).toMatchObject({
      name: "NotFound",
      message: expect.stringMatching(/checkpoint nothing of namespace x.* does not exist/),
    });
    for (const checkpoint of [{}, { path: "relative" }, { name: "../x", namespace: "x" }, { name: "x" }])
      await expect(call("InspectCheckpoint", { checkpoint })).rejects.toMatchObject({
        code: grpc.status.INVALID_ARGUMENT,
      });
    const failed = events("VerifyCheckpoint", { checkpoint: { path: "/nonexistent" } });
    const failure = await new Promise<grpc.ServiceError>((resolve) => failed.on("error", resolve).resume());
    expect(failure.code).toBe(grpc.status.NOT_FOUND);
  });

  it("lists, inspects and verifies a checkpoint, and finds a flipped bit", async () => {
    const store = new CheckpointStore(join(live.dir, "var/checkpoints"));
    await using task = await live.run(["counter"]);
    await task.nextNumber();
    await live.cedana("dump", "containerd", task.id, "--name", "seen");
    const listed = await live.cedana("checkpoint", "list", "--namespace", live.namespace);
    expect(listed).toMatch(new RegExp(`^${live.namespace} +seen@\\d{8}T\\d{9}Z +${task.id} +runc `, "m"));
    const inspected = JSON.parse(
      await live.cedana("checkpoint", "inspect", "seen", "--namespace", live.namespace, "--json"),
    );
    expect(inspected.processes).toMatchObject([{ pid: 1, parentPid: 0, threads: 1, command: "counter" }]);
    expect(inspected.memoryBytes).toBeGreaterThan(0);
    expect(inspected.manifest).toMatchObject({ containerId: task.id, name: "seen" });

    const verify = async () =>
      await new Promise<{ ok: boolean; findings: { fault: string; file: string }[] }>((resolve, reject) => {
        const stream = events("VerifyCheckpoint", {
          checkpoint: { namespace: live.namespace, name: "seen" },
        });
        stream.on("data", ({ result }) => result && resolve(result as never)).on("error", reject);
      });
    expect(await verify()).toMatchObject({ ok: true });
    const { path } = await store.find({ namespace: live.namespace }, "seen");
    const pages = join(path, "checkpoint/pages-1.img");
    const bytes = readFileSync(pages);
    bytes[100]! ^= 1;
    writeFileSync(pages, bytes);
    const { ok, findings } = await verify();
    expect(ok).toBe(false);
    expect(findings).toContainEqual(
      expect.objectContaining({ severity: "error", fault: "digest", file: "checkpoint/pages-1.img" }),
    );
    await expect(live.cedana("checkpoint", "verify", path)).rejects.toMatchObject({
      code: 2,
      stdout: expect.stringMatching(/pages-1\.img.* has the digest/),
    });
  });

  it("gives up what a client has cancelled", async () => {
    const store = new CheckpointStore(join(live.dir, "var/checkpoints"));
    await using task = await live.run(["counter"]);
    await task.nextNumber();
    await live.cedana("dump", "containerd", task.id, "--name", "big");
    const { path } = await store.find({ namespace: live.namespace }, "big");
    // Hashing it takes longer than anybody waits; it needs no space.
    const size = 256 * 2 ** 30;
    writeFileSync(join(path, "big.bin"), "");
    truncateSync(join(path, "big.bin"), size);
    const manifest = JSON.parse(readFileSync(join(path, "cedana.json"), "utf8"));
    manifest.files.push({ path: "big.bin", size, digest: `sha256:${"0".repeat(64)}` });
    writeFileSync(join(path, "cedana.json"), JSON.stringify(manifest));
    const stream = events("VerifyCheckpoint", { checkpoint: { path } });
    const failure = new Promise<grpc.ServiceError>((resolve) => stream.on("error", resolve));
    await new Promise<void>((resolve) => stream.once("data", () => resolve()));
    stream.cancel();
    expect((await failure).code).toBe(grpc.status.CANCELLED);
    await until(() => /"type":"Cancelled".*"method":"VerifyCheckpoint"/.test(live.cedanadLog()), {
      what: () => "the end of the call in cedanad's log",
    });
    rmSync(path, { recursive: true });
  });

  it("lets nobody who talks nonsense disturb a shim, whatever it is", async () => {
    await using task = await live.run(["counter"]);
    const before = cedanadPid();
    const preface = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    const frame = (
      length: number,
      type: number,
      flags: number,
      stream: number,
      payload = Buffer.alloc(0),
    ) => {
      const head = Buffer.alloc(9);
      head.writeUIntBE(length, 0, 3);
      head.writeUInt8(type, 3);
      head.writeUInt8(flags, 4);
      head.writeUInt32BE(stream, 5);
      return Buffer.concat([head, payload]);
    };
    const settings = frame(0, 4, 0, 0);
    const nonsense: Buffer[] = [
      Buffer.alloc(0), // says nothing, and stays
      randomBytes(64 * 1024),
      preface.subarray(0, 10),
      Buffer.concat([preface, randomBytes(64 * 1024)]),
      Buffer.concat([preface, settings, frame(0xffffff, 0, 0, 1)]), // a frame that is longer than allowed, and doesn't come
      Buffer.concat([preface, settings, frame(4, 1, 4, 1, randomBytes(4))]), // headers that can't be unpacked
      Buffer.concat([
        preface,
        settings,
        ...Array.from({ length: 2000 }, () => frame(8, 6, 0, 0, Buffer.alloc(8))),
      ]), // pings
      Buffer.concat([
        preface,
        settings,
        ...Array.from({ length: 2000 }, (_, at) => frame(4, 3, 0, 2 * at + 1, Buffer.alloc(4))),
      ]),
    ];
    const sockets: Socket[] = [];
    try {
      for (let round = 0; round < 12; round++)
        for (const bytes of nonsense) {
          const socket = connect(socketPath());
          socket.on("error", () => {}).resume(); // hung up on, as it should be
          socket.write(bytes);
          sockets.push(socket);
        }
      // containerd's calls go through the same process meanwhile.
      for (let at = 0; at < 20; at++) {
        expect(await task.status()).toBe("RUNNING");
        await task.nextNumber();
      }
    } finally {
      for (const socket of sockets) socket.destroy();
    }
    expect(cedanadPid()).toBe(before);
    expect(await call("Status", {})).toMatchObject({ pid: before });
  });

  it("keeps cedanad within its budget of memory, asked or not", async () => {
    await using fresh = await Live.start({ containerd: "1.7", engine: "runc" });
    await using task = await fresh.run(["sleeper"]);
    const { pid } = fresh.cedanad()!;
    const pss = () =>
      Number(/^Pss:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/smaps_rollup`, "utf8"))![1]) * 1024;
    // `cedana status` asks by the keepers' socket: who watches a node doesn't make cedanad bigger.
    await fresh.cedana("status");
    expect(pss()).toBeLessThan(MAX_PSS_BYTES);
    await fresh.cedana("checkpoint", "list");
    expect(pss()).toBeLessThan(MAX_PSS_BYTES + MAX_PSS_OF_API_BYTES);
    await task.kill(9);
    await task.wait();
  });
});
