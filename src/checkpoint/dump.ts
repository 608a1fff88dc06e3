import { copyFile, mkdir, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { release } from "node:os";
import { isAbsolute, join, relative } from "node:path";
import type { Logger } from "pino";
import { explainCriuLog } from "../criu/log.ts";
import { criuVersion } from "../criu/version.ts";
import {
  CriuFailed,
  InvalidRequest,
  NotFound,
  SyscallFailed,
  Unsupported,
  WrongState,
} from "../errors/index.ts";
import type { Cgroup } from "../linux/cgroup.ts";
import { hasNetworkSockets } from "../linux/net.ts";
import { type ChainContext, runChain, type Step, timesByStep } from "./chain.ts";
import { freezeMarker, hookNote } from "./freeze-marker.ts";
import { type CheckpointManifest, writeManifest } from "./manifest.ts";
import type { CriuPolicy, NetworkLock } from "./policy.ts";
import { preflight as findBlockers } from "./preflight/preflight.ts";
import { refusalOf } from "./preflight/report.ts";

/*
 * A dump of a container: what is asked for, what is dumped, and the steps in their order.
 *
 * The engine's own `checkpoint` drives CRIU, because it writes what its `restore` wants (descriptors.json, external names). What is
 * around it is ours: the cgroup is frozen before (CRIU's own freezer of cgroups version 1 waits in steps of 100 ms), options are
 * chosen by what the container has, and whatever fails leaves the container as it was.
 *
 * A chain may be cut off by a crash anywhere and be run again by the next cedanad for the same request. Each step is written so that
 * it finds its own work done, and what must be undone after a crash without a repetition lies on disk (`Attempt`, `freezeMarker`).
 */

export interface DumpRequest {
  /** tells this request from others of the same owner: a repetition after a crash has the same */
  readonly key: string;
  /** the request was begun by a cedanad before us */
  readonly repeated: boolean;
  /** directory of CRIU's images: absolute, made when missing; what is in it stays */
  readonly imagePath: string;
  /** CRIU's log and scratch; default: one that is removed */
  readonly workPath?: string | undefined;
  /** images of a pre-dump: absolute, or relative to `imagePath` */
  readonly parentPath?: string | undefined;
  /** the container runs on; else it has ended when the dump is whole */
  readonly leaveRunning: boolean;
  readonly policy: CriuPolicy;
}

/** What CRIU is told by way of the engine. */
export interface EngineDump
  extends Pick<DumpRequest, "imagePath" | "parentPath" | "leaveRunning" | "policy"> {
  readonly workPath: string;
  readonly networkLock: NetworkLock;
}

/** What is dumped, as its owner has it: the shim a task, the OCI runtime a container. */
export interface DumpTarget {
  /** for messages: "task c1" */
  readonly what: string;
  readonly initPid: number;
  /** its owner has paused it, and it stays paused */
  readonly paused: boolean;
  /** it ends when its processes do; then there is nothing to thaw */
  readonly hasEnded: boolean;
  /** directory of the owner's for small files that outlive a crash: the bundle */
  readonly directory: string;
  /** it has a network namespace that isn't the host's */
  readonly ownNetwork: boolean;
  /** where its configuration mounts something: that comes back with it */
  readonly mountPoints: readonly string[];
  /** what the manifest says of it */
  readonly facts: Pick<
    CheckpointManifest,
    "containerId" | "namespace" | "hostname" | "pod" | "generation" | "terminal" | "engine" | "specDigest"
  >;
  readonly log: Pick<Logger, "info" | "warn" | "error">;
  /** what the container wants to do itself before it is dumped, in it, while it runs. @throws when the dump is not to be */
  readonly preDumpHook?: (() => Promise<void>) | undefined;
  cgroup(): Promise<Cgroup>;
  /** The engine's `checkpoint`. @throws WrongState, RuntimeFailed */
  engineCheckpoint(options: EngineDump): Promise<void>;
}

interface DumpContext extends ChainContext {
  readonly target: DumpTarget;
  readonly request: DumpRequest;
  readonly startedAt: number;
  workPath: string;
  /** relative */
  parentPath: string | undefined;
  networkLock: NetworkLock;
  criu: string | undefined;
  /** the processes are in the images alone now */
  ended: boolean;
}

type DumpStep = Step<DumpContext>;

/** The dump, in order. Each step undoes its own work when a later one fails. */
export const dumpSteps = [
  validateDumpRequest,
  openImagePath, // from here on the image path exists, and what we make in it is known
  recordDump, // on the way back, when the container runs again: the manifest, without which images are no checkpoint of ours
  openWorkPath,
  checkOptions, // before anything is frozen
  preDumpHook, // of the container's own; it may be there to remove what the preflight would find
  preflightDump, // every blocker and every option that is missing, while the container runs
  freeze, // nothing below may wait for the container: it stands still
  detectNetwork, // on the frozen container: nobody opens a socket any more
  criuDump,
] as const satisfies readonly DumpStep[];

/**
 * Dumps a running or paused container. When it fails, the container is as it was and the files of the attempt are gone; CRIU's log is
 * kept as `criu-dump.log` in the owner's directory.
 * @returns the times of the steps, in milliseconds
 */
export async function dump(
  target: DumpTarget,
  request: DumpRequest,
  options: { signal?: AbortSignal; onBoundary?: ChainContext["onBoundary"] } = {},
): Promise<Record<string, number>> {
  const context: DumpContext = {
    target,
    request,
    startedAt: Date.now(),
    workPath: "",
    parentPath: undefined,
    networkLock: "default",
    criu: undefined,
    ended: false,
    times: [],
    signal: options.signal ?? new AbortController().signal,
    onBoundary: options.onBoundary,
  };
  await runChain("dump", dumpSteps, context);
  const times = timesByStep(context.times);
  target.log.info({ imagePath: request.imagePath, times }, "dumped");
  return times;
}

async function validateDumpRequest(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request } = context;
  const { imagePath, workPath, parentPath } = request;
  if (imagePath === "") throw new InvalidRequest(`checkpoint of ${target.what} names no image path`);
  if (!isAbsolute(imagePath)) throw new InvalidRequest(`image path ${imagePath} is not an absolute path`);
  if (workPath && !isAbsolute(workPath))
    throw new InvalidRequest(`work path ${workPath} is not an absolute path`);
  if (parentPath) {
    // The engines want it as CRIU's link will have it.
    context.parentPath = isAbsolute(parentPath) ? relative(imagePath, parentPath) : parentPath;
    if (!(await stat(join(imagePath, context.parentPath, "inventory.img")).catch(() => undefined)))
      throw new NotFound(`parent ${parentPath} of checkpoint ${imagePath} holds no images`);
  }
  await next();
}

