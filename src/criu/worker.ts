import { type ChildProcess, spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { closeSync, constants } from "node:fs";
import { type FileHandle, open, stat, unlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Cancelled, CriuFailed, InvalidRequest, messageOf, TimedOut, Unavailable } from "../errors/index.ts";
import { type Packet, Seqpacket } from "../linux/addon.ts";
import {
  type Features,
  type OptionsInit,
  Request,
  type RequestInit,
  RequestType,
  Response,
  type Version,
} from "../proto/generated/criu_rpc.ts";
import { WireError } from "../proto/wire.ts";
import { type CriuLogSummary, explainCriuLog, summarizeCriuLog } from "./log.ts";
import {
  type AnyOptions,
  type CommonOptions,
  type DumpOptions,
  encodeOptions,
  type RestoreOptions,
} from "./options.ts";

/*
 * A conversation with `criu swrk`, CRIU's RPC over a socket that it inherits.
 *
 *  1. socketpair(2) with SOCK_SEQPACKET: one packet is one message. Both ends CLOEXEC.
 *  2. Spawn CRIU with the far end as fd 3, in a session of its own, so that its helpers can be ended with it.
 *  3. Close our copy of the far end. While it stays open, we never see end of file when CRIU dies.
 *  4. Send the request, and answer every notification: CRIU and the frozen task wait while we think.
 *  5. Wait for the child on success too; its exit status is the last word.
 *
 * CRIU finds directories that we name by descriptor through /proc/<our pid>/fd, so they needn't be inherited; what restored tasks
 * inherit must be, and is given at the start (`fds`).
 *
 * CRIU says why it failed in its log, and only the first line of that in its response. The log, or what it wrote to stderr before
 * there was one, makes the error's message.
 *
 * Source: CRIU images/rpc.proto, cr-service.c, "swrk" mode.
 */

/** What CRIU announces in the middle of its work. Names as its action scripts have them. */
export type NotificationName =
  | "pre-dump"
  | "post-dump"
  | "pre-restore"
  | "post-restore"
  | "pre-resume"
  | "post-resume"
  | "network-lock"
  | "network-unlock"
  | "setup-namespaces"
  | "post-setup-namespaces"
  | "orphan-pts-master"
  | "status-ready"
  | "query-ext-files";

export interface Notification {
  readonly name: NotificationName;
  /** of the root task on the host: setup-namespaces, post-restore */
  readonly pid: number | undefined;
  /** orphan-pts-master: the pty's master, which is now the callback's to close */
  readonly fd: number | undefined;
}

/**
 * CRIU waits until the promise is there. One that rejects ends the dump or restore, and CRIU undoes what it did; the error that CRIU's
 * failure makes has it as its cause.
 * @returns for query-ext-files: keys of more external files
 */
export type NotificationCallback = (
  notification: Notification,
  // biome-ignore lint/suspicious/noConfusingVoidType: most callbacks return nothing
) => void | readonly string[] | Promise<void | readonly string[]>;
export type Notifications = Partial<Record<NotificationName, NotificationCallback>>;

export interface CallOptions {
  /** without any, CRIU isn't asked to notify */
  notifications?: Notifications | undefined;
  /** of the whole call; default: none. CRIU's own `freezeTimeoutS` is gentler, see `start` */
  timeoutMs?: number | undefined;
}

interface StartOptions {
  /** name or path; default "criu" */
  criu?: string | undefined;
  /** see `start` */
  signal?: AbortSignal | undefined;
  /** descriptors that CRIU inherits, for `inheritFds` and `pageServer`; they stay the caller's */
  fds?: readonly number[] | undefined;
  env?: NodeJS.ProcessEnv | undefined;
}

/** How long CRIU may take to undo its work after a refused notification, before it is killed. */
const GRACE_MS = 2_000;
/** CRIU's end comes at once after its last response. */
const EXIT_MS = 10_000;
/** What is kept of stderr. */
const STDERR_BYTES = 64 * 1024;
/** File systems take the time of the last timer interrupt. */
const CLOCK_SLACK_MS = 20;
const FIRST_FD = 4; // 3 is the socket

export class CriuWorker implements AsyncDisposable {
  readonly #child: ChildProcess;
  readonly #socket: Seqpacket;
  readonly #stderr: FileHandle;
  readonly #fds: readonly number[];
  readonly #exited: Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
  readonly #signal: AbortSignal | undefined;
  readonly #onAbort = () =>
    this.#giveUp(new Cancelled("the call of CRIU was cancelled", { cause: this.#signal?.reason }));
  readonly #packets: Packet[] = [];
  #wake: (() => void) | undefined;
  #pageServer: number | undefined;
  /** why the conversation is to end: nothing is waited for any more */
  #givenUp: Error | undefined;
  #refused: (() => void) | undefined;
  #killTimer: NodeJS.Timeout | undefined;
  #busy = false;

  private constructor(
    child: ChildProcess,
    socket: Seqpacket,
    stderr: FileHandle,
    { fds, signal }: StartOptions,
  ) {
    this.#child = child;
    this.#socket = socket;
    this.#stderr = stderr;
    this.#fds = fds ?? [];
    this.#signal = signal;
    this.#exited = new Promise((resolve) => child.once("exit", (code, signal) => resolve({ code, signal })));
    socket.onReadable(() => this.#receive());
    signal?.addEventListener("abort", this.#onAbort, { once: true });
    if (signal?.aborted) this.#onAbort();
  }

  /**
   * Starts CRIU. The caller owns the worker: `await using` kills and reaps it on every way out.
   *
   * Aborting, and a timeout, refuse the next notification, on which CRIU undoes its work, and kill CRIU after 2 s without one. A
   * dump whose CRIU is killed at the wrong moment may leave tasks stopped, or with CRIU's code in them, and a cgroup frozen: the caller
   * thaws it.
   * @throws Unavailable when there is no such program
   */
  static async start(options: StartOptions = {}): Promise<CriuWorker> {
    const { criu = "criu", fds = [], env = process.env } = options;
    if (options.signal?.aborted)
      throw new Cancelled("CRIU was not started: the call was cancelled", { cause: options.signal.reason });
    await using ours = new AsyncDisposableStack(); // until the worker has them
    const stderr = ours.use(await openScratch());
    const pair = Seqpacket.pair();
    ours.use(pair.ours);
    let child: ChildProcess;
    try {
      const stdio = ["ignore", "ignore", stderr.fd, pair.theirs, ...fds] as const;
      child = spawn(criu, ["swrk", "3"], { stdio: [...stdio], detached: true, env });
    } finally {
      closeSync(pair.theirs);
    }
    try {
      await once(child, "spawn");
    } catch (error) {
      throw new Unavailable(`start CRIU (${criu}): ${messageOf(error)}; is it installed?`, { cause: error });
    }
    ours.move();
    return new CriuWorker(child, pair.ours, stderr, options);
  }

  /** Kills it if it still runs, and waits for its end. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#signal?.removeEventListener("abort", this.#onAbort);
    clearTimeout(this.#killTimer);
    if (this.#isAlive) {
      if (this.#pageServer !== undefined) killQuietly(this.#pageServer); // its parent hasn't reaped it: the pid is its own
      this.#kill();
    }
    await this.#exited;
    this.#socket[Symbol.dispose]();
    for (const { fds } of this.#packets) for (const fd of fds) closeSync(fd);
    await this.#stderr.close();
  }

  get pid(): number {
    return this.#child.pid!;
  }

  /**
   * Dumps the tree below a task.
   * @throws CriuFailed with CRIU's first error and what is known about it; InvalidRequest; TimedOut; Cancelled
   */
  async dump(options: DumpOptions, call: CallOptions = {}): Promise<void> {
    await this.#work(RequestType.DUMP, `dump of process ${options.pid}`, options, call, "dump.log");
  }

  /** One round of memory while the tasks run: what they change afterwards is a later dump's. @throws as dump */
  async preDump(options: DumpOptions, call: CallOptions = {}): Promise<void> {
    const what = `pre-dump of process ${options.pid}`;
    await this.#work(
      RequestType.SINGLE_PRE_DUMP,
      what,
      { trackMemory: true, ...options },
      call,
      "pre-dump.log",
    );
  }

  /**
   * Restores a tree; its root becomes a child of whoever adopts CRIU's orphans, or with `sibling` of ours: then nobody but the
   * caller reaps it (Node doesn't: it waits for its own children by pid).
   * @returns the root task's pid on the host
   * @throws as dump
   */
  async restore(options: RestoreOptions, call: CallOptions = {}): Promise<number> {
    const { restore } = await this.#work(RequestType.RESTORE, "restore", options, call, "restore.log");
    if (!restore || restore.pid <= 0) throw new CriuFailed("CRIU restored, but doesn't say which process");
    return restore.pid;
  }

  /** Whether CRIU and kernel can do what a dump needs. @throws CriuFailed with what is missing */
  async check(options: Pick<CommonOptions, "imagesDir" | "logFile" | "logLevel" | "workDir">): Promise<void> {
    await this.#work(RequestType.CHECK, "check", options, {}, "check.log");
  }

  async version(): Promise<Version> {
    const { version } = await this.#call({ type: RequestType.VERSION, keepOpen: true }, "version", {});
    if (!version) throw new CriuFailed("CRIU answers a question for its version without one");
    return version;
  }

  /** What of memory tracking, lazy pages and pidfd store the kernel allows. */
  async features(): Promise<Features> {
    const asked = { memTrack: true, lazyPages: true, pidfdStore: true };
    const request = { type: RequestType.FEATURE_CHECK, features: asked, keepOpen: true };
    const { features } = await this.#call(request, "feature check", {});
    if (!features) throw new CriuFailed("CRIU answers a feature check without features");
    return features;
  }

  /** Writes cpuinfo.img of this machine's CPU into a directory. */
  async dumpCpu(options: Pick<CommonOptions, "imagesDir" | "cpu" | "workDir">): Promise<void> {
    const all = { cpu: "strict", ...options } as const;
    await this.#work(RequestType.CPUINFO_DUMP, "cpuinfo dump", all, {}, "cpuinfo.log");
  }

  /** @throws CriuFailed when this machine's CPU lacks what cpuinfo.img in the directory has */
  async checkCpu(options: Pick<CommonOptions, "imagesDir" | "cpu" | "workDir">): Promise<void> {
    const all = { cpu: "instructions", ...options } as const;
    await this.#work(RequestType.CPUINFO_CHECK, "cpuinfo check", all, {}, "cpuinfo.log");
  }

  /**
   * Receives pages for a directory of images, from one dump on another machine. Ends with the worker.
   * @returns the port, and what waits for its end. @throws (also from `finished`) CriuFailed
   */
  async pageServer(
    options: CommonOptions,
    call: CallOptions = {},
  ): Promise<{ port: number; pid: number; finished: () => Promise<void> }> {
    const type = RequestType.PAGE_SERVER_CHLD;
    const server = { port: 0, ...options.pageServer };
    const log = "page-server.log";
    const { ps } = await this.#work(type, "page server", { ...options, pageServer: server }, call, log, true);
    if (ps?.port === undefined || ps.pid === undefined)
      throw new CriuFailed("CRIU started a page server without a port");
    this.#pageServer = ps.pid;
    const { pid, port } = ps;
    const finished = async () => {
      const { status } = await this.#call(
        { type: RequestType.WAIT_PID, pid },
        "wait for the page server",
        {},
      );
      this.#pageServer = undefined;
      if (status !== 0)
        throw new CriuFailed(`the page server on port ${port} ended with wait status ${status}`);
    };
    return { port, pid, finished };
  }

  /** A request with options: directories opened for the time of it, the log read when it fails. */
  async #work(
    type: number,
    what: string,
    options: AnyOptions & { imagesDir: string | number },
    call: CallOptions,
    logFile: string,
    keepOpen = false,
  ): Promise<Response> {
    await using images = await Directory.open(options.imagesDir, `images of a ${what}`);
    await using work =
      options.workDir === undefined
        ? undefined
        : await Directory.open(options.workDir, `work path of a ${what}`);
    const log = options.logFile ?? logFile;
    const opts: OptionsInit = {
      ...encodeOptions({ ...options, logFile: log }, { images: images.fd, work: work?.fd }, this.#childFd),
      notifyScripts: call.notifications && Object.keys(call.notifications).length > 0 ? true : undefined,
    };
    const startedAt = Date.now();
    const explain = async () => {
      const path = join(`/proc/self/fd/${work?.fd ?? images.fd}`, log);
      // An earlier call's log, which this one has not come to open, would explain the wrong thing.
      if ((await stat(path)).mtimeMs < startedAt - CLOCK_SLACK_MS) return undefined;
      return await explainCriuLog(path);
    };
    return await this.#call({ type, opts, keepOpen }, what, call, explain);
  }

  readonly #childFd = (fd: number): number => {
    const at = this.#fds.indexOf(fd);
    if (at < 0) throw new InvalidRequest(`descriptor ${fd} was not given to CRIU at its start`);
    return FIRST_FD + at;
  };

  async #call(
    request: RequestInit,
    what: string,
    { notifications, timeoutMs }: CallOptions,
    explain?: () => Promise<CriuLogSummary | undefined>,
  ): Promise<Response> {
    if (this.#busy) throw new InvalidRequest(`CRIU is asked for ${what} in the middle of another call`);
    this.#busy = true;
    const timer =
      timeoutMs === undefined
        ? undefined
        : setTimeout(
            () => this.#giveUp(new TimedOut(`CRIU's ${what} took longer than ${timeoutMs} ms`)),
            timeoutMs,
          );
    const failure: { cause?: unknown } = {};
    try {
      this.#send(request);
      for (;;) {
        const response = decode(await this.#next(what, explain));
        if (response.message.type === RequestType.NOTIFY) {
          await this.#notify(response, notifications ?? {}, failure);
          continue;
        }
        for (const fd of response.fds) closeSync(fd); // none is expected here
        if (this.#givenUp && !response.message.success) throw this.#givenUp;
        if (!response.message.success) throw await this.#failed(what, response.message, failure, explain);
        if (request.keepOpen !== true) await this.#end(what, explain);
        return response.message;
      }
    } finally {
      clearTimeout(timer);
      this.#busy = false;
    }
  }

  #send(request: RequestInit): void {
    try {
      this.#socket.send(Request.encode(request));
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      // EPIPE: it has gone, and the next receive says how.
      if (code === "EPIPE" || code === "ECONNRESET") return;
      if (code === "EMSGSIZE")
        throw new InvalidRequest("the options for CRIU are too long for one packet", { cause: error });
      throw error;
    }
  }

  async #notify(
    { message, fds }: { message: Response; fds: readonly number[] },
    notifications: Notifications,
    failure: { cause?: unknown },
  ): Promise<void> {
    const name = (message.notify?.script ?? "") as NotificationName;
    const callback = this.#givenUp ? undefined : notifications[name];
    const [fd, ...more] = fds;
    for (const other of callback ? more : fds) closeSync(other);
    let external: readonly string[] | undefined;
    let success = this.#givenUp === undefined;
    if (callback) {
      const refused = new Promise<never>((_, reject) => {
        this.#refused = () => reject(this.#givenUp);
      });
      try {
        const asked = { name, pid: message.notify?.pid, fd };
        const answer = await Promise.race([callback(asked), refused]);
        if (Array.isArray(answer)) external = answer;
      } catch (error) {
        success = false;
        failure.cause = error;
      } finally {
        this.#refused = undefined;
      }
    }
    const opts = external && { imagesDirFd: -1, external };
    this.#send({ type: RequestType.NOTIFY, notifySuccess: success, opts });
  }

  /** After the last response: the exit status, which must agree. */
  async #end(what: string, explain?: () => Promise<CriuLogSummary | undefined>): Promise<void> {
    const { code, signal } = await this.#exit();
    if (code === 0) return;
    const end = signal ? `was killed by ${signal}` : `ended with exit status ${code}`;
    throw await this.#error(`CRIU's ${what} reported success and ${end}`, code ?? undefined, {}, explain);
  }

  /** It has said its last word: its end comes at once, or is helped along. */
  async #exit(): Promise<{ code: number | null; signal: NodeJS.Signals | null }> {
    const timer = setTimeout(() => this.#kill(), EXIT_MS);
    try {
      return await this.#exited;
    } finally {
      clearTimeout(timer);
    }
  }

  async #failed(
    what: string,
    { crErrno, crErrmsg }: Response,
    failure: { cause?: unknown },
    explain?: () => Promise<CriuLogSummary | undefined>,
  ): Promise<CriuFailed> {
    const errno = crErrno ? ` (errno ${crErrno})` : "";
    const why = failure.cause === undefined ? "" : `: ${messageOf(failure.cause)}`;
    return await this.#error(`CRIU's ${what} failed${errno}${why}`, undefined, failure, explain, crErrmsg);
  }

  async #error(
    message: string,
    exitStatus: number | undefined,
    options: ErrorOptions,
    explain?: () => Promise<CriuLogSummary | undefined>,
    said?: string,
  ): Promise<CriuFailed> {
    const fromStderr = summarizeCriuLog(await this.#readStderr());
    // ENOENT: it failed before it had a log, and stderr has what there is.
    const fromLog = await explain?.().catch(() => undefined);
    const log = fromLog?.firstError !== undefined || fromStderr.lastLines.length === 0 ? fromLog : fromStderr;
    const first = log?.firstError ?? said?.trim() ?? log?.lastLines.at(-1);
    const advice = log?.cause ? ` (${log.cause.advice})` : "";
    return new CriuFailed(`${message}${first ? `: ${first}` : ""}${advice}`, {
      ...options,
      exitStatus,
      log: log && [...log.errors.slice(0, 1), ...log.lastLines].join("\n"),
    });
  }

  async #next(what: string, explain?: () => Promise<CriuLogSummary | undefined>): Promise<Packet> {
    while (this.#packets.length === 0)
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    const packet = this.#packets[0]!;
    if (packet.data.length > 0) return this.#packets.shift()!;
    // The end of file stays in the queue: there is nothing behind it.
    const { code, signal } = await this.#exit();
    if (this.#givenUp) throw this.#givenUp;
    const end = signal ? `was killed by ${signal}` : `ended with exit status ${code}`;
    throw await this.#error(`CRIU ${end} in the middle of its ${what}`, code ?? undefined, {}, explain);
  }

  #receive(): void {
    if (this.#packets.at(-1)?.data.length === 0) return;
    for (;;) {
      let packet: Packet | undefined;
      try {
        packet = this.#socket.receive();
      } catch (error) {
        this.#giveUp(new CriuFailed(`receive from CRIU: ${messageOf(error)}`, { cause: error }));
        packet = { data: Buffer.alloc(0), fds: [] };
      }
      if (!packet) break;
      this.#packets.push(packet);
      if (packet.data.length === 0) {
        this.#socket.ended();
        break;
      }
    }
    this.#wake?.();
  }

  #giveUp(why: Error): void {
    if (this.#givenUp) return;
    this.#givenUp = why;
    this.#refused?.();
    this.#killTimer = setTimeout(() => this.#kill(), GRACE_MS);
  }

  get #isAlive(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }

  /** With its helpers and what of a restore isn't in a session of its own yet. */
  #kill(): void {
    if (this.#isAlive) killQuietly(-this.pid);
  }

  async #readStderr(): Promise<string> {
    const { size } = await this.#stderr.stat();
    const buffer = Buffer.alloc(Math.min(size, STDERR_BYTES));
    const { bytesRead } = await this.#stderr.read(buffer, 0, buffer.length, Math.max(0, size - STDERR_BYTES));
    return buffer.toString("utf8", 0, bytesRead);
  }
}

