// A FIFO that a shim writes: our end of stdout, stderr or a terminal.

import { createHash } from "node:crypto";
import { closeSync, constants, openSync } from "node:fs";
import net from "node:net";

/** The lines of an output that are whole numbers. */
export const numbersIn = (text: string): number[] => (text.match(/^\d+$/gm) ?? []).map(Number);

export class Output {
  readonly path: string;
  bytes = 0;
  /** everything so far, unless `keep` is false: then only `bytes` and the hash grow */
  #chunks: Buffer[] = [];
  #text = "";
  #keep: boolean;
  #read = 0;
  #hash = createHash("sha256");
  #socket: net.Socket | undefined;
  #waiting = new Set<() => void>();
  ended = false;

  constructor(path: string, { keep = true, open = true } = {}) {
    this.path = path;
    this.#keep = keep;
    if (open) this.open();
  }

  /** Opens the FIFO for reading without waiting for a writer. */
  open(): void {
    this.ended = false;
    const fd = openSync(this.path, constants.O_RDONLY | constants.O_NONBLOCK);
    let socket: net.Socket;
    try {
      socket = new net.Socket({ fd, readable: true, writable: false });
    } catch (error) {
      closeSync(fd);
      throw error;
    }
    this.#socket = socket;
    socket.on("data", (chunk: Buffer) => {
      this.bytes += chunk.length;
      this.#hash.update(chunk);
      if (this.#keep) this.#chunks.push(chunk);
      this.#wake();
    });
    const end = () => {
      if (this.#socket !== socket) return;
      this.ended = true;
      this.#wake();
    };
    socket.on("end", end);
    socket.on("close", end);
    socket.on("error", end);
  }

  /** The reader goes away: no one has the FIFO open for reading on our side. */
  async leave(): Promise<void> {
    const socket = this.#socket;
    this.#socket = undefined;
    if (!socket || socket.destroyed) return;
    const closed = new Promise((resolve) => socket.once("close", resolve));
    socket.destroy();
    await closed;
  }

  pause(): void {
    this.#socket?.pause();
  }

  resume(): void {
    this.#socket?.resume();
  }

  digest(): string {
    return this.#hash.copy().digest("hex");
  }

  get text(): string {
    if (this.#chunks.length > 0) {
      this.#text += Buffer.concat(this.#chunks).toString("latin1");
      this.#chunks = [];
    }
    return this.#text;
  }

  #wake(): void {
    for (const wake of this.#waiting) wake();
  }

  async #changed(deadline: number): Promise<boolean> {
    return await new Promise((resolve) => {
      const done = (changed: boolean) => {
        clearTimeout(timer);
        this.#waiting.delete(wake);
        resolve(changed);
      };
      const wake = () => done(true);
      const timer = setTimeout(() => done(false), Math.max(0, deadline - Date.now()));
      this.#waiting.add(wake);
    });
  }

  async #until<T>(probe: () => T | undefined, timeoutMs: number, what: string): Promise<T> {
    const deadline = Date.now() + timeoutMs;
    for (;;) {
      const value = probe();
      if (value !== undefined) return value;
      const tail = () => JSON.stringify(this.text.slice(-300));
      if (this.ended) throw new Error(`${this.path} ended before ${what}; its last text: ${tail()}`);
      if (!(await this.#changed(deadline)))
        throw new Error(`no ${what} on ${this.path} within ${timeoutMs} ms; its last text: ${tail()}`);
    }
  }

  /** The next whole line after those already taken, without its end. */
  async line(timeoutMs = 20_000): Promise<string> {
    return await this.#until(
      () => {
        const end = this.text.indexOf("\n", this.#read);
        if (end < 0) return undefined;
        const line = this.text.slice(this.#read, end).replace(/\r$/, "");
        this.#read = end + 1;
        return line;
      },
      timeoutMs,
      "line",
    );
  }

  /** Takes lines up to the first that matches. */
  async lineMatching(pattern: RegExp, timeoutMs = 20_000): Promise<RegExpMatchArray> {
    const deadline = Date.now() + timeoutMs;
    for (;;) {
      const match = (await this.line(Math.max(1, deadline - Date.now()))).match(pattern);
      if (match) return match;
    }
  }

  /** Waits until the text not yet taken matches (prompts have no line end), and takes it. */
  async match(pattern: RegExp, timeoutMs = 20_000): Promise<RegExpMatchArray> {
    return await this.#until(
      () => {
        const match = this.text.slice(this.#read).match(pattern);
        if (!match) return undefined;
        this.#read += match.index! + match[0].length;
        return match;
      },
      timeoutMs,
      `text matching ${pattern}`,
    );
  }

  /** The number on the next line, as the counting programs print them. */
  async nextNumber(timeoutMs = 20_000): Promise<number> {
    const line = await this.line(timeoutMs);
    if (!/^\d+$/.test(line))
      throw new Error(`expected a number on ${this.path}, got ${JSON.stringify(line)}`);
    return Number(line);
  }

  /** Forgets what has arrived but was not taken: the next line is one that arrives from now on. */
  skip(): void {
    this.#read = this.text.lastIndexOf("\n") + 1;
  }

  /** Resolves when the shim has closed the FIFO. */
  async end(timeoutMs = 20_000): Promise<void> {
    const deadline = Date.now() + timeoutMs;
    while (!this.ended)
      if (!(await this.#changed(deadline)))
        throw new Error(
          `${this.path} has not ended within ${timeoutMs} ms; its last text: ${JSON.stringify(this.text.slice(-300))}`,
        );
  }

  async reach(bytes: number, timeoutMs = 20_000): Promise<void> {
    await this.#until(() => (this.bytes >= bytes ? true : undefined), timeoutMs, `${bytes} bytes`);
  }
}
