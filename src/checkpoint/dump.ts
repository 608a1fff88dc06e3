import { mkdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { copyFile, mkdir, readdir, readFile, rm, rmdir, stat, writeFile } from "node:fs/promises";
import { release } from "node:os";
import { isAbsolute, join, relative, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import type { Logger } from "pino";
import { forgetReads, wasRead } from "../criu/config-file.ts";
import { Gate, type GateOptions, isPassed, removeGate, unbar } from "../criu/gate.ts";
import { keepKernelCache } from "../criu/kernel-cache.ts";
import { endOfWriters, unlockNetwork, waitForCriu } from "../criu/leftovers.ts";
import { explainCriuLog } from "../criu/log.ts";
import { criuVersion } from "../criu/version.ts";
import { learnVersionAnswer } from "../criu/version-answer.ts";
import {
  BrokenImage,
  CriuFailed,
  InvalidRequest,
  messageOf,
  NotFound,
  RuntimeFailed,
  SyscallFailed,
  Unsupported,
  WrongState,
} from "../errors/index.ts";
import { pluginsLoaded, pluginVersion } from "../features/registry.ts";
import { expectAnswer } from "../linux/apart.ts";
import type { Cgroup } from "../linux/cgroup.ts";
import { cgroupYard } from "../linux/cgroup-hierarchy.ts";
import { hasNetworkSockets } from "../linux/net.ts";
import { adapterSteps } from "./adapters.ts";
import { IMAGES_DIRECTORY } from "./archive/layout.ts";
import { type ChainContext, runChain, type Step, timesByStep } from "./chain.ts";
import { cpuFacts } from "./cpu.ts";
import { type DeviceDump, deviceSlot } from "./device-slot.ts";
import { dumpFeatures, type PluginDump } from "./features.ts";
import { digestTree, type Follower, followFiles } from "./follow.ts";
import {
  freezeMarker,
  hookNote,
  readFreezeNote,
  thawNoted,
  thawWherever,
  writeFreezeNote,
} from "./freeze-marker.ts";
import { findGpuMounts } from "./gpu-mounts.ts";
import type { CheckpointManifest, GpuFacts, RootfsDiffFacts } from "./manifest.ts";
import { writeManifest } from "./manifest-files.ts";
import type { CriuPolicy, NetworkLock } from "./policy.ts";
import { preflight as findBlockers } from "./preflight/preflight.ts";
import { refusalOf } from "./preflight/report.ts";
import {
  type Changes,
  DELETED_FILES_NAME,
  overlayLayers,
  prepareRootfsDiff,
  ROOTFS_DIFF_NAME,
  type RootfsBase,
  snapshotOf,
  takeRootfsDiff,
} from "./rootfs-diff/index.ts";
import { isCriuFile, Staging, type StagingRecord } from "./staging.ts";

/*
 * A dump of a container: what is asked for, what is dumped, and the steps in their order.
 *
 * The engine's own `checkpoint` drives CRIU, because it writes what its `restore` wants (descriptors.json, external names). What is
 * around it is ours: the cgroup is frozen before (CRIU's own freezer of cgroups version 1 waits in steps of 100 ms), options are
 * chosen by what the container has, and whatever fails leaves the container as it was.
 *
 * A chain may be cut off by a crash anywhere and be run again by the next cedanad for the same request. Each step is written so that
 * it finds its own work done, and what must be undone after a crash without a repetition lies on disk (`Attempt`, `freezeMarker`,
 * the staging directory, which the next one for that place sweeps).
 */

export interface DumpRequest {
  /** tells this request from others of the same owner: a repetition after a crash has the same */
  readonly key: string;
  /** the request was begun by a cedanad before us */
  readonly repeated: boolean;
  readonly place: DumpPlace;
  /** CRIU's log and scratch; default: one that is removed */
  readonly workPath?: string | undefined;
  /** images of a pre-dump: absolute, or relative to the image path */
  readonly parentPath?: string | undefined;
  /** the container runs on; else it has ended when the dump is whole */
  readonly leaveRunning: boolean;
  readonly policy: CriuPolicy;
  /** what the container has changed in its root file system comes along */
  readonly rootfs?: { readonly exclude: readonly string[]; readonly maxBytes: number } | undefined;
  /** hash the images while CRIU writes them, or when the container runs again */
  readonly digests: "alongside" | "afterwards";
  /** what the manifest says of the request */
  readonly origin?: Pick<CheckpointManifest, "name" | "trigger"> | undefined;
}

/** Where the checkpoint is put. */
export type DumpPlace =
  /** A directory of the caller's, absolute, made when missing: CRIU's images lie in it. `temporary`: the caller reads and removes it. */
  | { readonly imagePath: string; readonly temporary?: boolean }
  /** A directory of our store: the checkpoint becomes a directory in it, with CRIU's images in `checkpoint/`. `temporary`: for now. */
  | { readonly directory: string; readonly generation: string; readonly temporary?: boolean };

/** What the engine is told. */
export interface EngineDump extends Pick<DumpRequest, "parentPath" | "leaveRunning" | "policy"> {
  /** directory of CRIU's images */
  readonly imagePath: string;
  readonly workPath: string;
  /** its CRIU waits at a gate; such an engine is another one than that without, also for a repetition */
  readonly atGate: boolean;
  /** for its environment; CRIU_CONFIG_FILE is always there */
  readonly env: Readonly<Record<string, string>>;
}

/** What CRIU is told past the engine, by its configuration file: only the frozen container shows all of it. */
export interface CriuSettings extends Pick<DumpRequest, "policy"> {
  /** CRIU's own plugins keep away: what they would do is done */
  readonly withoutPlugins: boolean;
  readonly workPath: string;
  readonly networkLock: NetworkLock;
  /** mounts that the engine doesn't know to come from outside, and what CRIU is to call them */
  readonly externalMounts: readonly { readonly key: string; readonly source: string }[];
  /** where all hierarchies of cgroups are mounted, so that CRIU needs to mount none */
  readonly cgroupYard: string | undefined;
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
  /** where its root file system is mounted */
  readonly rootfs?: string | undefined;
  /** What its root file system was made of, where no overlay keeps its changes apart; default: nobody knows. */
  readonly rootfsBase?: {
    /** @throws Unsupported, Unavailable */
    open(signal: AbortSignal): Promise<RootfsBase>;
    /** Removes what a crash has left of `open`. */
    forget(): Promise<void>;
  };
  /** what the manifest says of it */
  readonly facts: Pick<
    CheckpointManifest,
    | "containerId"
    | "namespace"
    | "hostname"
    | "pod"
    | "generation"
    | "terminal"
    | "engine"
    | "specDigest"
    | "namespaces"
    | "plugins"
  >;
  /** The image that it was made of, as far as that can be found out. */
  image?(): Promise<CheckpointManifest["image"]>;
  /** Does something that other calls for the container wait for; default: nobody else calls. */
  inTurn?<T>(work: () => Promise<T>): Promise<T>;
  readonly log: Pick<Logger, "info" | "warn" | "error">;
  /**
   * What the container wants to do itself before it is dumped, in it, while it runs; undefined: nothing.
   * @throws when the administrator doesn't allow it; what is returned, when the dump is not to be
   */
  preDumpHook?(): Promise<(() => Promise<void>) | undefined>;
  cgroup(): Promise<Cgroup>;
  /**
   * Waits until all memory of a container that was restored lazily is there; default: it is.
   * @throws WrongState when it will never be
   */
  wholeMemory?(signal: AbortSignal): Promise<void>;
  /** How the engine's CRIU can be stopped at a gate; undefined where the engine gets CRIU from elsewhere than PATH. */
  gate?(): Promise<GateOptions | undefined>;
  /** Lines of CRIU's configuration file. */
  criuConfig(settings: CriuSettings): Promise<string>;
  /** The engine's `checkpoint`, to its end. @throws WrongState, RuntimeFailed */
  engineCheckpoint(options: EngineDump): Promise<void>;
}

interface DumpContext extends ChainContext {
  readonly target: DumpTarget;
  readonly request: DumpRequest;
  readonly startedAt: number;
  attempt: Attempt;
  staging: Staging;
  workPath: string;
  /** relative to the images where they are made */
  parentPath: string | undefined;
  /** plugins whose adapters were run */
  readonly adapters: NonNullable<CheckpointManifest["plugins"]>;
  networkLock: NetworkLock;
  criu: string | undefined;
  changes: Changes | undefined;
  base: RootfsBase | undefined;
  cgroup: Cgroup | undefined;
  follower: Follower | undefined;
  engine: StartedEngine | undefined;
  /** PATH of the engine */
  enginePath: string | undefined;
  facts: Promise<Facts> | undefined;
  devices: DeviceDump | undefined;
  frozenMs: number;
  criuFrozenMs: number | undefined;
  /** the processes are in the images alone now */
  ended: boolean;
}

type DumpStep = Step<DumpContext>;

/** The dump, in order. Each step undoes its own work when a later one fails. */
export const dumpSteps = [
  validateDumpRequest,
  waitForMemory, // of a container that was restored lazily; CRIU would leave out what isn't there yet, and say nothing
  openStaging, // what is made is beside its place, and put there on the way back, whole
  recordDump, // on the way back, when the container runs again: the manifest, without which images are no checkpoint of ours
  openWorkPath,
  adaptersOfPlugins, // those of all plugins stand here
  preDumpHook, // of the container's own; it may be there to remove what the preflight would find
  startEngine, // beside all that follows: its CRIU comes to a gate, which stays closed until the container stands still
  checkOptions, // before anything is frozen
  findDevices, // whose state CRIU can't take; what can't be dumped is refused by its name
  preflightDump, // every blocker and every option that is missing, while the container runs
  findChanges,
  meetCriu, // nothing is left that could be done while the container runs
  takeTurn, // from here on no other call changes the container's state
  lockDevices, // while the processes run; on the way back they get them again
  freeze, // nothing below may wait for the container: it stands still
  detectNetwork, // on the frozen container: nobody opens a socket any more
  checkpointDevices, // their state goes to the processes' memory, and the devices are let go
  takeRootfs, // files as they are for the memory that CRIU takes
  digestAlongside,
  lateAdaptersOfPlugins, // their last word, on the frozen container
  askForFacts,
  criuDump, // the gate is opened; the engine comes to its end
] as const satisfies readonly DumpStep[];

export interface DumpOutcome {
  /** directory of the checkpoint */
  path: string;
  /** of the steps, milliseconds */
  times: Record<string, number>;
  /** how long the container stood still for us; 0 where it was paused, or frozen by a cedanad before us */
  frozenMs: number;
}

/**
 * Dumps a running or paused container. When it fails, the container is as it was, an older checkpoint in that place too, and the files
 * of the attempt are gone; CRIU's log is kept as `criu-dump.log` in the owner's directory.
 */
export async function dump(
  target: DumpTarget,
  request: DumpRequest,
  options: { signal?: AbortSignal; onBoundary?: ChainContext["onBoundary"] } = {},
): Promise<DumpOutcome> {
  const begun = await earlierAttempt(target, request);
  if (begun?.committed !== undefined) return { path: begun.committed, times: {}, frozenMs: 0 };
  const context: DumpContext = {
    target,
    request,
    startedAt: Date.now(),
    attempt: begun?.attempt as Attempt, // openStaging makes one where there is none
    staging: begun?.staging as Staging,
    workPath: "",
    parentPath: undefined,
    adapters: [],
    networkLock: "default",
    criu: undefined,
    changes: undefined,
    base: undefined,
    cgroup: undefined,
    follower: undefined,
    engine: undefined,
    enginePath: undefined,
    facts: undefined,
    devices: undefined,
    frozenMs: 0,
    criuFrozenMs: undefined,
    ended: false,
    times: [],
    signal: options.signal ?? new AbortController().signal,
    onBoundary: options.onBoundary,
  };
  await pluginsLoaded();
  await runChain("dump", dumpSteps.flatMap(withAdapters), context);
  const outcome = {
    path: context.staging.finalPath,
    times: timesByStep(context.times),
    frozenMs: inHundredths(context.frozenMs),
  };
  // When whoever waits for this dump has been answered: it is for others.
  setImmediate(() => {
    target.log.info({ path: outcome.path, frozenMs: outcome.frozenMs, times: outcome.times }, "dumped");
    keepKernelCache((error) => target.log.info({ err: error }, "CRIU's answers of the kernel are not kept"));
    if (context.enginePath !== undefined) learnVersionAnswer(context.enginePath, target.log);
  });
  return outcome;
}

// ---- plugins ---------------------------------------------------------------------------------------------------------

const ADAPTER_PATIENCE_MS = 60_000;
/** The application stands still meanwhile. */
const LATE_ADAPTER_PATIENCE_MS = 5_000;

function withAdapters(step: DumpStep): DumpStep[] {
  if (step === adaptersOfPlugins)
    return [step, ...adapterSteps(dumpFeatures.dumpMiddleware, ADAPTER_PATIENCE_MS, pluginView, notePart)];
  if (step === lateAdaptersOfPlugins)
    return [
      step,
      ...adapterSteps(dumpFeatures.dumpMiddlewareLate, LATE_ADAPTER_PATIENCE_MS, pluginView, notePart),
    ];
  return [step];
}

/** The manifest names who took part. */
function notePart({ adapters }: DumpContext, name: string): void {
  if (!adapters.some((plugin) => plugin.name === name)) adapters.push({ name, version: pluginVersion(name) });
}

/** The adapters of plugins follow it. */
async function adaptersOfPlugins(_context: DumpContext, next: () => Promise<void>): Promise<void> {
  await next();
}

async function lateAdaptersOfPlugins(_context: DumpContext, next: () => Promise<void>): Promise<void> {
  await next();
}

/** undefined: the images are whole already, or the engine is at work for them; nothing can be asked of the container. */
async function pluginView(context: DumpContext): Promise<PluginDump | undefined> {
  const { target, request, attempt, staging, signal } = context;
  if (target.hasEnded || attempt.phase !== "begun" || (await isDumping(context))) return undefined;
  const { containerId, namespace, engine } = target.facts;
  return {
    containerId,
    namespace,
    engine,
    initPid: target.initPid,
    leaveRunning: request.leaveRunning,
    directory: staging.path,
    imagePath: imagesIn(context),
    repeated: request.repeated,
    signal,
    log: target.log,
    pids: async () => await (await target.cgroup()).pids(),
  };
}

async function validateDumpRequest(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request } = context;
  const { place, workPath, parentPath } = request;
  if ("imagePath" in place) {
    const { imagePath } = place;
    if (imagePath === "") throw new InvalidRequest(`checkpoint of ${target.what} names no image path`);
    if (!isAbsolute(imagePath)) throw new InvalidRequest(`image path ${imagePath} is not an absolute path`);
  }
  if (workPath && !isAbsolute(workPath))
    throw new InvalidRequest(`work path ${workPath} is not an absolute path`);
  // From here on, what is done on these paths may be done at once.
  for (const path of ["imagePath" in place ? place.imagePath : place.directory, workPath])
    if (path) await expectAnswer(path);
  if (parentPath) await expectAnswer(absoluteParent(request));
  if (parentPath && !(await stat(join(absoluteParent(request), "inventory.img")).catch(() => undefined)))
    throw new NotFound(`parent ${parentPath} of the checkpoint of ${target.what} holds no images`);
  await next();
}

async function waitForMemory({ target, signal }: DumpContext, next: () => Promise<void>): Promise<void> {
  await target.wholeMemory?.(signal);
  await next();
}

/** Where the images are in the end. */
function finalImagePath({ place }: DumpRequest): string {
  return "imagePath" in place ? place.imagePath : join(place.directory, place.generation, IMAGES_DIRECTORY);
}

function absoluteParent(request: DumpRequest): string {
  return resolve(finalImagePath(request), request.parentPath!);
}

// ---- staging ---------------------------------------------------------------------------------------------------------

const ATTEMPT_NAME = "checkpoint-attempt.json";

/** What has been done, on disk, for whoever goes on after a crash. */
interface Attempt {
  key: string;
  staging: StagingRecord;
  /** `dumped`: the images are whole; `committing`: the manifest, too, and they are being put in their place */
  phase: "begun" | "dumped" | "committing";
  leaveRunning: boolean;
  rootfsDiff?: RootfsDiffFacts;
  /** the devices' state is in the processes' memory; null: it turned out that nobody has any */
  gpu?: GpuFacts | null;
  /** directory of the gate of the engine that was started early */
  gate?: string | undefined;
  /** an engine has gone past the gate and ended the container: the images are whole, what else belongs to the checkpoint isn't there */
  pastGate?: boolean;
}

async function openStaging(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request } = context;
  if (!context.staging) {
    const { place } = request;
    context.staging =
      "imagePath" in place
        ? await Staging.inside(place.imagePath)
        : await Staging.beside(place.directory, place.generation);
    const { key, leaveRunning } = request;
    context.attempt = { key, leaveRunning, staging: context.staging.record(), phase: "begun" };
  }
  const { staging } = context;
  try {
    noteAttempt(context);
    context.parentPath = request.parentPath && relative(imagesIn(context), absoluteParent(request));
    mkdirSync(imagesIn(context), { recursive: true, mode: 0o700 });
    await next();
    noteAttempt(context, { phase: "committing" });
    await staging.commit({ durable: mustSync(context) });
  } catch (error) {
    if (!context.ended) throw error;
    // The processes are in the images alone now: these stay, whatever fails.
    throw new CriuFailed(
      `${target.what} was dumped and has ended, but its checkpoint could not be finished: ${messageOf(error)}. What was made is kept in ${staging.keep()}`,
      { cause: error },
    );
  } finally {
    await staging[Symbol.asyncDispose]();
    rmSync(attemptFile(target), { force: true });
  }
}

