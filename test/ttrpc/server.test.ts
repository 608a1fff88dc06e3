import { once } from "node:events";
import fs from "node:fs";
import { connect, createServer, type Socket } from "node:net";
import os from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  Cancelled,
  RemoteFailed,
  ResourceExhausted,
  statusCode,
  TimedOut,
  Unavailable,
  WrongState,
} from "../../src/errors/index.ts";
import {
  type Call,
  Client,
  Dispatcher,
  decodeResponse,
  encodeFrame,
  encodeRequest,
  encodeResponse,
  FrameReader,
  MAX_MESSAGE_BYTES,
  Server,
} from "../../src/ttrpc/index.ts";
import { Random } from "./random.ts";

const service = "test.Service";
const noBytes = new Uint8Array(0);
const text = (bytes: Uint8Array) => Buffer.from(bytes).toString();

let directory: string;
let socketPath: string;
let server: Server<string>;
let client: Client;
let hanging: Call<string>[];
let errors: Error[];
let largeCalls: number;
const sockets: Socket[] = [];

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "ttrpc-"));
  socketPath = path.join(directory, "s");
  hanging = [];
  errors = [];
  largeCalls = 0;
  let connections = 0;
  const dispatcher = new Dispatcher<string>().register(service, {
    Echo: (payload) => payload,
    Who: (_payload, call) => Buffer.from(call.context),
    Metadata: (_payload, call) => Buffer.from(JSON.stringify([...call.metadata])),
    Wait: async (payload) => {
      await sleep(Number(text(payload)));
      return payload;
    },
    Hang: (_payload, call) => {
      hanging.push(call);
      return new Promise<Uint8Array>((_resolve, reject) =>
        call.signal.addEventListener("abort", () => reject(new Error("aborted"))),
      );
    },
    Large: (payload) => {
      largeCalls++;
      return new Uint8Array(Number(text(payload)));
    },
    Fail: () => {
      throw new WrongState("task a is only created");
    },
  });
  server = new Server({
    dispatcher,
    context: () => `connection ${++connections}`,
    onConnectionError: (error) => errors.push(error),
  });
  await server.listen({ path: socketPath });
  client = await Client.connect(socketPath);
});

afterEach(async () => {
  client.close();
  for (const socket of sockets.splice(0)) socket.destroy();
  await server.close();
  fs.rmSync(directory, { recursive: true });
});

async function raw(): Promise<Socket> {
  const socket = connect({ path: socketPath });
  sockets.push(socket);
  socket.on("error", () => {});
  await once(socket, "connect");
  return socket;
}

const until = async (condition: () => boolean) => {
  while (!condition()) await sleep(1);
};

const request = (method: string, payload: Uint8Array, streamId = 1) =>
  encodeFrame({ streamId, type: 1, flags: 0 }, encodeRequest({ service, method, payload }));

describe("client and server", () => {
  it("make a call over a unix socket that only its owner can open", async () => {
    expect(text(await client.call(service, "Echo", Buffer.from("hi")))).toBe("hi");
    expect(fs.statSync(socketPath).mode & 0o777).toBe(0o600);
  });

  it("carry metadata", async () => {
    const metadata = new Map([["k", ["v", "w"]]]);
    expect(text(await client.call(service, "Metadata", noBytes, { metadata }))).toBe('[["k",["v","w"]]]');
  });

  it("carry messages up to 4 MiB both ways", async () => {
    const payload = new Random(3).bytes(1000);
    const big = Buffer.concat(Array.from({ length: 4000 }, () => payload));
    expect(Buffer.compare(await client.call(service, "Echo", big), big)).toBe(0);
    await expect(client.call(service, "Echo", new Uint8Array(MAX_MESSAGE_BYTES))).rejects.toThrow(
      ResourceExhausted,
    );
    await expect(client.call(service, "Large", Buffer.from("5000000"))).rejects.toMatchObject({
      code: statusCode.RESOURCE_EXHAUSTED,
    });
    expect(text(await client.call(service, "Echo", Buffer.from("still here")))).toBe("still here");
  });

  it("pass on the status and the message of a failure", async () => {
    const failure = client.call(service, "Fail", noBytes);
    await expect(failure).rejects.toThrow(RemoteFailed);
    await expect(failure).rejects.toMatchObject({
      code: statusCode.FAILED_PRECONDITION,
      message: "task a is only created",
    });
  });

  it("run calls side by side: answers come as they are ready", async () => {
    const order: string[] = [];
    const wait = async (ms: string) => order.push(text(await client.call(service, "Wait", Buffer.from(ms))));
    await Promise.all([wait("60"), wait("30"), wait("1")]);
    expect(order).toEqual(["1", "30", "60"]);
  });

  it("keep a thousand calls apart", async () => {
    const answers = await Promise.all(
      Array.from({ length: 1000 }, async (_, i) =>
        text(await client.call(service, "Echo", Buffer.from(`${i}`))),
      ),
    );
    expect(answers).toEqual(Array.from({ length: 1000 }, (_, i) => `${i}`));
  });

  it("give each connection its context", async () => {
    const other = await Client.connect(socketPath);
    expect(text(await client.call(service, "Who", noBytes))).toBe("connection 1");
    expect(text(await other.call(service, "Who", noBytes))).toBe("connection 2");
    other.close();
  });
});

