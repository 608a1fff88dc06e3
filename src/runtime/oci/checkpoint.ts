import { mkdirSync } from "node:fs";
import { mkdir, readdir, readFile, rm } from "node:fs/promises";
import { basename, dirname, isAbsolute, join, relative, resolve } from "node:path";
import {
  beginTracking,
  checkParent,
  isTrackedSince,
  type TrackedSince,
  type Tracking,
  trackedSince,
  withoutParent,
} from "../../checkpoint/dump/parent.ts";
import type { CriuSettings, DumpRequest, DumpTarget, EngineDump } from "../../checkpoint/dump/target.ts";
import { type AbandonedDump, dump as dumpContainer } from "../../checkpoint/dump.ts";
import { Staging } from "../../checkpoint/staging.ts";
import { criuBelow } from "../../criu/gate.ts";
import { killCriu, whileWatchingCriu } from "../../criu/leftovers.ts";
import { explainCriuLog } from "../../criu/log.ts";
import { criuLines } from "../../criu/option-file.ts";
import { toldPluginDirectory } from "../../criu/plugins.ts";
import { CriuFailed, InvalidRequest, RuntimeFailed, SyscallFailed, WrongState } from "../../errors/index.ts";
import { expectAnswer } from "../../linux/apart.ts";
import { Cgroup } from "../../linux/cgroup.ts";
import { foreignHierarchies } from "../../linux/cgroup-hierarchy.ts";
import { isAlive, startTime } from "../../linux/proc.ts";
import { readProcessNote, sweepProcessNotes, writeProcessNote } from "../../linux/process-notes.ts";
import { allowedAnnotations } from "../annotated-checkpoint.ts";
import { type EngineFeatures, engineVersion } from "../engine.ts";
import { failureFrom, lastErrorIn } from "../engine-failure.ts";
import { hookOf } from "../hooks.ts";
import { annotatedImage, pluginsOf, specFacts } from "../manifest-facts.ts";
import { cgroupName, hasNetworkNamespace, identityOf, type OciSpec, readSpec } from "../spec.ts";
import { type Conversation, namesCriu, type OciAnswer, type OciCall, Options } from "./call.ts";
import { criuConfigFile, dumpPolicy, engineArguments, type Policy } from "./criu-options.ts";
import { dropScratch, noteFrozen } from "./frozen.ts";
import { generationOf } from "./generation.ts";
import { runHook } from "./hooks.ts";
import { forgetEnds, isUnstarted, noteEnd, readMarker } from "./marker.ts";
import { containerState, namespaceOf } from "./state.ts";
import { inTurn } from "./turns.ts";

/*
 * `checkpoint`: the chain of src/checkpoint with a container for its target, whose engine the wrapper runs, with the options that
 * the caller gives and the container's annotations ask for.
 */

interface Dump {
  readonly call: OciCall;
  readonly options: Options;
  readonly features: EngineFeatures;
  readonly spec: OciSpec;
  readonly policy: Policy;
  readonly imagePath: string;
  readonly leaveRunning: boolean;
  readonly pid: number;
}

/** A checkpoint that nobody's `checkpoint` has asked for. */
export type OwnDump = Pick<DumpRequest, "place" | "origin" | "rootfs" | "digests">;

/** The command, when checkpoints of the same container that were begun before it have come to their end. */
export async function checkpoint(call: OciCall, wrapper: Conversation): Promise<OciAnswer | undefined> {
  return await inTurn(call.marker, wrapper.signal, async () => await checkpointInTurn(call, wrapper));
}

