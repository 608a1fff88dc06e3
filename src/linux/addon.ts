import { closeSync, existsSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { Unavailable } from "../errors/index.ts";

// The system calls that Node lacks: the typed face of addon/binding. Each is one call and never waits. Descriptors that
// these functions make are close-on-exec and are the caller's to close. A failing call throws an Error with `errno`,
// `code` and `syscall`, as Node's own functions do.

/** What the kernel knows of the process at the other end of a unix socket. */
export interface PeerCredentials {
  /** As it was when the peer connected; 0 for a process outside of our pid namespace. */
  readonly pid: number;
  readonly uid: number;
  readonly gid: number;
}

interface Addon {
  sealedCopy(path: string, name: string, most: number): Promise<SealedCopy>;
  netlinkDump(namespaceFd: number, protocol: number, requests: Buffer[]): Promise<(Buffer | number)[]>;
  socketOf(pid: number, fd: number): SocketOfProcess;
  kcmp(pid: number, otherPid: number, type: number): number;
  tryHandle(mountPath: string, type: number, handle: Buffer): Promise<number>;
  peerCredentials(fd: number): PeerCredentials;
  setCloexec(fd: number, on: boolean): void;
  pidfdOpen(pid: number): number;
  pidfdSendSignal(fd: number, signal: number): void;
  pidfdPoll(fd: number): boolean;
  flock(fd: number, operation: number): boolean;
  seqpacketPair(): [ours: number, theirs: number];
  seqpacketSend(fd: number, packet: Uint8Array): void;
  seqpacketReceive(fd: number): Packet | undefined;
  watchReadable(fd: number, callback: () => void): () => void;
  openat2(directory: number, path: PathLike, flags: number, mode: number, resolve: number): number;
  openApart(directory: number, path: PathLike, flags: number, mode: number, resolve: number): Promise<number>;
  flockApart(fd: number, operation: number): Promise<boolean>;
  readApart(path: PathLike, most: number, follow: boolean): Promise<Buffer>;
  statApart(path: PathLike): Promise<NumbersOfStat>;
  fileSystemApart(path: PathLike): Promise<number>;
  renameat2(from: number, fromPath: PathLike, to: number, toPath: PathLike, flags: number): void;
  seekTo(fd: number, offset: number, whence: number): number;
  listXattr(path: PathLike): Buffer;
  getXattr(path: PathLike, name: string): Buffer | undefined;
  setXattr(path: PathLike, name: string, value: Buffer): void;
  removeXattr(path: PathLike, name: string): void;
  mknod(path: PathLike, mode: number, major: number, minor: number): void;
  utimens(path: PathLike, ...secondsAndNanoseconds: [number, number, number, number]): void;
}

/** A Buffer where a name may be anything but UTF-8. */
type PathLike = string | Buffer;

let loaded: Addon | undefined;

/** The part of the addon whose types stand elsewhere (src/linux/cuda.ts). */
export function addonPart<T>(): T {
  return addon() as unknown as T;
}

/** Loads the addon at its first use, so that a program which needs none of it runs without. */
function addon(): Addon {
  loaded ??= load();
  return loaded;
}

function load(): Addon {
  const path = findAddon();
  try {
    return createRequire(import.meta.url)(path) as Addon;
  } catch (err) {
    throw new Unavailable(`load the native addon ${path}: ${(err as Error).message}`, { cause: err });
  }
}

/** Path of the compiled addon: `CEDANA_ADDON` where set, else as `findNative` finds it. @throws Unavailable when there is none */
export function findAddon(): string {
  return findNative("cedana.node", "build/binding", "CEDANA_ADDON");
}

/**
 * Path of something of ours that is compiled: what the environment variable says where it is set, else the file, or the file in the
 * build directory, in the directory of this file or one above it. That fits the source tree (src/linux), a build (dist) and an
 * installation, where such files lie beside the bundled program.
 * @throws Unavailable when there is none
 */
export function findNative(name: string, built: string, variable: string): string {
  const told = process.env[variable];
  if (told) return told;
  for (let directory = import.meta.dirname; ; directory = dirname(directory)) {
    for (const path of [join(directory, name), join(directory, built, name)])
      if (existsSync(path)) return path;
    if (directory === dirname(directory)) break;
  }
  throw new Unavailable(
    `the native part ${name} is neither beside ${import.meta.dirname} nor above it; run \`npm run build\` or set ${variable}`,
  );
}

/** Who is at the other end of a connected unix socket (SO_PEERCRED, unix(7)). */
export function peerCredentials(fd: number): PeerCredentials {
  return addon().peerCredentials(fd);
}

/** Whether a descriptor is closed in a program that we execute. Node opens all of its own so; inherited ones may not be. */
export function setCloexec(fd: number, on: boolean): void {
  addon().setCloexec(fd, on);
}

/** A process that can't be confused with another one that gets its pid later (pidfd_open(2)). */
export class Pidfd implements Disposable {
  readonly fd: number;

  private constructor(fd: number) {
    this.fd = fd;
  }

  /**
   * The process that has this pid now; one that has ended and waits to be reaped counts.
   * @throws ESRCH when there is none
   */
  static open(pid: number): Pidfd {
    return new Pidfd(addon().pidfdOpen(pid));
  }

  /** @throws ESRCH when it has ended and was reaped */
  signal(signal: number): void {
    addon().pidfdSendSignal(this.fd, signal);
  }

  /** Whether it has ended, reaped or not. */
  get ended(): boolean {
    return addon().pidfdPoll(this.fd);
  }

  [Symbol.dispose](): void {
    closeSync(this.fd);
  }
}

/**
 * Sends dump requests to netlink in a network namespace, one after another, and collects the answers off the event loop. A
 * thread of its own makes the socket in there: no thread of ours ever changes its namespace.
 * @param namespaceFd  an open /proc/PID/ns/net, which is duplicated; -1: our own namespace
 * @param protocol     NETLINK_*
 * @returns for each request its messages with their headers, or an errno that the kernel answered
 * @throws ETIMEDOUT when the kernel is silent for 5 s
 */
export function netlinkDump(
  namespaceFd: number,
  protocol: number,
  requests: readonly Buffer[],
): Promise<(Buffer | number)[]> {
  return addon().netlinkDump(namespaceFd, protocol, [...requests]);
}

/** What a socket says of itself. */
export interface SocketOfProcess {
  /** AF_* */
  readonly family: number;
  /** SOCK_* */
  readonly type: number;
  /** IPPROTO_*, or of another table, by family */
  readonly protocol: number;
  /** 1 for a socket that listens */
  readonly listening: number;
  /** 1 for a socket that tells who sent what (SO_PASSCRED) */
  readonly passCredentials: number;
  /** TCP's state; of others 1 connected, 7 not */
  readonly state: number;
  /** Inode of the network namespace that it was made in; undefined where the kernel doesn't tell. */
  readonly networkNamespace?: number;
}

/**
 * Looks at a socket of another process through a duplicate (pidfd_getfd(2)), for what socket diagnostics don't list:
 * unbound sockets, families without diagnostics, sockets of another namespace.
 * @throws EBADF, ESRCH when it has gone; EPERM without ptrace access
 */
export function socketOf(pid: number, fd: number): SocketOfProcess {
  return addon().socketOf(pid, fd);
}

const kcmpTypes = { memory: 1, files: 2, fs: 3, signalHandlers: 4 } as const;

/**
 * Whether two processes share something (kcmp(2)): 0 yes; 1 or 2 no, and in which order they sort; 3 no.
 * @throws ESRCH when one has ended
 */
export function kcmp(pid: number, otherPid: number, what: keyof typeof kcmpTypes): number {
  return addon().kcmp(pid, otherPid, kcmpTypes[what]);
}

const lockOperations = { shared: 1, exclusive: 2, unlock: 8 } as const;

/**
 * Takes or gives back a lock on an open file (flock(2)), without waiting. It belongs to the open file description: every
 * duplicate and child shares it, and it ends with the last of them.
 * @returns false when somebody else has it
 */
export function flock(fd: number, operation: keyof typeof lockOperations): boolean {
  return addon().flock(fd, lockOperations[operation]);
}

/** How openat2(2) walks a path. Source: linux/openat2.h. */
export const RESOLVE = { NO_XDEV: 1, NO_MAGICLINKS: 2, NO_SYMLINKS: 4, BENEATH: 8, IN_ROOT: 16 } as const;

/**
 * Opens a path that can't lead out of a directory: no `..` above it, no absolute path, no symbolic link.
 * @param directory  an open directory
 * @param flags      O_*; O_CLOEXEC is added
 * @param mode       of a file that is created
 * @throws EXDEV for a path that leads out, ELOOP for a symbolic link
 */
export function openBeneath(directory: number, path: PathLike, flags: number, mode = 0): number {
  return addon().openat2(
    directory,
    path,
    flags,
    mode,
    RESOLVE.BENEATH | RESOLVE.NO_SYMLINKS | RESOLVE.NO_MAGICLINKS,
  );
}

/**
 * Opens a path as somebody would whose root is that directory: its symbolic links, absolute ones and `..` lead about in it, and never
 * out of it. Links of /proc are not followed.
 */
export function openInRoot(root: number, path: PathLike, flags: number, mode = 0): number {
  return addon().openat2(root, path, flags, mode, RESOLVE.IN_ROOT | RESOLVE.NO_MAGICLINKS);
}

/** Of stat(2). */
export type NumbersOfStat = [mode: number, rdev: number, links: number, bytes: number, blocks: number];

/**
 * System calls that may never come back, each in a thread of its own. src/linux/apart.ts bounds them: call nothing of this by itself.
 */
export const apart = {
  /** openat2(2). @param directory  duplicated; -1: none, the path is absolute. The caller closes what is opened */
  open: (directory: number, path: PathLike, flags: number, mode: number, resolve: number) =>
    addon().openApart(directory, path, flags, mode, resolve),
  /** As `flock`: a server may be asked for the lock. */
  flock: (fd: number, operation: keyof typeof lockOperations) =>
    addon().flockApart(fd, lockOperations[operation]),
  /** Whether a file handle leads back to its file (open_by_handle_at(2)): 0, or the errno. */
  tryHandle: (mountPath: string, type: number, handle: Buffer) => addon().tryHandle(mountPath, type, handle),
  /** A regular file, whole. @throws EISDIR, EINVAL for what is no file, EFBIG for one with more than `most` bytes, ELOOP for a link that isn't to be followed */
  read: (path: PathLike, most: number, follow: boolean) => addon().readApart(path, most, follow),
  stat: (path: PathLike) => addon().statApart(path),
  /** statfs(2)'s f_type, of the nearest directory above what isn't there. */
  fileSystem: (path: PathLike) => addon().fileSystemApart(path),
};

/** One packet, and the descriptors that came with it, which are the receiver's to close. */
export interface Packet {
  /** empty: the other side has closed */
  readonly data: Buffer;
  readonly fds: readonly number[];
}

/**
 * One end of a pair of unix sockets that keep packets apart (SOCK_SEQPACKET, unix(7)). Neither end is inherited.
 * While it is open, it keeps the process alive.
 */
export class Seqpacket implements Disposable {
  readonly fd: number;
  #stop: (() => void) | undefined;
  #closed = false;

  private constructor(fd: number) {
    this.fd = fd;
  }

  /** @returns ours, and the other end as a descriptor that blocks, for a child; the caller closes it */
  static pair(): { ours: Seqpacket; theirs: number } {
    const [ours, theirs] = addon().seqpacketPair();
    return { ours: new Seqpacket(ours), theirs };
  }

  /**
   * Sends one packet, whole.
   * @throws EMSGSIZE when it doesn't fit into the socket's buffer, EAGAIN when the other side lets packets lie, EPIPE when it has gone
   */
  send(packet: Uint8Array): void {
    addon().seqpacketSend(this.fd, packet);
  }

  /** The next packet; undefined when none is there yet. */
  receive(): Packet | undefined {
    try {
      return addon().seqpacketReceive(this.fd);
    } catch (error) {
      // It ended without reading all that we sent: an end like any other.
      if ((error as NodeJS.ErrnoException).code === "ECONNRESET") return { data: Buffer.alloc(0), fds: [] };
      throw error;
    }
  }

  /** Calls back whenever `receive` has something to give, an end included, until the end of this socket. One at a time. */
  onReadable(callback: () => void): void {
    this.#stop?.();
    this.#stop = addon().watchReadable(this.fd, callback);
  }

  /** The end has been received: it would be received for ever. */
  ended(): void {
    this.#stop?.();
    this.#stop = undefined;
  }

  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#stop?.(); // before the number may become somebody else's
    closeSync(this.fd);
  }
}

