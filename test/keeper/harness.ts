// The real launcher and keeper, built with AddressSanitizer and UBSan, against a small cedanad of our own: a real socket,
// the real protocol, and nothing behind it but what the test says. No containerd, no engine.

import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import fs from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import os from "node:os";
import path from "node:path";
import { flock } from "../../src/linux/addon.ts";
import {
  encodeMessage,
  type FieldValues,
  type Message,
  MessageReader,
  type MessageType,
  messageType,
} from "../../src/shim/keeper-protocol.ts";
import { daemonSocketName } from "../../src/shim/socket-name.ts";
import { Client, encodeFrame, encodeResponse, frameType } from "../../src/ttrpc/index.ts";
import { until } from "../live/harness/until.ts";

const repository = path.resolve(import.meta.dirname, "../..");
const output = path.join(repository, "build/keeper-sanitized");
export const isRoot = process.getuid!() === 0;

/** Long enough for the first compilation beside other tests on two cores. */
export const BUILD_TIMEOUT_MS = 180_000;

/** Builds the keeper with the sanitizers where its sources are newer. Test files run side by side: one builds, the others wait. */
export function buildKeeper(): void {
  fs.mkdirSync(output, { recursive: true });
  try {
    execFileSync(
      "flock",
      [`${output}/lock`, "make", "-s", "-j2", "-C", path.join(repository, "addon/keeper"), "sanitized"],
      { stdio: ["ignore", "pipe", "pipe"] },
    );
  } catch (error) {
    const { stderr, message } = error as Error & { stderr?: Buffer };
    throw new Error(
      `build the keeper with sanitizers (needs make and gcc with libasan): ${stderr ?? message}`,
    );
  }
}

/** The program: the name that it is called by decides what it is. */
export const keeperBinary = path.join(output, "cedana-keeper");

export const type = messageType;

/** One connection of a launcher or keeper to the cedanad of the test. */
export class Link {
  readonly socket: Socket;
  /** everything that came, in order */
  readonly log: Message[] = [];
  readonly #taken = new Set<Message>();
  readonly #waiters = new Set<() => void>();
  /** answer PING */
  alive = true;
  /** a keeper's: it has said HELLO */
  isKeeper = false;
  closed = false;
  #steps = 0;

  constructor(socket: Socket, cedanad: FakeCedanad) {
    this.socket = socket;
    const reader = new MessageReader();
    socket.on("data", (chunk: Buffer) => {
      for (const message of reader.push(chunk)) {
        this.log.push(message);
        cedanad.arrived(this, message);
      }
      this.#wake();
    });
    socket.on("error", () => {}); // close follows
    socket.on("close", () => {
      this.closed = true;
      this.#wake();
    });
  }

  #wake(): void {
    for (const waiter of this.#waiters) waiter();
  }

  send(type: MessageType, values: FieldValues = {}): void {
    this.socket.write(encodeMessage(type, values));
  }

