import { closeSync, constants, openSync } from "node:fs";
import { rm } from "node:fs/promises";
import { Socket } from "node:net";
import { InvalidRequest, PermissionDenied, SyscallFailed, TimedOut, WrongState } from "../errors/index.ts";
import { makeNode, Pidfd } from "../linux/addon.ts";
import type { Cgroup } from "../linux/cgroup.ts";
import { processStat } from "../linux/proc.ts";
import { Slices } from "../linux/slices.ts";
import { configurationPath, readConfiguration } from "./configuration.ts";
import { parseDuration } from "./quantities.ts";
import { annotationsOf, isSandboxContainer, type OciSpec, ownAnnotation, refuseDenied } from "./spec.ts";

/*
 * Commands of the container's own, run in it around its checkpoints:
 *
 *   cedana.io/hook.pre-dump      before a dump looks at the container; its failure refuses the dump
 *   cedana.io/hook.post-restore  when the restored processes run, before the container counts as started; its failure fails the restore
 *   cedana.io/hook-timeout       how long each may take: "10s", "500ms", "1m30s", "7" (seconds); 30 s where nothing is said
 *
 * A value that is a JSON list is executed as these arguments; any other is for the container's `/bin/sh -c`. The administrator
 * has to allow them (`annotations.hooks`): whoever may annotate a pod may not always exec in it.
 *
 * A hook is executed as the container's first process was: same user, directory, environment, limits. Engines make it the leader of a session of
 * its own, by which it is ended whole: what of that session is left when the hook is over, or its time, is killed. So nothing of it gets into a dump.
 */

export type HookName = "pre-dump" | "post-restore";

export interface Hook {
  readonly name: HookName;
  /** for messages: "annotation cedana.io/hook.pre-dump" */
  readonly from: string;
  readonly args: readonly string[];
  readonly timeoutMs: number;
}

const hookNames: readonly HookName[] = ["pre-dump", "post-restore"];
const defaultTimeoutMs = 30_000;
/** Whoever waits for a checkpoint has a limit of its own; an hour is more than any of them. */
const maxTimeoutMs = 60 * 60 * 1000;
/** What is kept of a hook's output: the end of it. */
const maxOutputBytes = 16 * 1024;
/** How much of it an error quotes. */
const quotedCharacters = 1000;
/** A killed process ends as soon as it runs; one that waits for a disk may take its time. */
const endWithinMs = 5_000;

/**
 * The container's hook of that name.
 * @returns undefined when it has none
 * @throws PermissionDenied where the administrator doesn't allow hooks, InvalidRequest for one that can't be understood
 */
export async function hookOf(spec: OciSpec, name: HookName): Promise<Hook | undefined> {
  const setting = ownAnnotation(spec, `hook.${name}`);
  if (setting === undefined) return undefined;
  const { hooks, deny } = (await readConfiguration()).annotations;
  if (!hooks)
    throw new PermissionDenied(
      `${setting.name} is not allowed on this node: hooks run commands in the container, and the administrator has to allow them ("annotations": {"hooks": true} in ${configurationPath()})`,
    );
  refuseDenied(spec, deny);
  return { name, from: setting.name, args: argumentsOf(setting), timeoutMs: timeoutOf(spec) };
}

/** What can't be right about a container's hooks is said when it is created, not at its checkpoint. @throws as `hookOf` */
export async function checkHooks(spec: OciSpec): Promise<void> {
  for (const name of hookNames) await hookOf(spec, name);
  if (isSandboxContainer(spec)) return;
  for (const key of Object.keys(annotationsOf(spec)))
    if (key.startsWith("cedana.io/hook.") && !hookNames.some((name) => isKeyOf(key, name)))
      throw new InvalidRequest(`annotation ${key} names no hook; there are ${hookNames.join(" and ")}`);
}

function isKeyOf(key: string, name: HookName): boolean {
  return key === `cedana.io/hook.${name}` || key.startsWith(`cedana.io/hook.${name}.`);
}

function argumentsOf({ name, value }: { name: string; value: string }): string[] {
  const list = jsonList(value);
  if (list === undefined) {
    if (value.trim() === "" || value.includes("\0"))
      throw new InvalidRequest(
        `${name} is ${JSON.stringify(value)}; it must be a command for /bin/sh, or a JSON list of arguments`,
      );
    return ["/bin/sh", "-c", value];
  }
  const isArgument = (one: unknown): one is string => typeof one === "string" && !one.includes("\0");
  if (list.length === 0 || !list.every(isArgument) || list[0] === "")
    throw new InvalidRequest(`${name} must be a JSON list of strings, of which the first is the program`);
  return list;
}

/** A command may well begin with `[`, the shell's test; hardly one is JSON. */
function jsonList(value: string): unknown[] | undefined {
  try {
    const parsed: unknown = JSON.parse(value);
    return Array.isArray(parsed) ? parsed : undefined;
  } catch {
    return undefined; // a command for the shell
  }
}