/** renameat2(2)'s flags. Source: linux/fs.h. */
const renameFlags = { noReplace: 1, exchange: 2 } as const;

/**
 * Renames in a way that rename(2) can't (renameat2(2)): `noReplace` fails with EEXIST where something is; `exchange` swaps
 * two entries in one step, so that there is no moment with neither.
 * @param from  an open directory, and the entry in it
 * @throws EINVAL where the file system can't
 */
export function renameAt(
  from: readonly [directory: number, name: string],
  to: readonly [directory: number, name: string],
  how: keyof typeof renameFlags,
): void {
  addon().renameat2(from[0], from[1], to[0], to[1], renameFlags[how]);
}

/** lseek(2)'s SEEK_DATA and SEEK_HOLE. */
const SEEK = { data: 3, hole: 4 } as const;

/**
 * Where data, or the next hole, begins at or after an offset (lseek(2)). A file without holes has one at its end. It moves the
 * position of the descriptor: read with positions.
 * @returns undefined when there is no more data
 */
export function seek(fd: number, to: keyof typeof SEEK, offset: number): number | undefined {
  const found = addon().seekTo(fd, offset, SEEK[to]);
  return found < 0 ? undefined : found;
}

// Extended attributes (xattr(7)). A path's last component is not followed where it is a symbolic link:
// `/proc/self/fd/DIRECTORY/NAME` is the entry itself, whatever it is.