/**
 * Whether the files are written to the disk before they are put in their place: always in our store, and in an image path where an
 * older checkpoint gives way, which `commit` sees. Otherwise a machine that fails loses nothing that was there, and the caller doesn't
 * wait for the disk.
 */
function mustSync({ request: { place } }: DumpContext): boolean {
  return !place.temporary && !("imagePath" in place);
}

/** Where CRIU's images are made. */
function imagesIn({ request: { place }, staging }: DumpContext): string {
  return "imagePath" in place ? staging.path : join(staging.path, IMAGES_DIRECTORY);
}

/** What a cedanad before us did of this request. `committed`: all of it. */
async function earlierAttempt(
  target: DumpTarget,
  request: DumpRequest,
): Promise<
  { attempt: Attempt; staging: Staging; committed?: undefined } | { committed: string } | undefined
> {
  if (!request.repeated) return undefined;
  const text = await readFile(attemptFile(target), "utf8").catch(() => undefined); // the crash came before it
  const attempt = text === undefined ? undefined : (JSON.parse(text) as Attempt);
  if (attempt?.key !== request.key) return undefined;
  const staging = Staging.resume(attempt.staging);
  if (attempt.phase === "committing" && (!staging || staging.isEmpty)) {
    await staging?.[Symbol.asyncDispose]();
    await rm(attemptFile(target), { force: true });
    return { committed: attempt.staging.finalPath };
  }
  if (!staging) throw new BrokenImage(`${attempt.staging.root}, in which the dump was made, has gone`);
  return { attempt, staging };
}

