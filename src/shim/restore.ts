import { link, readFile, rename, rm, writeFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import {
  type EngineRestore,
  type RestoreTarget,
  restore as restoreContainer,
} from "../checkpoint/restore.ts";
import { descendsFrom, kill, killCriu, whileWatchingCriu } from "../criu/leftovers.ts";
import { toldPluginDirectory } from "../criu/plugins.ts";
import { Cgroup } from "../linux/cgroup.ts";
import { isAlive, programOf } from "../linux/proc.ts";
import { readConfiguration } from "../runtime/configuration.ts";
import type { Engine } from "../runtime/engine.ts";
import { hookOf } from "../runtime/hooks.ts";
import { RestoreCgroup } from "../runtime/restore-cgroup.ts";
import { configForRestore } from "../runtime/restore-configuration.ts";
import { restoreSettings } from "../runtime/restore-settings.ts";
import { restoredContainer } from "../runtime/restored-container.ts";
import {
  cedanaAnnotations,
  cgroupPathV2,
  hasUserNamespace,
  identityOf,
  type OciSpec,
  sharedPidNamespace,
} from "../runtime/spec.ts";
import { withFeatures } from "./checkpoint.ts";
import type { Container } from "./container.ts";
import { criuConfigFile, policyOptions, restorePolicy } from "./criu-policy.ts";
import { reachBoundary } from "./fault.ts";
import { noteFreshUpper } from "./fresh-upper.ts";
import { runHook } from "./hooks.ts";
import type { Work } from "./keeper.ts";
import type { Restoration, RestoredTask } from "./restoration.ts";

/*
 * Restore as containerd's Task API asks for it: the chain of src/checkpoint, with a task for its target.
 *
 * Two things the engines don't do, and we do around them: the bundle's config.json is changed for the time of the restore, and CRIU is
 * told the container's cgroup (src/runtime/restore-configuration.ts and restore-cgroup.ts say how and why).
 */

/**
 * Restores a task that was created from a checkpoint; see `restore` of src/checkpoint. The engine runs as an operation of the keeper,
 * whose tag comes from the request: a repetition after a crash waits for the engine that was started before, or finds how it ended.
 */
export async function restore(task: RestoredTask, restoration: Restoration, work: Work): Promise<void> {
  const { source } = restoration;
  const spec = await task.spec();
  const engine = await withFeatures(task);
  const config = new BundleConfig(task.bundle);
  const keeperPid = task.pod.keeper.pid;
  const hook = await hookOf(spec, "post-restore");
  const rootfs = resolve(task.bundle, spec.root?.path ?? "rootfs");
  const cgroup = await RestoreCgroup.of({
    spec,
    id: task.id,
    engine: engine.name,
    systemd: engine.systemdCgroup,
    parent: keeperPid,
  });
  const program = await programOf(keeperPid);
  const pidNamespace = sharedPidNamespace(spec, keeperPid);
  const target: RestoreTarget = {
    what: `task ${task.id}`,
    directory: task.bundle,
    container: restoredContainer(spec, task.bundle, engine.features, {
      terminal: task.init.stdio.terminal,
      rootfs,
    }),
    rootfs,
    allowRootfsDiff: async () => {
      if (source.onFailure === "fresh") await noteFreshUpper(task.bundle, rootfs);
    },
    log: task.log,
    identity: identityOf(spec, task.id, task.namespace),
    why: source.why,
    get initPid() {
      return task.init.pid;
    },
    get hasEnded() {
      return task.init.exit !== undefined || task.init.heldExit !== undefined || !isAlive(task.init.pid);
    },
    postRestoreHook: hook && ((env) => runHook(task, work.tag, hook, env)),
    setGeneration: async (generation) => {
      task.generation = generation; // on record with the start
    },
    policy: (manifest) => restorePolicy(manifest, spec),
    prepareConfiguration: async () => {
      await config.change(
        async (text, path) =>
          await configForRestore(spec, text, { bundle: task.bundle, path, engine: engine.name, program }),
      );
    },
    putConfigurationBack: () => config.putBack(),
    prepareCgroup: ({ cgroupsMode }) => cgroup.make(cgroupsMode),
    removeCgroup: async () =>
      void (await task.logFailure("remove the cgroup of a failed restore", removeCgroups(task, spec))),
    sharedPids: pidNamespace === undefined ? undefined : { path: pidNamespace, program },
    hasOtherHierarchies: cgroup.hasOtherHierarchies,
    deviceMap: cedanaAnnotations(spec).gpuMap,
    cgroup: () => task.cgroup(),
    engineRestore: (options) => engineRestore(task, restoration, work, engine, spec, cgroup, options),
    endCriu: async (workPath) =>
      void (await task.logFailure("end what is left of CRIU", endCriu(task, spec, workPath))),
    undoEngineRestore: ({ lazy }) => restoration.undoEngineRestore(work, lazy),
    criuRoots: [join(task.bundle, "criu-root"), join(engine.root, task.id, "criu-root")], // crun's, runc's
    unmount: (mountPoint) => task.pod.keeper.unmount(task.pod.keeper.ownTag("unmount-criu"), mountPoint),
    lazy: (await wantsLazy(spec))
      ? task.memory.target(hasUserNamespace(spec), (spawn) =>
          task.pod.keeper.run(work.tag("lazy-pages"), spawn),
        )
      : undefined,
  };
  await restoreContainer(
    target,
    {
      key: String(work.request),
      repeated: work.repeated,
      path: source.path,
      ...(await restoreSettings()),
      workPath: task.options.criuWorkPath || undefined,
    },
    { onBoundary: reachBoundary },
  );
}

/** As the container's annotation has it. What the administrator forbids is refused here, where it is asked for. */
async function wantsLazy(spec: OciSpec): Promise<boolean> {
  if (!cedanaAnnotations(spec).lazy) return false;
  const { annotations } = await readConfiguration();
  return cedanaAnnotations(spec, { denied: annotations.deny.filter((key) => key === "lazy") }).lazy === true;
}

// ---- what is left of an engine or a CRIU that was killed -------------------------------------------------------------

/** All of it descends from the keeper, which adopts orphans. */
async function endCriu(task: Container, spec: OciSpec, workPath: string): Promise<void> {
  const left = await killCriu(workPath, task.pod.keeper.pid);
  if (left.length > 0) task.log.error({ pids: left }, "processes of CRIU don't end");
  await endRestored(task, spec);
}

/** Processes that CRIU had restored when it or the engine was killed: the engine doesn't know of them. */
async function endRestored(task: Container, spec: OciSpec): Promise<void> {
  const cgroup = await containerCgroup(task, spec);
  const keeper = task.pod.keeper.pid;
  const ours = async () =>
    (await cgroup?.pids().catch(() => []))?.filter((pid) => descendsFrom(pid, keeper)) ?? []; // it is gone with its processes
  for (let attempt = 0; attempt < 100; attempt++) {
    const pids = await ours();
    if (pids.length === 0) return;
    if (attempt === 0) task.log.warn({ pids }, "killed: restored by halves");
    await cgroup?.thaw().catch(() => {}); // a frozen process of version 1 doesn't even die
    for (const pid of pids) kill(pid);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  task.log.error({ pids: await ours() }, "processes of a failed restore don't end");
}

/** Of the container that is not there any more, or was never whole; undefined where only the engine knows its path. */
async function containerCgroup(task: Container, spec: OciSpec): Promise<Cgroup | undefined> {
  const path = cgroupPathV2(spec, task.id, task.options.systemdCgroup);
  return path === undefined ? undefined : await Cgroup.at(path);
}

async function removeCgroups(task: RestoredTask, spec: OciSpec): Promise<void> {
  await task.containerCgroup.remove();
  const cgroup = await containerCgroup(task, spec);
  if (task.options.systemdCgroup) await cgroup?.leaveToSystemd();
  const left = await cgroup?.removeLeft();
  if (left && left.length > 0) task.log.warn({ left }, "cgroups of a failed restore are still busy");
}

// ---- engine ----------------------------------------------------------------------------------------------------------

async function engineRestore(
  task: Container,
  restoration: Restoration,
  work: Work,
  engine: Engine,
  spec: OciSpec,
  cgroup: RestoreCgroup,
  { imagePath, workPath, policy, externalMounts, lazy, withoutPlugins }: EngineRestore,
): Promise<void> {
  const configFile = await criuConfigFile(task.bundle, {
    tcpClose: policy.tcp === "close",
    lazyPages: lazy,
    pluginDirectory: withoutPlugins ? workPath : toldPluginDirectory(),
    externalMounts,
    cgroupRoots: cgroup.roots,
  });
  const onDeath = async (pids: number[]) => {
    for (const pid of pids) kill(pid);
    await endCriu(task, spec, workPath);
  };
  try {
    await whileWatchingCriu(
      { parent: task.pod.keeper.pid, workPath, onDeath, log: task.log },
      async () =>
        await restoration.engineRestore(work, engine, {
          imagePath,
          workPath,
          ...policyOptions(policy),
          tcpClose: policy.tcp === "close",
          lazyPages: lazy,
          ...configFile,
        }),
    );
  } finally {
    if (configFile.criuConfigFile) await rm(configFile.criuConfigFile, { force: true });
  }
}

/** The bundle's config.json, changed for the time of a restore. The original lies beside it until it is put back. */
class BundleConfig {
  readonly #path: string;
  readonly #original: string;

  constructor(bundle: string) {
    this.#path = join(bundle, "config.json");
    this.#original = join(bundle, "config.json.original");
  }

  /** @param edit  gives the text that it is to have; undefined: it stays as it is */
  async change(edit: (text: string, path: string) => Promise<string | undefined>): Promise<void> {
    await this.putBack(); // an attempt before a crash
    const changed = await edit(await readFile(this.#path, "utf8"), this.#path);
    if (changed === undefined) return;
    await writeFile(`${this.#path}.new`, changed, { mode: 0o600 });
    await link(this.#path, this.#original);
    await rename(`${this.#path}.new`, this.#path);
  }

  async putBack(): Promise<void> {
    await rename(this.#original, this.#path).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== "ENOENT") throw error; // it wasn't changed
    });
  }
}
