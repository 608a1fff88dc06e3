import { mkdir, readlink, rename, rm, symlink } from "node:fs/promises";
import { join } from "node:path";

/*
 * Programs that CRIU starts, in a quicker form of ours: it finds them by PATH, so their directory is put at the front of the engine's.
 *
 *   tar   for each tmpfs, while the container stands still (addon/keeper/tar.c); what isn't small and simple it leaves to the real one
 */

let made: { program: string; directory: string } | undefined;

/**
 * A directory for the front of PATH of an engine that is to run CRIU, in our run directory; made where it is missing.
 * @param program  path of our native program, which is all of them by the names it is called by
 * @returns undefined where there is nothing to be put before the others, or with `CEDANA_CRIU_TAR=off`
 */
export async function criuTools(program: string): Promise<string | undefined> {
  // One that an upgrade has just removed has no path to be called by.
  if (process.env.CEDANA_CRIU_TAR === "off" || program.startsWith("/proc/")) return undefined;
  const directory = join(process.env.CEDANA_RUN_DIR || "/run/cedana", "criu-tools");
  if (made?.program === program && made.directory === directory) return directory;
  const link = join(directory, "tar");
  await mkdir(directory, { recursive: true, mode: 0o700 });
  const found = await readlink(link).catch(() => undefined); // ENOENT: the first of this run directory
  if (found !== program) {
    // A cedanad of another mount namespace may do the same at the same time. A link that leads nowhere there is passed over by execvp(3).
    const fresh = `${link}.${process.pid}`;
    await rm(fresh, { force: true });
    await symlink(program, fresh);
    await rename(fresh, link);
  }
  made = { program, directory };
  return directory;
}