/**
 * After a crash, a dump that nobody goes on with: what was made is removed, or kept where the container is in it alone.
 * @param hasEnded  whether the container has; asked when nobody writes into the staging directory any more
 * @returns where it is kept
 */
export async function abandonAttempt(
  directory: string,
  hasEnded: () => Promise<boolean>,
): Promise<string | undefined> {
  const path = join(directory, ATTEMPT_NAME);
  const text = await readFile(path, "utf8").catch(() => undefined); // none was begun
  if (text === undefined) return undefined;
  const { staging: record, phase, leaveRunning, gate } = JSON.parse(text) as Attempt;
  const staging = Staging.resume(record);
  if (staging) await endOfWriters(staging.path);
  if (gate) await removeGate(gate);
  const isLast = !leaveRunning && (phase !== "begun" || (await hasEnded()));
  const kept = staging && isLast && !staging.isEmpty ? staging.keep() : undefined;
  await staging?.[Symbol.asyncDispose]();
  await rm(path, { force: true });
  return kept;
}

function noteAttempt(context: DumpContext, news: Partial<Attempt> = {}): void {
  Object.assign(context.attempt, news);
  const path = attemptFile(context.target);
  // At once, some 100 us: the container stands still, and a trip through a busy thread pool may take milliseconds.
  writeFileSync(`${path}.new`, JSON.stringify(context.attempt), { mode: 0o600 });
  renameSync(`${path}.new`, path);
}

