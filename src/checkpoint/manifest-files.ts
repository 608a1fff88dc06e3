import { lstatSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { lstat, readdir, stat } from "node:fs/promises";
import { join, relative } from "node:path";
import { hashFiles, listTree, syncPath } from "./digest.ts";
import { algorithmOf } from "./file-hash.ts";
import { type CheckpointManifest, MANIFEST_NAME, manifestText } from "./manifest.ts";

// A manifest and the files that it names: written for what lies in a directory, and compared with it.

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
  const text = manifestText({ ...manifest, files }, imagePath);
  const path = join(imagePath, MANIFEST_NAME);
  const temporary = `${path}.new`;
  try {
    // At once but for the disk: a trip through the thread pool takes longer than each of these.
    rmSync(temporary, { force: true }); // of a writer that was killed; "wx" below doesn't follow a link
    writeFileSync(temporary, text, { flag: "wx", mode: 0o600 });
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

/** Looked at on the event loop, some us each; more of them, as a container with many processes has, by way of the thread pool. */
const FILES_AT_ONCE = 200;

/**
 * Whether the files that a restore reads are there in their size. Logs and statistics don't count: whoever copies or archives images may
 * leave them out.
 */
export async function compareSizes(directory: string, manifest: CheckpointManifest): Promise<FileFault[]> {
  const atOnce = manifest.files.length <= FILES_AT_ONCE;
  const look = async (path: string) => (atOnce ? lstatSync(path) : await lstat(path));
  const faults = await Promise.all(
    manifest.files.map(async ({ path, size }): Promise<FileFault | undefined> => {
      if (!isRead(path)) return undefined;
      const found = await look(join(directory, path)).catch((error: NodeJS.ErrnoException) => error);
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