/** For whoever has the turn. */
export async function checkpointInTurn(
  call: OciCall,
  wrapper: Conversation,
  own?: OwnDump,
): Promise<OciAnswer | undefined> {
  const options = new Options(call.argv);
  const [features, state] = await Promise.all([engineVersion(call.engine), containerState(call)]);
  const marker = readMarker(call.marker);
  if (isUnstarted(marker)) throw new WrongState("Container cannot be checkpointed in created state");
  if (state === undefined || !["running", "paused"].includes(state.status)) {
    wrapper.become([call.engine, ...call.globalArgv, "checkpoint", call.id]); // the engine has the words
    return undefined;
  }
  const spec = await readSpec(state.bundle);
  await allowedAnnotations(spec);
  const parentPath = options.value("parent-path");
  if (parentPath && isAbsolute(parentPath))
    throw new InvalidRequest(`--parent-path ${parentPath} must be relative to the image path`);
  const preDump = options.has("pre-dump");
  const dump: Dump = {
    call,
    options,
    features,
    spec,
    policy: dumpPolicy(options, spec),
    imagePath: resolve(call.cwd, options.value("image-path") ?? "checkpoint"),
    leaveRunning: preDump || options.has("leave-running"),
    pid: state.pid,
  };
  const { pid } = state;
  const started = startTime(pid);
  const scratch = scratchOf(call);
  mkdirSync(scratch, { recursive: true, mode: 0o700 });
  let failed = true;
  try {
    // A pre-dump is no checkpoint yet, and CRIU stops the processes for it by itself, for a moment. With lazy pages the caller reads the
    // images while CRIU still serves the memory, as --status-fd tells him: they can't be put in their place afterwards.
    if (preDump || options.has("lazy-pages")) {
      for (const path of [dump.imagePath, resolve(call.cwd, options.value("work-path") ?? ".")])
        await expectAnswer(path); // in the chain below, its first step asks
      const env = await criuConfigFile(join(scratch, "criu.conf"), await criuConfigLines(dump, {}));
      if (preDump) await takePreDump(dump, wrapper, parentPath, env);
      else
        await withImagePath(dump.imagePath, async () => {
          await runEngine(dump, wrapper, { imagePath: dump.imagePath, parentPath, env });
        });
      failed = false;
      return { status: 0 };
    }
    const cgroup = await Cgroup.of(pid, cgroupName(spec, call.id, features.name));
    const generation = generationOf(call, pid);
    const target: DumpTarget = {
      what: `container ${call.id}`,
      initPid: pid,
      paused: state.status === "paused",
      get hasEnded() {
        return !isAlive(pid, started);
      },
      directory: scratch,
      ownNetwork: hasNetworkNamespace(spec),
      mountPoints: (spec.mounts ?? []).map(({ destination }) => destination),
      rootfs: resolve(state.bundle, spec.root?.path ?? "rootfs"),
      facts: {
        ...identityOf(spec, call.id, namespaceOf(call.root)),
        ...(generation > 0 && { generation }),
        terminal: spec.process?.terminal ?? false,
        engine: { name: features.name, version: features.version, path: call.engine },
        ...specFacts(spec),
        plugins: pluginsOf(features.name),
      },
      image: async () => annotatedImage(spec),
      tracking: trackingOf(call, pid),
      log: wrapper.log,
      preDumpHook: async () => {
        const hook = await hookOf(spec, "pre-dump");
        const container = { initPid: pid, bundle: state.bundle, spec };
        return hook && (() => runHook({ call, wrapper }, container, hook, [], scratch));
      },
      cgroup: async () => cgroup,
      gate: async () =>
        namesCriu(call.globalArgv) ? undefined : criuBelow(call.pid, await wrapper.program()),
      criuConfig: async (settings) =>
        (await criuConfigLines(dump, settings)).map((line) => `${line}\n`).join(""),
      engineCheckpoint: async (engineDump) => {
        await runEngine(dump, wrapper, engineDump);
        if (!dump.leaveRunning) await waitForEnd(pid, started);
      },
    };
    const workPath = options.value("work-path");
    await noteFrozen(call.marker, cgroup, scratch, async () => {
      const request: DumpRequest = {
        key: call.marker,
        repeated: false,
        place: { imagePath: dump.imagePath },
        digests: "alongside",
        ...own,
        workPath: workPath && resolve(call.cwd, workPath),
        parentPath: parentPath,
        leaveRunning: dump.leaveRunning,
        policy: {
          ...dump.policy,
          emptyNamespaces: [...dump.policy.emptyNamespaces],
          cgroupsMode: dump.policy.cgroupsMode ?? "",
        },
      };
      await dumpContainer(target, request, { signal: wrapper.signal });
      if (!dump.leaveRunning) noteItsEnd(call, features, wrapper); // before the caller, who has the answer, asks for its delete
      wrapper.answer({ status: 0 }); // what was noted on the way is removed at once, in this turn of the event loop
    });
    failed = false;
  } finally {
    await dropScratch(scratch, failed, wrapper.log);
  }
  return { status: 0 };
}

