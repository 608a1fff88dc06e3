import {
  closeSync,
  existsSync,
  fstatSync,
  ftruncateSync,
  openSync,
  readdirSync,
  readFileSync,
  statSync,
  writeSync,
} from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import type { Logger } from "pino";
import { kill } from "../criu/leftovers.ts";
import { flock, setCloexec } from "../linux/addon.ts";

const LOCK_FD = 4;
const LEAVE_MS = 5_000;

/**
 * One cedanad for a socket. Who passed us the lock holds it for us; else we take it.
 *
 * Whoever passed us the socket alone, systemd, has put it in the place of the one that the lock's holder serves: no path leads there any
 * more, but its keepers would keep it alive. It ends for us, as for an upgrade.
 * @param passed  the socket is there, from whoever started us
 * @returns false when another cedanad has the lock
 */
export async function takeLock(path: string, passed: boolean, log: Logger): Promise<boolean> {
  if (existsSync(path) && isSameFile(LOCK_FD, path)) {
    setCloexec(LOCK_FD, true);
    return true;
  }
  const fd = openSync(path, "a+", 0o600); // stays open, and locked, as long as we live
  if (!flock(fd, "exclusive") && !(passed && (await inherit(fd, path, log)))) {
    closeSync(fd);
    return false;
  }
  ftruncateSync(fd);
  writeSync(fd, `${process.pid}\n`); // for whoever must end us before we could say our pid
  return true;
}

/** Ends who has the lock. False: the file doesn't say who that is, or it doesn't end. */
async function inherit(fd: number, path: string, log: Logger): Promise<boolean> {
  for (const signal of ["SIGTERM", "SIGKILL"] as const) {
    const pid = Number.parseInt(readFileSync(path, "utf8"), 10);
    if (pid > 1 && hasOpen(pid, path)) {
      log.info({ pid, signal }, "cedanad's socket has been replaced: the cedanad that had it ends");
      kill(pid, signal);
    }
    for (const until = Date.now() + LEAVE_MS; Date.now() < until; await sleep(10))
      if (flock(fd, "exclusive")) return true;
  }
  return false;
}

/** Whether a process has the file open. Its pid alone may be that of another one by now. */
function hasOpen(pid: number, path: string): boolean {
  try {
    return readdirSync(`/proc/${pid}/fd`).some((name) => isSameFile(`/proc/${pid}/fd/${name}`, path));
  } catch {
    return false; // ENOENT: it has ended
  }
}

function isSameFile(file: number | string, path: string): boolean {
  try {
    const [a, b] = [typeof file === "number" ? fstatSync(file) : statSync(file), statSync(path)];
    return a.ino === b.ino && a.dev === b.dev;
  } catch {
    return false; // EBADF: no fd 4 was passed; ENOENT: closed meanwhile
  }
}
