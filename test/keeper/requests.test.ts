// Requests of containerd: kept until they are answered, told again to the next cedanad, answered alone where that must be.

import { connect } from "node:net";
import { beforeAll, describe, expect, it } from "vitest";
import { task as tasks } from "../../src/proto/index.ts";
import { type Client, encodeFrame, encodeRequest, FrameReader, frameType } from "../../src/ttrpc/index.ts";
import { until } from "../live/harness/until.ts";
import { BUILD_TIMEOUT_MS, buildKeeper, Pod, type } from "./harness.ts";

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

const service = "containerd.task.v2.Task";
const noBytes = new Uint8Array();
const text = (bytes: Uint8Array) => Buffer.from(bytes).toString();
const frame = (streamId: number, method: string, payload: Uint8Array = noBytes) =>
  encodeFrame({ streamId, type: frameType.request, flags: 0 }, encodeRequest({ service, method, payload }));
/** A call whose outcome is looked at later. */
const call = (client: Client, method: string, options: { payload?: Uint8Array; timeoutMs?: number } = {}) => {
  const outcome = client.call(service, method, options.payload ?? noBytes, options).then(text);
  outcome.catch(() => {});
  return outcome;
};

describe.concurrent("a request", () => {
  it("goes to cedanad as it came, with number, connection, deliveries and age, and its response back", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    const outcome = call(client, "State", { payload: Buffer.from("abc") });
    const request = await pod.link.take(type.REQUEST);
    expect([request.int("request"), request.int("connection"), request.int("deliveries")]).toEqual([1, 1, 1]);
    expect(request.int("ageMs")).toBeLessThan(5_000);
    expect(request.bytes("frame")).toEqual(frame(1, "State", Buffer.from("abc")));
    pod.link.respond(request, "answer");
    expect(await outcome).toBe("answer");
  });

  it("is told again to the next cedanad, with its count and age, until it is answered", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    const [first, second] = [call(client, "Start"), call(client, "Kill")];
    const answered = await pod.link.take(type.REQUEST);
    pod.link.respond(answered, "done");
    expect(await first).toBe("done");
    await pod.link.take(type.REQUEST);
    for (const deliveries of [2, 3]) {
      const link = await pod.replaceCedanad();
      const requests = link.log.filter((message) => message.type === type.REQUEST);
      expect(requests.map((request) => [request.int("request"), request.int("deliveries")])).toEqual([
        [2, deliveries],
      ]);
    }
    const again = await pod.link.take(type.REQUEST);
    expect(again.int("ageMs")).toBeGreaterThan(0);
    pod.link.respond(again, "late");
    expect(await second).toBe("late");
    expect((await pod.replaceCedanad()).count(type.REQUEST)).toBe(0);
  });

  it("is blamed only for the cedanads that had begun it", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    void call(client, "Start").catch(() => {}); // cut off at the end
    const first = await pod.link.take(type.REQUEST);
    expect(first.int("taken")).toBe(0);
    let link = await pod.replaceCedanad(); // the first was sent it, and ended
    const seen = (): [number, number] => {
      const told = link.log.find((message) => message.type === type.REQUEST)!;
      return [told.int("deliveries"), told.int("taken")];
    };
    expect(seen()).toEqual([2, 0]);
    for (const _ of [1, 2, 3]) link.send(type.TAKEN, { request: first.int("request") });
    link.send(type.TAKEN, { request: 999 });
    await link.run({ argv: ["true"] }); // it has read them
    link = await pod.replaceCedanad();
    expect(seen()).toEqual([3, 2]); // no more than it has been sent
  });

  it("that only waits isn't blamed for the cedanads that end meanwhile", async () => {
    await using pod = await Pod.start();
    const outcome = call(await pod.client(), "Wait");
    let request = await pod.link.take(type.REQUEST);
    for (let round = 0; round < 3; round++) {
      pod.link.send(type.PARKED, { request: request.int("request") });
      const link = await pod.replaceCedanad();
      request = await link.take(type.REQUEST);
      expect(request.int("deliveries")).toBe(1);
    }
    pod.link.respond(request, "ended");
    expect(await outcome).toBe("ended");
  });

  it("whose own time has passed is not told again", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    const [short, long] = [
      call(client, "State", { timeoutMs: 50 }),
      call(client, "Kill", { timeoutMs: 60_000 }),
    ];
    await expect(short).rejects.toThrow(/no answer within 50 ms/);
    const link = await pod.replaceCedanad();
    expect(link.count(type.REQUEST)).toBe(1);
    link.respond(await link.take(type.REQUEST), "in time");
    expect(await long).toBe("in time");
  });

  it("whose connection has closed is finished all the same, and cedanad is told", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    void call(client, "Create");
    await pod.link.take(type.REQUEST);
    client.close();
    expect((await pod.link.take(type.CONNECTION_CLOSED)).int("connection")).toBe(1);
    const link = await pod.replaceCedanad();
    const request = await link.take(type.REQUEST);
    expect([request.int("deliveries"), request.int("closed")]).toEqual([2, 1]);
    link.respond(request, "nobody hears this");
    expect((await pod.replaceCedanad()).count(type.REQUEST)).toBe(0);
  });

  it("of more than 4 MiB is told by its header alone, and the next one is served", async () => {
    await using pod = await Pod.start();
    const socket = connect(pod.socketPath);
    const header = frame(5, "State").subarray(0, 10);
    header.writeUInt32BE((4 << 20) + 1, 0);
    socket.write(header);
    socket.write(Buffer.alloc((4 << 20) + 1));
    socket.write(frame(7, "State"));
    expect((await pod.link.take(type.REQUEST)).bytes("frame")).toEqual(header);
    expect((await pod.link.take(type.REQUEST)).bytes("frame")).toEqual(frame(7, "State"));
    socket.destroy();
  });
});

