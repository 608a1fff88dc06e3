import { mkdir, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { Logger } from "pino";
import { thawWherever } from "../../checkpoint/freeze-marker.ts";
import { Cgroup, type CgroupPaths } from "../../linux/cgroup.ts";

// Containers that a checkpoint holds frozen, on disk: a cedanad that is killed in the middle leaves none that stands still for ever.

const suffix = ".frozen";
/** Beside it while a dump is in work: what is to be undone when the engine, which goes on without us, has come to its end. */
const dumpSuffix = ".dumping";

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
  await mkdir(dirname(marker), { recursive: true, mode: 0o700 });
  const dumpNote: DumpNote = { cgroup: cgroup.toJSON(), paused, scratch };
  await writeWhole(`${marker}${dumpSuffix}`, dumpNote);
  if (!paused) await writeWhole(`${marker}${suffix}`, cgroup);
  try {
    await work();
  } finally {
    for (const one of [suffix, dumpSuffix]) await rm(`${marker}${one}`, { force: true });
  }
}

async function writeWhole(path: string, content: object): Promise<void> {
  await writeFile(`${path}.new`, JSON.stringify(content), { mode: 0o600 });
  await rename(`${path}.new`, path);
}

/**
 * At the start of a cedanad: what an earlier one has left frozen.
 * @returns of a container's marker: when the dump that was in work has come to its end, and what it made is gone
 */
export async function thawLeftovers(
  runDirectory: string,
  log: Logger,
): Promise<(marker: string) => Promise<void>> {
  const directory = join(runDirectory, "oci");
  const names = await readdir(directory).catch((): string[] => []); // ENOENT: nothing was ever frozen
  for (const name of names.filter((one) => one.endsWith(suffix))) {
    const note = join(directory, name);
    try {
      const cgroup = Cgroup.fromPaths(JSON.parse(await readFile(note, "utf8")));
      if (await cgroup.isFrozen().catch(() => false)) await cgroup.thaw();
      log.warn({ note: name }, "thawed a container whose checkpoint was cut off");
    } catch (error) {
      log.error({ err: error, note: name }, "thaw a container whose checkpoint was cut off");
    }
    await rm(note, { force: true });
  }
  const undone = new Map<string, Promise<void>>();
  for (const name of names.filter((one) => one.endsWith(dumpSuffix))) {
    const marker = join(directory, name.slice(0, -dumpSuffix.length));
    undone.set(marker, undoDump(join(directory, name), log)); // not waited for here: the engine may be at work for long
  }
  return async (marker) => await undone.get(marker);
}

/**
 * When the engine has come to its end, which may have frozen the container once more: what it made is removed, or kept where the
 * container is in it alone.
 */
async function undoDump(note: string, log: Logger): Promise<void> {
  try {
    const { cgroup: paths, paused, scratch } = JSON.parse(await readFile(note, "utf8")) as DumpNote;
    const cgroup = Cgroup.fromPaths(paths);
    const { abandonAttempt } = await import("../../checkpoint/dump.ts");
    const kept = await abandonAttempt(scratch, async () => (await cgroup.pids()).length === 0);
    await rm(scratch, { recursive: true, force: true });
    // Another one may have begun meanwhile: the freezer is its own then.
    const now = await readFile(note, "utf8").catch(() => undefined);
    if (now === undefined || (JSON.parse(now) as DumpNote).scratch !== scratch) return;
    if (!paused) await thawWherever(cgroup);
    log.warn({ note, ...(kept !== undefined && { kept }) }, "undid a checkpoint that was cut off");
  } catch (error) {
    log.error({ err: error, note }, "undo a checkpoint that was cut off");
  }
  await rm(note, { force: true });
}