/** Memory alone, while the container runs but for a moment. As a dump, it is made beside its place. */
async function takePreDump(
  dump: Dump,
  wrapper: Conversation,
  parentPath: string | undefined,
  env: Record<string, string>,
): Promise<void> {
  const { call, imagePath, pid } = dump;
  const tracking = trackingOf(call, pid);
  const what = `container ${call.id}`;
  let parent = parentPath && resolve(imagePath, parentPath);
  if (parentPath && parent) {
    await checkParent(what, { parent, images: imagePath, shown: parentPath }, wrapper.signal);
    if (!isTrackedSince(tracking, parent)) {
      wrapper.log.warn(withoutParent(what, parentPath));
      parent = undefined;
    }
  }
  await using staging = await Staging.inside(imagePath);
  beginTracking(tracking);
  await runEngine(dump, wrapper, {
    imagePath: staging.path,
    parentPath: parent && relative(staging.path, parent),
    env,
  });
  trackedSince(tracking, staging.path);
  await staging.commit({ durable: false });
}

/** A container without a marker needs a note, too: of its process, beside those of others. */
function trackingOf(call: OciCall, pid: number): Tracking {
  const directory = join(dirname(dirname(call.marker)), "oci-tracked");
  const path = join(directory, basename(call.marker));
  return {
    since: () => readProcessNote<TrackedSince>(path, pid),
    note: (since) => {
      sweepProcessNotes(directory);
      writeProcessNote(path, pid, since);
    },
  };
}

/**
 * The same for a caller who has asked before, of a cedanad that ended in the middle of it. A container that runs is dumped anew: what had
 * been made was undone.
 * @param left  what has become of that dump
 */
export async function checkpointAgain(
  call: OciCall,
  wrapper: Conversation,
  left: AbandonedDump,
): Promise<OciAnswer | undefined> {
  if (!left) return await checkpoint(call, wrapper);
  if ("kept" in left)
    throw new CriuFailed(
      `cedanad ended in the middle of the checkpoint of container ${call.id}, which has ended with it; whether it is whole nobody knows. What was made is kept in ${left.kept}`,
    );
  noteItsEnd(call, await engineVersion(call.engine), wrapper);
  return { status: 0 };
}

/** The checkpoint is whole, whatever becomes of the note. */
function noteItsEnd(
  { marker, id, root, engine, globalArgv }: OciCall,
  { name }: EngineFeatures,
  { log }: Conversation,
): void {
  if (name !== "crun") return;
  const failed = (error: unknown) => log.error({ err: error }, "note the end of a container for its delete");
  try {
    noteEnd(marker, readMarker(marker) ?? { version: 1, id, root, engine, globalArgv });
  } catch (error) {
    failed(error);
  }
  void forgetEnds(dirname(dirname(marker))).catch(failed);
}

/** Options of the caller's that the chain has. */
const chainOptions = ["image-path", "work-path", "parent-path"]; // the last one from where the images are made

/** Lines of CRIU's configuration file for what the engine has no option for. */
async function criuConfigLines(
  { options, features, policy, pid }: Dump,
  {
    workPath,
    networkLock = "default",
    externalMounts = [],
    withoutPlugins = false,
    cgroupYard,
  }: Partial<CriuSettings>,
): Promise<string[]> {
  const { criuConfig } = engineArguments("checkpoint", features, options, policy, chainOptions);
  return [
    ...criuConfig,
    ...criuLines({
      networkLock: networkLock === "default" || options.has("network-lock") ? undefined : networkLock,
      externalMounts,
      cgroupRoots: await foreignHierarchies(pid),
      cgroupYard,
      pluginDirectory: withoutPlugins ? workPath : toldPluginDirectory(),
    }),
  ];
}