// ---- image path ------------------------------------------------------------------------------------------------------

/** What was there before, so that a failure removes no more than it made; on disk, for whoever goes on after a crash. */
interface Attempt {
  key: string;
  /** the topmost directory that was made for it */
  made?: string | undefined;
  /** names in the image path that were there */
  before: string[];
}

async function openImagePath(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request } = context;
  const attempt = (await earlierAttempt(target, request)) ?? (await beginAttempt(target, request));
  try {
    await next();
  } catch (error) {
    if (!context.ended) await removeAttempt(request.imagePath, attempt);
    throw error;
  } finally {
    await rm(attemptFile(target), { force: true });
  }
}

async function earlierAttempt(target: DumpTarget, request: DumpRequest): Promise<Attempt | undefined> {
  if (!request.repeated) return undefined;
  const text = await readFile(attemptFile(target), "utf8").catch(() => undefined); // the crash came before it
  const earlier = text === undefined ? undefined : (JSON.parse(text) as Attempt);
  return earlier?.key === request.key ? earlier : undefined;
}

async function beginAttempt(target: DumpTarget, { key, imagePath }: DumpRequest): Promise<Attempt> {
  const made = await mkdir(imagePath, { recursive: true, mode: 0o700 }).catch((error) => {
    throw pathFailure(`make image path ${imagePath}`, error);
  });
  const attempt: Attempt = { key, made, before: made ? [] : await listDirectory(imagePath) };
  await writeFile(`${attemptFile(target)}.new`, JSON.stringify(attempt), { mode: 0o600 });
  await rename(`${attemptFile(target)}.new`, attemptFile(target));
  return attempt;
}

function attemptFile(target: DumpTarget): string {
  return join(target.directory, "checkpoint-attempt.json");
}

/** Half a checkpoint is none: what this attempt made goes. */
async function removeAttempt(imagePath: string, { made, before }: Attempt): Promise<void> {
  if (made) {
    await rm(made, { recursive: true, force: true });
    return;
  }
  for (const name of await listDirectory(imagePath))
    if (!before.includes(name)) await rm(join(imagePath, name), { recursive: true, force: true });
}

async function listDirectory(path: string): Promise<string[]> {
  try {
    return await readdir(path);
  } catch (error) {
    throw new InvalidRequest(`image path ${path} is not a directory that can be read`, { cause: error });
  }
}

/** The caller's path is at fault, unless it is the machine. */
function pathFailure(what: string, error: NodeJS.ErrnoException): Error {
  if (["ENOSPC", "EIO", "EDQUOT", "EMFILE"].includes(error.code ?? "")) return SyscallFailed.from(error);
  return new InvalidRequest(`${what}: ${error.message}`, { cause: error });
}