function attemptFile(target: DumpTarget): string {
  return join(target.directory, ATTEMPT_NAME);
}

/** The caller's path is at fault, unless it is the machine. */
function pathFailure(what: string, error: NodeJS.ErrnoException): Error {
  if (["ENOSPC", "EIO", "EDQUOT", "EMFILE"].includes(error.code ?? "")) return SyscallFailed.from(error);
  return new InvalidRequest(`${what}: ${error.message}`, { cause: error });
}

// ---- work path -------------------------------------------------------------------------------------------------------

const CRIU_LOG = "dump.log";

async function openWorkPath(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request } = context;
  context.workPath = request.workPath || join(target.directory, "criu-work");
  await mkdir(context.workPath, { recursive: true, mode: 0o700 }).catch((error) => {
    throw pathFailure(`make CRIU's work path ${context.workPath}`, error); // crun fails when it isn't there
  });
  // In a directory of the caller's, of an earlier dump: its last word is not this one's.
  if (request.workPath && !request.repeated) await removeLog(context.workPath);
  try {
    await next();
    if (request.digests === "afterwards") context.criuFrozenMs = await criuFrozenMs(context.workPath);
  } catch (error) {
    await keepLog(join(context.workPath, "dump.log"), join(target.directory, "criu-dump.log"));
    throw error;
  } finally {
    if (!request.workPath) rmSync(context.workPath, { recursive: true, force: true }); // a handful of files
  }
}

async function removeLog(workPath: string): Promise<void> {
  const path = join(workPath, CRIU_LOG);
  await rm(path, { force: true }).catch(async () => {
    // A crash of ours may have left what barred CRIU's way there.
    await rmdir(path).catch((error) => {
      throw pathFailure(`remove ${path}, in whose place CRIU writes its log`, error);
    });
  });
}

