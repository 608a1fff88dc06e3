import { constants, renameSync, rmSync, writeFileSync } from "node:fs";
import { lstat, open, readdir, stat } from "node:fs/promises";
import { join, relative } from "node:path";
import { BrokenImage, Unsupported } from "../errors/index.ts";
import type { CpuFacts } from "./cpu.ts";
import { hashFiles, listTree, syncPath } from "./digest.ts";
import { algorithmOf } from "./file-hash.ts";
import schema from "./manifest.schema.json" with { type: "json" };
import { findFault, type Schema } from "./schema.ts";

/** `cedana.json`, beside CRIU's images: how a checkpoint was taken, so that it can be restored in the same way. */
export const MANIFEST_NAME = "cedana.json";
const VERSION = 1;

/** A manifest lists some hundred files. More than this is not one, and would only fill our memory. */
const MAX_MANIFEST_BYTES = 16 * 1024 * 1024;

/** Who a container is, for itself and for people. */
export interface ContainerIdentity {
  readonly containerId: string;
  /** containerd's; "" outside of it */
  readonly namespace: string;
  readonly hostname?: string;
  /** Kubernetes' names of its pod, and of the container in it */
  readonly pod?: { readonly namespace: string; readonly name: string; readonly container?: string };
}

/** Described, and checked when read, by manifest.schema.json. */
export interface CheckpointManifest {
  version: 1;
  /** ISO 8601, UTC */
  createdAt: string;
  containerId: string;
  namespace: string;
  hostname?: string;
  /** Kubernetes' names */
  pod?: NonNullable<ContainerIdentity["pod"]>;
  /** how many restores it had behind it; absent: none */
  generation?: number;
  /** the container had a terminal */
  terminal: boolean;
  /** release */
  kernel: string;
  criuVersion?: string;
  cedanaVersion?: string;
  /** the container's image, as the engine above names it */
  image?: { name?: string; digest?: string };
  cpu?: CpuFacts;
  /** name of the checkpoint in the node's store; absent: the caller gave the place */
  name?: string;
  /** who asked for it: containerd or an engine's caller (also when absent), the command line, `cedana.io/checkpoint-every`, or a signal */
  trigger?: "caller" | "command" | "schedule" | "signal";
  /** what the container changed in its root file system, when that was taken; absent: images alone */
  rootfsDiff?: RootfsDiffFacts;
  /**
   * All but this file is in an archive beside it, which has a manifest of its own, of the checkpoint's files. `files` names the archive.
   */
  archive?: { file: string; compression: "none" | "gzip" | "lz4" | "zstd"; encrypted: boolean };
  /** the container's GPU state, when it has any: in the memory images, put there by the driver */
  gpu?: GpuFacts;
  /** the plugins that took part */
  plugins?: { name: string; version: string }[];
  /** of the container, as its spec names them; with a path: joined, not its own */
  namespaces?: { type: string; path?: string }[];
  engine: { name: string; version: string; path: string };
  /** options as used; a restore uses them again */
  options: {
    tcp?: "keep" | "close" | "skip-in-flight";
    fileLocks: boolean;
    extUnix: boolean;
    shellJob: boolean;
    emptyNamespaces: string[];
    cgroupsMode?: string;
    /** how packets were kept away meanwhile; absent: CRIU's default */
    networkLock?: "skip" | "nftables";
    leaveRunning: boolean;
    parentPath?: string;
  };
  /** SHA-256 of the container's config.json as parsed, hexadecimal */
  specDigest: string;
  /**
   * every regular file below the image path, sorted; the manifest itself is not among them. The digest is `xxh128:`
   * (older ones: `sha256:`) and hexadecimal digits; it may be absent, which makes `verifyFiles` look at sizes alone.
   */
  files: { path: string; size: number; digest?: string }[];
  /** milliseconds by step, which are the adapters' names where a chain of them took the checkpoint */
  timings: { totalMs: number } & Record<string, number>;
}

/**
 * `rootfs-diff.tar` and `deleted.files` beside the manifest: taken while the container was frozen, so memory and files agree. A restore
 * applies them to a fresh root file system of the same image before CRIU runs (`applyRootfsDiff`), or refuses.
 */
export interface RootfsDiffFacts {
  /** an overlay's upper layer, or the root compared with the snapshot below it; with whiteouts in the tar */
  source: "overlay" | "snapshot";
  /** containerd's, of a snapshot */
  snapshotter?: string;
  /** of the tar */
  bytes: number;
  members: number;
  /** how many paths were deleted */
  deleted: number;
  /** patterns of paths that were left out (see `excluder`): the container's new ones have what the image has there */
  exclude: string[];
  /** sockets, which no tar holds; their servers make them again */
  sockets: string[];
}

