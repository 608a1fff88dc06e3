import { mkdir, readlink, rename, rm, symlink } from "node:fs/promises";
import { join } from "node:path";

/*
 * Programs that CRIU starts, in a quicker form of ours: it finds them by PATH, so their directory is put at the front of the engine's.
 *
 *   tar    for each tmpfs, while the container stands still (addon/keeper/tar.c); what isn't small and simple it leaves to the real one
 *   criu   asked for its version, for which both engines start CRIU once more, it says what CRIU has said (version-answer.ts,
 *          addon/keeper/criu-gate.c); else it becomes the real one
 */

export function toolsDirectory(): string {
  return join(process.env.CEDANA_RUN_DIR || "/run/cedana", "criu-tools");
}

let made: { program: string; directory: string } | undefined;

/**
 * PATH for an engine that is to run CRIU: our programs come first, in a directory of our run directory, which is made where it is missing.
 * `CEDANA_CRIU_TOOLS=off` leaves them out.
 * @param program  path of our native program, which is all of them by the names it is called by
 * @param path     PATH of whoever starts the engine
 */
export async function criuPath(program: string, path: string): Promise<string> {
  // One that an upgrade has just removed has no path to be called by.
  if (process.env.CEDANA_CRIU_TOOLS === "off" || program.startsWith("/proc/")) return path;
  const directory = toolsDirectory();
  if (made?.program !== program || made.directory !== directory) {
    for (const name of ["tar", "criu"]) await link(program, directory, name);
    made = { program, directory };
  }
  return `${directory}:${path}`;
}

async function link(program: string, directory: string, name: string): Promise<void> {
  const place = join(directory, name);
  await mkdir(directory, { recursive: true, mode: 0o700 });
  if ((await readlink(place).catch(() => undefined)) === program) return; // ENOENT: the first in this run directory
  // A cedanad of another mount namespace may do the same at the same time. A link that leads nowhere there is passed over by execvp(3).
  const fresh = `${place}.${process.pid}`;
  await rm(fresh, { force: true });
  await symlink(program, fresh);
  await rename(fresh, place);
}