/** How long CRIU held the container by its own count: the part of the standstill that is not ours. */
async function criuFrozenMs(workPath: string): Promise<number | undefined> {
  const { readDumpStats } = await import("../criu/stats.ts");
  const stats = await readDumpStats(workPath).catch(() => undefined); // what can't be read is left out: nobody needs it to restore
  return stats && inHundredths((stats.freezingUs + stats.frozenUs) / 1000);
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
  const hook = target.hasEnded ? undefined : await target.preDumpHook?.();
  if (!hook) {
    await next();
    return;
  }
  const note = hookNote(target.directory);
  const done = `${request.key}\ndone\n`;
  // Done before a crash: the container may be frozen by now, or CRIU at work on it.
  const isDone = request.repeated && (await readFile(note, "utf8").catch(() => "")) === done; // the crash came before it
  const run = async () => {
    const cgroup = target.paused ? await target.cgroup() : undefined;
    await writeFile(note, `${request.key}\n`, { mode: 0o600 });
    try {
      await cgroup?.thaw();
      await hook();
    } finally {
      if (!target.hasEnded) await cgroup?.freeze();
    }
    await writeFile(note, done, { mode: 0o600 });
  };
  try {
    if (!isDone) await (target.inTurn ? target.inTurn(run) : run()); // nobody pauses or resumes it meanwhile
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
    const gpuMounts = await findGpuMounts(target.initPid, target.mountPoints);
    const report = await findBlockers(
      {
        pids: await (await target.cgroup()).pids(),
        rootPid: target.initPid,
        spec: { mountPoints: [...target.mountPoints, ...gpuMounts.map((one) => one.mountPoint)], terminal },
        destination: context.staging.path,
        policy: request.policy,
        engine: engine.name === "runc" || engine.name === "crun" ? engine.name : undefined,
        ...(criu !== undefined && { criu: { version: criu } }),
        ...(context.devices && { pluginDevices: context.devices.devices }),
      },
      { signal: context.signal },
    );
    if (!report.ok) throw new WrongState(refusalOf(target.what, report));
  }
  await next();
}

// ---- devices ---------------------------------------------------------------------------------------------------------

async function findDevices(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target } = context;
  if (!target.hasEnded) context.devices = await deviceSlot()?.findForDump(target);
  await using _ = { [Symbol.asyncDispose]: async () => await context.devices?.close() };
  await next();
}

async function lockDevices(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { devices, attempt, target } = context;
  if (!devices) {
    await next();
    return;
  }
  try {
    if (attempt.gpu === undefined) await devices.lock();
    await next();
  } catch (error) {
    if (!context.ended) {
      const also = await devices.resume().then(
        () => undefined,
        (failure: Error) => failure,
      );
      if (also) {
        target.log.error({ err: also }, "give devices back after a failed dump");
        if (error instanceof Error) error.message += `; ${also.message}`;
      }
    }
    throw error;
  }
  if (context.ended) return; // nobody is left to get them
  await devices.resume();
  if (attempt.gpu) Object.assign(attempt.gpu, devices.facts(attempt.gpu));
}

async function checkpointDevices(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { devices, attempt } = context;
  if (devices && attempt.gpu === undefined) {
    await devices.checkpoint();
    await noteAttempt(context, { gpu: devices.facts() ?? null });
  }
  await next();
}

// ---- freezer ---------------------------------------------------------------------------------------------------------

async function freeze(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target } = context;
  if (target.hasEnded) {
    await thawNoted(target.directory); // frozen before a crash, and ended while it was
    await next(); // ended by this dump, before a crash: its end is only to be looked at again
    return;
  }
  const cgroup = await target.cgroup();
  const frozen = !target.paused && context.attempt.phase === "begun" && !(await isDumping(context));
  const since = performance.now();
  if (frozen) {
    noteFreeze(context, cgroup, false);
    await cgroup.freeze(undefined, context.signal);
  }
  context.cgroup = cgroup;
  try {
    await next();
  } finally {
    // CRIU and the engine meddle with the freezer, too: paused if it was, running if it was. What has ended is thawed, too.
    await putFreezerBack(cgroup, target.paused && !context.ended && !target.hasEnded).catch((error) =>
      target.log.warn({ err: error }, "put the freezer back after a dump"),
    );
    if (frozen) context.frozenMs = performance.now() - since;
    rmSync(freezeMarker(target.directory), { force: true });
  }
}

function noteFreeze({ target, request }: DumpContext, cgroup: Cgroup, dumping: boolean): void {
  writeFreezeNote(target.directory, { key: request.key, dumping, cgroup: cgroup.toJSON() });
}

/**
 * Whether the engine was at work for this request when cedanad ended: it goes on, and the freezer is CRIU's until it is done. CRIU thaws a
 * version 1 cgroup when it holds its processes by ptrace; frozen again, they could not run CRIU's parasite, which then waits for ever.
 */
async function isDumping({ target, request }: DumpContext): Promise<boolean> {
  if (!request.repeated) return false;
  const note = await readFreezeNote(target.directory); // the crash came before it, or after all
  return note?.key === request.key && note.dumping;
}

async function putFreezerBack(cgroup: Cgroup, paused: boolean): Promise<void> {
  if (!paused) await thawWherever(cgroup);
  else if (!(await cgroup.isFrozen())) await cgroup.freeze();
}

// ---- network ---------------------------------------------------------------------------------------------------------

const NETWORK_LOCK_SKIP_SINCE = "3.18";

async function detectNetwork(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target } = context;
  const canSkip =
    !target.hasEnded && context.criu !== undefined && !isOlder(context.criu, NETWORK_LOCK_SKIP_SINCE);
  if (canSkip && target.ownNetwork && !hasNetworkSockets(target.initPid)) context.networkLock = "skip";
  await next();
}

// ---- files -----------------------------------------------------------------------------------------------------------

