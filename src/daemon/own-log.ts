import { copyFile, rename, stat, truncate } from "node:fs/promises";
import type { Logger } from "pino";

/*
 * cedanad's log, which the keepers write lines into, too. It lies in the run directory, on most machines a tmpfs, so what it has is memory;
 * and a cedanad lives for months.
 */

const MAX_BYTES = 8 * 1024 * 1024;
const LOOK_EVERY_MS = 60_000;

/** As long as we live. */
export function keepLogShort(path: string, log: Logger): void {
  const look = () =>
    shortenLog(path, MAX_BYTES).catch((error) => log.warn({ err: error, path }, "shorten the log"));
  setInterval(look, LOOK_EVERY_MS).unref();
}

/**
 * Moves what a log that has grown too long holds to `PATH.1`, in the place of what was there. Everybody who has it open appends to it, so the
 * file itself stays; a line that is written between the copy and the cut is lost.
 * @returns whether it was too long
 */
export async function shortenLog(path: string, maxBytes: number): Promise<boolean> {
  const found = await stat(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return undefined; // we write elsewhere, and no keeper has written
    throw error;
  });
  if (!found || found.size <= maxBytes) return false;
  await copyFile(path, `${path}.1.new`);
  await truncate(path);
  await rename(`${path}.1.new`, `${path}.1`);
  return true;
}