  /** The first message of the type that fits and hasn't been taken; waits for it. */
  async take(wanted: MessageType, fits: (message: Message) => boolean = () => true): Promise<Message> {
    return await this.#until(`message ${wanted}`, () => {
      const found = this.log.find(
        (message) => message.type === wanted && !this.#taken.has(message) && fits(message),
      );
      if (found) this.#taken.add(found);
      return found;
    });
  }

  async ended(): Promise<void> {
    await this.#until("the end of the connection", () => this.closed || undefined);
  }

  count(wanted: MessageType): number {
    return this.log.filter((message) => message.type === wanted).length;
  }

  async #until<T>(what: string, probe: () => T | undefined): Promise<T> {
    const deadline = Date.now() + 20_000;
    for (;;) {
      const found = probe();
      if (found !== undefined) return found;
      const rest = deadline - Date.now();
      if (rest <= 0)
        throw new Error(`waited in vain for ${what}; came: ${this.log.map((m) => m.type).join(" ")}`);
      if (this.closed && what.startsWith("message"))
        throw new Error(
          `the connection ended before ${what}; came: ${this.log.map((m) => m.type).join(" ")}`,
        );
      await new Promise<void>((resolve) => {
        const done = () => {
          clearTimeout(timer);
          this.#waiters.delete(done);
          resolve();
        };
        const timer = setTimeout(done, rest);
        this.#waiters.add(done);
      });
    }
  }

  /** An operation, and its RESULT. Without a tag: work of cedanad's own. */
  async operate(type: MessageType, values: FieldValues): Promise<Message> {
    const request = Number(values.request ?? 0);
    const step = String(values.step ?? `own#${++this.#steps}`);
    this.send(type, { ...values, request, step });
    return await this.result(request, step);
  }

  async result(request: number, step: string): Promise<Message> {
    return await this.take(
      messageType.RESULT,
      (message) => message.int("request") === request && message.string("step") === step,
    );
  }

  /** Runs a program to its end; its wait status. */
  async run(values: FieldValues): Promise<number> {
    const result = await this.operate(messageType.SPAWN, values);
    if (result.int("errno") !== 0) throw new Error(result.string("message"));
    return result.int("waitStatus");
  }

  /** Answers a request. */
  respond(request: Message, payload: string | Uint8Array = "", code = 0): void {
    const streamId = request.bytes("frame").readUInt32BE(4);
    const body = code
      ? encodeResponse({ status: { code, message: `${payload}` } })
      : encodeResponse({ payload: Buffer.from(payload) });
    this.send(messageType.RESPONSE, {
      request: request.int("request"),
      frame: encodeFrame({ streamId, type: frameType.response, flags: 0 }, body),
    });
  }
}

/** cedanad, as far as a keeper can tell. It holds the lock always, so nobody starts another while it is away. */
export class FakeCedanad {
  readonly runDir: string;
  readonly socketPath: string;
  readonly links: Link[] = [];
  /** pids of all that have said HELLO */
  readonly keepers = new Set<number>();
  readonly startAnswer: FieldValues;
  #server: Server | undefined;
  #lock: number;
  readonly #waiters = new Set<() => void>();
  /** what WELCOME says; undefined: no WELCOME */
  welcome: FieldValues | undefined = { version: 2, pid: 0, build: "test" };
  /** answer START, and PING on new connections */
  alive = true;

