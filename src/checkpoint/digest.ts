import { createHash, type Hash } from "node:crypto";
import {
  closeSync,
  constants,
  fchmodSync,
  fstatSync,
  fsyncSync,
  openSync,
  readdirSync,
  readlinkSync,
  readSync,
} from "node:fs";
import { getPriority, setPriority } from "node:os";
import { BrokenImage, WrongState } from "../errors/index.ts";
import { openBeneath } from "../linux/addon.ts";
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
  /** `sha256:` and hexadecimal */
  digest: string;
}

/**
 * Hashes files, in as many threads as the pool has.
 * @param files  by their path below the directory; size only to share the work evenly
 * @returns in the order of `files`
 * @throws BrokenImage for what is not a regular file
 */
export async function hashFiles(
  directory: string,
  files: readonly { path: string; size: number }[],
  signal?: AbortSignal,
): Promise<HashedFile[]> {
  const shares = Array.from({ length: MAX_WORKERS }, () => ({ bytes: 0, paths: [] as string[] }));
  for (const { path, size } of files.toSorted((a, b) => b.size - a.size)) {
    const least = shares.reduce((a, b) => (b.bytes < a.bytes ? b : a));
    least.bytes += size + 64 * 1024; // opening costs, too
    least.paths.push(path);
  }
  const stop = new AbortController(); // one that fails stops the others
  const either = signal ? AbortSignal.any([signal, stop.signal]) : stop.signal;
  const results = await Promise.allSettled(
    shares
      .filter(({ paths }) => paths.length > 0)
      .map(async ({ paths }) => {
        try {
          return await runJob("hashFiles", { directory, paths }, either);
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

/** Hashes of a directory's files while they are written. */
export interface Follower {
  /** The writer has ended: hashes what is left. @returns every regular file, sorted by path */
  finish(): Promise<HashedFile[]>;
  /** Ends it where nobody calls `finish`. */
  abandon(): void;
}

/**
 * Hashes CRIU's pages while it writes them: they grow at their end and nowhere else, and a core that CRIU leaves idle keeps up with it,
 * so that the digest of a large checkpoint is known soon after its end. The files are made readable for their owner alone.
 */
export function followFiles(directory: string, signal?: AbortSignal): Follower {
  const ended = new SharedArrayBuffer(4);
  const stop = new AbortController();
  const either = signal ? AbortSignal.any([signal, stop.signal]) : stop.signal;
  const job = runJob("followFiles", { directory, ended }, either);
  job.catch(() => {}); // told by finish, or abandoned
  const end = () => {
    Atomics.store(new Int32Array(ended), 0, 1);
    Atomics.notify(new Int32Array(ended), 0);
  };
  return {
    finish: async () => {
      end();
      return await job;
    },
    abandon: () => {
      stop.abort();
      end();
    },
  };
}

/** Writes everything below a directory, and itself, to the disk (fsync(2)). */
export async function syncTree(directory: string, signal?: AbortSignal): Promise<void> {
  await runJob("syncTree", { directory }, signal);
}

const READ_BYTES = 1024 * 1024;

export function listFilesHere({ directory }: { directory: string }, context: JobContext): FoundFile[] {
  const found: FoundFile[] = [];
  walk(directory, context, (entry) => found.push(entry));
  return found.sort((a, b) => (a.path < b.path ? -1 : 1));
}

/** Depth first; a directory after what is in it. */
function walk(directory: string, context: JobContext, visit: (entry: FoundFile, fd?: number) => void): void {
  const into = (fd: number, prefix: string) => {
    for (const entry of readdirSync(`/proc/self/fd/${fd}`, { withFileTypes: true })) {
      context.checkCancelled();
      const path = prefix + entry.name;
      if (entry.isDirectory()) {
        withFd(openBeneath(fd, entry.name, constants.O_RDONLY | constants.O_DIRECTORY), (child) => {
          into(child, `${path}/`);
          visit({ path, type: "directory", size: 0 }, child);
        });
      } else if (entry.isFile()) {
        withFd(openFile(fd, entry.name, path), (child) =>
          visit({ path, type: "file", size: fstatSync(child).size }, child),
        );
      } else visit({ path, type: entry.isSymbolicLink() ? "symlink" : "other", size: 0 });
    }
  };
  withFd(openDirectory(directory), (fd) => into(fd, ""));
}

export function hashFilesHere(
  { directory, paths }: { directory: string; paths: string[] },
  context: JobContext,
): HashedFile[] {
  const buffer = Buffer.allocUnsafeSlow(READ_BYTES);
  return withFd(openDirectory(directory), (root) =>
    paths.map((path) =>
      withFd(openFile(root, path, path), (fd) => {
        const hash = createHash("sha256");
        let size = 0;
        for (let read = -1; read !== 0; size += read) {
          context.checkCancelled();
          read = readSync(fd, buffer, 0, READ_BYTES, null);
          hash.update(read === READ_BYTES ? buffer : buffer.subarray(0, read));
        }
        return { path, size, digest: `sha256:${hash.digest("hex")}` };
      }),
    ),
  );
}

/** How long to wait when there was nothing new. */
const FOLLOW_PAUSE_MS = 5;

const FOLLOWER_NICENESS = 10;
/** CRIU and the engines let everybody read what they write. */
const PRIVATE = 0o600;

/** Sets this thread's niceness; without CAP_SYS_NICE, which the way back needs, it stays as it is. */
function niceness(): (value: number) => void {
  const thread = Number(readlinkSync("/proc/thread-self").split("/").at(-1));
  try {
    setPriority(thread, getPriority(thread) - 1);
    setPriority(thread, getPriority(thread) + 1);
  } catch {
    return () => {}; // EACCES
  }
  const usual = getPriority(thread);
  return (value) => setPriority(thread, Math.min(19, usual + value));
}

export function followFilesHere(
  { directory, ended }: { directory: string; ended: SharedArrayBuffer },
  context: JobContext,
): HashedFile[] {
  const flag = new Int32Array(ended);
  const buffer = Buffer.allocUnsafeSlow(READ_BYTES);
  const growing = new Map<string, { fd: number; hash: Hash; size: number }>();
  const root = openDirectory(directory);
  const beNice = niceness();
  try {
    beNice(FOLLOWER_NICENESS); // what CRIU needs comes first
    // Asked before looking: what is there after the writer's end is all there is.
    for (let over = false; !over; ) {
      context.checkCancelled();
      over = Atomics.load(flag, 0) !== 0;
      if (over) beNice(0); // now somebody waits
      let news = over;
      for (const name of readdirSync(`/proc/self/fd/${root}`)) {
        if (!/^pages-\d+\.img$/.test(name)) continue;
        let file = growing.get(name);
        if (!file) {
          file = { fd: openFile(root, name, name), hash: createHash("sha256"), size: 0 };
          fchmodSync(file.fd, PRIVATE);
          growing.set(name, file);
        }
        for (let read = -1; read !== 0; file.size += read) {
          context.checkCancelled();
          read = readSync(file.fd, buffer, 0, READ_BYTES, null);
          file.hash.update(buffer.subarray(0, read));
          news ||= read > 0;
        }
      }
      if (!news) Atomics.wait(flag, 0, 0, FOLLOW_PAUSE_MS);
    }
    const followed = [...growing].map(([path, { hash, size, fd }]) => {
      if (fstatSync(fd).size !== size) throw new WrongState(`${path} changed after it was written`);
      return { path, size, digest: `sha256:${hash.digest("hex")}` };
    });
    const paths = listFilesHere({ directory }, context)
      .filter(({ type, path }) => type === "file" && !growing.has(path))
      .map(({ path }) => path);
    for (const path of paths) withFd(openFile(root, path, path), (fd) => fchmodSync(fd, PRIVATE));
    return [...followed, ...hashFilesHere({ directory, paths }, context)].sort((a, b) =>
      a.path < b.path ? -1 : 1,
    );
  } finally {
    beNice(0);
    for (const { fd } of growing.values()) closeSync(fd);
    closeSync(root);
  }
}

export function syncTreeHere({ directory }: { directory: string }, context: JobContext): void {
  walk(directory, context, (_entry, fd) => fd !== undefined && fsyncSync(fd));
  withFd(openDirectory(directory), fsyncSync);
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