/** Names are ASCII in practice; latin1 keeps whatever there is. */
export function listXattrs(path: PathLike): string[] {
  return addon().listXattr(path).toString("latin1").split("\0").filter(Boolean);
}

/** @returns undefined when there is none of that name */
export function getXattr(path: PathLike, name: string): Buffer | undefined {
  return addon().getXattr(path, name);
}

export function setXattr(path: PathLike, name: string, value: Buffer): void {
  addon().setXattr(path, name, value);
}

export function removeXattr(path: PathLike, name: string): void {
  addon().removeXattr(path, name);
}

/** Makes a device node or a FIFO (mknod(2)). @param mode  S_IFCHR, S_IFBLK or S_IFIFO and the permissions; umask applies */
export function makeNode(path: PathLike, mode: number, major = 0, minor = 0): void {
  addon().mknod(path, mode, major, minor);
}

/** Sets modification and access time, in nanoseconds since 1970, of a link itself too (utimensat(2)). */
export function setTimes(path: PathLike, modifiedNs: bigint, accessedNs = modifiedNs): void {
  addon().utimens(path, ...secondsAndRest(accessedNs), ...secondsAndRest(modifiedNs));
}

function secondsAndRest(ns: bigint): [seconds: number, nanoseconds: number] {
  const rest = ((ns % 1_000_000_000n) + 1_000_000_000n) % 1_000_000_000n; // before 1970 too
  return [Number((ns - rest) / 1_000_000_000n), Number(rest)];
}

/** A memfd with a program that can't be changed any more, and what it is a copy of, as the keeper writes it. */
export interface SealedCopy {
  readonly fd: number;
  /** `dev:ino:size:mtimeNs:ctimeNs` of the file */
  readonly of: string;
}

/**
 * Copies a program into a sealed memfd, in a thread. The caller owns the descriptor.
 * @param name  what `/proc/PID/exe` shows
 * @throws EFBIG for what isn't a file, or has more than `most` bytes
 */
export async function sealedCopy(path: string, name: string, most: number): Promise<SealedCopy> {
  return await addon().sealedCopy(path, name, most);
}
