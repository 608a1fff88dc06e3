import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { NotFound, statusCode } from "../../src/errors/index.ts";
import {
  type Call,
  Dispatcher,
  decodeFrame,
  decodeResponse,
  encodeFrame,
  encodeRequest,
  frameFlag,
  frameType,
  MAX_MESSAGE_BYTES,
} from "../../src/ttrpc/index.ts";
import { Random } from "./random.ts";

const noBytes = new Uint8Array(0);
const never = new Promise<Uint8Array>(() => {});

interface Options {
  streamId?: number;
  type?: number;
  flags?: number;
  payload?: Uint8Array;
  timeoutMs?: number;
  service?: string;
}

function request(
  method: string,
  { streamId = 1, type = 1, flags = 0, payload = noBytes, ...rest }: Options = {},
): Buffer {
  return encodeFrame(
    { streamId, type, flags },
    encodeRequest({ service: "test.Service", method, payload, ...rest }),
  );
}

const calls: Call<string>[] = [];
const dispatcher = new Dispatcher<string>().register("test.Service", {
  Echo: (payload, call) => {
    calls.push(call);
    return payload;
  },
  Later: async (payload) => {
    await sleep(1);
    return payload;
  },
  Hang: (_payload, call) => {
    calls.push(call);
    return never;
  },
  Fail: () => {
    throw new NotFound("task a is unknown", { cause: new Error("no such directory") });
  },
  Crash: async () => {
    throw new TypeError("undefined is not an object");
  },
  Large: (payload) => new Uint8Array(Number(Buffer.from(payload).toString())),
});

async function answer(bytes: Uint8Array, signal?: AbortSignal, ageMs?: number) {
  const frame = decodeFrame((await dispatcher.dispatch(bytes, "context", signal, ageMs))!);
  return { ...frame, ...decodeResponse(frame.payload!) };
}

const answerStatus = async (bytes: Uint8Array) => (await answer(bytes)).status.code;

