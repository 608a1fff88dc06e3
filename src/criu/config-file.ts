import { utimesSync } from "node:fs";
import { readFile, stat } from "node:fs/promises";

/*
 * Whether CRIU has read a file of options that the engine's environment names: an engine behind a script that clears the environment
 * starts a CRIU that knows nothing of it, and says nothing. The file's time of access tells.
 */

/** From here on `wasRead` counts. */
export function forgetReads(path: string): void {
  utimesSync(path, 0, new Date()); // an access before the last change is noted also by a file system mounted relatime
}

/** @returns true also where nobody notes accesses (noatime) */
export async function wasRead(path: string): Promise<boolean> {
  const isNoted = async () => (await stat(path)).atimeMs !== 0;
  if (await isNoted()) return true;
  await readFile(path);
  return !(await isNoted());
}
