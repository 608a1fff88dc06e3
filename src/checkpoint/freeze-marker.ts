import { join } from "node:path";
import { NotFound } from "../errors/index.ts";
import { Cgroup, type CgroupPaths } from "../linux/cgroup.ts";
import { readRecord, writeRecordNow } from "../linux/record-file.ts";

/** On disk while a dump holds its container frozen: whoever comes after a crash thaws it. @param directory  the owner's, the bundle */
export function freezeMarker(directory: string): string {
  return join(directory, "cedana-frozen");
}

/**
 * On disk from before a container's hook until the end of the dump: whoever comes after a crash pauses a container again that its owner
 * had paused, and that ran for its hook.
 */
export function hookNote(directory: string): string {
  return join(directory, "cedana-hook-ran");
}

/** What is in it. */
export interface FreezeNote {
  /** of the request */
  key: string;
  /** the engine was asked to dump */
  dumping: boolean;
  /** the container may have ended when it is looked for */
  cgroup: CgroupPaths;
}

/** At once, some 100 us: the container stands still, or is about to. */
export function writeFreezeNote(directory: string, note: FreezeNote): void {
  writeRecordNow(freezeMarker(directory), note);
}

/** @returns undefined when there is none, or one that says nothing */
export async function readFreezeNote(directory: string): Promise<FreezeNote | undefined> {
  const note = await readRecord<Partial<FreezeNote>>(freezeMarker(directory)).catch(() => undefined);
  return typeof note?.key === "string" && note.cgroup ? (note as FreezeNote) : undefined;
}

/**
 * Thaws what a dump has frozen and a crash left like that, also a cgroup whose processes have all ended: engines take such a container
 * for a paused one, and don't delete it.
 */
export async function thawNoted(directory: string): Promise<void> {
  const note = await readFreezeNote(directory);
  if (note) await thawWherever(Cgroup.fromPaths(note.cgroup));
}

/** One that has been removed is thawed. */
export async function thawWherever(cgroup: Cgroup): Promise<void> {
  if ((await cgroup.freezerState()) === "thawed") return;
  await cgroup.thaw().catch((error) => {
    if (!(error instanceof NotFound)) throw error;
  });
}
