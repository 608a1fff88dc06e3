import { existsSync, mkdirSync, rmSync } from "node:fs";
import { readdir, readFile, rm } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { Logger } from "pino";
import type { AbandonedDump } from "../../checkpoint/dump.ts";
import { hookNote, thawWherever } from "../../checkpoint/freeze-marker.ts";
import { Cgroup, type CgroupPaths } from "../../linux/cgroup.ts";
import { removeWithoutMounts } from "../../linux/mount-options.ts";
import { isAlive, startTime } from "../../linux/proc.ts";
import { readRecord, readRecordNow, writeRecordNow } from "../../linux/record-file.ts";

// Containers that a checkpoint holds frozen, on disk: a cedanad that is killed in the middle leaves none that stands still for ever.

/** Both begin with what no id of a container has. */
const suffix = "~frozen";
/** Beside it while a dump is in work: what is to be undone when the engine, which goes on without us, has come to its end. */
const dumpSuffix = "~dumping";

interface DumpNote {
  cgroup: CgroupPaths;
  paused: boolean;
  /** directory in which the dump notes how far it is */
  scratch: string;
}

/**
 * Keeps the notes while a dump may hold the container frozen.
 * @param marker   the container's, beside which the notes are kept
 * @param scratch  the owner's directory of the dump
 */
export async function noteFrozen(
  marker: string,
  cgroup: Cgroup,
  scratch: string,
  work: () => Promise<void>,
): Promise<void> {
  const paused = await cgroup.isFrozen();
  mkdirSync(dirname(marker), { recursive: true, mode: 0o700 });
  const dumpNote: DumpNote = { cgroup: cgroup.toJSON(), paused, scratch };
  writeRecordNow(`${marker}${dumpSuffix}`, dumpNote);
  if (!paused) writeRecordNow(`${marker}${suffix}`, cgroup);
  try {
    await work();
  } finally {
    for (const one of [suffix, dumpSuffix]) rmSync(`${marker}${one}`, { force: true });
  }
}

/**
 * Whether a container that stands still does so by its owner's will, and not for a dump of ours that is under way.
 * @param marker  of the container
 */
export function isPausedByOwner(marker: string): boolean {
  return readRecordNow<DumpNote>(`${marker}${dumpSuffix}`)?.paused ?? true;
}

/** Of a container's marker: what became of the dump that an earlier cedanad was at. Never rejects. */
export type Leftovers = (marker: string) => Promise<AbandonedDump>;

/**
 * At the start of a cedanad: what an earlier one has left frozen.
 * @returns of a container's marker: when the dump that was in work has come to its end, and what became of it
 */
export async function thawLeftovers(runDirectory: string, log: Logger): Promise<Leftovers> {
  const directory = join(runDirectory, "oci");
  const names = await readdir(directory).catch((): string[] => []); // ENOENT: nothing was ever frozen
  for (const [name] of await notesIn(directory, names, suffix)) {
    const note = join(directory, name);
    try {
      const paths = await readRecord<CgroupPaths>(note);
      if (!paths) continue; // its dump has ended meanwhile
      const cgroup = Cgroup.fromPaths(paths);
      if (await cgroup.isFrozen().catch(() => false)) await cgroup.thaw();
      log.warn({ note: name }, "thawed a container whose checkpoint was cut off");
    } catch (error) {
      log.error({ err: error, note: name }, "thaw a container whose checkpoint was cut off");
    }
    await forget(note, log);
  }
  const undone = new Map<string, Promise<AbandonedDump>>();
  for (const [name, ofWhom] of await notesIn(directory, names, dumpSuffix)) {
    const marker = join(directory, ofWhom);
    undone.set(marker, undoDump(join(directory, name), log)); // not waited for here: the engine may be at work for long
  }
  await sweepScratches(runDirectory, log);
  return async (marker) => await undone.get(marker);
}

