import { access } from "node:fs/promises";
import { dirname, join } from "node:path";
import { NotFound } from "../../errors/index.ts";
import { readMountInfo, unescapeOctal } from "../../linux/mount-options.ts";
import { rawName } from "../tar/format.ts";
import { runJob } from "../worker/pool.ts";
import type { ApplyOutput } from "./apply.ts";
import { excluder } from "./exclude.ts";
import type { PackOutput } from "./layer.ts";
import { DELETED_FILES_NAME, ROOTFS_DIFF_NAME } from "./names.ts";
import type { Layers } from "./overlay.ts";
import type { Changes } from "./pack.ts";
import type { Snapshot } from "./snapshot.ts";

// What a container has changed in its root file system, as a layer: `rootfs-diff.tar` and `deleted.files`.

export { type Changes, DELETED_FILES_NAME, type Layers, ROOTFS_DIFF_NAME };

/**
 * The layers of the overlay that is mounted at a path.
 * @throws NotFound when there is none: another snapshotter
 */
export async function overlayLayers(rootfs: string, pid: number | "self" = "self"): Promise<Layers> {
  const mounts = (await readMountInfo(pid)).filter((mount) => mount.mountPoint === rootfs);
  const mount = mounts.at(-1); // the last one covers the others
  if (mount?.type !== "overlay")
    throw new NotFound(
      `${rootfs} is ${mount ? `of type ${mount.type}` : "no mount point"}: it has no upper layer`,
    );
  const options = joinEscaped(mount.superOptions).map(unescapeOctal);
  const valuesOf = (key: string) =>
    options.filter((option) => option.startsWith(`${key}=`)).map((option) => option.slice(key.length + 1));
  const upper = valuesOf("upperdir")[0];
  if (upper === undefined) throw new NotFound(`the overlay at ${rootfs} is read-only: it has no upper layer`);
  const lowers = [...valuesOf("lowerdir").flatMap(splitLowers), ...valuesOf("lowerdir+")].map(
    withoutBackslashes,
  );
  return { upper: withoutBackslashes(upper), lowers: await findAll(lowers, withoutBackslashes(upper)) };
}

/** What a root file system was made of, for as long as it isn't disposed of. */
export interface RootfsBase extends AsyncDisposable {
  /** directory */
  readonly path: string;
  readonly snapshotter: string;
  /** when the root was the same, at the earliest, nanoseconds since 1970 */
  readonly sameAtNs: bigint;
}

/**
 * A root file system that keeps its changes in no layer of their own, beside what it was made of.
 * @param base      directory that is as the root was
 * @param sameAtNs  when they were the same, at the earliest
 */
export async function snapshotOf(root: string, base: string, sameAtNs: bigint): Promise<Snapshot> {
  const mounted = (await readMountInfo("self"))
    .map(({ mountPoint }) => mountPoint)
    .filter((mountPoint) => mountPoint.startsWith(`${root}/`))
    .map((mountPoint) => rawName(mountPoint.slice(root.length + 1)));
  return { root, base, mounted, sameAtNs };
}

/** Overlay writes a comma in a path as `\,`, which cuts an option in two. */
function joinEscaped(options: readonly string[]): string[] {
  const joined: string[] = [];
  for (const option of options) {
    const before = joined.at(-1);
    if (before?.endsWith("\\134") || before?.endsWith("\\"))
      joined[joined.length - 1] = `${before},${option}`;
    else joined.push(option);
  }
  return joined;
}

/** At colons that have no backslash before them; two colons begin layers of data only, which hold no names. */
const splitLowers = (list: string) => list.split("::", 1)[0]!.split(/(?<!\\):/);
const withoutBackslashes = (path: string) => path.replace(/\\(.)/g, "$1");