function timeoutOf(spec: OciSpec): number {
  const setting = ownAnnotation(spec, "hook-timeout");
  if (setting === undefined) return defaultTimeoutMs;
  const ms = parseDuration(setting.value);
  if (ms === undefined || ms === 0 || ms > maxTimeoutMs)
    throw new InvalidRequest(
      `${setting.name} is ${JSON.stringify(setting.value)}; it must be a time up to 1h such as 10s, 500ms or 1m30s`,
    );
  return ms;
}

/** How a hook went, as an error. @param engineError  the engine's words, when it could not even begin it */
export function hookFailure(
  hook: Hook,
  what: string,
  outcome: { exitStatus?: number; engineError?: string | undefined; output: string },
): Error {
  const { exitStatus, engineError, output } = outcome;
  const quoted = output.length > quotedCharacters ? `… ${output.slice(-quotedCharacters)}` : output;
  const said = quoted === "" ? "it printed nothing" : `it printed: ${quoted}`;
  const subject = `${hook.name} hook of ${what} (${hook.from})`;
  if (exitStatus === undefined)
    return new TimedOut(`${subject} did not end within ${hook.timeoutMs} ms and was killed; ${said}`);
  if (engineError !== undefined) return new WrongState(`${subject} could not be run: ${engineError}`);
  return new WrongState(`${subject} ended with status ${exitStatus}; ${said}`);
}

/**
 * Kills what is left of a hook: every process of its session in the container's cgroup.
 * @param pid  the hook's process, the leader of that session, dead or alive
 * @throws TimedOut naming those that can't be killed
 */
export async function endSession(cgroup: Cgroup, pid: number): Promise<void> {
  const deadline = Date.now() + endWithinMs;
  const { breathe } = new Slices(); // a container may have tens of thousands of processes
  for (;;) {
    const left: number[] = [];
    for (const one of await cgroup.pids()) {
      if (isOfSession(one, pid)) left.push(one);
      const pause = breathe();
      if (pause) await pause;
    }
    if (left.length === 0) return;
    if (Date.now() >= deadline)
      throw new TimedOut(`processes ${left.join(", ")} of a hook are still there after SIGKILL`);
    for (const one of left) killOfSession(one, pid);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

function isOfSession(pid: number, session: number): boolean {
  const stat = processStat(pid);
  return stat !== undefined && stat.session === session && stat.state !== "Z" && stat.state !== "X";
}

/** The fd first, then the look whether it is still that process: so no other one can be hit. */
function killOfSession(pid: number, session: number): void {
  try {
    using process = Pidfd.open(pid);
    if (isOfSession(pid, session)) process.signal(9);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw SyscallFailed.from(error); // it has ended
  }
}

/**
 * A FIFO that a hook's output goes into, of which the end is kept: a container must not fill the host's memory or disk.
 * It has a writer as long as it is open, so the hook may come and go.
 */
export class HookOutput implements AsyncDisposable {
  readonly path: string;
  readonly #socket: Socket;
  readonly #ended: Promise<void>;
  #writer: number | undefined;
  #kept = Buffer.alloc(0);
  #bytes = 0;

  /** @param path  is made, and goes at the end; one that is there is from before a crash, and the hook may still write into it */
  static open(path: string): HookOutput {
    try {
      makeNode(path, constants.S_IFIFO | 0o600);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw SyscallFailed.from(error);
    }
    return new HookOutput(path);
  }

  private constructor(path: string) {
    this.path = path;
    this.#writer = openSync(path, constants.O_RDWR | constants.O_NONBLOCK);
    const fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
    this.#socket = new Socket({ fd, readable: true, writable: false });
    this.#socket.on("data", (data: Buffer) => {
      this.#bytes += data.length;
      this.#kept = Buffer.concat([this.#kept, data]).subarray(-maxOutputBytes);
    });
    this.#ended = new Promise((resolve) => {
      this.#socket.once("close", () => resolve());
      this.#socket.on("error", () => this.#socket.destroy()); // EIO and the like: what has come is what there is
    });
  }

  /** All that has been written, when everybody has closed it; or what has come within `timeoutMs`. */
  async text(timeoutMs = 1_000): Promise<string> {
    if (this.#writer !== undefined) closeSync(this.#writer);
    this.#writer = undefined;
    const timer = setTimeout(() => this.#socket.destroy(), timeoutMs);
    await this.#ended;
    clearTimeout(timer);
    const text = this.#kept.toString("utf8").trim();
    return this.#bytes > maxOutputBytes ? `… (${this.#bytes} bytes) ${text}` : text;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#writer !== undefined) closeSync(this.#writer);
    this.#writer = undefined;
    this.#socket.destroy();
    await this.#ended;
    await rm(this.path, { force: true });
  }
}