describe("Client", () => {
  it("gives up when the time is over, and so does the server", async () => {
    await expect(client.call(service, "Hang", noBytes, { timeoutMs: 30 })).rejects.toThrow(TimedOut);
    await until(() => hanging[0]!.signal.aborted);
    expect(text(await client.call(service, "Echo", Buffer.from("on")))).toBe("on"); // the late answer harms nobody
  });

  it("gives up when its caller does", async () => {
    const abort = new AbortController();
    const call = client.call(service, "Hang", noBytes, { signal: abort.signal });
    abort.abort(new Error("enough"));
    await expect(call).rejects.toThrow(Cancelled);
    await expect(client.call(service, "Echo", noBytes, { signal: abort.signal })).rejects.toThrow(Cancelled);
  });

  it("fails what is under way when the connection closes, and calls after it", async () => {
    const failed = expect(client.call(service, "Hang", noBytes)).rejects.toThrow(Unavailable);
    await until(() => hanging.length === 1);
    await server.close();
    await failed;
    expect(client.isOpen).toBe(false);
    await expect(client.call(service, "Echo", noBytes)).rejects.toThrow(Unavailable);
  });

  it("fails what is under way when it is closed", async () => {
    const call = client.call(service, "Hang", noBytes);
    client.close();
    await expect(call).rejects.toMatchObject({
      name: "Unavailable",
      cause: { message: "the client was closed" },
    });
  });

  it("says which socket it could not reach", async () => {
    const missing = path.join(directory, "missing");
    await expect(Client.connect(missing)).rejects.toMatchObject({
      name: "Unavailable",
      message: `connect to ${missing}`,
    });
  });

  it("survives a server that answers nonsense", async () => {
    const answers = [
      encodeFrame({ streamId: 99, type: 2, flags: 0 }, encodeResponse({})), // nobody's
      encodeFrame({ streamId: 1, type: 2, flags: 0 }, Buffer.from("0a05616263", "hex")),
      encodeFrame({ streamId: 3, type: 3, flags: 0 }, Buffer.from("stream")),
      Buffer.from("ffffffff0000000502000000", "hex"),
    ];
    const other = path.join(directory, "other");
    const liar = createServer((socket) =>
      socket.once("data", () => socket.write(Buffer.concat(answers))),
    ).listen(other);
    await once(liar, "listening");
    const victim = await Client.connect(other);
    const results = await Promise.allSettled([1, 2, 3].map(() => victim.call(service, "Echo", noBytes)));
    expect(results.map((result) => (result as PromiseRejectedResult).reason.name)).toEqual([
      "CedanaError",
      "Unsupported",
      "ResourceExhausted",
    ]);
    victim.close();
    liar.close();
  });
});

