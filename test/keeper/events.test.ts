// Events on their way to containerd.

import fs from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { beforeAll, describe, expect, it } from "vitest";
import {
  decodeRequest,
  encodeFrame,
  encodeRequest,
  encodeResponse,
  FrameReader,
  frameType,
} from "../../src/ttrpc/index.ts";
import { until } from "../live/harness/until.ts";
import { BUILD_TIMEOUT_MS, buildKeeper, Pod, type } from "./harness.ts";

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

/** containerd's event service, as far as the keeper can tell. */
class EventService {
  readonly path: string;
  readonly got: string[] = [];
  readonly streams: number[] = [];
  connections = 0;
  answer: (payload: string) => Buffer | undefined = () => Buffer.from(encodeResponse({}));
  #server: Server | undefined;
  readonly #sockets = new Set<Socket>();

  constructor(pod: Pod) {
    this.path = pod.env.TTRPC_ADDRESS!;
  }

  async listen(): Promise<void> {
    fs.rmSync(this.path, { force: true });
    this.#server = createServer((socket) => {
      this.connections++;
      this.#sockets.add(socket);
      socket.on("error", () => {});
      const reader = new FrameReader();
      socket.on("data", (chunk: Buffer) => {
        for (const frame of reader.push(chunk)) {
          const payload = Buffer.from(decodeRequest(frame.payload!).payload).toString();
          this.got.push(payload);
          this.streams.push(frame.streamId);
          const answer = this.answer(payload);
          if (answer)
            socket.write(
              encodeFrame({ streamId: frame.streamId, type: frameType.response, flags: 0 }, answer),
            );
        }
      });
    });
    await new Promise<void>((resolve) => this.#server!.listen(this.path, resolve));
  }

  async close(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    this.#sockets.clear();
    await new Promise((resolve) => this.#server?.close(resolve));
    fs.rmSync(this.path, { force: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async gets(count: number): Promise<void> {
    await until(() => this.got.length >= count, {
      timeoutMs: 20_000,
      what: () => `${count} events: ${this.got.length}`,
    });
  }
}

function send(pod: Pod, payload: string | Buffer, key = `${payload}`, id = "c1"): void {
  const frame = encodeFrame(
    { streamId: 1, type: frameType.request, flags: 0 },
    encodeRequest({ service: "events", method: "Forward", payload: Buffer.from(payload) }),
  );
  pod.link.send(type.EVENT, { id, eventKey: key, frame });
}
const settled = async (pod: Pod) => expect(await pod.link.run({ argv: ["true"] })).toBe(0);
const count = (n: number) => Array.from({ length: n }, (_, i) => `e${i}`);

describe.concurrent("events", () => {
  it("go out in order, one at a time, over one connection", async () => {
    await using pod = await Pod.start();
    await using service = new EventService(pod);
    await service.listen();
    let underWay = 0;
    service.answer = () => {
      expect(++underWay).toBe(1);
      underWay--;
      return Buffer.from(encodeResponse({}));
    };
    for (const event of count(200)) send(pod, event);
    await service.gets(200);
    expect(service.got).toEqual(count(200));
    expect(service.streams).toEqual(service.streams.map((_, at) => 2 * at + 1));
    expect(service.connections).toBe(1);
  });

  it("of a key that was taken are dropped, for this container, until its task is gone", async () => {
    await using pod = await Pod.start();
    await using service = new EventService(pod);
    await service.listen();
    send(pod, "a", "key");
    send(pod, "b", "key");
    send(pod, "c", "key", "c2");
    await service.gets(2);
    await pod.replaceCedanad();
    send(pod, "d", "key"); // the next cedanad repeats what the last may have sent
    pod.link.send(type.TASK_GONE, { id: "c1" });
    send(pod, "e", "key");
    await service.gets(3);
    await settled(pod);
    expect(service.got).toEqual(["a", "c", "e"]);
  });

  it("remember the last thousands of keys of a container, not all there ever were", async () => {
    await using pod = await Pod.start();
    await using service = new EventService(pod);
    await service.listen();
    for (const event of count(2_200)) send(pod, event);
    await service.gets(2_200);
    for (const event of [...count(2_200).slice(-2_000), "e0"]) send(pod, event);
    await service.gets(2_201);
    await settled(pod);
    expect(service.got.slice(2_200)).toEqual(["e0"]);
  });

  it("wait while containerd is away, and go on where it was interrupted", async () => {
    await using pod = await Pod.start();
    await using service = new EventService(pod);
    for (const event of ["a", "b"]) send(pod, event);
    await settled(pod);
    await service.listen();
    await service.gets(2);
    service.answer = () => undefined; // it has it, but dies before it says so
    send(pod, "c");
    await service.gets(3);
    await service.close();
    service.answer = () => Buffer.from(encodeResponse({}));
    send(pod, "d");
    await service.listen();
    await service.gets(5);
    expect(service.got).toEqual(["a", "b", "c", "c", "d"]);
  });

  it("that containerd refuses are told with its reason, long or short, and the next ones go on", async () => {
    await using pod = await Pod.start();
    await using service = new EventService(pod);
    const reasons: Record<string, string> = { a: "no", b: "x".repeat(300), c: "" };
    service.answer = (payload) =>
      payload === "d"
        ? Buffer.from(encodeResponse({}))
        : Buffer.from(encodeResponse({ status: { code: 3, message: reasons[payload]! } }));
    await service.listen();
    for (const event of ["a", "b", "c", "d"]) send(pod, event);
    await service.gets(4);
    for (const event of ["a", "b", "c"]) {
      const refused = await pod.link.take(type.EVENT_REFUSED);
      expect([refused.string("id"), refused.string("eventKey"), refused.string("message")]).toEqual([
        "c1",
        event,
        `status 3: ${reasons[event]}`,
      ]);
    }
  });

  it("are not stopped by answers to nobody, nonsense, or a message that is too long", async () => {
    await using pod = await Pod.start();
    await using service = new EventService(pod);
    let round = 0;
    service.answer = () => {
      round++;
      if (round === 1) return Buffer.from("0affffffff", "hex"); // no Response, but an answer
      return Buffer.from(encodeResponse({}));
    };
    await service.listen();
    send(pod, "a");
    send(pod, "b");
    await service.gets(2);
    expect(service.got).toEqual(["a", "b"]);
    expect(pod.link.count(type.EVENT_REFUSED)).toBe(0);
  });

  it("are refused with a word when too many wait, and taken again when containerd has read some", async () => {
    await using pod = await Pod.start();
    await using service = new EventService(pod);
    const big = (at: number) => Buffer.concat([Buffer.from(`${at} `), Buffer.alloc(1 << 20, "x")]);
    for (let at = 0; at < 9; at++) send(pod, big(at), `key${at}`);
    const refused = await pod.link.take(type.EVENT_REFUSED);
    expect([refused.string("eventKey"), refused.string("message")]).toEqual([
      "key7",
      "too many events wait for containerd",
    ]);
    expect((await pod.link.take(type.EVENT_REFUSED)).string("eventKey")).toBe("key8");
    expect(pod.log()).toMatch(/events of test\/c1: containerd has not taken any for too long/);
    await service.listen();
    await service.gets(7);
    send(pod, "after", "key8"); // it wasn't taken then
    await service.gets(8);
    expect(service.got.map((payload) => payload.split(" ")[0])).toEqual([..."0123456", "after"]);
    expect(pod.log()).toMatch(/containerd takes them again/);
  });

  it("go out before the keeper leaves", async () => {
    await using pod = await Pod.start();
    await using service = new EventService(pod);
    await service.listen();
    for (const event of count(50)) send(pod, event);
    pod.link.send(type.LEAVE);
    await pod.gone();
    expect(service.got).toEqual(count(50));
  });

  it("go out before the keeper leaves, also when cedanad is gone by then", async () => {
    await using pod = await Pod.start();
    await using service = new EventService(pod);
    await service.listen();
    for (const event of count(50)) send(pod, event);
    pod.link.send(type.LEAVE);
    pod.link.socket.end();
    await pod.gone();
    expect(service.got).toEqual(count(50));
  });

  it("without an address, or without a key, are refused with a word", async () => {
    await using pod = await Pod.start({ TTRPC_ADDRESS: "" });
    send(pod, "a");
    expect((await pod.link.take(type.EVENT_REFUSED)).string("message")).toMatch(
      /no address for events \(TTRPC_ADDRESS\)/,
    );
    pod.link.send(type.EVENT, { id: "c1", eventKey: "k" });
    expect((await pod.link.take(type.EVENT_REFUSED)).string("message")).toMatch(
      /needs an id, a key and a frame/,
    );
  });
});
