import { mkdir, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { Logger } from "pino";
import { Cgroup } from "../../linux/cgroup.ts";

// Containers that a checkpoint holds frozen, on disk: a cedanad that is killed in the middle leaves none that stands still for ever.

const suffix = ".frozen";

/** Keeps the note while a dump may hold the container frozen. @param marker  the container's, beside which the note is kept */
export async function noteFrozen(marker: string, cgroup: Cgroup, work: () => Promise<void>): Promise<void> {
  const note = `${marker}${suffix}`;
  const paused = await cgroup.isFrozen();
  if (!paused) {
    await mkdir(dirname(note), { recursive: true, mode: 0o700 });
    await writeFile(`${note}.new`, JSON.stringify(cgroup), { mode: 0o600 });
    await rename(`${note}.new`, note);
  }
  try {
    await work();
  } finally {
    await rm(note, { force: true });
  }
}

/** At the start of a cedanad: what an earlier one has left frozen. */
export async function thawLeftovers(runDirectory: string, log: Logger): Promise<void> {
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
}
