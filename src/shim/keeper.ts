import type { Socket } from "node:net";
import { SyscallFailed, TimedOut, Unavailable } from "../errors/index.ts";
import type { SealedCopy } from "../linux/addon.ts";
import type { MountCall } from "../linux/mount-options.ts";
import { errorNames } from "./errno.ts";
import {
  encodeMessage,
  exitStatusOf,
  type FieldValues,
  type Message,
  type MessageType,
  messageType,
} from "./keeper-protocol.ts";

/** Names an operation: the same tag is never carried out twice while its request is unanswered. */
export interface Tag {
  /** the keeper's number of the request; 0: work of our own, which nobody repeats */
  readonly request: number;
  readonly step: string;
}

/** The call on whose behalf something is done. A repetition after a crash has the same number, and so the same tags. */
export interface Work {
  /** the keeper's number of the request */
  readonly request: number;
  /** the request was delivered to a cedanad before us */
  readonly repeated: boolean;
  /** when the request arrived at the keeper, nanoseconds since 1970 */
  readonly sinceNs: bigint;
  tag(step: string): Tag;
}

export interface SpawnOptions {
  argv: readonly string[];
  env?: readonly string[] | undefined;
  cwd?: string | undefined;
  /** key of an open io object whose ends become fds 0, 1 and 2 */
  io?: string | undefined;
  /** the keeper listens here for the pty master */
  consoleSocket?: string | undefined;
  /** stdout and stderr go here instead */
  outputPath?: string | undefined;
  schedCore?: boolean | undefined;
  timeoutMs?: number | undefined;
  /** told its pid when it runs; not of one that a cedanad before us has started */
  onSpawned?: ((pid: number) => void) | undefined;
}

/** How a spawned tool ended. `exitStatus` is 128 + signal when a signal ended it. */
export interface ToolExit {
  pid: number;
  exitStatus: number;
}

export const stdioKind = { none: 0, fifo: 1, file: 2, logProgram: 3 } as const;

export interface IoOptions {
  io: string;
  terminal: boolean;
  stdin: string;
  stdout: string;
  stderr: string;
  stdoutKind: number;
  stderrKind: number;
  uid?: number | undefined;
  gid?: number | undefined;
  driverArgv?: readonly string[] | undefined;
  driverEnv?: readonly string[] | undefined;
  timeoutMs?: number | undefined;
  /** `ALL_PIPES` or nothing */
  flags?: number | undefined;
}

/**
 * Of IO_OPEN: a pipe also where there is nothing behind it. A restored process has what the keeper gives it; the host's /dev/null is on a
 * mount that the container hasn't, so CRIU could not dump it again. (An engine that makes a container opens the container's own instead.)
 */
export const ALL_PIPES = 1;

/** End of a process that the keeper adopted: a container's init, an exec'd process, an orphan. */
export interface AdoptedExit {
  sequence: number;
  pid: number;
  exitStatus: number;
  atNs: bigint;
}

interface PendingOperation {
  what: string;
  onSpawned?: ((pid: number) => void) | undefined;
  resolve: (result: Message) => void;
  reject: (error: Error) => void;
}

/**
 * cedanad's hand on one keeper: mechanism by request, no policy. Everything pending is rejected when the keeper goes away;
 * when cedanad goes away, the next cedanad repeats the request and the keeper answers the operations it has done from memory.
 */
export class Keeper {
  readonly pid: number;
  readonly version: number;
  readonly #socket: Socket;
  readonly #sealedCopyOf: (program: string) => SealedCopy | undefined;
  readonly #pending = new Map<string, PendingOperation>();
  #ownSteps = 0;
  #closed = false;

  /** @param sealedCopyOf  a copy that the keeper executes in a program's place, where there is one */
  constructor(
    socket: Socket,
    pid: number,
    version: number,
    sealedCopyOf: (program: string) => SealedCopy | undefined,
  ) {
    this.#socket = socket;
    this.#sealedCopyOf = sealedCopyOf;
    this.pid = pid;
    this.version = version;
  }

  get connected(): boolean {
    return !this.#closed;
  }

  /** A tag for work that no request asked for. Nothing is remembered of it. */
  ownTag(what: string): Tag {
    this.#ownSteps += 1;
    return { request: 0, step: `${what}#${this.#ownSteps}` };
  }

  /** Runs a tool to its end. @throws SyscallFailed when it can't be started, TimedOut past `timeoutMs` */
  async run(tag: Tag, options: SpawnOptions): Promise<ToolExit> {
    const program = options.argv[0] ?? "";
    const sealed = this.#sealedCopyOf(program);
    const values = {
      argv: options.argv,
      env: options.env,
      cwd: options.cwd,
      io: options.io,
      consoleSocket: options.consoleSocket,
      outputPath: options.outputPath,
      schedCore: options.schedCore ? 1 : undefined,
      timeoutMs: options.timeoutMs,
      sealedFd: sealed?.fd,
      sealedOf: sealed?.of,
    };
    const result = await this.#operate(messageType.SPAWN, tag, program, values, options.onSpawned);
    return { pid: result.int("pid"), exitStatus: exitStatusOf(result.int("waitStatus")) };
  }

  /** kill(2) of a child not yet reaped. @throws SyscallFailed ESRCH when there is none of that pid */
  async signal(tag: Tag, pid: number, signal: number): Promise<void> {
    await this.#operate(messageType.SIGNAL, tag, `signal ${signal} to pid ${pid}`, { pid, signal });
  }