/** Before anything is frozen: where the changed files are, and a thread that is ready to read them. */
async function findChanges(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request, signal } = context;
  await using _ = { [Symbol.asyncDispose]: async () => await context.base?.[Symbol.asyncDispose]() };
  // What was dumped past the gate has ended, and its files aren't taken yet.
  const isThere = !target.hasEnded || context.attempt.pastGate;
  if (request.rootfs && !context.attempt.rootfsDiff && isThere) {
    context.changes = await changesOf(context);
    await prepareRootfsDiff(context.changes, request.rootfs.exclude, signal);
  } else if (request.rootfs && request.repeated && context.attempt.rootfsDiff?.source !== "overlay")
    await target.rootfsBase
      ?.forget()
      .catch((error) =>
        target.log.warn({ err: error }, "remove what a dump before a crash was compared with"),
      );
  await next();
}

async function changesOf(context: DumpContext): Promise<Changes> {
  const { target, signal } = context;
  const { rootfs } = target;
  const advice = 'cedana.io/rootfs-diff: "false" leaves them out';
  const what = `changed files of ${target.what} can't be taken`;
  if (rootfs === undefined)
    throw new Unsupported(`${what}: nothing is known of where its root file system is; ${advice}`);
  try {
    return await overlayLayers(rootfs);
  } catch (error) {
    if (!(error instanceof NotFound)) throw error;
    if (!target.rootfsBase)
      throw new Unsupported(
        `${what}: ${messageOf(error)}, and nobody says here what it was made of. Give the container an overlay (Podman's and Docker's driver overlay or overlay2); ${advice}`,
        { cause: error },
      );
  }
  try {
    context.base = await target.rootfsBase.open(signal);
    return await snapshotOf(rootfs, context.base.path, context.base.sameAtNs);
  } catch (error) {
    if (error instanceof Error)
      error.message = `${what}: its root file system is no overlay, and what it was made of can't be had: ${error.message}; ${advice}`;
    throw error;
  }
}

async function takeRootfs(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { request, changes, base, staging, signal } = context;
  if (changes && request.rootfs) {
    const { exclude, maxBytes } = request.rootfs;
    for (const name of [ROOTFS_DIFF_NAME, DELETED_FILES_NAME])
      await rm(join(staging.path, name), { force: true }); // of an attempt before a crash
    const { bytes, members, deleted, sockets } = await takeRootfsDiff(changes, staging.path, {
      exclude,
      maxBytes,
      signal,
    });
    const source = base
      ? ({ source: "snapshot", snapshotter: base.snapshotter } as const)
      : ({ source: "overlay" } as const);
    noteAttempt(context, {
      rootfsDiff: { ...source, bytes, members, deleted, exclude: [...exclude], sockets },
    });
  }
  await next();
}

async function takeTurn({ target }: DumpContext, next: () => Promise<void>): Promise<void> {
  await (target.inTurn ? target.inTurn(next) : next());
}

/** Where it costs no time of its own: the container's owner waits for the end of it all. */
async function digestAlongside(context: DumpContext, next: () => Promise<void>): Promise<void> {
  if (context.request.digests !== "alongside") {
    await next();
    return;
  }
  const { staging, signal } = context;
  const follower = followFiles(staging.path, { images: imagesIn(context), signal });
  try {
    await next();
    context.follower = follower;
  } catch (error) {
    follower.abandon();
    throw error;
  }
}

// ---- CRIU ------------------------------------------------------------------------------------------------------------

/** One that was started before the container was frozen. */
interface StartedEngine {
  /** here and open, or gone through by a cedanad before us */
  readonly gate: Gate | undefined;
  readonly end: Promise<void>;
}

/**
 * Starts the engine early, where its CRIU can be stopped. A repetition after a crash looks what has become of the one that was: CRIU
 * went through, and the engine goes on or has come to its end; or it was sent away with the end of its cedanad, and one without a
 * gate follows.
 */
async function startEngine(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { request, attempt } = context;
  try {
    if (attempt.phase === "begun") {
      if (request.repeated) await findEngine(context);
      else await startAtGate(context);
    }
    await next();
  } finally {
    const { gate, end } = context.engine ?? {};
    gate?.[Symbol.dispose]();
    await end?.catch(() => {}); // told where CRIU is waited for, or sent away
    if (attempt.gate) await removeGate(attempt.gate);
  }
}

async function startAtGate(context: DumpContext): Promise<void> {
  const { target } = context;
  const options = target.hasEnded ? undefined : await target.gate?.();
  if (!options) return;
  context.enginePath = options.path;
  const gate = await Gate.make(target.directory, options, join(context.workPath, CRIU_LOG));
  noteAttempt(context, { gate: gate.directory });
  const end = target.engineCheckpoint({ ...engineDump(context), atGate: true, env: gate.env });
  end.catch(() => {}); // looked at where CRIU is waited for
  context.engine = { gate, end };
}

/** After a crash. */
async function findEngine(context: DumpContext): Promise<void> {
  const { target, attempt } = context;
  if (!attempt.gate || attempt.pastGate) return;
  const env = { CRIU_CONFIG_FILE: join(attempt.gate, "criu.conf") };
  const end = target.engineCheckpoint({ ...engineDump(context), atGate: true, env });
  if (isPassed(attempt.gate)) {
    end.catch(() => {}); // looked at where CRIU is waited for
    context.engine = { gate: undefined, end };
    return;
  }
  const failure = await end.then(
    () => undefined,
    (error: Error) => error, // nobody lets it go any more
  );
  if (failure === undefined) await wentPast(context);
  else await unbar(attempt.gate); // one without a gate follows
}