describe("Server", () => {
  it("is not harmed by a client that sends random bytes", async () => {
    const random = new Random(11);
    for (let round = 0; round < 30; round++) {
      const socket = await raw();
      socket.resume();
      for (let part = 0; part < 5; part++) socket.write(random.bytes(random.int(2000)));
      socket.end();
    }
    expect(text(await client.call(service, "Echo", Buffer.from("fine")))).toBe("fine");
  });

  it("answers a frame that is too long on its stream and serves the next one", async () => {
    const socket = await raw();
    const size = MAX_MESSAGE_BYTES + 1;
    const header = request("Echo", noBytes, 5).subarray(0, 10);
    header.writeUInt32BE(size, 0);
    socket.write(header);
    socket.write(Buffer.alloc(size));
    socket.write(request("Echo", Buffer.from("next"), 7));
    const reader = new FrameReader();
    const frames: { streamId: number; code: number; payload: string }[] = [];
    socket.on("data", (chunk: Buffer) => {
      for (const frame of reader.push(chunk)) {
        const { status, payload } = decodeResponse(frame.payload!);
        frames.push({ streamId: frame.streamId, code: status.code, payload: text(payload) });
      }
    });
    await until(() => frames.length === 2);
    expect(frames).toEqual([
      { streamId: 5, code: statusCode.RESOURCE_EXHAUSTED, payload: "" },
      { streamId: 7, code: 0, payload: "next" },
    ]);
  });

  it("serves others while one client sends half a frame and another doesn't read", async () => {
    const half = await raw();
    half.write(request("Echo", Buffer.from("abc")).subarray(0, 12));
    const deaf = await raw();
    deaf.pause();
    for (let i = 0; i < 100; i++) deaf.write(request("Large", Buffer.from("1000000"), 2 * i + 1));
    const started = Date.now();
    for (let i = 0; i < 50; i++) await client.call(service, "Echo", noBytes);
    expect(Date.now() - started).toBeLessThan(5_000);
  });

  it("stops reading from a client that doesn't take its answers, and goes on when it does", async () => {
    const slow = await raw();
    slow.pause();
    for (let i = 0; i < 20; i++) {
      slow.write(request("Large", Buffer.from("1000000"), 2 * i + 1));
      await sleep(1);
    }
    const reader = new FrameReader();
    let answered = 0;
    slow.on("data", (chunk: Buffer) => {
      for (const _frame of reader.push(chunk)) answered++;
    });
    expect(largeCalls).toBeLessThan(20);
    slow.resume();
    await until(() => answered === 20);
    expect(errors).toEqual([]);
  });

  it("drops a client that asks for ever and reads nothing", async () => {
    const deaf = await raw();
    deaf.pause();
    const requests = Array.from({ length: 200 }, (_, i) =>
      request("Large", Buffer.from("4000000"), 2 * i + 1),
    );
    deaf.write(Buffer.concat(requests));
    await until(() => errors.length > 0);
    expect(errors[0]!.message).toBe("the client does not read its answers");
  });

  it("aborts the calls of a client that goes", async () => {
    const call = client.call(service, "Hang", noBytes).catch(() => {});
    await until(() => hanging.length === 1);
    client.close();
    await call;
    await until(() => hanging[0]!.signal.aborted && server.connectionCount === 0);
  });

  it("reports an end inside a frame", async () => {
    const socket = await raw();
    socket.end(request("Echo", noBytes).subarray(0, 11));
    await until(() => errors.length > 0);
    expect(errors[0]!.message).toBe("the connection ended inside a frame");
  });

  it("lets calls finish when it closes with grace, and removes its socket", async () => {
    const call = client.call(service, "Wait", Buffer.from("50"));
    await sleep(10);
    await server.close({ graceMs: 5_000 });
    expect(text(await call)).toBe("50");
    expect(fs.existsSync(socketPath)).toBe(false);
  });

  it("cuts off what outlasts the grace", async () => {
    const failed = expect(client.call(service, "Hang", noBytes)).rejects.toThrow(Unavailable);
    await until(() => hanging.length === 1);
    const started = Date.now();
    await server.close({ graceMs: 50 });
    await failed;
    expect(Date.now() - started).toBeLessThan(2_000);
  });

  it("says so when it can't listen", async () => {
    const second = new Server({ dispatcher: new Dispatcher(), context: () => undefined });
    await expect(second.listen({ path: socketPath })).rejects.toMatchObject({ code: "EADDRINUSE" });
  });

  it("refuses a connection that its owner refuses", async () => {
    const strict = new Server({
      dispatcher: new Dispatcher(),
      context: () => {
        throw new Error("not root");
      },
      onConnectionError: (error) => errors.push(error),
    });
    const other = path.join(directory, "strict");
    await strict.listen({ path: other });
    const victim = await Client.connect(other);
    await expect(victim.call(service, "Echo", noBytes)).rejects.toThrow(Unavailable);
    expect(errors[0]!.message).toBe("not root");
    await strict.close();
  });
});
