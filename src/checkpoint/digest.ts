import { closeSync, constants, fstatSync, openSync, readdirSync } from "node:fs";
import { open, readdir } from "node:fs/promises";
import { join } from "node:path";
import { BrokenImage } from "../errors/index.ts";
import { openBeneath } from "../linux/addon.ts";
import { type DigestAlgorithm, FileHash } from "./file-hash.ts";
import type { JobContext } from "./worker/jobs.ts";
import { MAX_WORKERS, runJob } from "./worker/pool.ts";

// Lists, hashes and syncs what lies in a checkpoint. The directory may come from anybody: below it no link is followed, and
// nothing but a regular file is opened.

/** One thing in a checkpoint, by its path in it. */
export interface FoundFile {
  path: string;
  type: "file" | "directory" | "symlink" | "other";
  /** of a regular file, else 0 */
  size: number;
}

/** Everything below a directory, sorted by path. */
export async function listTree(directory: string, signal?: AbortSignal): Promise<FoundFile[]> {
  return await runJob("listFiles", { directory }, signal);
}

export interface HashedFile {
  path: string;
  size: number;
  /** `xxh128:` or `sha256:`, and hexadecimal digits */
  digest: string;
}

/**
 * Hashes files, in as many threads as the pool has.
 * @param files  by their path below the directory; size only to share the work evenly; algorithm: default xxh128
 * @returns in the order of `files`
 * @throws BrokenImage for what is not a regular file
 */
export async function hashFiles(
  directory: string,
  files: readonly { path: string; size: number; algorithm?: DigestAlgorithm }[],
  signal?: AbortSignal,
): Promise<HashedFile[]> {
  const shares = Array.from({ length: MAX_WORKERS }, () => ({
    bytes: 0,
    files: [] as { path: string; algorithm: DigestAlgorithm }[],
  }));
  for (const { path, size, algorithm = "xxh128" } of files.toSorted((a, b) => b.size - a.size)) {
    const least = shares.reduce((a, b) => (b.bytes < a.bytes ? b : a));
    least.bytes += size + 64 * 1024; // opening costs, too
    least.files.push({ path, algorithm });
  }
  const stop = new AbortController(); // one that fails stops the others
  const either = signal ? AbortSignal.any([signal, stop.signal]) : stop.signal;
  const results = await Promise.allSettled(
    shares
      .filter((share) => share.files.length > 0)
      .map(async (share) => {
        try {
          return await runJob("hashFiles", { directory, files: share.files }, either);
        } catch (error) {
          stop.abort(error);
          throw error;
        }
      }),
  );
  if (stop.signal.aborted) throw stop.signal.reason;
  const byPath = new Map(
    results.flatMap((result) =>
      result.status === "fulfilled" ? result.value.map((file) => [file.path, file]) : [],
    ),
  );
  return files.map(({ path }) => byPath.get(path)!);
}

/** How many threads of libuv's pool may wait for the disk; the others are for everybody. */
const SYNC_LANES = 2;

/**
 * Writes everything below a directory, and itself, to the disk (fsync(2)). In the thread pool: starting a worker of ours takes longer than
 * to sync a small checkpoint.
 */
export async function syncTree(directory: string, signal?: AbortSignal): Promise<void> {
  const entries = await readdir(directory, { withFileTypes: true });
  const files = entries.filter((entry) => entry.isFile()).values();
  const lane = async () => {
    for (const { name } of files) {
      signal?.throwIfAborted();
      await syncPath(join(directory, name));
    }
  };
  await Promise.all(Array.from({ length: SYNC_LANES }, lane));
  for (const { name } of entries.filter((entry) => entry.isDirectory()))
    await syncTree(join(directory, name), signal);
  await syncPath(directory);
}

/** fsync(2), of what no link is followed to. */
export async function syncPath(path: string): Promise<void> {
  await using file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW);
  await file.sync();
}

/** Between two looks whether the caller has given up. */
const READ_BYTES = 8 * 1024 * 1024;

export function listFilesHere({ directory }: { directory: string }, context: JobContext): FoundFile[] {
  const found: FoundFile[] = [];
  walk(directory, context, (entry) => found.push(entry));
  return found.sort((a, b) => (a.path < b.path ? -1 : 1));
}

/** Depth first; a directory after what is in it. */
function walk(directory: string, context: JobContext, visit: (entry: FoundFile) => void): void {
  const into = (fd: number, prefix: string) => {
    for (const entry of readdirSync(`/proc/self/fd/${fd}`, { withFileTypes: true })) {
      context.checkCancelled();
      const path = prefix + entry.name;
      if (entry.isDirectory()) {
        withFd(openBeneath(fd, entry.name, constants.O_RDONLY | constants.O_DIRECTORY), (child) => {
          into(child, `${path}/`);
          visit({ path, type: "directory", size: 0 });
        });
      } else if (entry.isFile()) {
        withFd(openFile(fd, entry.name, path), (child) =>
          visit({ path, type: "file", size: fstatSync(child).size }),
        );
      } else visit({ path, type: entry.isSymbolicLink() ? "symlink" : "other", size: 0 });
    }
  };
  withFd(openDirectory(directory), (fd) => into(fd, ""));
}

export function hashFilesHere(
  { directory, files }: { directory: string; files: { path: string; algorithm: DigestAlgorithm }[] },
  context: JobContext,
): HashedFile[] {
  return withFd(openDirectory(directory), (root) =>
    files.map(({ path, algorithm }) =>
      withFd(openFile(root, path, path), (fd) => {
        const hash = new FileHash(algorithm);
        let size = 0;
        for (let read = READ_BYTES; read === READ_BYTES; size += read) {
          context.checkCancelled();
          read = hash.readSync(fd, size, READ_BYTES);
        }
        return { path, size, digest: hash.digest() };
      }),
    ),
  );
}

export function openDirectory(path: string): number {
  return openSync(path, constants.O_RDONLY | constants.O_DIRECTORY);
}

function openFile(directory: number, name: string, path: string): number {
  let fd: number;
  try {
    // Not blocked by a FIFO without a writer.
    fd = openBeneath(directory, name, constants.O_RDONLY | constants.O_NONBLOCK | constants.O_NOFOLLOW);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT")
      throw new BrokenImage(`${path} is missing`, { cause: error });
    throw new BrokenImage(`${path} can't be opened as a file of the checkpoint`, { cause: error });
  }
  if (fstatSync(fd).isFile()) return fd;
  closeSync(fd);
  throw new BrokenImage(`${path} is not a regular file`);
}

export function withFd<T>(fd: number, use: (fd: number) => T): T {
  try {
    return use(fd);
  } finally {
    closeSync(fd);
  }
}
