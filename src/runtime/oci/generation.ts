import { existsSync, readFileSync } from "node:fs";
import { mkdir, readdir, rename, rm, writeFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { bootId, isAlive, startTime } from "../../linux/proc.ts";
import type { OciCall } from "./call.ts";

// How many restores a container has behind it, for its next dump. A restored container needs no marker, whose price is a question to
// cedanad at each command; so nobody tells us of its end: a note is of one process, and goes with a later note.

interface Note {
  boot: string;
  pid: number;
  startTime: number;
  generation: number;
}

function directoryOf(call: OciCall): string {
  return join(dirname(dirname(call.marker)), "oci-restored");
}

/** At once: a small file of ours in memory. @returns undefined also for one that a cedanad that was killed has half written */
function readNote(path: string): Note | undefined {
  if (!existsSync(path)) return undefined; // it was never restored
  try {
    return JSON.parse(readFileSync(path, "utf8")) as Note;
  } catch {
    return undefined;
  }
}

const isCurrent = (note: Note) => note.boot === bootId() && isAlive(note.pid, note.startTime);

export async function noteGeneration(call: OciCall, initPid: number, generation: number): Promise<void> {
  const directory = directoryOf(call);
  await mkdir(directory, { recursive: true, mode: 0o700 });
  for (const name of await readdir(directory)) {
    const note = readNote(join(directory, name));
    if (!note || !isCurrent(note)) await rm(join(directory, name), { force: true });
  }
  const started = startTime(initPid);
  if (started === undefined) return; // it has ended
  const path = join(directory, basename(call.marker));
  const note: Note = { boot: bootId(), pid: initPid, startTime: started, generation };
  await writeFile(`${path}.new`, JSON.stringify(note), { mode: 0o600 });
  await rename(`${path}.new`, path);
}

/** @returns 0 for a container that was started afresh */
export function generationOf(call: OciCall, initPid: number): number {
  const note = readNote(join(directoryOf(call), basename(call.marker)));
  return note && note.pid === initPid && isCurrent(note) ? note.generation : 0;
}
