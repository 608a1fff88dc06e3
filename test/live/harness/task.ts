// A container's task and its exec processes, with our ends of their stdio.

import { execFileSync } from "node:child_process";
import { closeSync, constants, mkdtempSync, openSync, readFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import type { Descriptor, ExitState, ProcessState, TaskStatus } from "./client.ts";
import type { Live } from "./live.ts";
import { Output } from "./output.ts";
import { anyJson, anyOf, type Message } from "./proto.ts";
import { processSpec, type SpecOptions } from "./spec.ts";
import { until } from "./until.ts";

export interface StdioOptions {
  terminal?: boolean | undefined;
  /** a FIFO for stdin; without it the container's stdin is /dev/null */
  stdin?: boolean | undefined;
  /** false: no stdout and stderr at all; a string: an URI of ours, as file:// or binary:// */
  stdio?: false | string | undefined;
  /** false: count and hash the output, don't keep it */
  keepOutput?: boolean | undefined;
  /** false: make the FIFOs but let somebody else read them */
  readOutput?: boolean | undefined;
}

/** FIFOs in a directory of their own, and our ends of them. */
export class Stdio {
  readonly stdinPath: string = "";
  readonly stdoutPath: string = "";
  readonly stderrPath: string = "";
  readonly stdout: Output | undefined;
  readonly stderr: Output | undefined;
  #stdin: number | undefined;

  constructor(parent: string, options: StdioOptions) {
    const keep = options.keepOutput ?? true;
    const open = options.readOutput ?? true;
    if (options.stdin || options.stdio === undefined) {
      const directory = mkdtempSync(join(parent, "io-"));
      if (options.stdin) this.stdinPath = join(directory, "stdin");
      if (options.stdio === undefined) {
        this.stdoutPath = join(directory, "stdout");
        if (!options.terminal) this.stderrPath = join(directory, "stderr");
      }
      execFileSync("mkfifo", [this.stdinPath, this.stdoutPath, this.stderrPath].filter(Boolean));
    }
    if (typeof options.stdio === "string") this.stdoutPath = this.stderrPath = options.stdio;
    else if (this.stdoutPath) {
      this.stdout = new Output(this.stdoutPath, { keep, open });
      if (this.stderrPath) this.stderr = new Output(this.stderrPath, { keep, open });
    }
    // Opened for reading too: a FIFO without a reader can't be opened for writing alone.
    if (this.stdinPath) this.#stdin = openSync(this.stdinPath, constants.O_RDWR | constants.O_NONBLOCK);
  }

  write(text: string): void {
    if (this.#stdin === undefined) throw new Error("stdin is not open");
    writeSync(this.#stdin, text);
  }

  closeStdin(): void {
    if (this.#stdin !== undefined) closeSync(this.#stdin);
    this.#stdin = undefined;
  }

  async close(): Promise<void> {
    this.closeStdin();
    await this.stdout?.leave();
    await this.stderr?.leave();
  }
}

/** What init and exec processes have in common. */
export abstract class LiveProcess {
  readonly live: Live;
  readonly containerId: string;
  /** empty for init */
  readonly execId: string;
  readonly io: Stdio;
  pid = 0;
  /** answer of a Wait that was under way before the process was started */
  exited: Promise<ExitState> | undefined;

  constructor(live: Live, containerId: string, execId: string, io: Stdio) {
    this.live = live;
    this.containerId = containerId;
    this.execId = execId;
    this.io = io;
  }

  get stdout(): Output {
    if (!this.io.stdout) throw new Error("this process has no stdout FIFO");
    return this.io.stdout;
  }
  get stderr(): Output {
    if (!this.io.stderr) throw new Error("this process has no stderr FIFO");
    return this.io.stderr;
  }
  nextNumber(timeoutMs?: number): Promise<number> {
    return this.stdout.nextNumber(timeoutMs);
  }
  write(text: string): void {
    this.io.write(text);
  }

  waitEarly(): void {
    this.exited = this.live.client.tasks.wait(this.containerId, this.execId);
    this.exited.catch(() => {}); // whoever wants it awaits it; containerd may go away meanwhile
  }

  async start(): Promise<void> {
    this.pid = (await this.live.client.tasks.start(this.containerId, this.execId)).pid;
  }
  async kill(signal = 9, all = false): Promise<void> {
    await this.live.client.tasks.kill(this.containerId, signal, { execId: this.execId, all });
  }
  /** The exit status, by a Wait of its own. */
  async wait(): Promise<number> {
    return (await this.live.client.tasks.wait(this.containerId, this.execId)).exitStatus;
  }
  state(): Promise<ProcessState> {
    return this.live.client.tasks.get(this.containerId, this.execId);
  }
  async status(): Promise<TaskStatus> {
    return (await this.state()).status;
  }
  async resize(width: number, height: number): Promise<void> {
    await this.live.client.tasks.resizePty(this.containerId, this.execId, width, height);
  }
  /** Our end, then the shim's. */
  async closeStdin(): Promise<void> {
    this.io.closeStdin();
    await this.live.client.tasks.closeIO(this.containerId, this.execId);
  }
  abstract delete(): Promise<number>;
}

export class LiveExec extends LiveProcess {
  async delete(): Promise<number> {
    const { exitStatus } = await this.live.client.tasks.deleteProcess(this.containerId, this.execId);
    return exitStatus;
  }
  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill(9).catch(() => {});
    await this.exited?.catch(() => {});
    await this.delete().catch(() => {});
    await this.io.close();
  }
}

export interface CheckpointOptions {
  exit?: boolean;
  imagePath?: string;
  workPath?: string;
  openTcp?: boolean;
  externalUnixSockets?: boolean;
  terminal?: boolean;
  fileLocks?: boolean;
  emptyNamespaces?: string[];
  cgroupsMode?: string;
  parentPath?: string;
}

let lastCheckpointMs = 0;

export class LiveTask extends LiveProcess {
  readonly id: string;
  #execs = 0;
  #deleted = false;

  constructor(live: Live, id: string, io: Stdio) {
    super(live, id, "", io);
    this.id = id;
  }

  override async start(): Promise<void> {
    if (!this.exited) this.waitEarly();
    await super.start();
  }

  /** Registers a process; `start()` runs it. */
  async addExec(
    options: Pick<SpecOptions, "args" | "cwd" | "env"> & StdioOptions & { execId?: string },
  ): Promise<LiveExec> {
    const execId = options.execId ?? `e${++this.#execs}`;
    const io = new Stdio(this.live.ioDir, options);
    try {
      await this.live.client.tasks.exec({
        containerId: this.id,
        execId,
        stdin: io.stdinPath,
        stdout: io.stdoutPath,
        stderr: io.stderrPath,
        terminal: options.terminal ?? false,
        spec: anyJson("types.containerd.io/opencontainers/runtime-spec/1/Process", processSpec(options)),
      });
    } catch (error) {
      await io.close();
      throw error;
    }
    return new LiveExec(this.live, this.id, execId, io);
  }

  async exec(
    args: string[],
    options: Omit<SpecOptions, "args"> & StdioOptions & { execId?: string } = {},
  ): Promise<LiveExec> {
    const exec = await this.addExec({ ...options, args });
    exec.waitEarly();
    await exec.start();
    return exec;
  }

  /** Runs a process to its end: its exit status and output. */
  async execToEnd(
    args: string[],
    options: StdioOptions = {},
  ): Promise<{ status: number; stdout: string; stderr: string }> {
    const exec = await this.exec(args, options);
    const { exitStatus } = await exec.exited!;
    await exec.delete();
    await exec.io.stdout?.end();
    await exec.io.stderr?.end();
    const result = {
      status: exitStatus,
      stdout: exec.io.stdout?.text ?? "",
      stderr: exec.io.stderr?.text ?? "",
    };
    await exec.io.close();
    return result;
  }

  async pause(): Promise<void> {
    await this.live.client.tasks.pause(this.id);
  }
  async resume(): Promise<void> {
    await this.live.client.tasks.resume(this.id);
  }
  async pids(): Promise<number[]> {
    return (await this.live.client.tasks.pids(this.id)).map((info) => info.pid);
  }

  /**
   * Dumps into a directory (a new one unless `imagePath` names it) and returns it.
   * As containerd's clients do, it doesn't pause the task first; tests that want that do it themselves.
   */
  async checkpoint(options: CheckpointOptions = {}): Promise<string> {
    // With an image path, containerd 1.7 stores a tar of an empty directory beside it, whose only difference from the last is
    // a time in seconds; it refuses the same content twice. Mended in 2.x.
    const sinceLastMs = Date.now() - lastCheckpointMs;
    if (sinceLastMs < 1_100 && this.live.options.containerd !== "2.1")
      await new Promise((resolve) => setTimeout(resolve, 1_100 - sinceLastMs));
    lastCheckpointMs = Date.now();
    const imagePath = options.imagePath ?? mkdtempSync(join(this.live.dir, "image-"));
    const message: Message = { ...options, imagePath };
    await this.live.client.tasks.checkpoint(this.id, anyOf("containerd.runc.v1.CheckpointOptions", message));
    return imagePath;
  }

  /** A checkpoint in containerd's content store. */
  async checkpointToStore(options: CheckpointOptions = {}): Promise<Descriptor[]> {
    const answer = await this.live.client.tasks.checkpoint(
      this.id,
      anyOf("containerd.runc.v1.CheckpointOptions", { ...options }),
    );
    return answer.descriptors;
  }

  /** The bundle directory, while the task exists. */
  get bundle(): string {
    return this.live.bundleOf(this.id);
  }

  /** Path of the TTRPC socket that containerd reaches this task's shim by. */
  shimSocket(): string {
    const text = readFileSync(join(this.bundle, "address"), "utf8").trim();
    return text.replace(/^unix:\/\//, "");
  }

  /** Deletes the task and its container; what the task's Delete answers is the exit status. */
  async delete(): Promise<number> {
    const { exitStatus } = await this.live.client.tasks.delete(this.id);
    this.#deleted = true;
    await this.live.removeContainer(this.id);
    return exitStatus;
  }

  /** Kills, waits, deletes, whatever state the task is in. */
  async destroy(): Promise<void> {
    try {
      if (!this.#deleted) {
        await until(
          async () => {
            const status = await this.status().catch(() => undefined);
            if (status === undefined) return true;
            if (status === "PAUSED") await this.resume().catch(() => {});
            if (status !== "STOPPED") await this.kill(9).catch(() => {});
            return await this.live.client.tasks.delete(this.id).then(
              () => true,
              () => false,
            );
          },
          { timeoutMs: 15_000, everyMs: 20, what: () => `the deletion of task ${this.id}` },
        );
        this.#deleted = true;
        await this.live.removeContainer(this.id);
      }
    } finally {
      await this.io.close();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.destroy();
  }
}
