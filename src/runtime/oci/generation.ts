import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { bootId, isAlive, startTime } from "../../linux/proc.ts";
import { readRecordNow, writeRecordNow } from "../../linux/record-file.ts";
import type { OciCall } from "./call.ts";

// How many restores a container has behind it, for its next dump. A restored container needs no marker, whose price is a question to
// cedanad at each command; so nobody tells us of its end: a note is of one process, and goes with a later note. They are read and written at once:
// there is one for each restored container at most.

interface Note {
  boot: string;
  pid: number;
  startTime: number;
  generation: number;
}

function directoryOf(call: OciCall): string {
  return join(dirname(dirname(call.marker)), "oci-restored");
}

function readNote(path: string): Note | undefined {
  try {
    return readRecordNow<Note>(path);
  } catch {
    return undefined; // nothing but a number would be lost with it
  }
}

const isCurrent = (note: Note) => note.boot === bootId() && isAlive(note.pid, note.startTime);

export function noteGeneration(call: OciCall, initPid: number, generation: number): void {
  const directory = directoryOf(call);
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  for (const name of readdirSync(directory)) {
    const note = readNote(join(directory, name));
    if (!note || !isCurrent(note)) rmSync(join(directory, name), { force: true });
  }
  const started = startTime(initPid);
  if (started === undefined) return; // it has ended
  const path = join(directory, basename(call.marker));
  const note: Note = { boot: bootId(), pid: initPid, startTime: started, generation };
  writeRecordNow(path, note);
}

/** @returns 0 for a container that was started afresh */
export function generationOf(call: OciCall, initPid: number): number {
  const note = readNote(join(directoryOf(call), basename(call.marker)));
  return note && note.pid === initPid && isCurrent(note) ? note.generation : 0;
}
