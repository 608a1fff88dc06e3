import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { bootId, isAlive, startTime } from "./proc.ts";
import { readRecordNow, writeRecordNow } from "./record-file.ts";

// Small records that are of one process, and mean nothing of another. Nobody tells us of its end: what is read is compared with the
// process that it is asked of. They are read and written at once.

interface Owner {
  boot: string;
  pid: number;
  startTime: number;
}

const isCurrent = (owner: Owner) => owner.boot === bootId() && isAlive(owner.pid, owner.startTime);

/** @returns undefined: there is none, or it was another process's, or it can't be read */
export function readProcessNote<T extends object>(path: string, pid: number): T | undefined {
  const note = readNote<T>(path);
  return note && note.pid === pid && isCurrent(note) ? note : undefined;
}

/** Writes nothing of a process that has ended. */
export function writeProcessNote(path: string, pid: number, note: object): void {
  const started = startTime(pid);
  if (started === undefined) return;
  mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
  const owner: Owner = { boot: bootId(), pid, startTime: started };
  writeRecordNow(path, { ...note, ...owner });
}

/** Removes those of processes that have ended from a directory that holds nothing else. */
export function sweepProcessNotes(directory: string): void {
  let names: string[];
  try {
    names = readdirSync(directory);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return; // none was ever written
    throw error;
  }
  for (const name of names) {
    const note = readNote(join(directory, name));
    if (!note || !isCurrent(note)) rmSync(join(directory, name), { force: true });
  }
}

function readNote<T extends object>(path: string): (T & Owner) | undefined {
  try {
    return readRecordNow<T & Owner>(path);
  } catch {
    return undefined; // as if there were none: whoever keeps notes here can do without
  }
}
