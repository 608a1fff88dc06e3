import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { readProcessNote, sweepProcessNotes, writeProcessNote } from "../../src/linux/process-notes.ts";

let place: string;
const at = (name: string) => join(place, name);
beforeEach(() => {
  place = mkdtempSync(join(tmpdir(), "notes-"));
});
afterEach(() => rmSync(place, { recursive: true }));

it("keeps a note for a process, and for no other", () => {
  writeProcessNote(at("a/b/note"), process.pid, { n: 1 });
  expect(readProcessNote(at("a/b/note"), process.pid)).toMatchObject({ n: 1 });
  writeProcessNote(at("a/b/note"), process.pid, { n: 2 });
  expect(readProcessNote(at("a/b/note"), process.pid)).toMatchObject({ n: 2 });
  expect(readProcessNote(at("a/b/note"), process.ppid)).toBeUndefined();
  expect(readProcessNote(at("none"), process.pid)).toBeUndefined();
  writeProcessNote(at("of-nobody"), 2 ** 22 + 1, { n: 1 });
  expect(readdirSync(place)).toEqual(["a"]);
});

it("takes another process's for none: of another boot, of the same pid, of no process", () => {
  writeProcessNote(at("note"), process.pid, { n: 1 });
  const note = readProcessNote<Record<string, unknown>>(at("note"), process.pid)!;
  for (const other of [
    { ...note, boot: "another" },
    { ...note, startTime: 1 },
    { ...note, pid: 2 ** 22 + 1 },
  ]) {
    writeFileSync(at("note"), JSON.stringify(other));
    expect(readProcessNote(at("note"), process.pid)).toBeUndefined();
  }
  writeFileSync(at("note"), "{");
  expect(readProcessNote(at("note"), process.pid)).toBeUndefined();
});

it("sweeps what is of processes that have ended, or can't be read", () => {
  writeProcessNote(at("ours"), process.pid, { n: 1 });
  const note = readProcessNote<Record<string, unknown>>(at("ours"), process.pid)!;
  writeFileSync(at("gone"), JSON.stringify({ ...note, startTime: 1 }));
  writeFileSync(at("broken"), "{");
  sweepProcessNotes(place);
  expect(readdirSync(place)).toEqual(["ours"]);
  sweepProcessNotes(at("none"));
});