/** Relative ones are from where the mounter was, which containerd and Podman choose among the parents of the upper one. */
async function findAll(lowers: string[], upper: string): Promise<string[] | undefined> {
  const found: string[] = [];
  for (const lower of lowers) {
    const candidates = lower.startsWith("/")
      ? [lower]
      : parentsOf(upper).map((parent) => join(parent, lower));
    const path = await firstThatExists(candidates);
    if (path === undefined) return undefined;
    found.push(path);
  }
  return found;
}

function parentsOf(path: string): string[] {
  const parent = dirname(path);
  return parent === path ? [] : [parent, ...parentsOf(parent)];
}

async function firstThatExists(paths: string[]): Promise<string | undefined> {
  for (const path of paths)
    if (
      await access(path).then(
        () => true,
        () => false, // the next one
      )
    )
      return path;
  return undefined;
}

/**
 * Writes a container's changes. While it runs nothing may change: the container is frozen.
 * @param directory  where `rootfs-diff.tar` and `deleted.files` go; neither may exist
 * @param options.exclude    paths that are left out, see `excluder`
 * @param options.maxBytes   of the tar; more is an error
 * @param options.whiteouts  deletions are marked in the tar as image layers have it (the default), or only listed in `deleted.files`,
 *                           as Podman and CRI-O want it
 * @throws ResourceExhausted, Unsupported, WrongState when something changes; nothing is left then
 */
export async function takeRootfsDiff(
  changes: Changes,
  directory: string,
  options: { exclude?: readonly string[]; maxBytes?: number; whiteouts?: boolean; signal?: AbortSignal } = {},
): Promise<PackOutput> {
  const input = {
    changes,
    tar: join(directory, ROOTFS_DIFF_NAME),
    deletedFiles: join(directory, DELETED_FILES_NAME),
    exclude: [...(options.exclude ?? [])],
    maxBytes: options.maxBytes,
    whiteouts: options.whiteouts ?? true,
  };
  return await runJob("packRootfsDiff", input, options.signal);
}

/**
 * For who is about to freeze a container: has a thread ready that `takeRootfsDiff` will use, and what that will look at in memory.
 * @throws InvalidRequest for patterns that it wouldn't take
 */
export async function prepareRootfsDiff(
  changes: Changes,
  exclude: readonly string[],
  signal?: AbortSignal,
): Promise<void> {
  excluder(exclude);
  await runJob("prepareRootfsDiff", { changes }, signal);
}

/** Whether a checkpoint's directory has changes to apply. */
export async function hasRootfsDiff(directory: string): Promise<boolean> {
  return (
    (await firstThatExists([join(directory, ROOTFS_DIFF_NAME), join(directory, DELETED_FILES_NAME)])) !==
    undefined
  );
}

/**
 * Applies a container's changes to a fresh root file system, from a checkpoint of ours, of Podman, CRI-O or containerd. Any failure is
 * an error, and the target is then to be discarded: it is half changed.
 * @param directory  with `rootfs-diff.tar`, and `deleted.files` where there is one
 * @param target     the container's root, before anything is mounted below it
 * @param options.devices  whether device nodes may be made (default: yes, as by any image; the device cgroup guards their use)
 * @returns undefined when the checkpoint has no rootfs diff
 * @throws BrokenImage for what would lead out of the target or doesn't fit it; ResourceExhausted
 */
export async function applyRootfsDiff(
  directory: string,
  target: string,
  options: { maxBytes?: number; maxMembers?: number; devices?: boolean; signal?: AbortSignal } = {},
): Promise<ApplyOutput | undefined> {
  const tar = await firstThatExists([join(directory, ROOTFS_DIFF_NAME)]);
  const deletedFiles = await firstThatExists([join(directory, DELETED_FILES_NAME)]);
  if (tar === undefined && deletedFiles === undefined) return undefined;
  const { maxBytes, maxMembers, devices = true } = options;
  return await runJob(
    "applyRootfsDiff",
    { tar, target, deletedFiles, maxBytes, maxMembers, devices },
    options.signal,
  );
}
