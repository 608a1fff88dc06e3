import { closeSync, constants } from "node:fs";
import { TimedOut, Unavailable } from "../errors/index.ts";
import { apart, type NumbersOfStat, RESOLVE } from "./addon.ts";

/*
 * Files on paths that somebody else has in his hand. Behind a mount there may be a server that doesn't answer any more (NFS), or never meant to
 * (FUSE, which a container may have without asking anybody); then whoever looks stays in the kernel. Not the event loop: that is every
 * pod's. Not a thread of libuv's pool either: there are four. So each of these calls has a thread of its own, is waited for no longer than
 * 10 s, and stays behind alone (12 KB). What hasn't come back is not asked for again until it has.
 *
 *   a path in a container    every step of the way is taken by these calls; many of them, by file-servers.ts
 *   a path of a caller's     he is root and means no harm, but his server may have died: it is asked once, before anything else
 *                            (`expectAnswer`). That it dies a moment later is left to the keepers, which replace a cedanad that hangs
 */

/** A call that hasn't come back by then is given up: `CEDANA_FILE_PATIENCE_MS`, for tests. */
const PATIENCE_MS = Number(process.env.CEDANA_FILE_PATIENCE_MS) || 10_000;
/** Threads that may have been given up: 6 MB. Then nothing is tried any more. */
const MAX_LEFT_BEHIND = 512;
/**
 * … and no question is asked. Below a server that is gone, callers ask with ever other paths; there must be room for what every container needs, whose
 * configuration is read in this way.
 */
const MAX_LEFT_BY_QUESTIONS = 256;

/** What was given up. */
const leftBehind: { what: string; on: string }[] = [];

/** How a call is waited for. */
export interface Waiting {
  timeoutMs?: number | undefined;
  /** what is not asked again while a call of it is left behind; default: the same call on the same path */
  on?: string | undefined;
  /** it is not tried where so many were given up */
  mostLeftBehind?: number | undefined;
}

/**
 * Waits until a call of its own thread is back.
 * @param what     for the error: "open /a/b"
 * @param discard  gives back what it brings when nobody waits any more
 * @throws TimedOut; Unavailable, when too many were given up; what the call says
 */
async function wait<T>(
  what: string,
  begin: () => Promise<T>,
  options: Waiting & { discard?: (late: T) => void } = {},
): Promise<T> {
  const { timeoutMs = PATIENCE_MS, on = what, mostLeftBehind = MAX_LEFT_BEHIND, discard } = options;
  if (leftBehind.some((one) => one.on === on)) throw noAnswer(what, "an earlier call still waits for it");
  if (leftBehind.length >= mostLeftBehind)
    throw new Unavailable(
      `${what}: not tried: ${leftBehind.length} file operations before it have not come back (${leftBehind[0]!.what}): find the mounts whose servers (NFS, FUSE) are gone, and unmount them (umount -f, umount -l)`,
    );
  const call = begin();
  const late = Symbol();
  const { promise: patience, resolve } = Promise.withResolvers<typeof late>();
  const timer = setTimeout(resolve, timeoutMs, late);
  try {
    const found = await Promise.race([call, patience]);
    if (found !== late) return found as T;
  } finally {
    clearTimeout(timer);
  }
  const left = { what, on };
  leftBehind.push(left);
  call
    .then(discard)
    .catch(() => {}) // nobody waits any more for what it says
    .finally(() => leftBehind.splice(leftBehind.indexOf(left), 1));
  throw noAnswer(what, `no answer within ${timeoutMs / 1000} s`);
}

/** Of a question, that is. */
function asked(waiting: Waiting): Waiting {
  return { mostLeftBehind: MAX_LEFT_BY_QUESTIONS, ...waiting };
}

function noAnswer(what: string, why: string): TimedOut {
  return new TimedOut(`${what}: ${why}: the server of its file system (NFS, FUSE) may be gone`);
}

/**
 * Opens a path. The caller closes the descriptor. O_NONBLOCK, so that no FIFO is waited for.
 * @throws as openat2(2), and `wait`
 */