function decode({ data, fds }: Packet): { message: Response; fds: readonly number[] } {
  try {
    return { message: Response.decode(data), fds };
  } catch (error) {
    for (const fd of fds) closeSync(fd);
    if (!(error instanceof WireError)) throw error;
    throw new CriuFailed(`CRIU sent a packet that is no response: ${error.message}`, { cause: error });
  }
}

function killQuietly(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error; // it ended meanwhile
  }
}

/** A file without a name: unlike a pipe it is never full, and a helper that lives on doesn't keep us waiting for its end. */
async function openScratch(): Promise<FileHandle> {
  const path = join(tmpdir(), `cedana-criu-${randomUUID()}`);
  const flags = constants.O_RDWR | constants.O_CREAT | constants.O_EXCL | constants.O_APPEND;
  const file = await open(path, flags, 0o600);
  await unlink(path);
  return file;
}

/** A directory that we opened, or that the caller has open. */
class Directory implements AsyncDisposable {
  readonly fd: number;
  readonly #handle: FileHandle | undefined;

  private constructor(fd: number, handle?: FileHandle) {
    this.fd = fd;
    this.#handle = handle;
  }

  static async open(directory: string | number, what: string): Promise<Directory> {
    if (typeof directory === "number") return new Directory(directory);
    try {
      const handle = await open(directory, constants.O_RDONLY | constants.O_DIRECTORY);
      return new Directory(handle.fd, handle);
    } catch (error) {
      throw new InvalidRequest(`open the ${what}, ${directory}: ${messageOf(error)}`, { cause: error });
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#handle?.close();
  }
}