// ---- work path -------------------------------------------------------------------------------------------------------

async function openWorkPath(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request } = context;
  context.workPath = request.workPath || join(target.directory, "criu-work");
  await mkdir(context.workPath, { recursive: true, mode: 0o700 }).catch((error) => {
    throw pathFailure(`make CRIU's work path ${context.workPath}`, error); // crun fails when it isn't there
  });
  try {
    await next();
  } catch (error) {
    await keepLog(join(context.workPath, "dump.log"), join(target.directory, "criu-dump.log"));
    throw error;
  } finally {
    if (!request.workPath) await rm(context.workPath, { recursive: true, force: true });
  }
}

export async function keepLog(from: string, to: string): Promise<void> {
  await copyFile(from, to).catch(() => undefined); // ENOENT: CRIU was not started
}

// ---- options ---------------------------------------------------------------------------------------------------------

/** Options of CRIU that are younger than the oldest CRIU with which a dump of a container works. */
const criuSince: readonly (readonly [
  what: string,
  version: string,
  wanted: (request: DumpRequest) => boolean,
])[] = [
  [
    "closing TCP connections at the dump (cedana.io/tcp: close)",
    "3.15",
    ({ policy }) => policy.tcp === "close",
  ],
];

async function checkOptions(context: DumpContext, next: () => Promise<void>): Promise<void> {
  context.criu = await criuVersion();
  for (const [what, version, wanted] of criuSince)
    if (context.criu !== undefined && wanted(context.request) && isOlder(context.criu, version))
      throw new Unsupported(`${what} needs CRIU ${version} or newer; this machine has ${context.criu}`);
  await next();
}

/** Versions as CRIU counts them: "4.2.1" against "4.2". */
export function isOlder(version: string, than: string): boolean {
  const [a, b] = [version, than].map((text) => text.split(".").map((part) => Number.parseInt(part, 10) || 0));
  for (let at = 0; at < Math.max(a!.length, b!.length); at++) {
    const difference = (a![at] ?? 0) - (b![at] ?? 0);
    if (difference !== 0) return difference < 0;
  }
  return false;
}

// ---- the container's hook --------------------------------------------------------------------------------------------

/**
 * A container that its owner has paused (as containerd's client and CRI-O do before they ask for a checkpoint) runs as long as its hook
 * does, and stands still again before anything else is done.
 */
async function preDumpHook(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request } = context;
  if (target.preDumpHook === undefined || target.hasEnded) {
    await next();
    return;
  }
  const note = hookNote(target.directory);
  const done = `${request.key}\ndone\n`;
  // Done before a crash: the container may be frozen by now, or CRIU at work on it.
  const isDone = request.repeated && (await readFile(note, "utf8").catch(() => "")) === done; // the crash came before it
  try {
    if (!isDone) {
      const cgroup = target.paused ? await target.cgroup() : undefined;
      await writeFile(note, `${request.key}\n`, { mode: 0o600 });
      try {
        await cgroup?.thaw();
        await target.preDumpHook();
      } finally {
        if (!target.hasEnded) await cgroup?.freeze();
      }
      await writeFile(note, done, { mode: 0o600 });
    }
    await next();
  } finally {
    await rm(note, { force: true });
  }
}

// ---- preflight -------------------------------------------------------------------------------------------------------

async function preflightDump(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request, criu } = context;
  // A repetition has been looked at, and may be in the middle of CRIU's work.
  if (!target.hasEnded && !request.repeated) {
    const { engine, terminal } = target.facts;
    const report = await findBlockers(
      {
        pids: await (await target.cgroup()).pids(),
        rootPid: target.initPid,
        spec: { mountPoints: target.mountPoints, terminal },
        destination: request.imagePath,
        policy: request.policy,
        engine: engine.name === "runc" || engine.name === "crun" ? engine.name : undefined,
        ...(criu !== undefined && { criu: { version: criu } }),
      },
      { signal: context.signal },
    );
    if (!report.ok) throw new WrongState(refusalOf(target.what, report));
  }
  await next();
}

// ---- freezer ---------------------------------------------------------------------------------------------------------

async function freeze(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target } = context;
  if (target.hasEnded) {
    await next(); // by this dump, before a crash: its end is only to be looked at again
    return;
  }
  const cgroup = await target.cgroup();
  const marker = freezeMarker(target.directory);
  if (!target.paused && !(await isDumping(context))) {
    await writeFile(marker, `${context.request.key}\n`, { mode: 0o600 });
    await cgroup.freeze(undefined, context.signal);
  }
  try {
    await next();
  } finally {
    // CRIU and the engine meddle with the freezer, too: paused if it was, running if it was. What ended has no cgroup any more.
    if (!target.hasEnded)
      await putFreezerBack(cgroup, target.paused && !context.ended).catch((error) =>
        target.log.warn({ err: error }, "put the freezer back after a dump"),
      );
    await rm(marker, { force: true });
  }
}