describe.concurrent("an operation", () => {
  it("is done once while its request is open; a repetition is answered from memory", async () => {
    await using pod = await Pod.start();
    const outcome = call(await pod.client(), "Create");
    const request = (await pod.link.take(type.REQUEST)).int("request");
    const spawn = { request, step: "create", argv: ["sh", "-c", `echo x >> ${pod.path("count")}; exit 3`] };
    const once = await pod.link.operate(type.SPAWN, spawn);
    expect(once.int("waitStatus")).toBe(3 << 8);
    const twice = await pod.link.operate(type.SPAWN, spawn);
    const link = await pod.replaceCedanad();
    const thrice = await link.operate(type.SPAWN, spawn);
    for (const repeated of [twice, thrice])
      for (const field of ["pid", "waitStatus", "atNs"] as const)
        expect(repeated.bigint(field)).toBe(once.bigint(field));
    expect(await lines(pod.path("count"))).toBe(1);
    link.respond(await link.take(type.REQUEST), "ok");
    expect(await outcome).toBe("ok");
    // Its request is answered: the tag is forgotten.
    await link.operate(type.SPAWN, spawn);
    expect(await lines(pod.path("count"))).toBe(2);
  });

  it("that is under way when cedanad ends isn't begun again: the next one gets the one result", async () => {
    await using pod = await Pod.start();
    void call(await pod.client(), "Create");
    const request = (await pod.link.take(type.REQUEST)).int("request");
    const script = `echo x >> ${pod.path("count")}; while ! [ -e ${pod.path("go")} ]; do sleep 0.01; done`;
    const spawn = { request, step: "create", argv: ["sh", "-c", script] };
    pod.link.send(type.SPAWN, spawn);
    await pod.link.take(type.SPAWNED);
    const link = await pod.replaceCedanad();
    link.send(type.SPAWN, spawn);
    link.send(type.SPAWN, { ...spawn, step: "go", argv: ["touch", pod.path("go")] });
    expect((await link.result(request, "create")).int("waitStatus")).toBe(0);
    expect(await lines(pod.path("count"))).toBe(1);
  });

  it("without a request is never remembered", async () => {
    await using pod = await Pod.start();
    const spawn = { request: 0, step: "own", argv: ["sh", "-c", `echo x >> ${pod.path("count")}`] };
    await pod.link.operate(type.SPAWN, spawn);
    await pod.link.operate(type.SPAWN, spawn);
    expect(await lines(pod.path("count"))).toBe(2);
  });
});