async function runEngine(
  { call, options, features, policy }: Dump,
  wrapper: Conversation,
  {
    imagePath,
    workPath,
    parentPath,
    env,
  }: Pick<EngineDump, "imagePath" | "parentPath"> & Partial<EngineDump>,
): Promise<void> {
  const scratch = scratchOf(call);
  const work = workPath ?? resolve(call.cwd, options.value("work-path") ?? join(scratch, "work"));
  const { argv } = engineArguments("checkpoint", features, options, policy, chainOptions);
  mkdirSync(work, { recursive: true, mode: 0o700 }); // crun fails when it isn't there
  const outputPath = join(scratch, "output");
  const command = [
    call.engine,
    ...call.globalArgv,
    "checkpoint",
    `--image-path=${imagePath}`,
    `--work-path=${work}`,
    ...(parentPath ? [`--parent-path=${parentPath}`] : []),
  ];
  // Its own processes alone: the container's are to live. A directory of the caller's may have another CRIU at work in it.
  const onDeath = async () =>
    void (await killCriu(work, work.startsWith(`${scratch}/`) ? undefined : call.pid));
  const status = await whileWatchingCriu(
    { parent: call.pid, workPath: work, onDeath, log: wrapper.log },
    async () => await wrapper.run([...command, ...argv, call.id], { env, outputPath }),
  );
  if (status === 0) return;
  const words = lastErrorIn(await readFile(outputPath, "utf8").catch(() => "")); // ENOENT: it was killed before it could write
  const what = `checkpoint of container ${call.id}`;
  if (workPath === undefined) throw await engineError(what, status, words, join(work, "dump.log"));
  throw failureFrom("checkpoint", call.id, status, words); // the chain adds CRIU's reason
}

/** A directory of this call's own, on the run directory's file system. */
export function scratchOf(call: OciCall): string {
  return join(dirname(dirname(call.marker)), "c", `oci-${basename(call.marker).slice(0, 16)}-${call.pid}`);
}

/** The engine's words, then what CRIU's log says was the reason. */
export async function engineError(
  what: string,
  status: number,
  words: string | undefined,
  criuLog: string | undefined,
): Promise<Error> {
  const engineWords = words ?? `the engine ended with status ${status} and said nothing`;
  const summary = criuLog && (await explainCriuLog(criuLog).catch(() => undefined)); // ENOENT: CRIU was not even started
  if (!summary || summary.errors.length === 0)
    return new RuntimeFailed(`${what}: ${engineWords}`, { exitStatus: status });
  const lines = [...new Set([summary.firstError, ...summary.errors.slice(-5)])].join("; ");
  return new CriuFailed(
    `${what}: ${engineWords}: CRIU: ${lines}${summary.cause ? `. ${summary.cause.advice}` : ""}`,
    {
      exitStatus: status,
    },
  );
}

// ---- parts ----

/** Half a checkpoint is none: after a failure, what was not there before is removed. */
async function withImagePath(imagePath: string, work: () => Promise<void>): Promise<void> {
  let made: string | undefined;
  let before: string[] = [];
  try {
    made = await mkdir(imagePath, { recursive: true, mode: 0o700 });
    if (!made) before = await readdir(imagePath);
  } catch (error) {
    throw SyscallFailed.from(error);
  }
  try {
    await work();
  } catch (error) {
    if (made) await rm(made, { recursive: true, force: true });
    else
      for (const name of await readdir(imagePath))
        if (!before.includes(name)) await rm(join(imagePath, name), { recursive: true, force: true });
    throw error;
  }
}

/** The engine reports success when CRIU does; the processes' end is the kernel's, a moment later. */
async function waitForEnd(pid: number, started: number | undefined): Promise<void> {
  for (let attempt = 0; isAlive(pid, started) && attempt < 100; attempt++)
    await new Promise((resolve) => setTimeout(resolve, Math.min(attempt, 10))); // the caller waits for it
}
