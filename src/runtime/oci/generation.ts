import { basename, dirname, join } from "node:path";
import { readProcessNote, sweepProcessNotes, writeProcessNote } from "../../linux/process-notes.ts";
import type { OciCall } from "./call.ts";

// How many restores a container has behind it, for its next dump. A restored container needs no marker, whose price is a question to
// cedanad at each command; so nobody tells us of its end: the note is of one process, and goes with a later note. There is one for each
// restored container at most.

interface Note {
  generation: number;
}

function directoryOf(call: OciCall): string {
  return join(dirname(dirname(call.marker)), "oci-restored");
}

export function noteGeneration(call: OciCall, initPid: number, generation: number): void {
  const directory = directoryOf(call);
  sweepProcessNotes(directory);
  const note: Note = { generation };
  writeProcessNote(join(directory, basename(call.marker)), initPid, note);
}

/** @returns 0 for a container that was started afresh */
export function generationOf(call: OciCall, initPid: number): number {
  return readProcessNote<Note>(join(directoryOf(call), basename(call.marker)), initPid)?.generation ?? 0;
}