describe.concurrent("while cedanad is away", () => {
  it("Connect and Pids are answered from the pids that are known, others wait", async () => {
    await using pod = await Pod.start();
    pod.link.send(type.TASK, { id: "c1", bundle: pod.bundle, pid: 4711, execPid: [4712, 4713] });
    await pod.link.operate(type.IO_FREE, { io: "nothing" }); // what came before has been read
    await pod.cedanad.die();
    const client = await pod.client();
    for (const name of [service, "containerd.task.v3.Task"]) {
      const connected = await client.call(name, "Connect", tasks.ConnectRequest.encode({ id: "c1" }));
      expect(tasks.ConnectResponse.decode(connected)).toMatchObject({ shimPid: pod.pid, taskPid: 4711 });
      const pids = await client.call(name, "Pids", tasks.PidsRequest.encode({ id: "c1" }));
      expect(tasks.PidsResponse.decode(pids).processes.map(({ pid }) => pid)).toEqual([4711, 4712, 4713]);
      const missing = client.call(name, "Pids", tasks.PidsRequest.encode({ id: "c2" }));
      await expect(missing).rejects.toMatchObject({ code: 5 });
    }
    const state = call(client, "State");
    const link = await pod.returnCedanad();
    expect(link.log.filter((message) => message.type === type.REQUEST).length).toBe(1);
    link.respond(await link.take(type.REQUEST), "state");
    expect(await state).toBe("state");
  });

  it("requests fail after the patience and name the log; waiting ones and those with operations under way go on", async () => {
    await using pod = await Pod.start({ CEDANA_KEEPER_PATIENCE_MS: "200" });
    const client = await pod.client();
    const [wait, create] = [call(client, "Wait"), call(client, "Create")];
    const parked = await pod.link.take(type.REQUEST);
    pod.link.send(type.PARKED, { request: parked.int("request") });
    const busy = (await pod.link.take(type.REQUEST)).int("request");
    await pod.link.operate(type.SPAWN, { request: busy, step: "create", argv: ["true"] });
    await pod.cedanad.die();
    const kill = call(client, "Kill");
    await expect(kill).rejects.toMatchObject({
      code: 14,
      message: expect.stringMatching(
        new RegExp(`could not be reached within \\d+ ms: see ${pod.runDir}/cedanad.log`),
      ),
    });
    // Six times the patience, and no longer: its caller would wait for ever.
    await expect(create).rejects.toMatchObject({ code: 14 });
    const link = await pod.returnCedanad();
    expect(link.log.filter((message) => message.type === type.REQUEST).length).toBe(1);
    link.respond(await link.take(type.REQUEST), "ended");
    expect(await wait).toBe("ended");
  });
});