  constructor(runDir: string, startAnswer: FieldValues) {
    this.runDir = runDir;
    this.startAnswer = startAnswer;
    this.socketPath = path.join(runDir, daemonSocketName());
    this.#lock = fs.openSync(`${this.socketPath}.lock`, "a", 0o600);
    if (!flock(this.#lock, "exclusive")) throw new Error(`${this.socketPath}.lock is held`);
  }

  async listen(): Promise<void> {
    fs.rmSync(this.socketPath, { force: true });
    const server = createServer((socket) => {
      this.links.push(new Link(socket, this));
      for (const waiter of this.#waiters) waiter();
    });
    this.#server = server;
    await new Promise<void>((resolve) => server.listen(this.socketPath, resolve));
  }

  /** Dies: no goodbye, no socket. */
  async die(): Promise<void> {
    const server = this.#server;
    this.#server = undefined;
    for (const link of this.links) link.socket.destroy();
    this.links.length = 0;
    if (server) await new Promise((resolve) => server.close(resolve));
  }

  async end(): Promise<void> {
    await this.die();
    fs.closeSync(this.#lock);
  }

  /** For keepers that shall find no cedanad and nobody who starts one. */
  releaseLock(): void {
    fs.closeSync(this.#lock);
    this.#lock = fs.openSync("/dev/null", "r");
  }

  arrived(link: Link, message: Message): void {
    switch (message.type) {
      case messageType.START:
        if (this.alive) link.send(messageType.START_ANSWER, this.startAnswer);
        return;
      case messageType.HELLO:
        link.isKeeper = true;
        this.keepers.add(message.int("pid"));
        if (this.welcome) link.send(messageType.WELCOME, this.welcome);
        return;
      case messageType.PING:
        if (this.alive && link.alive) link.send(messageType.PONG, { nonce: message.bigint("nonce") });
        return;
    }
  }

  /** The keeper's connection: the newest that has said HELLO. */
  async keeper(): Promise<Link> {
    return await until(() => this.links.findLast((link) => !link.closed && link.isKeeper), {
      timeoutMs: 20_000,
      everyMs: 2,
      what: () => "a keeper's HELLO",
    });
  }
}

export interface Finished {
  code: number | null;
  stdout: Buffer;
  stderr: string;
}

export interface LaunchOptions {
  stdin?: Buffer | "open" | "closed";
  cwd?: string;
  env?: Record<string, string>;
  program?: string;
}

/** A run directory and a bundle of their own, a cedanad, and what runs there. */
export class Ground {
  readonly dir: string;
  readonly runDir: string;
  readonly bundle: string;
  readonly socketPath: string;
  readonly launcher: string;
  readonly env: Record<string, string>;
  readonly cedanad: FakeCedanad;
  readonly #launchers: ChildProcess[] = [];
  readonly #clients: Client[] = [];
  /** others to be killed at the end */
  readonly pids: number[] = [];

  constructor(env: Record<string, string> = {}) {
    this.dir = fs.mkdtempSync(path.join(os.tmpdir(), "keeper-"));
    this.runDir = path.join(this.dir, "run");
    this.bundle = path.join(this.dir, "bundle");
    this.socketPath = path.join(this.dir, "s", "pod");
    this.launcher = path.join(this.dir, "containerd-shim-cedana-v2");
    fs.symlinkSync(keeperBinary, this.launcher);
    fs.mkdirSync(this.runDir, { mode: 0o700 });
    fs.mkdirSync(this.bundle, { mode: 0o700 });
    this.env = {
      PATH: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
      CEDANA_RUN_DIR: this.runDir,
      CEDANA_DAEMON: path.join(this.dir, "no-cedanad"),
      TTRPC_ADDRESS: path.join(this.dir, "containerd.ttrpc"),
      CEDANA_KEEPER_PONG_MS: "10000", // we are busy with other tests at times, and not hung
      ASAN_OPTIONS: `log_path=${this.dir}/sanitizer:exitcode=99:detect_leaks=1:strict_string_checks=1`,
      UBSAN_OPTIONS: `log_path=${this.dir}/sanitizer:print_stacktrace=1`,
      ...env,
    };
    this.cedanad = new FakeCedanad(this.runDir, {
      socketPath: this.socketPath,
      answer: Buffer.from(`unix://${this.socketPath}`),
    });
  }

  /** Starts the launcher; its end, and what it has written. */
  launch(args: readonly string[], options: LaunchOptions = {}): Promise<Finished> & { child: ChildProcess } {
    const program = options.program ?? this.launcher;
    const argv = options.stdin === "closed" ? ["-c", `exec "$0" "$@" <&-`, program, ...args] : args;
    const child = spawn(options.stdin === "closed" ? "/bin/sh" : program, argv, {
      cwd: options.cwd ?? this.bundle,
      env: { ...this.env, ...options.env },
      stdio: ["pipe", "pipe", "pipe"],
    });
    this.#launchers.push(child);
    child.stdin!.on("error", () => {}); // it may end without reading all of it
    if (options.stdin !== "open")
      child.stdin!.end(options.stdin instanceof Buffer ? options.stdin : undefined);
    const stdout: Buffer[] = [];
    const stderr: Buffer[] = [];
    child.stdout!.on("data", (chunk: Buffer) => stdout.push(chunk));
    child.stderr!.on("data", (chunk: Buffer) => stderr.push(chunk));
    const finished = new Promise<Finished>((resolve, reject) => {
      child.on("error", reject);
      child.on("close", (code) =>
        resolve({ code, stdout: Buffer.concat(stdout), stderr: Buffer.concat(stderr).toString() }),
      );
    });
    return Object.assign(finished, { child });
  }

  flags(id = "c1"): string[] {
    return ["-namespace", "test", "-id", id, "-address", "/run/containerd.sock"];
  }

  log(): string {
    try {
      return fs.readFileSync(path.join(this.runDir, "cedanad.log"), "utf8");
    } catch {
      return "";
    }
  }

  path(name: string): string {
    return path.join(this.dir, name);
  }

  mkfifo(name: string): string {
    execFileSync("mkfifo", [this.path(name)]);
    return this.path(name);
  }

  /** A program of the test's own: a shell script. */
  script(name: string, text: string): string {
    fs.writeFileSync(this.path(name), `#!/bin/sh\n${text}\n`, { mode: 0o755 });
    return this.path(name);
  }

  /** A process that has the lock file open and is named in it, as a cedanad that has been started is. */
  async lockHolder(): Promise<number> {
    const lock = `${this.cedanad.socketPath}.lock`;
    const { pid } = spawn("sh", ["-c", `exec 4<"$0"; exec sleep 1000`, lock], { stdio: "ignore" });
    this.pids.push(pid!);
    await until(() => fs.readdirSync(`/proc/${pid}/fd`).includes("4"), { what: () => "its fd" });
    fs.writeFileSync(lock, `${pid}\n`);
    return pid!;
  }

  async client(): Promise<Client> {
    const client = await Client.connect(this.socketPath);
    this.#clients.push(client);
    return client;
  }

  /** What the sanitizers have found so far. */
  findings(): string {
    return fs
      .readdirSync(this.dir)
      .filter((name) => name.startsWith("sanitizer"))
      .map((name) => fs.readFileSync(this.path(name), "utf8"))
      .join("\n");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const client of this.#clients) client.close();
    for (const child of this.#launchers) if (child.exitCode === null) child.kill("SIGKILL");
    const pids = [...this.pids, ...this.cedanad.keepers];
    for (const pid of pids) kill(pid);
    await this.cedanad.end();
    await until(() => pids.every((pid) => !isAlive(pid)), { what: () => `the end of ${pids}` });
    const findings = this.findings();
    fs.rmSync(this.dir, { recursive: true, force: true, maxRetries: 3 });
    if (findings) throw new Error(`the sanitizers report:\n${findings}`);
  }
}

export function kill(pid: number, signal: NodeJS.Signals = "SIGKILL"): void {
  try {
    process.kill(pid, signal);
  } catch {
    // it has ended already
  }
}

/** Whether the process runs; one that only waits to be reaped doesn't. */
export function isAlive(pid: number): boolean {
  try {
    const stat = fs.readFileSync(`/proc/${pid}/stat`, "utf8");
    return stat[stat.lastIndexOf(")") + 2] !== "Z";
  } catch {
    return false;
  }
}

/** A keeper that has been started as containerd does it, and its connection to our cedanad. */
export class Pod extends Ground {
  link!: Link;
  pid = 0;

  static async start(env: Record<string, string> = {}): Promise<Pod> {
    const pod = new Pod(env);
    try {
      await pod.cedanad.listen();
      const { code, stderr } = await pod.launch([...pod.flags(), "start"]);
      if (code !== 0) throw new Error(`start failed: ${stderr}`);
      pod.link = await pod.cedanad.keeper();
      await pod.link.take(messageType.END);
      pod.pid = pod.link.log.find((message) => message.type === messageType.HELLO)!.int("pid");
      pod.pids.push(pod.pid);
    } catch (error) {
      await pod[Symbol.asyncDispose]();
      throw error;
    }
    return pod;
  }

  /** cedanad dies, and another comes; what the keeper tells it, up to END. */
  async replaceCedanad(): Promise<Link> {
    await this.cedanad.die();
    return await this.returnCedanad();
  }

  async returnCedanad(): Promise<Link> {
    await this.cedanad.listen();
    this.link = await this.cedanad.keeper();
    await this.link.take(messageType.END);
    return this.link;
  }

  /** Says goodbye first, so that the sanitizers also look for leaks, which they do at exit. */
  override async [Symbol.asyncDispose](): Promise<void> {
    if (this.link && !this.link.closed && isAlive(this.pid)) {
      kill(this.pid, "SIGCONT");
      this.link.send(messageType.LEAVE);
      this.link.socket.end();
      await this.gone().catch(() => {}); // then it is killed
    }
    await super[Symbol.asyncDispose]();
  }

  /** The keeper has ended by itself. */
  async gone(): Promise<void> {
    await until(() => !isAlive(this.pid), { timeoutMs: 20_000, what: () => "the keeper's end" });
  }
}