/**
 * Whether the engine was at work for this request when cedanad ended: it goes on, and the freezer is CRIU's until it is done. CRIU thaws a
 * version 1 cgroup when it holds its processes by ptrace; frozen again, they could not run CRIU's parasite, which then waits for ever.
 */
async function isDumping({ target, request }: DumpContext): Promise<boolean> {
  if (!request.repeated) return false;
  const text = await readFile(freezeMarker(target.directory), "utf8").catch(() => ""); // the crash came before it, or after all
  return text === dumpingMark(request);
}

function dumpingMark(request: DumpRequest): string {
  return `${request.key}\ndumping\n`;
}

async function putFreezerBack(cgroup: Cgroup, paused: boolean): Promise<void> {
  const frozen = await cgroup.isFrozen();
  if (frozen && !paused) await cgroup.thaw();
  if (!frozen && paused) await cgroup.freeze();
}

// ---- network ---------------------------------------------------------------------------------------------------------

const NETWORK_LOCK_SKIP_SINCE = "3.18";

async function detectNetwork(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target } = context;
  const canSkip =
    !target.hasEnded && context.criu !== undefined && !isOlder(context.criu, NETWORK_LOCK_SKIP_SINCE);
  if (canSkip && target.ownNetwork && !(await hasNetworkSockets(target.initPid)))
    context.networkLock = "skip";
  await next();
}

// ---- CRIU ------------------------------------------------------------------------------------------------------------

async function criuDump(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request, workPath, parentPath, networkLock } = context;
  const { imagePath, leaveRunning, policy } = request;
  if (!target.paused && !target.hasEnded)
    await writeFile(freezeMarker(target.directory), dumpingMark(request), { mode: 0o600 });
  try {
    await target.engineCheckpoint({ imagePath, workPath, parentPath, leaveRunning, policy, networkLock });
  } catch (error) {
    if (error instanceof WrongState) throw error; // before CRIU was asked
    throw await criuFailure(`dump of ${target.what}`, error as Error, workPath, "dump.log");
  }
  context.ended = !leaveRunning;
  await next();
}

/** The engine's words, then what CRIU's log says was the reason. */
export async function criuFailure(
  what: string,
  failure: Error,
  workPath: string,
  logName: string,
): Promise<Error> {
  if (failure instanceof CriuFailed) return failure; // its owner has looked there
  const summary = await explainCriuLog(join(workPath, logName)).catch(() => undefined); // no log: CRIU was not even started
  if (!summary || summary.errors.length === 0) return failure;
  const lines = [...new Set([summary.firstError, ...summary.errors.slice(-5)])].join("; ");
  const advice = summary.cause ? `. ${summary.cause.advice}` : "";
  return new CriuFailed(`${what} failed in the engine's step (${failure.message}): CRIU: ${lines}${advice}`, {
    cause: failure,
  });
}

// ---- manifest --------------------------------------------------------------------------------------------------------

async function recordDump(context: DumpContext, next: () => Promise<void>): Promise<void> {
  await next();
  const { target, request, startedAt, networkLock, parentPath } = context;
  const { imagePath, policy, leaveRunning } = request;
  try {
    await writeManifest(imagePath, {
      createdAt: new Date(startedAt).toISOString(),
      ...target.facts,
      kernel: release(),
      ...(process.env.CEDANA_BUILD && { cedanaVersion: process.env.CEDANA_BUILD }),
      ...(context.criu !== undefined && { criuVersion: context.criu }),
      options: {
        ...(policy.tcp && { tcp: policy.tcp }),
        fileLocks: policy.fileLocks,
        extUnix: policy.extUnix,
        shellJob: policy.shellJob,
        emptyNamespaces: policy.emptyNamespaces,
        ...(policy.cgroupsMode && { cgroupsMode: policy.cgroupsMode }),
        ...(networkLock !== "default" && { networkLock }),
        leaveRunning,
        ...(parentPath && { parentPath }),
      },
      timings: { ...timesByStep(context.times), totalMs: Date.now() - startedAt },
    });
  } catch (error) {
    if (!context.ended) throw error;
    // The processes are in the images alone now: these stay, whatever fails.
    throw new CriuFailed(
      `${target.what} was dumped into ${imagePath} and has ended, but the manifest could not be written: ${(error as Error).message}. The images are whole; options that a restore needs must be given by annotations`,
      { cause: error },
    );
  }
}