describe.concurrent("backpressure", () => {
  it("stops a client that floods, and goes on with all of it when there are answers, also for others", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    const flood = Array.from({ length: 8 }, (_, i) => frame(2 * i + 1, "State", Buffer.alloc(1 << 20, i)));
    const others = await Promise.all([0, 1, 2, 3].map(async () => connect(pod.socketPath)));
    const answers = others.map(() => 0);
    for (const [at, socket] of others.entries()) {
      const reader = new FrameReader();
      socket.on("data", (chunk: Buffer) => {
        for (const _ of reader.push(chunk)) answers[at]!++;
      });
      socket.write(
        Buffer.concat([...flood, ...Array.from({ length: 40 }, (_, i) => frame(101 + 2 * i, "Kill"))]),
      );
    }
    // 8 MiB for each connection, 32 MiB for all: then nothing more is taken, not even what came in one piece with the last
    // (the forty small ones), and the keeper still answers cedanad.
    await until(() => pod.link.count(type.REQUEST) >= 30, { what: () => "the first requests" });
    expect(await pod.link.run({ argv: ["true"] })).toBe(0);
    const before = pod.link.count(type.REQUEST);
    expect(before).toBeLessThan(4 * 9);
    let answered = 0;
    await until(
      () => {
        const requests = pod.link.log.filter((message) => message.type === type.REQUEST);
        for (; answered < requests.length; answered++) pod.link.respond(requests[answered]!, "ok");
        return answers.every((count) => count === 48);
      },
      { timeoutMs: 20_000, everyMs: 5, what: () => `all answers: ${answers}` },
    );
    const last = call(client, "State");
    pod.link.respond(await pod.link.take(type.REQUEST, (m) => m.int("connection") === 1), "fine");
    expect(await last).toBe("fine");
    for (const socket of others) socket.destroy();
  });

  it("neither reads a client that doesn't take its responses, nor loses one when it does", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    const deaf = connect(pod.socketPath);
    deaf.pause();
    const total = 40;
    for (let i = 0; i < total; i++) deaf.write(frame(2 * i + 1, "Stats"));
    const answer = Buffer.alloc(200_000, "x");
    let answered = 0;
    const respond = () => {
      const requests = pod.link.log.filter(
        (message) => message.type === type.REQUEST && message.int("connection") === 2,
      );
      for (; answered < requests.length; answered++) pod.link.respond(requests[answered]!, answer);
      return true;
    };
    await until(() => respond() && answered === total, { what: () => "the requests" });
    for (let i = 0; i < total; i++) deaf.write(frame(1001 + 2 * i, "Stats")); // not read any more
    const other = call(client, "State");
    pod.link.respond(
      await pod.link.take(type.REQUEST, (message) => message.int("connection") === 1),
      "quick",
    );
    expect(await other).toBe("quick");
    expect(answered).toBe(total);
    const reader = new FrameReader();
    let read = 0;
    deaf.on("data", (chunk: Buffer) => {
      for (const _ of reader.push(chunk)) read++;
    });
    deaf.resume();
    await until(() => respond() && read === 2 * total, { everyMs: 5, what: () => `the responses: ${read}` });
    deaf.destroy();
  });

  it("cuts off a client that never takes its responses", async () => {
    await using pod = await Pod.start();
    const deaf = connect(pod.socketPath);
    deaf.pause();
    deaf.on("error", () => {});
    for (let i = 0; i < 10; i++) deaf.write(frame(2 * i + 1, "Stats"));
    await until(() => pod.link.count(type.REQUEST) === 10, { what: () => "the requests" });
    const answer = Buffer.alloc(3 << 20);
    for (const request of pod.link.log.filter((message) => message.type === type.REQUEST))
      pod.link.respond(request, answer);
    expect((await pod.link.take(type.CONNECTION_CLOSED)).int("connection")).toBe(1);
    deaf.destroy();
  });

  it("keeps requests in order for a cedanad that doesn't read for a while", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    pod.link.socket.pause();
    const calls = Array.from({ length: 60 }, (_, i) =>
      call(client, "State", { payload: Buffer.alloc(100_000, i) }),
    );
    await new Promise((resolve) => setTimeout(resolve, 100));
    pod.link.socket.resume();
    for (let i = 0; i < calls.length; i++) {
      const request = await pod.link.take(type.REQUEST);
      expect(request.int("request")).toBe(i + 1);
      pod.link.respond(request, `${i}`);
    }
    expect(await Promise.all(calls)).toEqual(calls.map((_, i) => `${i}`));
  });

  it("finds its way among thousands of waiting requests", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    const calls = Array.from({ length: 3_000 }, () => call(client, "Wait"));
    await until(() => pod.link.count(type.REQUEST) === 3_000, { what: () => "the requests" });
    for (const request of pod.link.log.filter((message) => message.type === type.REQUEST).reverse())
      pod.link.respond(request, `${request.int("request")}`);
    expect(await Promise.all(calls)).toEqual(calls.map((_, i) => `${i + 1}`));
  });
});

async function lines(file: string): Promise<number> {
  const { readFile } = await import("node:fs/promises");
  return (await readFile(file, "utf8")).split("\n").length - 1;
}
