import { readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { readFile, rename, rm, writeFile } from "node:fs/promises";
import { BrokenImage, SyscallFailed } from "../errors/index.ts";

// Records: small JSON files of ours, for whoever goes on after a crash. One is replaced whole, so its reader finds the old one or the new
// one. It isn't synced: a rename(2) that has returned survives the end of our process, and what the records are of (containers, and what
// is done to them) does not survive the end of the machine.
//
// "Now": at once, without the thread pool, whose two trips take longer than the write on a tmpfs. For what may not be interrupted by other
// code, or while a container stands still.

/** What no id of a container has, by which some records are named: what is written for one is never another one's. */
const NEW = "~new";

/** @throws SyscallFailed naming the file; the record before stays */
export async function writeRecord(path: string, record: unknown): Promise<void> {
  const temporary = `${path}${NEW}`;
  try {
    await writeFile(temporary, JSON.stringify(record), { mode: 0o600 });
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true }); // half of it would only take room
    throw failure(path, error);
  }
}

/** As `writeRecord`. */
export function writeRecordNow(path: string, record: unknown): void {
  const temporary = `${path}${NEW}`;
  try {
    writeFileSync(temporary, JSON.stringify(record), { mode: 0o600 });
    renameSync(temporary, path);
  } catch (error) {
    rmSync(temporary, { force: true });
    throw failure(path, error);
  }
}

/** @returns undefined when there is none. @throws SyscallFailed when it can't be read, BrokenImage when it isn't JSON */
export async function readRecord<T>(path: string): Promise<T | undefined> {
  try {
    return parse<T>(path, await readFile(path, "utf8"));
  } catch (error) {
    return undefinedIfMissing(error);
  }
}

/** As `readRecord`. */
export function readRecordNow<T>(path: string): T | undefined {
  try {
    return parse<T>(path, readFileSync(path, "utf8"));
  } catch (error) {
    return undefinedIfMissing(error);
  }
}

function parse<T>(path: string, text: string): T {
  try {
    return JSON.parse(text) as T;
  } catch (cause) {
    throw new BrokenImage(`record ${path} is not JSON`, { cause });
  }
}

function undefinedIfMissing(error: unknown): undefined {
  if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw SyscallFailed.from(error);
  return undefined;
}

function failure(path: string, error: unknown): Error {
  const { code, errno, syscall = "write", message } = error as NodeJS.ErrnoException;
  if (code === undefined || errno === undefined) return error as Error;
  return new SyscallFailed(`write ${path}: ${message}`, {
    cause: error,
    errno: Math.abs(errno),
    code,
    syscall,
  });
}