/** An engine that finds CRIU past the gate fails, as a rule, and is started once more when the container stands still. */
async function meetCriu(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { engine, target } = context;
  if (engine?.gate) {
    const { gate, end } = engine;
    const met = await Promise.race([
      gate.arrived.then(() => "criu" as const),
      end.then(
        () => "success" as const,
        (error: Error) => error,
      ),
    ]);
    if (met === "success") {
      gate[Symbol.dispose]();
      await wentPast(context);
    } else if (met !== "criu") {
      // It may have asked for the version by PATH, and have CRIU elsewhere for the dump.
      const isCrius = !gate.isSeen || /criu/i.test(met.message);
      if (!isCrius || !(met instanceof RuntimeFailed)) throw met;
      gate[Symbol.dispose]();
      await gate.unbar();
      context.engine = undefined;
      target.log.warn(
        { err: met },
        `the engine did not come to CRIU through cedana's gate: started again without. ${KEEP_ENVIRONMENT}`,
      );
    }
  }
  await next();
}

const KEEP_ENVIRONMENT =
  "If it is a script that calls the real one, let it leave PATH, CRIU_CONFIG_FILE and CEDANA_CRIU_GATE as they are";
const END_OF_DUMPED_MS = 10_000;

/**
 * The engine has dumped though CRIU never came through the gate, and not even what bars the way past it has stopped it: the container
 * ran meanwhile, so that nothing of its files and devices that is taken from here on would be of the moment of its memory. One that runs
 * on is dumped once more, standing still; what was made is thrown away. One that has ended with the dump has changed nothing since.
 */
async function wentPast(context: DumpContext): Promise<void> {
  const { target, request, attempt, workPath } = context;
  context.engine = undefined;
  if (request.leaveRunning) {
    const images = imagesIn(context);
    for (const name of await readdir(images))
      if (isCriuFile(name)) await rm(join(images, name), { recursive: true, force: true });
    for (const name of [CRIU_LOG, "stats-dump"])
      await rm(join(workPath, name), { recursive: true, force: true });
    if (attempt.gate) await removeGate(attempt.gate);
    noteAttempt(context, { gate: undefined });
    target.log.warn(
      `the engine dumped ${target.what} past cedana's gate, while it ran: thrown away, and dumped again without. ${KEEP_ENVIRONMENT}`,
    );
    return;
  }
  for (const until = Date.now() + END_OF_DUMPED_MS; !target.hasEnded; await sleep(5))
    if (Date.now() > until)
      throw new CriuFailed(
        `the engine dumped ${target.what} past cedana's gate and said that it had ended, but it runs: nothing is kept of the dump. ${KEEP_ENVIRONMENT}`,
      );
  context.ended = true;
  if (context.devices)
    throw new CriuFailed(
      `the engine dumped ${target.what} past cedana's gate, while it ran: what is on its devices is not in the images. ${KEEP_ENVIRONMENT}`,
    );
  noteAttempt(context, { pastGate: true });
  target.log.warn(
    `the engine dumped ${target.what} past cedana's gate: changed files are taken as they are at its end. ${KEEP_ENVIRONMENT}`,
  );
}

function engineDump(context: DumpContext): Omit<EngineDump, "atGate" | "env"> {
  const { request, workPath, parentPath } = context;
  const { leaveRunning, policy } = request;
  return { imagePath: imagesIn(context), workPath, parentPath, leaveRunning, policy };
}

async function criuDump(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request, workPath, networkLock, engine } = context;
  const { leaveRunning, policy } = request;
  if (context.attempt.phase !== "begun" || context.attempt.pastGate) {
    context.ended = !leaveRunning; // by a cedanad before us, or past the gate
    if (context.attempt.pastGate) noteAttempt(context, { phase: "dumped" });
    await next();
    return;
  }
  if (context.cgroup && !target.paused && !target.hasEnded) noteFreeze(context, context.cgroup, true);
  try {
    if (engine && !engine.gate) await engine.end;
    else {
      const gpuMounts = target.hasEnded ? [] : await findGpuMounts(target.initPid, target.mountPoints);
      const config = await target.criuConfig({
        workPath,
        policy,
        networkLock,
        externalMounts: gpuMounts.map(({ mountPoint, key }) => ({ key: mountPoint, source: key })),
        withoutPlugins: context.devices?.withoutCriuPlugins ?? false,
        cgroupYard: await yardOf(context),
      });
      await engine?.gate?.unbar();
      engine?.gate?.open(config);
      await (engine ? engine.end : runEngine(context, config));
      if (engine?.gate && !engine.gate.isPassed) {
        context.ended = !leaveRunning;
        throw new WentPast(
          `the engine dumped ${target.what} by another CRIU than the one at cedana's gate: whether its files are of the moment of its memory nobody knows. ${KEEP_ENVIRONMENT}`,
        );
      }
    }
  } catch (error) {
    if (error instanceof WrongState || error instanceof WentPast) throw error; // before CRIU was asked; after all
    if (engine?.gate && !engine.gate.isPassed) throw error; // killed in front of it
    // An engine that was killed leaves CRIU behind, which goes on: it may yet put the container to its end.
    if (!(await waitForCriu(workPath, CRIU_ALONE_MS)))
      target.log.error(
        { workPath },
        "CRIU goes on by itself after its engine has ended: not waited for any longer",
      );
    const last = await lastWord(workPath);
    if (last === undefined && networkLock !== "skip" && target.ownNetwork && !target.hasEnded)
      await unlockNetwork(target.initPid).catch((cause) =>
        target.log.warn({ err: cause }, "unlock the network of a container whose dump was cut off"),
      );
    if (last !== "finished")
      throw await criuFailure(`dump of ${target.what}`, error as Error, workPath, "dump.log");
    target.log.warn({ err: error }, "the engine has ended before it could say that CRIU's dump is whole");
  }
  context.ended = !leaveRunning;
  noteAttempt(context, { phase: "dumped" });
  await next();
}

class WentPast extends CriuFailed {}

const CGROUP_YARD_SINCE = "3.14";

async function yardOf({ target, criu }: DumpContext): Promise<string | undefined> {
  if (target.hasEnded || criu === undefined || isOlder(criu, CGROUP_YARD_SINCE)) return undefined;
  return await cgroupYard(target.initPid);
}