export async function openApart(path: string, flags: number): Promise<number> {
  return await open(path, -1, path, flags, 0, 0);
}

/** `openInRoot` of addon.ts. */
export async function openInRootApart(root: number, path: string, flags: number): Promise<number> {
  return await open(`/${path}`, root, path, flags, 0, RESOLVE.IN_ROOT | RESOLVE.NO_MAGICLINKS);
}

/** `openBeneath` of addon.ts. */
export async function openBeneathApart(
  directory: number,
  path: string,
  flags: number,
  mode = 0,
): Promise<number> {
  const resolve = RESOLVE.BENEATH | RESOLVE.NO_SYMLINKS | RESOLVE.NO_MAGICLINKS;
  return await open(path, directory, path, flags, mode, resolve);
}

async function open(
  shown: string,
  directory: number,
  path: string,
  flags: number,
  mode: number,
  resolve: number,
): Promise<number> {
  const whole = flags & O_PATH ? flags : flags | constants.O_NONBLOCK; // openat2(2) refuses other flags beside O_PATH
  return await wait(`open ${shown}`, () => apart.open(directory, path, whole, mode, resolve), {
    discard: closeSync,
  });
}

/** Of openat2(2), which Node's constants lack: a descriptor that only stands for the file, and opens nothing. */
export const O_PATH = 0o10000000;

/**
 * Reads a regular file, whole.
 * @param options.follow  also what a symbolic link leads to (default); its way is followed in either case
 * @throws EISDIR; EINVAL for what is no file; EFBIG for one with more than `mostBytes`; what open(2) and read(2) say; and `wait`
 */
export async function readApart(
  path: string,
  mostBytes: number,
  { follow = true }: { follow?: boolean } = {},
): Promise<Buffer> {
  return await wait(`read ${path}`, () => apart.read(path, mostBytes, follow));
}

/** flock(2) without waiting for who has it; a server may be asked. @param shown  for errors */
export async function flockApart(fd: number, shown: string, how: "shared" | "exclusive"): Promise<boolean> {
  return await wait(`lock ${shown}`, () => apart.flock(fd, how));
}

/**
 * Whether a file handle, as an inotify watch's fdinfo shows it, leads back to its file (open_by_handle_at(2)).
 * @param mountPath  any path on the file system
 * @returns 0, or the errno
 */
export async function tryHandleApart(
  mountPath: string,
  type: number,
  handle: Buffer,
  timeoutMs: number,
): Promise<number> {
  const what = `find a watched file of ${mountPath}`;
  return await wait(what, () => apart.tryHandle(mountPath, type, handle), asked({ timeoutMs }));
}

/** stat(2). */
export async function statApart(path: string, waiting: Waiting = {}): Promise<NumbersOfStat> {
  return await wait(`stat ${path}`, () => apart.stat(path), asked(waiting));
}

/** Of linux/magic.h: those whose every answer is a server's. */
const SERVED = new Set([
  0x65735546, // fuse
  0x6969, // nfs
  0xff534d42, // cifs
  0xfe534d42, // smb2
  0x01021997, // 9p
  0x00c36400, // ceph
  0x5346414f, // afs
]);

/**
 * What a path's file system is: somebody's who may stop answering, or the kernel's own. Of what isn't there yet, the nearest directory above
 * it counts.
 * @throws TimedOut when there is no answer
 */
export async function isServed(path: string, waiting: Waiting = {}): Promise<boolean> {
  const type = await wait(`ask the file system of ${path}`, () => apart.fileSystem(path), asked(waiting));
  return SERVED.has(type);
}

/**
 * Before anything is done on a path of a caller's: whether its file system answers. What else is wrong with the path is for whoever uses it.
 * @throws TimedOut, Unavailable
 */
export async function expectAnswer(path: string): Promise<void> {
  try {
    await isServed(path);
  } catch (error) {
    if (error instanceof TimedOut || error instanceof Unavailable) throw error;
  }
}