describe("Dispatcher", () => {
  it("answers on the stream of the request", async () => {
    const got = await answer(request("Echo", { streamId: 0xffff_ffff, payload: Buffer.from("hi") }));
    expect(got).toMatchObject({ streamId: 0xffff_ffff, type: 2, flags: 0, status: { code: 0, message: "" } });
    expect(Buffer.from(got.payload!).toString()).toBe("hi");
    expect(
      Buffer.from((await answer(request("Later", { payload: Buffer.from("yo") }))).payload!).toString(),
    ).toBe("yo");
  });

  it("tells the handler of the call", async () => {
    calls.length = 0;
    const metadata = new Map([["containerd-namespace-ttrpc", ["moby"]]]);
    const message = encodeRequest({
      service: "test.Service",
      method: "Echo",
      payload: noBytes,
      timeoutMs: 5000,
      metadata,
    });
    await dispatcher.dispatch(encodeFrame({ streamId: 1, type: 1, flags: 0 }, message), "from here");
    expect(calls[0]).toMatchObject({
      service: "test.Service",
      method: "Echo",
      context: "from here",
      timeoutMs: 5000,
      metadata,
    });
    expect(calls[0]!.deadline! - Date.now()).toBeGreaterThan(4000);
  });

  it("turns what a handler throws into its status", async () => {
    expect((await answer(request("Fail"))).status).toEqual({
      code: statusCode.NOT_FOUND,
      message: "task a is unknown: no such directory",
    });
    expect((await answer(request("Crash"))).status).toEqual({
      code: statusCode.UNKNOWN,
      message: "undefined is not an object",
    });
  });

  it("says UNIMPLEMENTED for what it doesn't serve, and names it", async () => {
    expect((await answer(request("Nothing"))).status).toEqual({
      code: statusCode.UNIMPLEMENTED,
      message: "service test.Service has no method Nothing",
    });
    expect(await answerStatus(request("Echo", { service: "other.Service" }))).toBe(statusCode.UNIMPLEMENTED);
    expect(await answerStatus(request("constructor"))).toBe(statusCode.UNIMPLEMENTED);
    expect(await answerStatus(request("__proto__"))).toBe(statusCode.UNIMPLEMENTED);
  });

  it("refuses streaming calls, but not a client that says it has sent everything", async () => {
    expect(await answerStatus(request("Echo", { flags: frameFlag.remoteOpen }))).toBe(
      statusCode.UNIMPLEMENTED,
    );
    expect(await answerStatus(request("Echo", { type: frameType.data }))).toBe(statusCode.UNIMPLEMENTED);
    expect(await answerStatus(request("Echo", { flags: frameFlag.remoteClosed }))).toBe(statusCode.OK);
  });

  it("refuses what is against the protocol on its stream", async () => {
    expect(await answerStatus(request("Echo", { streamId: 2 }))).toBe(statusCode.INVALID_ARGUMENT);
    expect(await answerStatus(request("Echo", { streamId: 0 }))).toBe(statusCode.INVALID_ARGUMENT);
    expect(await answerStatus(request("Echo", { type: 9 }))).toBe(statusCode.INVALID_ARGUMENT);
    const garbage = encodeFrame({ streamId: 5, type: 1, flags: 0 }, Buffer.from("0a05616263", "hex"));
    expect(await answer(garbage)).toMatchObject({
      streamId: 5,
      status: { code: statusCode.INVALID_ARGUMENT },
    });
  });

  it("answers the header of a frame that was too long", async () => {
    const header = request("Echo", { streamId: 7 }).subarray(0, 10);
    header.writeUInt32BE(MAX_MESSAGE_BYTES + 1, 0);
    expect(await answer(header)).toMatchObject({
      streamId: 7,
      status: { code: statusCode.RESOURCE_EXHAUSTED },
    });
  });

  it("ignores responses", async () => {
    expect(await dispatcher.dispatch(request("Echo", { type: frameType.response }), "")).toBeNull();
    const header = request("Echo", { type: frameType.response }).subarray(0, 10);
    header.writeUInt32BE(0xffff_ffff, 0);
    expect(await dispatcher.dispatch(header, "")).toBeNull();
  });

  it("replaces a response that is too long", async () => {
    const fits = MAX_MESSAGE_BYTES - 5; // field key and length are part of the message
    expect(await answerStatus(request("Large", { payload: Buffer.from(`${fits}`) }))).toBe(statusCode.OK);
    expect(await answerStatus(request("Large", { payload: Buffer.from(`${fits + 1}`) }))).toBe(
      statusCode.RESOURCE_EXHAUSTED,
    );
  });

  it("answers when the client's time is over, and aborts the handler", async () => {
    calls.length = 0;
    const got = await answer(request("Hang", { timeoutMs: 20 }));
    expect(got.status).toEqual({
      code: statusCode.DEADLINE_EXCEEDED,
      message: "Hang was not done within 20 ms",
    });
    expect(calls[0]!.signal.aborted).toBe(true);
  });

  it("counts the time that a frame has waited", async () => {
    const started = Date.now();
    const got = await answer(request("Hang", { timeoutMs: 60_000 }), undefined, 59_990);
    expect(got.status.code).toBe(statusCode.DEADLINE_EXCEEDED);
    expect(Date.now() - started).toBeLessThan(5_000);
  });

  it("aborts the handler when the client goes", async () => {
    calls.length = 0;
    const gone = new AbortController();
    void dispatcher.dispatch(request("Hang"), "", gone.signal);
    await sleep(1);
    expect(calls[0]!.signal.aborted).toBe(false);
    gone.abort("bye");
    expect(calls[0]!.signal.reason).toBe("bye");
    void dispatcher.dispatch(request("Hang"), "", gone.signal);
    await sleep(1);
    expect(calls[1]!.signal.aborted).toBe(true);
  });

  it("leaves no listener behind on the signal of its caller", async () => {
    const signal = new AbortController().signal;
    let added = 0;
    const { addEventListener, removeEventListener } = signal;
    signal.addEventListener = (...args: Parameters<typeof addEventListener>) => {
      added++;
      addEventListener.apply(signal, args);
    };
    signal.removeEventListener = (...args: Parameters<typeof removeEventListener>) => {
      added--;
      removeEventListener.apply(signal, args);
    };
    for (const method of ["Echo", "Fail", "Crash"]) await dispatcher.dispatch(request(method), "", signal);
    expect(added).toBe(0);
  });

  it("answers every frame of random bytes with a frame", async () => {
    const random = new Random(7);
    for (let round = 0; round < 5_000; round++) {
      const streamId = random.int(2 ** 32);
      const bytes = encodeFrame(
        { streamId, type: random.int(5), flags: random.int(4) },
        random.bytes(random.int(50)),
      );
      const response = await dispatcher.dispatch(bytes, "");
      if (bytes[8] === frameType.response) expect(response).toBeNull();
      else expect(decodeFrame(response!)).toMatchObject({ streamId, type: 2 });
    }
  });
});
