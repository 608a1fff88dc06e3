// Our client of containerd's API, against servers that answer in every way that one can.

import { mkdtempSync, rmSync } from "node:fs";
import { createServer, type ServerHttp2Stream } from "node:http2";
import { type AddressInfo, createServer as createSocket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  AlreadyExists,
  Cancelled,
  NotFound,
  RemoteFailed,
  TimedOut,
  Unavailable,
} from "../../src/errors/index.ts";
import { Containers } from "../../src/proto/generated/containerd_containers.ts";
import { Containerd } from "../../src/shim/containerd.ts";

let directory: string;
let address: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "containerd-"));
  address = join(directory, "c.sock");
});
afterEach(() => rmSync(directory, { recursive: true }));

type Answer = (stream: ServerHttp2Stream, headers: Record<string, unknown>, body: Buffer) => void;

async function serve(answer: Answer): Promise<AsyncDisposable> {
  const server = createServer();
  const sessions = new Set<{ destroy(): void }>();
  server.on("session", (session) => {
    sessions.add(session);
    session.on("error", () => {}); // the client goes
  });
  server.on("stream", (stream, headers) => {
    const chunks: Buffer[] = [];
    stream.on("error", () => {}); // cancelled
    stream.on("data", (chunk: Buffer) => chunks.push(chunk));
    stream.on("end", () => answer(stream, headers, Buffer.concat(chunks)));
  });
  await new Promise<void>((listening) => server.listen(address, listening));
  return {
    [Symbol.asyncDispose]: async () => {
      for (const session of sessions) session.destroy();
      await new Promise((closed) => server.close(closed));
    },
  };
}

function message(bytes: Uint8Array, flag = 0, length = bytes.length): Buffer {
  const prefix = Buffer.from([flag, 0, 0, 0, 0]);
  prefix.writeUInt32BE(length, 1);
  return Buffer.concat([prefix, bytes]);
}

function send(stream: ServerHttp2Stream, body: Buffer, status = 0, text = ""): void {
  stream.respond({ ":status": 200, "content-type": "application/grpc" }, { waitForTrailers: true });
  stream.on("wantTrailers", () =>
    stream.sendTrailers({ "grpc-status": String(status), ...(text && { "grpc-message": text }) }),
  );
  stream.end(body);
}

async function get(options: Parameters<Containerd["call"]>[3] = {}) {
  using containerd = new Containerd(address, "some");
  return (await containerd.call(Containers, "Get", { id: "web" }, options)).container;
}

describe("the client of containerd's API", () => {
  it("calls in its namespace, with the lease, and takes an answer that comes in pieces", async () => {
    const heard: unknown[] = [];
    await using _ = await serve((stream, headers, body) => {
      heard.push(headers[":path"], headers["containerd-namespace"], headers["containerd-lease"], headers.te);
      heard.push(Containers.methods.Get.request.decode(body.subarray(5)));
      const whole = message(
        Containers.methods.Get.response.encode({ container: { id: "web", snapshotter: "native" } }),
      );
      stream.respond({ ":status": 200 }, { waitForTrailers: true });
      stream.on("wantTrailers", () => stream.sendTrailers({ "grpc-status": "0" }));
      stream.write(whole.subarray(0, 3));
      setImmediate(() => stream.end(whole.subarray(3)));
    });
    expect(await get({ lease: "mine" })).toMatchObject({ id: "web", snapshotter: "native" });
    expect(heard).toEqual([
      "/containerd.services.containers.v1.Containers/Get",
      "some",
      "mine",
      "trailers",
      { id: "web" },
    ]);
  });

  it.each([
    [5, NotFound],
    [6, AlreadyExists],
    [14, Unavailable],
    [9, RemoteFailed],
  ])("throws status %i as what it is, with containerd's words", async (status, kind) => {
    // Without a message, the status comes with the headers; with one, after it.
    for (const early of [true, false]) {
      await using _ = await serve((stream) => {
        const words = "caf%C3%A9 100%";
        if (!early) return send(stream, Buffer.alloc(0), status, words);
        stream.respond(
          { ":status": 200, "grpc-status": String(status), "grpc-message": "caf%C3%A9" },
          { endStream: true },
        );
      });
      const failed = get();
      await expect(failed).rejects.toBeInstanceOf(kind);
      await expect(failed).rejects.toThrow(early ? `${address}): Get: café` : "caf%C3%A9 100%");
    }
  });

  it.each<[string, Buffer]>([
    ["no message", Buffer.alloc(0)],
    ["half a message", message(Buffer.from([1, 2]), 0, 9)],
    ["more than one", Buffer.concat([message(Buffer.alloc(0)), message(Buffer.alloc(0))])],
    ["a compressed one", message(Buffer.from([1]), 1)],
  ])("refuses an answer that is %s", async (_what, body) => {
    await using _ = await serve((stream) => send(stream, body));
    await expect(get()).rejects.toThrow(/not one message of gRPC/);
  });

  it("reads no answer without end", async () => {
    await using _ = await serve((stream) => {
      stream.respond({ ":status": 200 });
      const block = Buffer.alloc(1 << 20);
      const more = () => void (stream.destroyed || stream.write(block, more));
      more();
    });
    await expect(get()).rejects.toThrow(/its answer is too long/);
  });

  it("gives up one that doesn't come, or isn't wanted any more", async () => {
    await using _ = await serve(() => {});
    await expect(get({ timeoutMs: 50 })).rejects.toBeInstanceOf(TimedOut);
    await expect(get({ signal: AbortSignal.timeout(50) })).rejects.toBeInstanceOf(Cancelled);
    await expect(get({ signal: AbortSignal.abort() })).rejects.toBeInstanceOf(Cancelled);
  });

  it("says that containerd isn't there, goes away, or is something else", async () => {
    await expect(get()).rejects.toThrow(/Get: connect ENOENT/);
    await expect(get()).rejects.toBeInstanceOf(Unavailable);
    {
      await using _ = await serve((stream) => stream.session?.destroy());
      await expect(get()).rejects.toBeInstanceOf(Unavailable);
    }
    const other = createSocket((socket) => {
      socket.on("error", () => {});
      socket.resume();
      socket.end("HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    await new Promise<void>((listening) => other.listen(address, listening));
    expect(other.address() as unknown as AddressInfo).toBe(address);
    await expect(get()).rejects.toBeInstanceOf(Unavailable);
    await new Promise((closed) => other.close(closed));
  });
});
