import { mkdir, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { Logger } from "pino";
import { Cgroup } from "../../linux/cgroup.ts";

// Containers that a checkpoint holds frozen, on disk: a cedanad that is killed in the middle leaves none that stands still for ever.

const suffix = ".frozen";

/**
 * Does something while the container stands still, and leaves it paused if it was, running if it was.
 * @param marker  the container's marker, beside which the note is kept
 * @param work  returns whether the container has ended by it: then there is nothing to be put back
 */
export async function whileFrozen(
  marker: string,
  cgroup: Cgroup,
  paused: boolean,
  log: Logger,
  work: () => Promise<boolean>,
): Promise<void> {
  const note = `${marker}${suffix}`;
  let ended = false;
  try {
    if (!paused) {
      await mkdir(dirname(note), { recursive: true, mode: 0o700 });
      await writeFile(`${note}.new`, JSON.stringify(cgroup), { mode: 0o600 });
      await rename(`${note}.new`, note);
      await cgroup.freeze();
    }
    ended = await work();
  } finally {
    // CRIU and the engine meddle with the freezer, too. What fails here says nothing about the work that was done.
    if (!ended)
      await putBack(cgroup, paused).catch((error) =>
        log.warn({ err: error }, "put the freezer back after a dump"),
      );
    await rm(note, { force: true });
  }
}

async function putBack(cgroup: Cgroup, paused: boolean): Promise<void> {
  const frozen = await cgroup.isFrozen();
  if (frozen && !paused) await cgroup.thaw();
  if (!frozen && paused) await cgroup.freeze();
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