/** Notes of a kind, and the markers that they belong to. An older cedanad's begin with a dot, as the end of a container's id may. */
async function notesIn(
  directory: string,
  names: readonly string[],
  kind: string,
): Promise<[string, string][]> {
  const older = kind.replace("~", ".");
  const found: [string, string][] = [];
  for (const name of names) {
    if (name.endsWith(kind)) found.push([name, name.slice(0, -kind.length)]);
    else if (name.endsWith(older)) {
      const text = await readFile(join(directory, name), "utf8").catch(() => ""); // removed meanwhile
      if (!text.includes('"globalArgv":')) found.push([name, name.slice(0, -older.length)]);
    }
  }
  return found;
}

/** Directories of an earlier cedanad's calls, but those of dumps, which are in their notes. */
async function sweepScratches(runDirectory: string, log: Logger): Promise<void> {
  const directory = join(runDirectory, "c");
  const names = await readdir(directory).catch((): string[] => []); // ENOENT: there was never a call
  for (const name of names) {
    const pid = /^oci-[0-9a-f]{16}-(\d+)$/.exec(name)?.[1];
    const scratch = join(directory, name);
    if (pid !== undefined && !(await isDumps(scratch)))
      void sweepScratch(scratch, Number(pid)).catch((error) =>
        log.error({ err: error, scratch }, "remove what a command of cedana-runtime has left"),
      );
  }
}

const WRAPPER_POLL_MS = 100;

async function sweepScratch(scratch: string, wrapper: number): Promise<void> {
  const started = startTime(wrapper);
  // Its engine may be at work there; they end one after the other.
  while (started !== undefined && isAlive(wrapper, started))
    await new Promise((resolve) => setTimeout(resolve, WRAPPER_POLL_MS).unref());
  await removeWithoutMounts(scratch); // CRIU, killed, has left every cgroup hierarchy mounted there
}

/**
 * At the end of a call, of which the caller is told something else than what becomes of its scratch.
 * @param failed  its CRIU may have been killed
 */
export async function dropScratch(scratch: string, failed: boolean, log: Logger): Promise<void> {
  try {
    if (failed) await removeWithoutMounts(scratch);
    else rmSync(scratch, { recursive: true, force: true }); // at once: a few small files in memory
  } catch (error) {
    log.error({ err: error, scratch }, "remove what a command of cedana-runtime has left");
  }
}

/** A dump's attempt, or a device's, is undone by others. */
async function isDumps(scratch: string): Promise<boolean> {
  return (await readdir(scratch).catch(() => [])).some(
    (name) => !/^(?:criu|restore-|hook\.|output$)/.test(name),
  );
}

/**
 * When the engine has come to its end, which may have frozen the container once more: what it made is removed, or finished where the
 * container is in it alone. Never rejects.
 */
async function undoDump(note: string, log: Logger): Promise<AbandonedDump> {
  let left: AbandonedDump;
  const say = (error: unknown) => log.error({ err: error, note }, "undo a checkpoint that was cut off");
  try {
    const dump = await readRecord<DumpNote>(note);
    if (!dump) return;
    const { cgroup: paths, paused, scratch } = dump;
    const cgroup = Cgroup.fromPaths(paths);
    const { abandonAttempt } = await import("../../checkpoint/dump.ts");
    try {
      if (paused) await pauseAfterHook(scratch, cgroup);
      left = await abandonAttempt(scratch, async () => (await cgroup.pids()).length === 0, log);
      await removeWithoutMounts(scratch);
    } catch (error) {
      say(error); // whatever it is, the container must not stand still for it
    }
    if (!paused) await thawWherever(cgroup);
    log.warn({ note, ...left }, `${left ? "took up" : "undid"} a checkpoint that was cut off`);
  } catch (error) {
    say(error);
  }
  await forget(note, log);
  return left;
}

/** A paused container ran for its hook: what its owner has paused must not go on. */
async function pauseAfterHook(scratch: string, cgroup: Cgroup): Promise<void> {
  if (!existsSync(hookNote(scratch))) return;
  const { endHook } = await import("./hooks.ts");
  await endHook(scratch, cgroup);
  if ((await cgroup.pids()).length > 0) await cgroup.freeze();
}

async function forget(note: string, log: Logger): Promise<void> {
  await rm(note, { force: true }).catch((error) => log.error({ err: error, note }, "remove a note"));
}
