import { existsSync, mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import type { DeviceOwner } from "../checkpoint/device-slot.ts";
import type { CgroupPaths } from "../linux/cgroup.ts";
import { bootId, isAlive, startTime } from "../linux/proc.ts";
import { readRecordNow, writeRecordNow } from "../linux/record-file.ts";

/*
 * What a dump is about to do to processes, on disk before it is done: a crash at any step leaves either nothing or a journal. It lies below the
 * run directory, named by the container's init, and without fsync: no process survives the machine's end.
 */

export interface JournalEntry {
  readonly pid: number;
  readonly startTime: number;
  readonly comm: string;
  /** to what it is to come back */
  readonly before: "running" | "locked" | "checkpointed";
  /** a call for it was given up and may still be at work: its state is to be believed only after another call */
  readonly abandoned?: boolean;
}

export interface Journal {
  readonly version: 1;
  readonly boot: string;
  readonly what: string;
  readonly initPid: number;
  /** the owner's */
  readonly directory: string;
  readonly cgroup: CgroupPaths;
  readonly paused: boolean;
  readonly processes: readonly JournalEntry[];
}

export type JournalOwner = Pick<DeviceOwner, "what" | "initPid" | "directory" | "paused">;

function journalDirectory(): string {
  return join(process.env.CEDANA_RUN_DIR || "/run/cedana", "gpu");
}

/** A pid and when it began name a process for as long as the machine runs. */
function journalFile(initPid: number): string {
  return join(journalDirectory(), `${initPid}-${startTime(initPid) ?? 0}.json`);
}

export function hasJournal({ initPid }: JournalOwner): boolean {
  return existsSync(journalDirectory()) && existsSync(journalFile(initPid));
}

export function writeJournal(
  { what, initPid, directory, paused }: JournalOwner,
  cgroup: CgroupPaths,
  processes: readonly JournalEntry[],
): void {
  const file = journalFile(initPid);
  const entries = processes.map(({ pid, startTime, comm, before }) => ({ pid, startTime, comm, before }));
  const journal: Journal = {
    version: 1,
    boot: bootId(),
    what,
    initPid,
    directory,
    cgroup,
    paused,
    processes: entries,
  };
  mkdirSync(journalDirectory(), { recursive: true, mode: 0o700 });
  writeRecordNow(file, journal);
}

/** Of what is still alive; undefined when there is none, or it is of another boot. */
export function readJournal({ initPid }: JournalOwner): Journal | undefined {
  return parse(journalFile(initPid));
}

function parse(file: string): Journal | undefined {
  const journal = readRecordNow<Journal>(file);
  if (journal?.version !== 1 || journal.boot !== bootId()) return undefined;
  const alive = journal.processes.filter(({ pid, startTime }) => isAlive(pid, startTime));
  return { ...journal, processes: alive };
}

export function removeJournal({ initPid }: JournalOwner): void {
  rmSync(journalFile(initPid), { force: true });
  removeEnded();
}

/** All that there are of processes that live. */
export function journals(): Journal[] {
  return removeEnded();
}

/** Those whose processes have all ended have nothing to say. */
function removeEnded(): Journal[] {
  let names: string[];
  try {
    names = readdirSync(journalDirectory());
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
    return []; // no GPU was ever touched
  }
  // Written and renamed in one go by the one cedanad: what is here under that name is a crash's.
  for (const name of names)
    if (/\.json[.~]new$/.test(name)) rmSync(join(journalDirectory(), name), { force: true });
  return names
    .filter((name) => name.endsWith(".json"))
    .flatMap((name) => {
      const file = join(journalDirectory(), name);
      const journal = parse(file);
      if (journal && (journal.processes.length > 0 || isAlive(journal.initPid))) return [journal];
      rmSync(file, { force: true });
      return [];
    });
}
