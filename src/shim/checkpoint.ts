import { join, resolve } from "node:path";
import type { TrackedSince } from "../checkpoint/dump/parent.ts";
import type { DumpTarget, EngineDump } from "../checkpoint/dump/target.ts";
import { dump as dumpContainer } from "../checkpoint/dump.ts";
import { gateBelow } from "../criu/gate.ts";
import { killCriu, whileWatchingCriu } from "../criu/leftovers.ts";
import { criuConfig } from "../criu/option-file.ts";
import { toldPluginDirectory } from "../criu/plugins.ts";
import { foreignHierarchies } from "../linux/cgroup-hierarchy.ts";
import { readProcessNote, writeProcessNote } from "../linux/process-notes.ts";
import { Engine, engineVersion } from "../runtime/engine.ts";
import { engineFailure } from "../runtime/engine-failure.ts";
import { hookOf } from "../runtime/hooks.ts";
import { pluginsOf, specFacts } from "../runtime/manifest-facts.ts";
import type { CheckpointRequestOptions } from "../runtime/options.ts";
import { hasNetworkNamespace, identityOf, type OciSpec } from "../runtime/spec.ts";
import type { Container } from "./container.ts";
import { dumpPolicy, policyOptions } from "./criu-policy.ts";
import { reachBoundary } from "./fault.ts";
import { runHook } from "./hooks.ts";
import type { Tag, Work } from "./keeper.ts";

/** Dump as containerd's Task API asks for it: the chain of src/checkpoint, with a task for its target. */

export interface CheckpointRequest {
  /** absolute; made when missing */
  imagePath: string;
  options: CheckpointRequestOptions;
}

/** Dumps a running or paused task into `request.imagePath`; see `dump` of src/checkpoint. */
export async function dump(task: Container, work: Work, request: CheckpointRequest): Promise<void> {
  const { options, imagePath } = request;
  const spec = await task.spec();
  const engine = await withFeatures(task);
  const target = dumpTarget(task, spec, engine, {
    tag: work.tag,
    directory: task.bundle,
    engineCheckpoint: (engineDump) => engineCheckpoint(task, work.tag, engine, engineDump),
  });
  await dumpContainer(
    target,
    {
      key: String(work.request),
      repeated: work.repeated,
      // Without an image path of the caller's, containerd reads what lies in a directory of its own and removes it.
      place: { imagePath, temporary: options.imagePath === "" },
      workPath: options.workPath || undefined,
      parentPath: options.parentPath || undefined,
      leaveRunning: !options.exit,
      policy: dumpPolicy(options, spec),
      digests: "alongside",
    },
    { onBoundary: reachBoundary },
  );
}

/** In the bundle: since which images the kernel marks pages that change. */
const TRACKED_NAME = "cedana-tracked.json";

/**
 * A task as the chain of the dump sees it.
 * @param own.tag  of operations: where a repetition after a crash derives the same again, nothing happens twice
 */
export function dumpTarget(
  task: Container,
  spec: OciSpec,
  engine: Engine,
  own: Pick<DumpTarget, "directory" | "engineCheckpoint" | "inTurn"> & { tag?: (step: string) => Tag },
): DumpTarget {
  const { tag = (step: string) => task.pod.keeper.ownTag(step), ...rest } = own;
  return {
    what: `task ${task.id}`,
    initPid: task.init.pid,
    get paused() {
      return task.init.state === "paused";
    },
    get hasEnded() {
      return task.init.exit !== undefined || task.init.heldExit !== undefined;
    },
    ownNetwork: hasNetworkNamespace(spec),
    mountPoints: (spec.mounts ?? []).map(({ destination }) => destination),
    rootfs: resolve(task.bundle, spec.root?.path ?? "rootfs"),
    rootfsBase: {
      open: async (signal) => await (await import("./rootfs-base.ts")).openRootfsBase(task, signal),
      forget: async () => await (await import("./rootfs-base.ts")).forgetRootfsBase(task),
    },
    facts: {
      ...identityOf(spec, task.id, task.namespace),
      ...(task.generation > 0 && { generation: task.generation }),
      terminal: task.init.stdio.terminal,
      engine: { name: engine.name, version: engine.features.version, path: engine.binary },
      ...specFacts(spec),
      plugins: pluginsOf("containerd", engine.name),
    },
    image: async () => await (await import("./image.ts")).imageOf(task, spec),
    tracking: {
      since: () => readProcessNote<TrackedSince>(join(task.bundle, TRACKED_NAME), task.init.pid),
      note: (since) => writeProcessNote(join(task.bundle, TRACKED_NAME), task.init.pid, since),
    },
    wholeMemory: (signal) => task.memory.whole(signal),
    log: task.log,
    preDumpHook: async () => {
      const hook = await hookOf(spec, "pre-dump");
      return hook && (() => runHook(task, tag, hook, []));
    },
    cgroup: () => task.cgroup(),
    gate: () => gateBelow(task.pod.keeper.pid),
    criuConfig: async ({ policy, networkLock, externalMounts, withoutPlugins, workPath, cgroupYard }) =>
      criuConfig({
        tcpClose: policy.tcp === "close",
        skipInFlight: policy.tcp === "skip-in-flight",
        networkLock: networkLock === "default" ? undefined : networkLock,
        externalMounts,
        pluginDirectory: withoutPlugins ? workPath : toldPluginDirectory(),
        cgroupRoots: await foreignHierarchies(task.init.pid),
        cgroupYard,
      }),
    ...rest,
  };
}

export async function engineCheckpoint(
  task: Container,
  tag: (step: string) => Tag,
  engine: Engine,
  { imagePath, workPath, parentPath, leaveRunning, policy, atGate, env }: EngineDump,
): Promise<void> {
  const logFile = join(task.bundle, "checkpoint.log.json");
  const outputPath = join(task.bundle, "checkpoint.out");
  const { argv } = engine.checkpoint({
    id: task.id,
    logFile,
    imagePath,
    workPath,
    parentPath,
    leaveRunning,
    ...policyOptions(policy),
    criuConfigFile: env.CRIU_CONFIG_FILE,
  });
  const onDeath = async () => void (await killCriu(workPath)); // its own processes alone: the container's are to live
  const exit = await whileWatchingCriu(
    { parent: task.pod.keeper.pid, workPath, onDeath, log: task.log },
    async () =>
      await task.pod.keeper.run(tag(atGate ? "checkpoint-at-gate" : "checkpoint"), {
        argv,
        env: Object.entries(env).map(([name, value]) => `${name}=${value}`),
        outputPath,
      }),
  );
  if (exit.exitStatus !== 0)
    throw await engineFailure("checkpoint", task.id, exit.exitStatus, logFile, outputPath);
}

export async function withFeatures(task: Container): Promise<Engine> {
  return new Engine({
    binary: task.options.binaryName,
    root: task.options.root,
    systemdCgroup: task.options.systemdCgroup,
    namespace: task.namespace,
    features: await engineVersion(task.options.binaryName || "runc"),
  });
}
