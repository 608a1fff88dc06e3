import { mkdirSync, rmSync } from "node:fs";
import { readFile, rm, writeFile } from "node:fs/promises";
import { isAbsolute, join, relative } from "node:path";
import type { Logger } from "pino";
import { removeGate } from "../criu/gate.ts";
import { keepKernelCache } from "../criu/kernel-cache.ts";
import { endOfWriters } from "../criu/leftovers.ts";
import { criuVersion } from "../criu/version.ts";
import { learnVersionAnswer } from "../criu/version-answer.ts";
import {
  BrokenImage,
  CriuFailed,
  InvalidRequest,
  messageOf,
  Unsupported,
  WrongState,
} from "../errors/index.ts";
import { pluginsLoaded, pluginVersion } from "../features/registry.ts";
import { expectAnswer } from "../linux/apart.ts";
import { readRecord } from "../linux/record-file.ts";
import { isOlder } from "../linux/versions.ts";
import { adapterSteps } from "./adapters.ts";
import { type ChainContext, runChain, timesByStep } from "./chain.ts";
import {
  ATTEMPT_NAME,
  type Attempt,
  absoluteParent,
  attemptFile,
  type DumpContext,
  type DumpStep,
  finalImagePath,
  imagesIn,
  inHundredths,
  mustSync,
  noteAttempt,
} from "./dump/context.ts";
import { criuDump, meetCriu, openWorkPath, startEngine } from "./dump/criu.ts";
import { digestAlongside, findChanges, takeRootfs } from "./dump/files.ts";
import { askForFacts, finishAttempt, isInPlace, recordDump } from "./dump/manifest.ts";
import { checkParent, isTrackedSince, withoutParent } from "./dump/parent.ts";
import {
  checkpointDevices,
  detectNetwork,
  findDevices,
  freeze,
  isDumping,
  lockDevices,
  takeTurn,
} from "./dump/standstill.ts";
import type { DumpRequest, DumpTarget } from "./dump/target.ts";
import { dumpFeatures, type PluginDump } from "./features.ts";
import { hookNote } from "./freeze-marker.ts";
import { findGpuMounts } from "./gpu-mounts.ts";
import { inventoryDigests } from "./parents.ts";
import { preflight as findBlockers } from "./preflight/preflight.ts";
import { refusalOf } from "./preflight/report.ts";
import { Staging } from "./staging.ts";

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
    parentDigests: [],
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
    ended: begun !== undefined && isInImagesAlone(begun.attempt),
    times: [],
    signal: options.signal ?? new AbortController().signal,
    onBoundary: options.onBoundary,
  };
  await pluginsLoaded();
  try {
    await runChain("dump", dumpSteps.flatMap(withAdapters), context);
  } catch (error) {
    throw context.staging ? await giveUp(context, error) : error;
  }
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
  const paths = [
    "imagePath" in place ? place.imagePath : place.directory,
    workPath,
    parentPath && absoluteParent(request),
  ];
  await Promise.all(paths.map((path) => path && expectAnswer(path)));
  if (parentPath && !context.staging) {
    const [parent, images] = [absoluteParent(request), finalImagePath(request)];
    await checkParent(target.what, { parent, images, shown: parentPath }, context.signal);
  }
  await next();
}

async function waitForMemory({ target, signal }: DumpContext, next: () => Promise<void>): Promise<void> {
  await target.wholeMemory?.(signal);
  await next();
}

// ---- staging ---------------------------------------------------------------------------------------------------------