  async mount(tag: Tag, call: MountCall): Promise<void> {
    await this.#operate(messageType.MOUNT, tag, `mount ${call.mountType || call.source} at ${call.target}`, {
      mountType: call.mountType,
      source: call.source,
      target: call.target,
      mountFlags: call.flags,
      mountData: call.data,
      loop: call.loop ? 1 : undefined,
      cwd: call.cwd,
    });
  }

  async unmount(tag: Tag, target: string): Promise<void> {
    await this.#operate(messageType.UNMOUNT, tag, `unmount ${target}`, { target });
  }

  async ioOpen(tag: Tag, options: IoOptions): Promise<void> {
    await this.#operate(messageType.IO_OPEN, tag, `open stdio of ${options.io}`, { ...options });
  }

  async ioResize(tag: Tag, io: string, width: number, height: number): Promise<void> {
    await this.#operate(messageType.IO_RESIZE, tag, `resize the terminal of ${io}`, { io, width, height });
  }

  async ioCloseStdin(tag: Tag, io: string): Promise<void> {
    await this.#operate(messageType.IO_CLOSE_STDIN, tag, `close stdin of ${io}`, { io });
  }

  /** Waits until stdout and stderr have been delivered whole. @returns false when `timeoutMs` passed first */
  async ioDrain(tag: Tag, io: string, timeoutMs: number): Promise<boolean> {
    try {
      await this.#operate(messageType.IO_DRAIN, tag, `drain stdio of ${io}`, { io, timeoutMs });
      return true;
    } catch (error) {
      if (error instanceof TimedOut) return false;
      throw error;
    }
  }

  async ioFree(tag: Tag, io: string): Promise<void> {
    await this.#operate(messageType.IO_FREE, tag, `close stdio of ${io}`, { io });
  }

  /** OOM messages for the container from now on. Does nothing with a keeper of version 1. */
  async watchOom(tag: Tag, id: string, path: string, flags: number): Promise<void> {
    if (this.version < 2) return;
    await this.#operate(messageType.WATCH_OOM, tag, `watch out-of-memory kills of ${id}`, {
      id,
      path,
      flags,
    });
  }

  respond(request: number, frame: Uint8Array): void {
    this.#send(messageType.RESPONSE, { request, frame });
  }

  /** Work on the request begins: if we crash now, it may be to blame. */
  taken(request: number): void {
    this.#send(messageType.TAKEN, { request });
  }

  /** The request only waits from now on: if we crash, it isn't to blame. */
  parked(request: number): void {
    this.#send(messageType.PARKED, { request });
  }

  acknowledge(sequence: number): void {
    this.#send(messageType.ACK, { sequence });
  }

  /** What the keeper answers Connect and Pids with while cedanad is away, and tells the next cedanad. */
  task(id: string, bundle: string, pid: number, execPids: readonly number[]): void {
    this.#send(messageType.TASK, { id, bundle, pid, execPid: execPids });
  }

  taskGone(id: string): void {
    this.#send(messageType.TASK_GONE, { id });
  }

  /** Queues an event for containerd. An event of this key is sent once in the container's life. */
  event(id: string, eventKey: string, frame: Uint8Array): void {
    this.#send(messageType.EVENT, { id, eventKey, frame });
  }

  leave(): void {
    this.#send(messageType.LEAVE, {});
  }

  pong(nonce: number): void {
    this.#send(messageType.PONG, { nonce });
  }

  welcome(build: string): void {
    this.#send(messageType.WELCOME, { version: this.version, pid: process.pid, build });
  }

  /** Takes a SPAWNED to whoever waits for it. */
  spawned(message: Message): void {
    const key = tagKey(message.int("request"), message.string("step"));
    this.#pending.get(key)?.onSpawned?.(message.int("pid"));
  }

  /** Takes a RESULT to whoever waits for it. */
  settle(result: Message): void {
    const key = tagKey(result.int("request"), result.string("step"));
    const pending = this.#pending.get(key);
    if (!pending) return; // asked by the cedanad before us, and not asked again
    this.#pending.delete(key);
    const errno = result.int("errno");
    if (errno === 0) {
      pending.resolve(result);
      return;
    }
    const code = errorNames.get(errno) ?? `errno ${errno}`;
    const detail = result.string("message");
    const text = detail ? `${pending.what}: ${detail}` : `${pending.what}: ${code}`;
    pending.reject(
      code === "ETIMEDOUT"
        ? new TimedOut(text)
        : new SyscallFailed(text, { errno, code, syscall: detail.split(/[\s:(]/, 1)[0] ?? "" }),
    );
  }

  /** Gives the connection up: the keeper comes back. */
  disconnect(): void {
    this.#socket.destroy();
  }

  /** The connection has ended. */
  lost(): void {
    this.#closed = true;
    for (const pending of this.#pending.values())
      pending.reject(new Unavailable(`${pending.what}: the pod's keeper (pid ${this.pid}) is gone`));
    this.#pending.clear();
  }

  #operate(
    type: MessageType,
    tag: Tag,
    what: string,
    values: FieldValues,
    onSpawned?: (pid: number) => void,
  ): Promise<Message> {
    return new Promise((resolve, reject) => {
      if (this.#closed) {
        reject(new Unavailable(`${what}: the pod's keeper (pid ${this.pid}) is gone`));
        return;
      }
      const frame = encodeMessage(type, { request: tag.request, step: tag.step, ...values });
      this.#pending.set(tagKey(tag.request, tag.step), { what, onSpawned, resolve, reject });
      this.#socket.write(frame);
    });
  }

  #send(type: MessageType, values: FieldValues): void {
    if (!this.#closed) this.#socket.write(encodeMessage(type, values));
  }
}

function tagKey(request: number, step: string): string {
  return `${request}/${step}`;
}
