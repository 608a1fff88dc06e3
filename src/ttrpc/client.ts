import { connect as connectSocket, type Socket } from "node:net";
import {
  Cancelled,
  CedanaError,
  RemoteFailed,
  ResourceExhausted,
  TimedOut,
  Unavailable,
  Unsupported,
} from "../errors/index.ts";
import { encodeFrame, type Frame, FrameReader, frameType, MAX_MESSAGE_BYTES } from "./frame.ts";
import { decodeResponse, encodeRequest } from "./message.ts";

export interface CallOptions {
  /** sent along, so that the server gives up too; undefined: without end */
  timeoutMs?: number | undefined;
  metadata?: ReadonlyMap<string, readonly string[]> | undefined;
  /** stops the waiting. TTRPC has no way to tell the server. */
  signal?: AbortSignal | undefined;
}

interface Pending {
  what: string;
  resolve: (payload: Uint8Array) => void;
  reject: (error: Error) => void;
}

const MAX_TIMER_MS = 2 ** 31 - 1;
const MAX_STREAM_ID = 0xffff_ffff;

/** Unary calls over one connection, any number at a time. */
export class Client {
  readonly #socket: Socket;
  readonly #pending = new Map<number, Pending>();
  #nextStream = 1;
  #closedBy: Error | undefined;

  /**
   * Connects to a unix socket.
   * @throws Unavailable with the error of connect(2) as cause, TimedOut, Cancelled
   */
  static async connect(
    path: string,
    options: { timeoutMs?: number; signal?: AbortSignal } = {},
  ): Promise<Client> {
    const socket = connectSocket({ path });
    try {
      await new Promise<void>((resolve, reject) => {
        const cleanUp = watch(`connect to ${path}`, options, reject);
        socket.once("connect", () => {
          cleanUp();
          resolve();
        });
        socket.once("error", (error) => {
          cleanUp();
          reject(new Unavailable(`connect to ${path}`, { cause: error }));
        });
      });
    } catch (error) {
      socket.on("error", () => {}); // of a connection that we no longer want
      socket.destroy();
      throw error;
    }
    return new Client(socket);
  }

  /** @param socket  connected; the client owns it from here on */
  constructor(socket: Socket) {
    this.#socket = socket;
    const reader = new FrameReader();
    socket.on("data", (chunk: Buffer) => {
      for (const frame of reader.push(chunk)) this.#take(frame);
    });
    let cause: Error | undefined;
    socket.on("error", (error) => {
      cause = error; // close follows
    });
    socket.on("close", () => this.#end(new Unavailable("the connection has closed", { cause })));
  }

  /** Whether calls can be made. */
  get isOpen(): boolean {
    return this.#closedBy === undefined;
  }

  /**
   * @param payload  encoded request message
   * @returns the encoded response message, a view of what was received
   * @throws RemoteFailed with the server's status, TimedOut, Cancelled, ResourceExhausted (too long, either way),
   *   Unavailable when the connection has closed
   */
  async call(
    service: string,
    method: string,
    payload: Uint8Array,
    options: CallOptions = {},
  ): Promise<Uint8Array> {
    const what = `${service}/${method}`;
    if (this.#closedBy) throw new Unavailable(`call ${what}`, { cause: this.#closedBy });
    if (options.signal?.aborted) throw new Cancelled(`call ${what}`, { cause: options.signal.reason });
    const request = encodeRequest({
      service,
      method,
      payload,
      timeoutMs: options.timeoutMs,
      metadata: options.metadata,
    });
    if (request.length > MAX_MESSAGE_BYTES)
      throw new ResourceExhausted(
        `call ${what}: request of ${request.length} bytes is over the limit of ${MAX_MESSAGE_BYTES}`,
      );
    const streamId = this.#takeStreamId();
    let cleanUp = () => {};
    try {
      return await new Promise<Uint8Array>((resolve, reject) => {
        this.#pending.set(streamId, { what, resolve, reject });
        cleanUp = watch(`call ${what}`, options, reject);
        this.#socket.write(encodeFrame({ streamId, type: frameType.request, flags: 0 }, request));
      });
    } finally {
      cleanUp();
      this.#pending.delete(streamId);
    }
  }

  /** Ends the connection; calls under way fail with Unavailable. */
  close(): void {
    this.#end(new Unavailable("the client was closed"));
    this.#socket.destroy();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** An idle connection no longer keeps the process alive. */
  unref(): this {
    this.#socket.unref();
    return this;
  }

  #take(frame: Frame): void {
    const pending = this.#pending.get(frame.streamId);
    if (!pending) return; // given up by us meanwhile, or of nobody
    const { what, resolve, reject } = pending;
    if (frame.payload === undefined) {
      reject(
        new ResourceExhausted(
          `call ${what}: response of ${frame.length} bytes is over the limit of ${MAX_MESSAGE_BYTES}`,
        ),
      );
      return;
    }
    if (frame.type !== frameType.response) {
      reject(new Unsupported(`call ${what}: the server answered with a stream`));
      return;
    }
    try {
      const { status, payload } = decodeResponse(frame.payload);
      if (status.code === 0) resolve(payload);
      else
        reject(
          new RemoteFailed(status.message || `call ${what}: status ${status.code}`, { code: status.code }),
        );
    } catch (error) {
      reject(new CedanaError(`call ${what}: the response can't be decoded`, { cause: error }));
    }
  }

  #end(reason: Error): void {
    if (this.#closedBy) return;
    this.#closedBy = reason;
    for (const { what, reject } of this.#pending.values())
      reject(new Unavailable(`call ${what}`, { cause: reason }));
    this.#pending.clear();
  }

  /** Odd, ascending; after the last comes the first that is free. */
  #takeStreamId(): number {
    while (this.#pending.has(this.#nextStream)) this.#advance();
    const taken = this.#nextStream;
    this.#advance();
    return taken;
  }

  #advance(): void {
    this.#nextStream = this.#nextStream + 2 > MAX_STREAM_ID ? 1 : this.#nextStream + 2;
  }
}

/** Rejects when the time is over or the signal aborts. @returns what stops watching */
function watch(
  what: string,
  options: { timeoutMs?: number | undefined; signal?: AbortSignal | undefined },
  reject: (error: Error) => void,
): () => void {
  const { timeoutMs, signal } = options;
  const onAbort = () => reject(new Cancelled(what, { cause: signal?.reason }));
  signal?.addEventListener("abort", onAbort, { once: true });
  let timer: NodeJS.Timeout | undefined;
  if (timeoutMs !== undefined && timeoutMs <= MAX_TIMER_MS)
    timer = setTimeout(() => reject(new TimedOut(`${what}: no answer within ${timeoutMs} ms`)), timeoutMs);
  return () => {
    clearTimeout(timer);
    signal?.removeEventListener("abort", onAbort);
  };
}
