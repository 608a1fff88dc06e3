import { join } from "node:path";
import { BrokenImage } from "../errors/index.ts";
import { readOne } from "./image/read.ts";
import type { Message } from "./image/value.ts";

// What CRIU counted and timed, from stats-dump and stats-restore, which it leaves in its work directory.

export interface DumpStats {
  /** until every task stood still */
  readonly freezingUs: number;
  /** during which no task ran */
  readonly frozenUs: number;
  /** to take memory from the tasks, and to write it out */
  readonly memdumpUs: number;
  readonly memwriteUs: number;
  /** looking for the files of inotify watches; undefined: none was looked for */
  readonly irmapResolveUs: number | undefined;
  readonly pagesScanned: bigint;
  /** unchanged since the parent's images */
  readonly pagesSkippedParent: bigint;
  readonly pagesWritten: bigint;
  /** left for lazy-pages */
  readonly pagesLazy: bigint;
  /** of shared memory */
  readonly sharedPagesScanned: bigint;
  readonly sharedPagesSkippedParent: bigint;
  readonly sharedPagesWritten: bigint;
}

export interface RestoreStats {
  readonly forkingUs: number;
  readonly restoreUs: number;
  /** copy on write: compared with the parent task's, and found equal */
  readonly pagesCompared: bigint;
  readonly pagesSkippedCow: bigint;
  readonly pagesRestored: bigint;
}

/**
 * @param directory  CRIU's work directory: the images' where no other was given
 * @throws ImageFault; ENOENT when no dump has come to its end there
 */
export async function readDumpStats(directory: string): Promise<DumpStats> {
  const dump = await read(directory, "dump");
  return {
    freezingUs: Number(dump.freezing_time),
    frozenUs: Number(dump.frozen_time),
    memdumpUs: Number(dump.memdump_time),
    memwriteUs: Number(dump.memwrite_time),
    irmapResolveUs: dump.irmap_resolve === undefined ? undefined : Number(dump.irmap_resolve),
    pagesScanned: count(dump.pages_scanned),
    pagesSkippedParent: count(dump.pages_skipped_parent),
    pagesWritten: count(dump.pages_written),
    pagesLazy: count(dump.pages_lazy),
    sharedPagesScanned: count(dump.shpages_scanned),
    sharedPagesSkippedParent: count(dump.shpages_skipped_parent),
    sharedPagesWritten: count(dump.shpages_written),
  };
}

/** @throws as readDumpStats */
export async function readRestoreStats(directory: string): Promise<RestoreStats> {
  const restore = await read(directory, "restore");
  return {
    forkingUs: Number(restore.forking_time),
    restoreUs: Number(restore.restore_time),
    pagesCompared: count(restore.pages_compared),
    pagesSkippedCow: count(restore.pages_skipped_cow),
    pagesRestored: count(restore.pages_restored),
  };
}

async function read(directory: string, kind: "dump" | "restore"): Promise<Message> {
  const path = join(directory, `stats-${kind}`);
  const found = (await readOne(path, "STATS"))[kind];
  // A file of the other kind under this name.
  if (found === undefined) throw new BrokenImage(`${path} has no statistics of a ${kind}`);
  return found as Message;
}

function count(value: Message[string] | undefined): bigint {
  return BigInt((value ?? 0n) as bigint);
}
