import { constants } from "node:fs";
import { open, readdir } from "node:fs/promises";
import { join } from "node:path";
import type { FoundFile, HashedFile } from "./digest-job.ts";
import type { DigestAlgorithm } from "./file-hash.ts";
import { MAX_WORKERS, runJob } from "./worker/pool.ts";

// Lists, hashes and syncs what lies in a checkpoint, beside the event loop.

/** Everything below a directory, sorted by path. */
export async function listTree(directory: string, signal?: AbortSignal): Promise<FoundFile[]> {
  return await runJob("listFiles", { directory }, signal);
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