/** What a restore must know of the GPUs; taken by the driver, by NVIDIA's program over it, or by CRIU's plugin, which knows the rest itself. */
export interface GpuFacts {
  means: "driver" | "cuda-checkpoint" | "criu-plugin";
  /** of the driver's interface: 13000 is 13.0 */
  driverVersion?: number;
  /** of the driver itself: "580.65.06" */
  driver?: string;
  /** all of the machine; uuid: 32 hexadecimal digits */
  devices: { uuid: string; name: string; memoryBytes: number }[];
  processes: {
    /** its own number for itself */
    pidInContainer: number;
    comm: string;
    /** what it comes back to */
    before: "running" | "locked" | "checkpointed";
    /** the thread of it that does the driver's work, by its own number: it must run for a restore */
    restoreThread?: number;
    /** UUIDs of those that it used, and its memory on them, as far as NVML tells */
    devices?: string[];
    memoryBytes?: number;
    /** milliseconds; restore and unlock where it ran on */
    times: { lockMs?: number; checkpointMs?: number; restoreMs?: number; unlockMs?: number };
  }[];
}

/**
 * Writes the manifest, which makes the images a checkpoint: last of all, to a temporary file that is synced and renamed. Fills
 * in `files` from what lies in the image path. Syncing the images is up to
 * whoever commits the checkpoint.
 * @param imagePath  directory of CRIU's images, or of the whole checkpoint
 * @param options.digests  hash every file, in worker threads
 * @param options.files    what is known already, every file
 * @param options.synced   false: for a checkpoint whose files aren't synced either
 */
export async function writeManifest(
  imagePath: string,
  manifest: Omit<CheckpointManifest, "version" | "files">,
  options: {
    digests?: boolean;
    files?: CheckpointManifest["files"];
    synced?: boolean;
    signal?: AbortSignal;
  } = {},
): Promise<void> {
  const { synced = true, signal } = options;
  // A manifest may be there already, of a writer that a crash cut off.
  const listed = options.files?.filter(({ path }) => !isOurs(path)) ?? (await listFiles(imagePath));
  const files = options.digests && !options.files ? await hashFiles(imagePath, listed, signal) : listed;
  const whole: CheckpointManifest = { version: VERSION, ...manifest, files };
  const fault = findFault(JSON.parse(JSON.stringify(whole)), schema as Schema);
  if (fault !== undefined) throw new TypeError(`manifest of ${imagePath}: ${fault}`); // no later reader would take it
  const path = join(imagePath, MANIFEST_NAME);
  const temporary = `${path}.new`;
  try {
    // At once but for the disk: a trip through the thread pool takes longer than each of these.
    rmSync(temporary, { force: true }); // of a writer that was killed; "wx" below doesn't follow a link
    writeFileSync(temporary, `${JSON.stringify(whole, undefined, 2)}\n`, { flag: "wx", mode: 0o600 });
    if (synced) await syncPath(temporary);
    renameSync(temporary, path);
  } catch (error) {
    rmSync(temporary, { force: true });
    throw error;
  }
  if (synced) await syncPath(imagePath); // the rename itself
}

/** Regular files only: CRIU's `parent` is a link to another checkpoint. */
async function listFiles(imagePath: string): Promise<CheckpointManifest["files"]> {
  const entries = await readdir(imagePath, { withFileTypes: true, recursive: true });
  const paths = entries
    .filter((entry) => entry.isFile())
    .map((entry) => relative(imagePath, join(entry.parentPath, entry.name)))
    .filter((path) => !isOurs(path))
    .sort();
  return await Promise.all(
    paths.map(async (path) => ({ path, size: (await stat(join(imagePath, path))).size })),
  );
}

/**
 * @returns undefined when there is none: a checkpoint of somebody else
 * @throws BrokenImage when it isn't a manifest, Unsupported when it is of a newer version
 */
