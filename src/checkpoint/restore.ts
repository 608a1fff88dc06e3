import { mkdir, realpath, rm, rmdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { keepKernelCache } from "../criu/kernel-cache.ts";
import { Unavailable, Unsupported } from "../errors/index.ts";
import { pluginsLoaded } from "../features/registry.ts";
import type { Cgroup } from "../linux/cgroup.ts";
import { readMountInfo } from "../linux/mount-options.ts";
import { readRecord, writeRecordNow } from "../linux/record-file.ts";
import { adapterSteps } from "./adapters.ts";
import { runChain, type Step, timesByStep } from "./chain.ts";
import { type ChangedImage, changedImages, linkImages, withoutOtherHierarchies } from "./changed-images.ts";
import { compareFilesWithDiff, type ExternalMount } from "./compare.ts";
import { criuFailure, keepLog } from "./criu-failure.ts";
import { type DeviceRestore, deviceSlot } from "./device-slot.ts";
import { type PluginRestore, restoreFeatures } from "./features.ts";
import { refusalOfRestore } from "./finding.ts";
import { makeMountPoint } from "./gpu-mounts.ts";
import { withHostname } from "./identity.ts";
import type { LazyRestore, LazyTarget } from "./lazy/begin.ts";
import type { CheckpointManifest, ContainerIdentity } from "./manifest.ts";
import { isThere, type OpenCheckpoint } from "./open.ts";
import type { CriuPolicy } from "./policy.ts";
import {
  type ChainOptions,
  type CheckContext,
  checkContext,
  comparingChecks,
  openingChecks,
  type RestoreCandidate,
  type RestoreLook,
} from "./restore/checks.ts";
import { freeIds, type SharedPids } from "./restore/ids.ts";
import { writeRestoredFile } from "./restored-file.ts";
import { applyRootfsDiff, hasRootfsDiff } from "./rootfs-diff/index.ts";
import { UnpackedCheckpoint } from "./unpack.ts";

/*
 * A restore of a container: what is asked for, what it becomes, and the steps in their order.
 *
 * The engine's own `restore` drives CRIU, because it alone can write the engine's state. What is around it is ours: what is wrong with
 * the checkpoint, or differs between it and the container or the node, is found before anything is made, all of it; the container's
 * files, network and cgroup are made ready; and whatever fails leaves nothing of the container.
 *
 * A chain may be cut off by a crash anywhere and be run again by the next cedanad for the same request: the owner's engine goes on
 * meanwhile, and a repetition waits for it instead of starting another. So each step finds its own work done. What a crash without a
 * repetition leaves lies in the owner's directory, whose deletion takes `discardRestore`.
 */

export interface RestoreRequest extends RestoreLook {
  /** tells this request from others of the same owner: a repetition after a crash has the same */
  readonly key: string;
  /** the request was begun by a cedanad before us */
  readonly repeated: boolean;
  /** CRIU's log and scratch; default: one that is removed */
  readonly workPath?: string | undefined;
}

/** What CRIU is told by way of the engine. */
export interface EngineRestore {
  /** directory of CRIU's images */
  readonly imagePath: string;
  readonly workPath: string;
  readonly policy: CriuPolicy;
  /** memory is left to the page daemon that listens in the work path */
  readonly lazy: boolean;
  /** CRIU's own plugins keep away: what they would do is done by others */
  readonly withoutPlugins: boolean;
  /** besides those that the engine tells CRIU of */
  readonly externalMounts: readonly ExternalMount[];
}

/** As much of it as is known when the checkpoint is open. */
export type EarlyRestore = Pick<EngineRestore, "imagePath" | "workPath" | "policy">;

/** What is restored, as its owner has it: the shim a task, the OCI runtime a container. */
export interface RestoreTarget extends RestoreCandidate {
  /** who it is now */
  readonly identity: ContainerIdentity;
  /** who chose the checkpoint */
  readonly why: "caller" | "annotation";
  /** on the host, once the engine has restored it */
  readonly initPid: number;
  /** the restored processes have ended already, as short work does */
  readonly hasEnded: boolean;
  /** What the container wants to do itself before it counts as restored. @param env  what it is told. @throws when it is not to be */
  readonly postRestoreHook?: ((env: readonly string[]) => Promise<void>) | undefined;
  /** Does what the caller needn't wait for when he has been told; undefined: all is done before. */
  readonly afterwards?: ((work: () => Promise<void>) => void) | undefined;
  /** Remembers for the next dump how many restores there have been. */
  setGeneration(generation: number): Promise<void>;
  /** root of the file system that the container will have, when a checkpoint's rootfs diff goes there; else its owner has seen to that */
  readonly rootfs?: string | undefined;
  /** Before the rootfs diff is applied: what can't be undone then is refused. */
  allowRootfsDiff?(): Promise<void>;
  /** The configuration is as the engine's restore needs it; put back when that is done. */
  prepareConfiguration(): Promise<void>;
  putConfigurationBack(): Promise<void>;
  /** The container's cgroup is where its configuration says, whatever the images say. */
  prepareCgroup(policy: CriuPolicy): Promise<void>;
  removeCgroup(): Promise<void>;
  /** hierarchies of version 1 beside the one of version 2 in which the container's cgroup is: those are others' */
  readonly hasOtherHierarchies: boolean;
  /** which device becomes which (`cedana.io/gpu-map`) */
  readonly deviceMap?: string | undefined;
  /** undefined: it has a pid namespace of its own */
  readonly sharedPids?: SharedPids | undefined;
  /** the engine's restore returns when the container has ended, not when it runs */
  readonly inForeground?: boolean;
  /** Of the restored container. */
  cgroup(): Promise<Cgroup>;
  /**
   * Starts the engine before its time, if that can be done without a trace: `engineRestore` lets it go, or starts another.
   * @param options  as they are by now. They may turn out otherwise
   */
  startEngine?(options: EarlyRestore): Promise<void>;
  /**
   * Ends one that `engineRestore` hasn't let go.
   * @returns whether it went its own way, and there may be something to be undone
   */
  dropEngine?(): Promise<boolean>;
  /** The engine's `restore`. On return the container runs, and its owner knows its pid. @throws RuntimeFailed */
  engineRestore(options: EngineRestore): Promise<void>;
  /** After a failure: nothing of CRIU goes on. @param workPath  where it works */
  endCriu(workPath: string): Promise<void>;
  /** Then: no process and nothing of the engine's state stays. */
  undoEngineRestore(options: Pick<EngineRestore, "lazy">): Promise<void>;
  /** where the engine shows CRIU the root file system */
  readonly criuRoots: readonly string[];
  /** Unmounts what CRIU or the engine, killed, has left mounted. */
  unmount(mountPoint: string): Promise<void>;
  /** The container wants to start before its memory is there; undefined: it doesn't, or its owner can't. */
  readonly lazy?: LazyTarget | undefined;
}

export interface RestoreContext extends CheckContext {
  readonly target: RestoreTarget;
  readonly request: RestoreRequest;
  workPath: string;
  /** the images as CRIU is to see them: those of the checkpoint, or links to them */
  engineImages: string | undefined;
  devices: DeviceRestore | undefined;
  /** from `startPageDaemon` on, where there is one */
  lazy: LazyRestore | undefined;
  /** set when a lazy restore has failed and an eager one may not */
  whyNotLazy: string | undefined;
}

type RestoreStep = Step<RestoreContext>;

/** The restore, in order. Each step undoes its own work when a later one fails. */
export const restoreSteps = [
  ...openingChecks,
  startEngineEarly, // beside what follows: its CRIU waits at a gate until `criuRestore`
  ...comparingChecks,
  reserveIds, // those of processes, where others live in their namespace; waits for who has one for a moment, refuses what stays
  adaptImages, // for another host name, and other hierarchies of cgroups
  recordRestore, // from here on a repetition goes on, whatever has become of the checkpoint: the container may run already
  openRestoreWorkPath,
  restoreAdaptersOfPlugins, // those of all plugins stand here
  prepareDevices, // whether they can be had here
  prepareRootfs,
  prepareConfiguration,
  prepareCgroup,
  prepareMountPoints,
  startPageDaemon, // where the container wants it, and it can be had; from here on somebody fills memory
  lateRestoreAdaptersOfPlugins,
  criuRestore, // the container runs from here on; when what follows fails, it is ended
  makeDeviceNodes, // the new container's, which the driver opens by their names
  restoreDevices, // before anybody is told that the container runs
  tellContainer, // restore.json, for the hook to read
  postRestoreHook, // of the container's own, last: it may use all that it has
] as const satisfies readonly RestoreStep[];

/**
 * Restores a container. When it fails, nothing of the container is left, and CRIU's log is kept as `criu-restore.log` in the owner's
 * directory. When it succeeds, what a repetition needs stays until `discardRestore`.
 * @returns the times of the steps, in milliseconds
 */
export async function restore(
  target: RestoreTarget,
  request: RestoreRequest,
  options: ChainOptions = {},
): Promise<Record<string, number>> {
  const attempt = await earlierRestore(target.directory, request);
  const begin = (): RestoreContext => ({
    ...checkContext(target, request, options),
    ...attempt,
    target,
    request,
    workPath: "",
    engineImages: attempt?.engineImages,
    devices: undefined,
    lazy: undefined,
    whyNotLazy: undefined,
  });
  await pluginsLoaded();
  const run = async (steps: readonly RestoreStep[], context: RestoreContext) => {
    await runChain("restore", steps.flatMap(withRestoreAdapters), context);
  };
  let context = begin();
  try {
    await run(attempt ? restoreSteps.slice(restoreSteps.indexOf(reserveIds)) : restoreSteps, context);
  } catch (error) {
    const { whyNotLazy } = context;
    if (whyNotLazy === undefined) throw error;
    target.log.warn({ err: error }, "the lazy restore failed; once more, eagerly");
    context = { ...begin(), whyNotLazy };
    await run(restoreSteps, context);
  }
  keepKernelCache((error) => target.log.info({ err: error }, "CRIU's answers of the kernel are not kept"));
  const times = timesByStep(context.times);
  target.log.info({ checkpoint: request.path, lazy: context.lazy !== undefined, times }, "restored");
  return times;
}

/**
 * Removes what a restore keeps for a repetition, when there can be none any more: it is on record as done, or its owner goes. After a lazy
 * restore only when the page daemon has ended: it reads what was unpacked.
 * @param unpackRoot  as in the request
 */
export async function discardRestore(directory: string, unpackRoot: string | undefined): Promise<void> {
  if (unpackRoot !== undefined) await new UnpackedCheckpoint(unpackRoot, directory).remove();
  await rm(changedImages(directory), { recursive: true, force: true });
  await rm(defaultWorkPath(directory), { recursive: true, force: true });
  await rm(restoreAttemptFile(directory), { force: true });
  await rm(appliedMark(directory), { force: true });
}

// ---- the engine, early ---------------------------------------------------------------------------------------------

async function startEngineEarly(context: RestoreContext, next: () => Promise<void>): Promise<void> {
  const { checkpoint, policy, target } = context;
  try {
    await target.startEngine?.({ imagePath: checkpoint.imagePath, workPath: workPathOf(context), policy });
    await next();
  } finally {
    await dropEngine(context);
  }
}

async function dropEngine(context: RestoreContext): Promise<void> {
  const { target } = context;
  const left = await target.dropEngine?.().catch((error) => {
    target.log.error({ err: error }, "end the engine of a restore that is not to be");
  });
  if (left) await undoEngine(target, workPathOf(context), false);
}

// ---- process ids -----------------------------------------------------------------------------------------------------

/** Without facts an engine of before a crash may have restored it: the ids are its own. */
async function reserveIds(
  { facts, request, target }: RestoreContext,
  next: () => Promise<void>,
): Promise<void> {
  if (target.sharedPids && facts) {
    const refusal = refusalOfRestore(request.path, await freeIds(facts.ids, target.sharedPids, target.log));
    if (refusal) throw refusal;
  }
  await next();
}

// ---- images ----------------------------------------------------------------------------------------------------------

async function adaptImages(context: RestoreContext, next: () => Promise<void>): Promise<void> {
  const { checkpoint, facts, target } = context;
  const { container, directory } = target;
  let isMade = false;
  try {
    if (facts) {
      const { imagePath } = checkpoint;
      const changes = [
        await withHostname(imagePath, facts, container.hostname),
        target.hasOtherHierarchies ? await withoutOtherHierarchies(imagePath) : undefined,
      ].filter((change): change is ChangedImage => change !== undefined);
      if (changes.length > 0) {
        isMade = true;
        await linkImages(imagePath, directory, changes);
        context.engineImages = changedImages(directory);
      }
    }
    await next();
  } finally {
    if (isMade) await rm(changedImages(directory), { recursive: true, force: true });
  }
}

// ---- plugins ---------------------------------------------------------------------------------------------------------

const ADAPTER_PATIENCE_MS = 60_000;

function withRestoreAdapters(step: RestoreStep): RestoreStep[] {
  if (step === restoreAdaptersOfPlugins)
    return [step, ...adapterSteps(restoreFeatures.restoreMiddleware, ADAPTER_PATIENCE_MS, restoreView)];
  if (step === lateRestoreAdaptersOfPlugins)
    return [step, ...adapterSteps(restoreFeatures.restoreMiddlewareLate, ADAPTER_PATIENCE_MS, restoreView)];
  return [step];
}

/** The adapters of plugins follow it. */
async function restoreAdaptersOfPlugins(_context: RestoreContext, next: () => Promise<void>): Promise<void> {
  await next();
}

async function lateRestoreAdaptersOfPlugins(
  _context: RestoreContext,
  next: () => Promise<void>,
): Promise<void> {
  await next();
}

async function restoreView({ target, request, checkpoint, signal }: RestoreContext): Promise<PluginRestore> {
  const { path, imagePath, manifest } = checkpoint;
  return {
    what: target.what,
    bundle: target.directory,
    directory: path,
    imagePath,
    dumped: manifest && { containerId: manifest.containerId, namespace: manifest.namespace },
    repeated: request.repeated,
    signal,
    log: target.log,
  };
}

// ---- the attempt -----------------------------------------------------------------------------------------------------

/** What has been found and decided, on disk for whoever goes on after a crash. */
interface RestoreAttempt {
  key: string;
  checkpoint: OpenCheckpoint;
  policy: CriuPolicy;
  externalMounts: readonly ExternalMount[];
  engineImages: string | undefined;
}

function restoreAttemptFile(directory: string): string {
  return join(directory, "restore-attempt.json");
}

async function earlierRestore(
  directory: string,
  { key, repeated }: RestoreRequest,
): Promise<Omit<RestoreAttempt, "key"> | undefined> {
  if (!repeated) return undefined;
  const attempt = await readRecord<RestoreAttempt>(restoreAttemptFile(directory));
  if (attempt?.key !== key) return undefined; // the crash came before it
  const { checkpoint, policy, externalMounts, engineImages } = attempt;
  return { checkpoint, policy, externalMounts, engineImages };
}

async function recordRestore(context: RestoreContext, next: () => Promise<void>): Promise<void> {
  const { checkpoint, engineImages, externalMounts, policy, request, target } = context;
  const file = restoreAttemptFile(target.directory);
  const attempt: RestoreAttempt = { key: request.key, checkpoint, policy, externalMounts, engineImages };
  writeRecordNow(file, attempt);
  try {
    await next();
  } catch (error) {
    await rm(file, { force: true });
    throw error;
  }
}

// ---- work path -------------------------------------------------------------------------------------------------------

export function defaultWorkPath(directory: string): string {
  return join(directory, "criu-restore");
}

function workPathOf({ request, target }: Pick<RestoreContext, "request" | "target">): string {
  return request.workPath || defaultWorkPath(target.directory);
}

async function openRestoreWorkPath(context: RestoreContext, next: () => Promise<void>): Promise<void> {
  const { target, request } = context;
  context.workPath = workPathOf(context);
  await mkdir(context.workPath, { recursive: true, mode: 0o700 });
  let mayHaveMounts = false;
  try {
    await next();
  } catch (error) {
    mayHaveMounts = true; // of every cgroup hierarchy: never removed with what is below
    await keepLog(join(context.workPath, "restore.log"), join(target.directory, "criu-restore.log"));
    await unmountLeft([context.workPath], target);
    mayHaveMounts = false;
    throw error;
  } finally {
    if (!request.workPath && !mayHaveMounts) await rm(context.workPath, { recursive: true, force: true });
  }
}

/**
 * CRIU mounts every cgroup hierarchy in its work path, and the engine the root file system in a place of its own; they unmount them
 * unless they are killed. Whoever then removes the directories (we do, the engine, and containerd the bundle) would remove the host's
 * cgroups, and the container's files.
 */
async function unmountLeft(directories: readonly string[], target: RestoreTarget): Promise<void> {
  const places = await Promise.all(directories.map(async (one) => await realpath(one).catch(() => one))); // ENOENT: nothing is mounted there
  const mounts = (await readMountInfo("self"))
    .map(({ mountPoint }) => mountPoint)
    .filter((mountPoint) =>
      places.some((place) => mountPoint === place || mountPoint.startsWith(`${place}/`)),
    );
  for (const mountPoint of mounts.reverse()) await target.unmount(mountPoint);
}

// ---- devices ---------------------------------------------------------------------------------------------------------

async function prepareDevices(context: RestoreContext, next: () => Promise<void>): Promise<void> {
  const { checkpoint, target } = context;
  const facts = checkpoint.manifest?.gpu;
  if (facts) {
    const slot = deviceSlot();
    if (!slot) throw new Unavailable("the checkpoint has GPU state, and this program can't restore any");
    if (target.inForeground && facts.means !== "criu-plugin")
      throw new Unsupported(
        `the checkpoint has GPU state, which is restored when the container runs: restore ${target.what} in the background (--detach)`,
      );
    context.devices = await slot.prepareRestore(target, facts);
  }
  await using _ = { [Symbol.asyncDispose]: async () => await context.devices?.close() };
  await next();
}

async function makeDeviceNodes({ target }: RestoreContext, next: () => Promise<void>): Promise<void> {
  const nodes = target.container.gpuNodes ?? [];
  // In the foreground the container has come and gone.
  if (nodes.length > 0 && !target.inForeground) {
    const { makeGpuNodes } = await import("./gpu-nodes.ts");
    await makeGpuNodes(await (await target.cgroup()).pids(), nodes, target.log);
  }
  await next();
}

async function restoreDevices(context: RestoreContext, next: () => Promise<void>): Promise<void> {
  await context.devices?.restore();
  await next();
}

// ---- files -----------------------------------------------------------------------------------------------------------

/** The rootfs diff is applied: a repetition finds the engine at work on these files. */
function appliedMark(directory: string): string {
  return join(directory, "rootfs-applied");
}

/** What the container had changed in its root file system, in the new one's; strictly: nothing of it leads out, or else it fails. */
async function prepareRootfs(
  { checkpoint, facts, request, signal, target }: RestoreContext,
  next: () => Promise<void>,
): Promise<void> {
  const mark = appliedMark(target.directory);
  if (target.rootfs !== undefined && (await hasRootfsDiff(checkpoint.path)) && !(await isThere(mark))) {
    await target.allowRootfsDiff?.();
    // From its beginning also where a crash has cut it off: each member is made anew.
    await applyRootfsDiff(checkpoint.path, target.rootfs, { signal });
    await writeFile(mark, "", { mode: 0o600 });
    const differences = facts ? await compareFilesWithDiff(facts, target.container) : [];
    const refusal = refusalOfRestore(request.path, differences);
    if (refusal) throw refusal;
  }
  await next();
}

// ---- the container's surroundings ------------------------------------------------------------------------------------

async function prepareConfiguration({ target }: RestoreContext, next: () => Promise<void>): Promise<void> {
  await target.prepareConfiguration();
  try {
    await next();
  } finally {
    await target.putConfigurationBack();
  }
}

async function prepareCgroup({ target, policy }: RestoreContext, next: () => Promise<void>): Promise<void> {
  try {
    await target.prepareCgroup(policy);
    await next();
  } catch (error) {
    await target.removeCgroup();
    throw error;
  }
}

/** CRIU mounts on what is there. In a fresh root file system it isn't, where somebody past the engine had made it in the old one. */
async function prepareMountPoints(
  { externalMounts, target }: RestoreContext,
  next: () => Promise<void>,
): Promise<void> {
  const { rootfs } = target.container;
  for (const { mountPoint, source } of externalMounts)
    if (rootfs !== undefined && mountPoint !== undefined) await makeMountPoint(rootfs, mountPoint, source);
  await next();
}

// ---- lazy pages ------------------------------------------------------------------------------------------------------

/** Where a page daemon's guard and log are, below the owner's directory; whoever owns the daemon removes it. */
function pageDaemonDirectory(directory: string): string {
  return join(directory, "lazy-pages");
}

async function startPageDaemon(context: RestoreContext, next: () => Promise<void>): Promise<void> {
  const { checkpoint, request, target, workPath } = context;
  if (!target.lazy) return await next();
  const { beginLazyRestore } = await import("./lazy/begin.ts");
  const begun =
    context.whyNotLazy ??
    (context.devices && "it has GPU state, whose restore needs all of its memory") ??
    (await beginLazyRestore(target.lazy, {
      directory: pageDaemonDirectory(target.directory),
      imagePath: checkpoint.imagePath,
      checkpointPath: checkpoint.path,
      workPath,
      repeated: request.repeated,
    }));
  if (typeof begun === "string") {
    context.whyNotLazy = undefined; // an eager restore's failure is final
    target.log.warn({ reason: begun }, "restored eagerly, though cedana.io/lazy asks for a lazy restore");
    target.lazy.refused(begun);
    return await next();
  }
  context.lazy = begun;
  try {
    await next();
  } catch (error) {
    await begun.stop();
    context.whyNotLazy = begun.toBlame(error);
    throw error;
  }
}

// ---- CRIU ------------------------------------------------------------------------------------------------------------

async function criuRestore(context: RestoreContext, next: () => Promise<void>): Promise<void> {
  const { checkpoint, devices, engineImages, externalMounts, lazy, policy, request, target, workPath } =
    context;
  try {
    await target
      .engineRestore({
        imagePath: engineImages ?? checkpoint.imagePath,
        workPath,
        policy,
        externalMounts,
        withoutPlugins: devices?.withoutCriuPlugins ?? false,
        lazy: lazy !== undefined,
      })
      .catch(async (error: Error) => {
        const what = `restore of ${target.what} from ${request.path}`;
        throw await criuFailure(what, error, workPath, "restore.log");
      });
    await next();
  } catch (error) {
    lazy?.restoreHasFailed();
    await dropEngine(context); // where it failed before it was let go
    await undoEngine(target, workPath, lazy !== undefined);
    throw error;
  }
}

/** After an engine that failed. Never rejects: why the restore failed is what the caller has to know. */
export async function undoEngine(target: RestoreTarget, workPath: string, lazy: boolean): Promise<void> {
  try {
    await target.endCriu(workPath);
    await unmountLeft(target.criuRoots, target); // or else the engine would delete what is mounted there
    // crun makes its own in the bundle, and refuses to restore where it is there already.
    for (const path of target.criuRoots) await rmdir(path).catch(() => {}); // ENOENT: none was made, or the engine has removed it
    await target.undoEngineRestore({ lazy });
  } catch (cause) {
    target.log.error({ err: cause }, "undo a failed restore");
  }
}

// ---- the container's own ---------------------------------------------------------------------------------------------

function generationOf({ checkpoint }: RestoreContext): number {
  return (checkpoint.manifest?.generation ?? 0) + 1;
}

/** A container that has no place for the file is restored all the same: who needs it can find out in its hook's environment. */
async function tellContainer(context: RestoreContext, next: () => Promise<void>): Promise<void> {
  const { checkpoint, target } = context;
  const { manifest } = checkpoint;
  const generation = generationOf(context);
  const tell = async () => {
    if (target.hasEnded) return;
    await writeRestoredFile(target.initPid, {
      version: 1,
      generation,
      why: target.why,
      ...(manifest && { dumpedAt: manifest.createdAt }),
      restoredAt: new Date().toISOString(),
      ...(manifest && { old: identityIn(manifest) }),
      new: target.identity,
    }).catch((error) => {
      if (!target.hasEnded)
        target.log.warn({ err: error }, "write /run/cedana/restore.json into the container");
    });
  };
  await target.setGeneration(generation);
  if (target.afterwards && !target.postRestoreHook) target.afterwards(tell);
  else await tell();
  await next();
}

function identityIn({ containerId, namespace, hostname, pod }: CheckpointManifest): ContainerIdentity {
  return {
    containerId,
    namespace,
    ...(hostname !== undefined && { hostname }),
    ...(pod && { pod }),
  };
}

/** What has ended has nothing more to do: short work that was restored near its end is no failure of its hook. */
async function postRestoreHook(context: RestoreContext, next: () => Promise<void>): Promise<void> {
  const { target } = context;
  if (target.postRestoreHook && !target.hasEnded)
    await target
      .postRestoreHook([`CEDANA_GENERATION=${generationOf(context)}`, `CEDANA_WHY=${target.why}`])
      .catch((error) => {
        if (!target.hasEnded) throw error;
        target.log.info({ err: error }, "the container has ended before its post-restore hook");
      });
  await next();
}