async function openStaging(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request } = context;
  if (!context.staging) {
    const { place } = request;
    context.staging =
      "imagePath" in place
        ? await Staging.inside(place.imagePath)
        : await Staging.beside(place.directory, place.generation);
    const { key, leaveRunning, parentPath } = request;
    context.attempt = { key, leaveRunning, staging: context.staging.record(), phase: "begun" };
    if (parentPath && !isTrackedSince(target.tracking, absoluteParent(request))) {
      context.attempt.withoutParent = true;
      target.log.warn(withoutParent(target.what, parentPath));
    }
  }
  noteAttempt(context);
  if (request.parentPath && !context.attempt.withoutParent) {
    const parent = absoluteParent(request);
    context.parentPath = relative(imagesIn(context), parent);
    context.parentDigests = await inventoryDigests(parent);
  }
  mkdirSync(imagesIn(context), { recursive: true, mode: 0o700 });
  await next();
  noteAttempt(context, { phase: "committing" });
  await context.staging.commit({ durable: mustSync(context) });
  rmSync(attemptFile(target), { force: true });
}

/**
 * After a failure of any step, also of one before `openStaging`, for which a repetition has a staging directory already. Where the
 * processes are in the images alone, these stay.
 * @returns what the caller is told
 */
async function giveUp({ ended, staging, target }: DumpContext, error: unknown): Promise<unknown> {
  try {
    if (!ended) return error;
    return new CriuFailed(
      `${target.what} was dumped and has ended, but its checkpoint could not be finished: ${messageOf(error)}. What was made is kept in ${staging.keep()}`,
      { cause: error },
    );
  } finally {
    await staging[Symbol.asyncDispose]();
    rmSync(attemptFile(target), { force: true });
  }
}

/** Whether an attempt before a crash has put the processes to their end. */
function isInImagesAlone({ leaveRunning, phase, pastGate }: Attempt): boolean {
  return !leaveRunning && (phase !== "begun" || pastGate === true);
}

/** What a cedanad before us did of this request. `committed`: all of it. */
async function earlierAttempt(
  target: DumpTarget,
  request: DumpRequest,
): Promise<
  { attempt: Attempt; staging: Staging; committed?: undefined } | { committed: string } | undefined
> {
  if (!request.repeated) return undefined;
  const attempt = await readRecord<Attempt>(attemptFile(target));
  if (attempt?.key !== request.key) return undefined; // the crash came before it
  const staging = Staging.resume(attempt.staging);
  if (attempt.phase === "committing" && (!staging || staging.isEmpty)) {
    await staging?.[Symbol.asyncDispose]();
    await rm(attemptFile(target), { force: true });
    return { committed: attempt.staging.finalPath };
  }
  if (!staging) throw new BrokenImage(`${attempt.staging.root}, in which the dump was made, has gone`);
  return { attempt, staging };
}

/** What became of a dump that nobody goes on with; undefined: nothing is left of it. */
export type AbandonedDump =
  /** the container has ended with it, and it was whole: it is in its place */
  | { readonly finished: string }
  /** the container has ended, and it can't be known to be whole: where the images are kept */
  | { readonly kept: string }
  | undefined;

/**
 * After a crash, a dump that nobody goes on with: what was made is removed, or, where the container is in it alone, finished.
 * @param hasEnded  whether the container has; asked when nobody writes into the staging directory any more
 */
export async function abandonAttempt(
  directory: string,
  hasEnded: () => Promise<boolean>,
  log: Pick<Logger, "error">,
): Promise<AbandonedDump> {
  const path = join(directory, ATTEMPT_NAME);
  const attempt = await readRecord<Attempt>(path);
  if (!attempt) return undefined; // none was begun
  const { staging: record, leaveRunning, gate } = attempt;
  const staging = Staging.resume(record);
  if (staging) await endOfWriters(staging.path);
  if (gate) removeGate(gate);
  const isLast = isInImagesAlone(attempt) || (!leaveRunning && (await hasEnded()));
  let left: AbandonedDump;
  if (isLast && (await isInPlace(attempt))) left = { finished: record.finalPath };
  else if (staging && isLast && !staging.isEmpty)
    try {
      left = (await finishAttempt(staging, attempt))
        ? { finished: record.finalPath }
        : { kept: staging.keep() };
    } catch (error) {
      left = { kept: staging.keep() };
      log.error({ err: error, ...left }, "finish a checkpoint with which its container has ended");
    }
  await staging?.[Symbol.asyncDispose]();
  await rm(path, { force: true });
  return left;
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