export async function readManifest(imagePath: string): Promise<CheckpointManifest | undefined> {
  const path = join(imagePath, MANIFEST_NAME);
  let text: string;
  try {
    text = await readBounded(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw new BrokenImage(`manifest ${path} can't be read`, { cause: error });
  }
  return parseManifest(text, path);
}

/** @param path  for messages. @throws BrokenImage, Unsupported */
export function parseManifest(text: string, path: string): CheckpointManifest {
  let manifest: unknown;
  try {
    manifest = JSON.parse(text);
  } catch {
    throw new BrokenImage(`manifest ${path} is not JSON`); // without the parser's words: they quote the file
  }
  const version = (manifest as { version?: unknown } | null)?.version;
  if (typeof version === "number" && Number.isInteger(version) && version > VERSION)
    throw new Unsupported(`manifest ${path} is of version ${version}; this cedana knows up to ${VERSION}`);
  const fault = findFault(manifest, schema as Schema);
  if (fault !== undefined) throw new BrokenImage(`manifest ${path} is malformed: ${fault}`);
  return manifest as CheckpointManifest;
}

/** Images may come from anybody: a link is not followed, and a FIFO or device is not waited for. */
async function readBounded(path: string): Promise<string> {
  await using file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  const info = await file.stat();
  if (!info.isFile()) throw new Error("it is not a regular file");
  if (info.size > MAX_MANIFEST_BYTES) throw new Error(`its ${info.size} bytes are too many`);
  return await file.readFile("utf8");
}

export interface FileFault {
  path: string;
  kind: "missing" | "extra" | "type" | "size" | "digest";
  /** for people; names the file */
  message: string;
}

/**
 * Compares a directory with what its manifest says, file by file, and hashes what has a digest there: nothing is changed, and
 * every fault is found, not the first. CRIU's `parent`, a link to an earlier checkpoint, is no fault.
 * @returns an empty list when all is as it was
 */
export async function verifyFiles(
  manifest: CheckpointManifest,
  directory: string,
  signal?: AbortSignal,
): Promise<FileFault[]> {
  const found = await listTree(directory, signal);
  const named = new Map(manifest.files.map((file) => [file.path, file]));
  const toHash = found.flatMap(({ path, type, size }) => {
    const { size: expected, digest } = named.get(path) ?? {};
    // What has another size needs no digest to be wrong.
    return digest && type === "file" && size === expected
      ? [{ path, size, algorithm: algorithmOf(digest) }]
      : [];
  });
  const digests = new Map(
    (await hashFiles(directory, toHash, signal)).map(({ path, digest }) => [path, digest]),
  );
  return compareFiles(
    manifest,
    found
      .filter(({ path, type }) => type !== "directory" && !(type === "symlink" && isParent(path)))
      .map((file) => ({ ...file, digest: digests.get(file.path) })),
  );
}

/**
 * The faults of files that were found, against those of a manifest.
 * @param found    digest: where it is known
 * @param ignored  may be there without being named
 */
export function compareFiles(
  manifest: CheckpointManifest,
  found: readonly { path: string; size: number; type?: string; digest?: string | undefined }[],
  ignored: readonly string[] = [],
): FileFault[] {
  const byPath = new Map(found.map((file) => [file.path, file]));
  const faults: FileFault[] = [];
  const fault = (kind: FileFault["kind"], path: string, what: string) =>
    faults.push({ path, kind, message: `${path} ${what}` });
  for (const { path, size, digest } of manifest.files) {
    const there = byPath.get(path);
    byPath.delete(path);
    if (!there) fault("missing", path, "is missing");
    else if (there.type !== undefined && there.type !== "file")
      fault("type", path, `is a ${there.type} instead of a file`);
    else if (there.size !== size) fault("size", path, `has ${there.size} bytes instead of ${size}`);
    else if (digest !== undefined && there.digest !== undefined && digest !== there.digest)
      fault("digest", path, `has the digest ${there.digest} instead of ${digest}`);
  }
  for (const { path, type = "file" } of byPath.values())
    if (!isOurs(path) && !ignored.includes(path))
      fault("extra", path, `is a ${type} that the manifest doesn't name`);
  return faults.sort((a, b) => (a.path < b.path ? -1 : 1));
}

const isOurs = (path: string) => path === MANIFEST_NAME || path === `${MANIFEST_NAME}.new`;
const isParent = (path: string) => path === "parent" || path.endsWith("/parent");

/**
 * Whether the files that a restore reads are there in their size. Logs and statistics don't count: whoever copies or archives images may
 * leave them out.
 */
export async function compareSizes(directory: string, manifest: CheckpointManifest): Promise<FileFault[]> {
  const faults = await Promise.all(
    manifest.files.map(async ({ path, size }): Promise<FileFault | undefined> => {
      if (!isRead(path)) return undefined;
      const found = await lstat(join(directory, path)).catch((error: NodeJS.ErrnoException) => error);
      if (found instanceof Error) {
        const what = found.code === "ENOENT" ? "is missing" : `can't be looked at: ${found.message}`;
        return { path, kind: "missing", message: `${path} ${what}` };
      }
      if (!found.isFile()) return { path, kind: "type", message: `${path} is not a file` };
      if (found.size === size) return undefined;
      return { path, kind: "size", message: `${path} has ${found.size} bytes instead of ${size}` };
    }),
  );
  return faults.filter((fault) => fault !== undefined);
}

/** By a restore. */
function isRead(path: string): boolean {
  return /\.img$|(?:^|\/)descriptors\.json$|^rootfs-diff\.tar$|^deleted\.files$|^checkpoint\.tar(?:\.|$)/.test(
    path,
  );
}
