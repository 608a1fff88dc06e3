import { link, mkdir, readFile, readlink, rename, rm, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { criuFailure, keepLog } from "../checkpoint/dump.ts";
import { type CheckpointManifest, checkFiles, readManifest } from "../checkpoint/manifest.ts";
import { BrokenImage, InvalidRequest, NotFound } from "../errors/index.ts";
import { hostCgroupVersion, makeCgroup, parseMembership } from "../linux/cgroup.ts";
import type { Engine, RestoreCommand } from "../runtime/engine.ts";
import { cgroupPathV2, type OciSpec, ownsNetworkNamespace, withHook } from "../runtime/spec.ts";
import { withFeatures } from "./checkpoint.ts";
import { criuConfigFile, policyOptions, restorePolicy } from "./criu-policy.ts";
import type { Task } from "./task.ts";

/*
 * Restore as containerd's Task API asks for it, by way of the engine's own `restore`, which alone can write the engine's state.
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

/** Images that a new container is to be made from, looked at but not used yet. */
interface Checkpoint {
  /** as the caller named it */
  readonly path: string;
  /** where CRIU's images are */
  readonly imagePath: string;
  readonly manifest: CheckpointManifest | undefined;
}

export interface RestorePlan {
  readonly engine: Engine;
  readonly options: Omit<RestoreCommand, "id" | "bundle" | "pidFile" | "logFile">;
  /** The engine's failure with what CRIU's log says. */
  explain(failure: Error): Promise<Error>;
  /** Removes what only the restore needed; after a failure keeps CRIU's log as `criu-restore.log` in the bundle. */
  done(failed: boolean): Promise<void>;
}

/**
 * Finds the images and looks whether they can belong to a container with or without a terminal: files and sizes, not contents.
 * @throws NotFound, BrokenImage, InvalidRequest
 */
export async function openCheckpoint(path: string, terminal: boolean): Promise<Checkpoint> {
  const imagePath = await findImages(path);
  const inner = await readManifest(imagePath);
  const manifest = inner ?? (imagePath === path ? undefined : await readManifest(path));
  if (manifest && manifest.terminal !== terminal)
    throw new InvalidRequest(
      manifest.terminal
        ? `checkpoint ${path} is of a container with a terminal: create the new one with a terminal`
        : `checkpoint ${path} is of a container without a terminal: create the new one without`,
    );
  if (manifest) await checkFiles(inner ? imagePath : path, manifest);
  if (!(await stat(join(imagePath, "descriptors.json")).catch(() => undefined)))
    throw new BrokenImage(
      `checkpoint ${path} has no descriptors.json, which engines write beside CRIU's images: it is incomplete, or a dump of processes rather than of a container`,
    );
  if (manifest?.options.parentPath && !(await stat(join(imagePath, "parent")).catch(() => undefined)))
    throw new BrokenImage(
      `checkpoint ${path} builds on the pre-dump ${manifest.options.parentPath} (from its directory), which is missing`,
    );
  return { path, imagePath, manifest };
}

/** The directory with CRIU's images: the path itself, or `checkpoint/` in it. */
async function findImages(path: string): Promise<string> {
  for (const directory of [path, join(path, "checkpoint")])
    if (await stat(join(directory, "inventory.img")).catch(() => undefined)) return directory;
  const found = await stat(path).catch(() => undefined);
  if (!found) throw new NotFound(`checkpoint ${path} does not exist`);
  if (!found.isDirectory()) throw new InvalidRequest(`checkpoint ${path} is not a directory`);
  throw new BrokenImage(`${path} is not a checkpoint: it holds no inventory.img`);
}

/** Makes what the engine's `restore` needs. Run again after a crash, it finds or makes the same. */
export async function prepareRestore(task: Task, spec: OciSpec, path: string): Promise<RestorePlan> {
  const imagePath = await findImages(path);
  const manifest =
    (await readManifest(imagePath)) ?? (imagePath === path ? undefined : await readManifest(path));
  const policy = restorePolicy(manifest, spec);
  const engine = await withFeatures(task);
  const workPath = task.options.criuWorkPath || join(task.bundle, "criu-restore");
  const config = new BundleConfig(task.bundle);
  const cgroup = await cgroupOfRestore(task, spec);
  await mkdir(workPath, { recursive: true, mode: 0o700 });
  const criuConfig = await criuConfigFile(task.bundle, "restore", {
    tcpClose: policy.tcp === "close",
    cgroupRoots: cgroup === undefined ? undefined : await cgroupRoots(cgroup, task.pod.keeper.pid),
  });
  if (engine.name === "runc" && ownsNetworkNamespace(spec)) await config.addLoopbackHook(task.pod.keeper.pid);
  // Where the cgroup is there, CRIU gives it no limits of the dump; the engine gives it the new container's. systemd makes its own.
  if (cgroup !== undefined && !engine.systemdCgroup && !["full", "strict"].includes(policy.cgroupsMode))
    await makeCgroup(cgroup);
  return {
    engine,
    options: {
      imagePath,
      workPath,
      ...policyOptions(policy),
      tcpClose: policy.tcp === "close",
      ...criuConfig,
    },
    explain: (failure) =>
      criuFailure(`restore of task ${task.id} from ${path}`, failure, workPath, "restore.log"),
    done: async (failed) => {
      if (failed) await keepLog(join(workPath, "restore.log"), join(task.bundle, "criu-restore.log"));
      if (!task.options.criuWorkPath) await rm(workPath, { recursive: true, force: true });
      await rm(join(task.bundle, "criu-restore.conf"), { force: true });
      await config.putBack();
    },
  };
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
