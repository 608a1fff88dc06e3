import { existsSync } from "node:fs";
import { lstat, readdir, rm, rmdir, unlink, utimes } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import type { Logger } from "pino";
import { gpuLibraries, gpuTraces } from "../checkpoint/gpu-mounts.ts";
import { readMountInfo } from "../linux/mount-options.ts";
import { allPids, namespaceInode } from "../linux/proc.ts";
import { type Configuration, readConfiguration } from "./configuration.ts";

/*
 * What GPU containers leave on a node is bounded:
 *
 *   versions of the interception library   the newest used ones stay, and all that somebody has mounted. Checkpoints need theirs, and nobody knows all
 *                                          checkpoints: so many stay, for so long, that an upgrade a month is no matter
 *   traces                                 by age, and by their sum, the oldest first. A process that finds its file gone begins another
 *
 * A container may write where its traces are: only plain files directly in its directory are removed, by names in a directory that it can't
 * replace.
 */

const KEPT_LIBRARIES = 16;
const DAY_MS = 24 * 3_600_000;
/** Since a container was last created with the version, or seen with it. */
const LIBRARY_AGE_MS = 90 * DAY_MS;
/** A restore wants the directory: of a container that has no traces any more, it stays so long. */
const EMPTY_DIRECTORY_AGE_MS = 90 * DAY_MS;

export interface Swept {
  /** versions of the library, by their digests */
  libraries: string[];
  /** traces, and directories of them */
  traces: string[];
}

export async function sweepGpuFiles(log: Pick<Logger, "info" | "warn">, nowMs = Date.now()): Promise<Swept> {
  const swept: Swept = { libraries: [], traces: [] };
  try {
    swept.libraries = await sweepLibraries(nowMs);
    swept.traces = await sweepTraces((await readConfiguration()).gpu, nowMs);
    if (swept.libraries.length + swept.traces.length > 0)
      log.info(swept, "removed old versions of the GPU interception library and old traces");
  } catch (error) {
    log.warn({ err: error }, "sweep what GPU containers have left");
  }
  return swept;
}

interface Entry {
  readonly path: string;
  readonly usedMs: number;
  readonly bytes: number;
}

async function sweepLibraries(nowMs: number): Promise<string[]> {
  for (const { path, usedMs } of await entriesOf(gpuLibraries(), (name) => name.endsWith(".new"), "file"))
    if (nowMs - usedMs > DAY_MS) await unlink(path).catch(gone); // a crash's
  const versions = await entriesOf(gpuLibraries(), (name) => /^[0-9a-f]{64}$/.test(name));
  const old = versions.slice(KEPT_LIBRARIES).filter(({ usedMs }) => nowMs - usedMs > LIBRARY_AGE_MS);
  if (old.length === 0) return [];
  const mounted = await mountedDirectories(gpuLibraries());
  const removed: string[] = [];
  for (const { path } of old) {
    if (mounted.has(basename(path))) {
      await utimes(path, nowMs / 1000, nowMs / 1000);
      continue;
    }
    await rm(path, { recursive: true, force: true });
    removed.push(basename(path));
  }
  return removed;
}

/** The bound holds whenever a container gets a directory for its traces, too. */
export async function sweepTraces(
  { tracesMaxAgeMs, tracesMaxBytes }: Configuration["gpu"],
  nowMs = Date.now(),
): Promise<string[]> {
  const directories = await entriesOf(gpuTraces(), () => true);
  const perDirectory = await Promise.all(directories.map(({ path }) => entriesOf(path, () => true, "file")));
  const removed: string[] = [];
  let sum = 0;
  // The newest first: what is beyond the sum is what is oldest.
  for (const { path, usedMs, bytes } of perDirectory.flat().sort(byUse)) {
    sum += bytes;
    if (sum <= tracesMaxBytes && nowMs - usedMs <= tracesMaxAgeMs) continue;
    await unlink(path).catch(gone);
    removed.push(path);
  }
  const empty = directories.filter(
    ({ usedMs }, at) => perDirectory[at]!.length === 0 && nowMs - usedMs > EMPTY_DIRECTORY_AGE_MS,
  );
  if (empty.length === 0) return removed;
  const mounted = await mountedDirectories(gpuTraces());
  for (const { path } of empty) {
    if (mounted.has(basename(path))) continue;
    const isRemoved = await rmdir(path).then(
      () => true,
      (error: NodeJS.ErrnoException) => {
        if (error.code === "ENOTEMPTY") return false; // the container has made directories there: they are for people to look at
        return gone(error);
      },
    );
    if (isRemoved) removed.push(path);
  }
  return removed;
}

const byUse = (a: Entry, b: Entry) => b.usedMs - a.usedMs;

/** What is directly in a directory, the last used first. */
async function entriesOf(
  directory: string,
  wanted: (name: string) => boolean,
  kind: "directory" | "file" = "directory",
): Promise<Entry[]> {
  if (!existsSync(directory)) return [];
  const names = (await readdir(directory)).filter(wanted);
  const entries = await Promise.all(
    names.map(async (name) => {
      const path = join(directory, name);
      const info = await lstat(path).catch(() => undefined); // ENOENT: removed meanwhile
      if (!info || info.isDirectory() !== (kind === "directory")) return undefined;
      // Blocks: a file with holes takes less than its size.
      return { path, usedMs: info.mtimeMs, bytes: info.blocks * 512 };
    }),
  );
  return entries.filter((entry) => entry !== undefined).sort(byUse);
}

function gone(error: NodeJS.ErrnoException): false {
  if (error.code !== "ENOENT") throw error;
  return false;
}

/** Names of those directories below `parent` that are mounted in any process's mount namespace. */
async function mountedDirectories(parent: string): Promise<Set<string>> {
  const byNamespace = new Map<number, number>();
  for (const pid of allPids()) {
    try {
      const namespace = namespaceInode(pid, "mnt");
      if (namespace !== undefined) byNamespace.set(namespace, pid);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code !== "EACCES" && code !== "EPERM") throw error; // what even we may not look at is in no container of ours
    }
  }
  const all = await Promise.all(
    [...byNamespace.values()].map(
      async (pid) => await readMountInfo(pid, `/${basename(parent)}/`).catch(() => []), // it has ended
    ),
  );
  const roots = all.flat().map(({ root }) => root);
  return new Set(
    roots.filter((root) => basename(dirname(root)) === basename(parent)).map((root) => basename(root)),
  );
}