/** Without a gate. */
async function runEngine(context: DumpContext, config: string): Promise<void> {
  const { target } = context;
  const configFile = join(target.directory, "criu-dump.conf");
  await writeFile(configFile, config, { mode: 0o600 });
  await forgetReads(configFile);
  const since = Date.now();
  try {
    const PATH = (await target.gate?.())?.path;
    const env = { CRIU_CONFIG_FILE: configFile, ...(PATH !== undefined && { PATH }) };
    await target.engineCheckpoint({ ...engineDump(context), atGate: false, env });
    if (await wasRead(configFile)) return;
    context.networkLock = "default";
    target.log.warn(`CRIU did not get what cedana had to tell it. ${KEEP_ENVIRONMENT}`);
  } catch (error) {
    const log = await stat(join(context.workPath, "dump.log")).catch(() => undefined); // ENOENT: the engine did not come as far as CRIU
    const criuRan = log !== undefined && log.mtimeMs >= since - 1000;
    if (error instanceof RuntimeFailed && criuRan && !(await wasRead(configFile)))
      error.message += `. CRIU did not get what cedana had to tell it. ${KEEP_ENVIRONMENT}`;
    throw error;
  } finally {
    await rm(configFile, { force: true });
  }
}

/** How long a CRIU without an engine may go on: it holds the processes, and has all of their memory to write. */
const CRIU_ALONE_MS = 10 * 60_000;

/** CRIU's last word, in its log alone where nobody was left to hear it; undefined: it was killed, or not even started. */
async function lastWord(workPath: string): Promise<"finished" | "failed" | undefined> {
  const log = await explainCriuLog(join(workPath, "dump.log")).catch(() => undefined); // it was not even started
  const says = (word: RegExp) => log?.lastLines.some((line) => word.test(line));
  if (says(/Dumping finished successfully/)) return "finished";
  return says(/FAILED/) ? "failed" : undefined;
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
  if (!summary) return failure;
  const isCutOff = !summary.lastLines.some((line) => /FAILED|finished successfully/.test(line));
  if (isCutOff && summary.cause === undefined)
    return new CriuFailed(
      `${what} failed in the engine's step (${failure.message}): CRIU was killed: its log is cut off`,
      {
        cause: failure,
      },
    );
  if (summary.errors.length === 0) return failure;
  const lines = [...new Set([summary.firstError, ...summary.errors.slice(-5)])].join("; ");
  const advice = summary.cause ? `. ${summary.cause.advice}` : "";
  return new CriuFailed(`${what} failed in the engine's step (${failure.message}): CRIU: ${lines}${advice}`, {
    cause: failure,
  });
}

// ---- manifest --------------------------------------------------------------------------------------------------------

async function recordDump(context: DumpContext, next: () => Promise<void>): Promise<void> {
  try {
    await next();
  } catch (error) {
    context.follower?.abandon(); // CRIU had done its part, and what came after it failed: nobody asks for the digests any more
    throw error;
  }
  const { target, request, startedAt, staging } = context;
  const [cpu, image] = await context.facts!;
  const files = await (context.follower?.finish() ?? digestTree(staging.path, { signal: context.signal }));
  await writeManifest(
    staging.path,
    {
      createdAt: new Date(startedAt).toISOString(),
      ...target.facts,
      ...(context.adapters.length > 0 && { plugins: [...(target.facts.plugins ?? []), ...context.adapters] }),
      ...request.origin,
      ...(image && { image }),
      ...(context.attempt.rootfsDiff && { rootfsDiff: context.attempt.rootfsDiff }),
      ...(context.attempt.gpu && { gpu: context.attempt.gpu }),
      cpu,
      kernel: release(),
      ...(process.env.CEDANA_BUILD && { cedanaVersion: process.env.CEDANA_BUILD }),
      ...(context.criu !== undefined && { criuVersion: context.criu }),
      options: optionsOf(context),
      timings: {
        ...timesByStep(context.times),
        frozenMs: inHundredths(context.frozenMs),
        ...(context.criuFrozenMs !== undefined && { criuFrozenMs: context.criuFrozenMs }),
        totalMs: Date.now() - startedAt,
      },
    },
    { files, synced: false }, // by the commit, with all the rest
  );
}

type Facts = [cpu: Awaited<ReturnType<typeof cpuFacts>>, image: CheckpointManifest["image"]];

async function factsOf(target: DumpTarget): Promise<Facts> {
  return await Promise.all([cpuFacts(), target.image?.()]);
}

/** The engine is on its way then, and the event loop has nothing else to do until CRIU is done. */
const FACTS_AFTER_MS = 10;

/** What is asked of others for the manifest. Asking containerd takes some ms of the event loop, and here the container may stand still. */
async function askForFacts(context: DumpContext, next: () => Promise<void>): Promise<void> {
  context.facts = sleep(FACTS_AFTER_MS).then(() => factsOf(context.target));
  context.facts.catch(() => {}); // looked at by recordDump
  await next();
}

/** As used: a restore uses them again. */
function optionsOf({ request, networkLock }: DumpContext): CheckpointManifest["options"] {
  const { policy, leaveRunning, parentPath } = request;
  return {
    ...(policy.tcp && { tcp: policy.tcp }),
    fileLocks: policy.fileLocks,
    extUnix: policy.extUnix,
    shellJob: policy.shellJob,
    emptyNamespaces: policy.emptyNamespaces,
    ...(policy.cgroupsMode && { cgroupsMode: policy.cgroupsMode }),
    ...(networkLock !== "default" && { networkLock }),
    leaveRunning,
    ...(parentPath && { parentPath: relative(finalImagePath(request), absoluteParent(request)) }),
  };
}

const inHundredths = (ms: number) => Math.round(ms * 100) / 100;
