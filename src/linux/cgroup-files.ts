import { readFileSync } from "node:fs";
import { NotFound, SyscallFailed } from "../errors/index.ts";

// Files of cgroups, which may go at any moment with the cgroup, between open and read too.

/** ENOENT: no such file. ENODEV, ESRCH: the cgroup went between open and read. */
export function removed(err: unknown): boolean {
  return ["ENOENT", "ENODEV", "ESRCH"].includes((err as NodeJS.ErrnoException).code ?? "");
}

/** A small file of the kernel's, read at once: 10 us, where a detour through the thread pool takes some hundred. */
export function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch (err) {
    return ignoreGone(err);
  }
}

/** For a `catch`: undefined for what has gone. @throws SyscallFailed for everything else */
export function ignoreGone(err: unknown): undefined {
  if (removed(err)) return undefined;
  throw SyscallFailed.from(err);
}

/** The error for a file of the cgroup at `path`: NotFound where it has gone, else SyscallFailed. */
export function notFoundOr(err: unknown, path: string): Error {
  return removed(err)
    ? new NotFound(`cgroup ${path} has been removed`, { cause: err })
    : SyscallFailed.from(err);
}
