import { createServer, type Server as NetServer, type Socket } from "node:net";
import { ResourceExhausted, toStatus } from "../errors/index.ts";
import type { Dispatcher } from "./dispatcher.ts";
import { encodeFrame, type Frame, FrameReader, frameType } from "./frame.ts";
import { encodeResponse } from "./message.ts";

/** So many unsent bytes of answers: we stop reading from that client until it has taken them. */
const PAUSE_BYTES = 1024 * 1024;
/** So many: it asks and never listens. Its connection ends. */
const GIVE_UP_BYTES = 64 * 1024 * 1024;
/** Far more than the Wait calls of a busy node; each costs some hundred bytes. */
const MAX_CALLS_PER_CONNECTION = 16 * 1024;

export interface ServerOptions<C> {
  dispatcher: Dispatcher<C>;
  /** Called once for each connection: what its calls get as `context`. Throwing refuses the connection. */
  context: (socket: Socket) => C;
  /** Something went wrong with one connection, which has been or is about to be closed. For a log. */
  onConnectionError?: (error: Error) => void;
}

/**
 * TTRPC over unix sockets (or any stream socket): a Dispatcher with connections. Each call runs by itself; one connection
 * has no effect on another, whatever it sends or doesn't read. When a client goes, the signals of its calls are aborted.
 */
export class Server<C> {
  readonly #options: ServerOptions<C>;
  readonly #connections = new Set<Connection<C>>();
  readonly #listeners = new Set<NetServer>();
  #closing = false;

  constructor(options: ServerOptions<C>) {
    this.#options = options;
  }

  get connectionCount(): number {
    return this.#connections.size;
  }

  /**
   * Listens on a path (made with mode 0600; removed by `close`) or on an inherited descriptor.
   * @throws the error of bind(2): EADDRINUSE when there is such a file
   */
  async listen(where: { path: string } | { fd: number }): Promise<void> {
    const listener = createServer((socket) => this.accept(socket));
    this.#listeners.add(listener);
    await new Promise<void>((resolve, reject) => {
      listener.once("error", reject);
      listener.once("listening", () => {
        listener.off("error", reject);
        listener.on("error", (error) => this.#options.onConnectionError?.(error)); // of accept(2): EMFILE
        resolve();
      });
      // bind(2) happens within listen(), so nothing else in this process sees the changed mask.
      const umask = process.umask(0o177);
      try {
        listener.listen(where);
      } finally {
        process.umask(umask);
      }
    }).catch((error) => {
      this.#listeners.delete(listener);
      throw error;
    });
  }

  /** Serves a connection that somebody else accepted. Takes the socket over. */
  accept(socket: Socket): void {
    if (this.#closing) {
      socket.destroy();
      return;
    }
    let context: C;
    try {
      context = this.#options.context(socket);
    } catch (error) {
      socket.destroy();
      this.#options.onConnectionError?.(error as Error);
      return;
    }
    const connection = new Connection(socket, this.#options, context);
    this.#connections.add(connection);
    socket.once("close", () => this.#connections.delete(connection));
  }

  /**
   * Takes no new connections and no new calls, lets calls finish for `graceMs`, then ends every connection.
   * @param options.graceMs  0 by default: what is under way is cut off
   */
  async close(options: { graceMs?: number } = {}): Promise<void> {
    this.#closing = true;
    const closed = [...this.#listeners].map(
      (listener) => new Promise<void>((resolve) => listener.close(() => resolve())),
    );
    this.#listeners.clear();
    const connections = [...this.#connections];
    await Promise.all(connections.map((connection) => connection.finish(options.graceMs ?? 0)));
    await Promise.all(closed);
  }
}

class Connection<C> {
  readonly #socket: Socket;
  readonly #options: ServerOptions<C>;
  readonly #context: C;
  readonly #gone = new AbortController();
  readonly #calls = new Set<Promise<void>>();
  #finishing = false;

  constructor(socket: Socket, options: ServerOptions<C>, context: C) {
    this.#socket = socket;
    this.#options = options;
    this.#context = context;
    const reader = new FrameReader();
    socket.on("data", (chunk: Buffer) => {
      if (this.#finishing) return;
      for (const frame of reader.push(chunk)) this.#take(frame);
    });
    socket.on("drain", () => socket.resume());
    socket.on("end", () => {
      if (!reader.atFrameEnd) this.#fail(new Error("the connection ended inside a frame"));
    });
    socket.on("error", (error) => options.onConnectionError?.(error)); // close follows
    socket.on("close", () => this.#gone.abort());
  }

  async finish(graceMs: number): Promise<void> {
    this.#finishing = true;
    const socket = this.#socket;
    if (graceMs > 0 && this.#calls.size > 0) {
      let timer: NodeJS.Timeout | undefined;
      const patience = new Promise((resolve) => {
        timer = setTimeout(resolve, graceMs);
      });
      await Promise.race([Promise.all(this.#calls), patience]);
      clearTimeout(timer);
    }
    if (socket.destroyed) return;
    await new Promise<void>((resolve) => {
      socket.once("close", () => resolve());
      if (graceMs > 0 && this.#calls.size === 0 && socket.writableLength > 0) {
        socket.end(() => socket.destroy()); // the last answers are on their way
        setTimeout(() => socket.destroy(), graceMs).unref();
      } else {
        socket.destroy();
      }
    });
  }

  #take(frame: Frame): void {
    if (this.#calls.size >= MAX_CALLS_PER_CONNECTION && frame.type !== frameType.response) {
      const status = toStatus(
        new ResourceExhausted(`${MAX_CALLS_PER_CONNECTION} calls are under way on this connection`),
      );
      const header = { streamId: frame.streamId, type: frameType.response, flags: 0 };
      this.#send(encodeFrame(header, encodeResponse({ status })));
      return;
    }
    const call: Promise<void> = this.#options.dispatcher
      .dispatchFrame(frame, this.#context, this.#gone.signal)
      .then((response) => {
        if (response) this.#send(response);
      })
      .finally(() => this.#calls.delete(call));
    this.#calls.add(call);
  }

  #send(frame: Buffer): void {
    const socket = this.#socket;
    if (socket.destroyed || socket.writableEnded) return; // the client has gone; nobody waits for this
    socket.write(frame);
    if (socket.writableLength > GIVE_UP_BYTES) this.#fail(new Error("the client does not read its answers"));
    else if (socket.writableLength > PAUSE_BYTES) socket.pause();
  }

  #fail(error: Error): void {
    this.#socket.destroy(error);
  }
}
