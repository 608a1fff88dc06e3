import { link, readFile, readlink, rename, rm, stat, writeFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import {
  type EngineRestore,
  type RestoreTarget,
  restore as restoreContainer,
} from "../checkpoint/restore.ts";
import { hostCgroupVersion, makeCgroup, parseMembership } from "../linux/cgroup.ts";
import { isAlive } from "../linux/proc.ts";
import type { Engine } from "../runtime/engine.ts";
import { hookOf } from "../runtime/hooks.ts";
import { restoredContainer } from "../runtime/restored-container.ts";
import { cgroupPathV2, identityOf, type OciSpec, ownsNetworkNamespace, withHook } from "../runtime/spec.ts";
import { withFeatures } from "./checkpoint.ts";
import { criuConfigFile, policyOptions, restorePolicy } from "./criu-policy.ts";
import { reachBoundary } from "./fault.ts";
import { runHook } from "./hooks.ts";
import type { Task, Work } from "./task.ts";

/*
 * Restore as containerd's Task API asks for it: the chain of src/checkpoint, with a task for its target.
 *
 * Two things the engines don't do, and we do around them:
 *
 * - runc restores into an empty network namespace, where lo is down: sockets connected over loopback don't restore, and
 *   nothing in the container can use 127.0.0.1 afterwards. A hook in the bundle's config.json, which runc runs between CRIU's
 *   making of the namespaces and of the sockets, sets lo up. The config is put back after the restore.
 * - On hosts with cgroups version 2, runc leaves the processes in the cgroup of the container that was dumped, and crun tells
 *   CRIU to turn every hierarchy to the new container's path, version 1 ones of a hybrid host too (whatever its
 *   --manage-cgroups-mode says, which has no effect at a restore). A configuration file tells CRIU what each is turned to.
 */

/**
 * Restores a task that was created from a checkpoint; see `restore` of src/checkpoint. The engine runs as an operation of the keeper,
 * whose tag comes from the request: a repetition after a crash waits for the engine that was started before, or finds how it ended.
 */
export async function restore(task: Task, work: Work, path: string): Promise<void> {
  const spec = await task.spec();
  const engine = await withFeatures(task);
  const config = new BundleConfig(task.bundle);
  const keeperPid = task.pod.keeper.pid;
  const hook = await hookOf(spec, "post-restore");
  const target: RestoreTarget = {
    what: `task ${task.id}`,
    directory: task.bundle,
    container: restoredContainer(spec, task.bundle, engine.features, {
      terminal: task.init.stdio.terminal,
      rootfs: resolve(task.bundle, spec.root?.path ?? "rootfs"),
    }),
    log: task.log,
    identity: identityOf(spec, task.id, task.namespace),
    why: task.restoreAsked,
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
    prepareNetwork: async () => {
      if (engine.name === "runc" && ownsNetworkNamespace(spec)) await config.addLoopbackHook(keeperPid);
    },
    putNetworkBack: () => config.putBack(),
    prepareCgroup: async ({ cgroupsMode }) => {
      const cgroup = await cgroupOfRestore(task, spec);
      // Where the cgroup is there, CRIU gives it no limits of the dump; the engine gives it the new container's. systemd makes its own.
      if (cgroup !== undefined && !engine.systemdCgroup && !["full", "strict"].includes(cgroupsMode))
        await makeCgroup(cgroup);
    },
    removeCgroup: () => task.undo("remove the cgroup of a failed restore", task.removeCgroup()),
    engineRestore: (options) => engineRestore(task, work, engine, spec, options),
    undoEngineRestore: () => task.undoEngineRestore(work),
  };
  await restoreContainer(
    target,
    {
      key: String(work.request),
      repeated: work.repeated,
      path,
      workPath: task.options.criuWorkPath || undefined,
    },
    { onBoundary: reachBoundary },
  );
}

async function engineRestore(
  task: Task,
  work: Work,
  engine: Engine,
  spec: OciSpec,
  { imagePath, workPath, policy, externalMounts }: EngineRestore,
): Promise<void> {
  const cgroup = await cgroupOfRestore(task, spec);
  const configFile = await criuConfigFile(task.bundle, "restore", {
    tcpClose: policy.tcp === "close",
    externalMounts,
    cgroupRoots: cgroup === undefined ? undefined : await cgroupRoots(cgroup, task.pod.keeper.pid),
  });
  try {
    await task.engineRestore(work, engine, {
      imagePath,
      workPath,
      ...policyOptions(policy),
      tcpClose: policy.tcp === "close",
      ...configFile,
    });
  } finally {
    if (configFile.criuConfigFile) await rm(configFile.criuConfigFile, { force: true });
  }
}

/** The cgroup of version 2 that CRIU is to be told of; undefined with version 1, and for a path that only the engine knows. */
async function cgroupOfRestore(task: Task, spec: OciSpec): Promise<string | undefined> {
  if ((await hostCgroupVersion()) !== 2) return undefined;
  return cgroupPathV2(spec, task.id, task.options.systemdCgroup);
}

/** What each hierarchy's cgroups are turned to: the container's own, and in version 1 ones where the keeper is. */
async function cgroupRoots(cgroup: string, keeperPid: number): Promise<[controller: string, path: string][]> {
  const membership = parseMembership(await readFile(`/proc/${keeperPid}/cgroup`, "utf8"));
  return [...membership].map(([controller, path]) => [controller, controller === "" ? cgroup : path]);
}

/** The bundle's config.json, changed for the time of a restore. The original lies beside it until it is put back. */
class BundleConfig {
  readonly #path: string;
  readonly #original: string;

  constructor(bundle: string) {
    this.#path = join(bundle, "config.json");
    this.#original = join(bundle, "config.json.original");
  }

  async addLoopbackHook(keeperPid: number): Promise<void> {
    await link(this.#path, this.#original).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== "EEXIST") throw error; // an attempt before a crash
    });
    const text = await readFile(this.#original, "utf8");
    const hook = { path: await keeperProgram(keeperPid), args: ["cedana-loopback"], timeout: 10 };
    await writeFile(`${this.#path}.new`, withHook(text, "createRuntime", hook, this.#path), { mode: 0o600 });
    await rename(`${this.#path}.new`, this.#path);
  }

  async putBack(): Promise<void> {
    await rename(this.#original, this.#path).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== "ENOENT") throw error; // it wasn't changed
    });
  }
}

/** The keeper's program as it is installed now; where it has gone, the one that runs. */
async function keeperProgram(pid: number): Promise<string> {
  const exe = `/proc/${pid}/exe`;
  const installed = (await readlink(exe)).replace(/ \(deleted\)$/, ""); // replaced by an upgrade
  return (await stat(installed).catch(() => undefined)) ? installed : exe;
}
