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
  openat2(directory: number, path: string, flags: number, mode: number, resolve: number): number;
}

let loaded: Addon | undefined;

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

/**
 * Path of the compiled addon: `CEDANA_ADDON` where set, else `cedana.node` or `build/binding/cedana.node` in the directory
 * of this file or one above it. That fits the source tree (src/linux), a build (dist) and an installation, where the addon
 * lies beside the bundled program.
 * @throws Unavailable when there is none
 */
export function findAddon(): string {
  const told = process.env.CEDANA_ADDON;
  if (told) return told;
  for (let directory = import.meta.dirname; ; directory = dirname(directory)) {
    for (const path of [join(directory, "cedana.node"), join(directory, "build/binding/cedana.node")])
      if (existsSync(path)) return path;
    if (directory === dirname(directory)) break;
  }
  throw new Unavailable(
    `the native addon cedana.node is neither beside ${import.meta.dirname} nor above it; run \`npm run build\` or set CEDANA_ADDON`,
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

/**
 * Whether a file handle, as an inotify watch's fdinfo shows it, leads back to its file (open_by_handle_at(2)); off the
 * event loop, for it may read a disk.
 * @param mountPath  any path on the file system
 * @returns 0, or the errno
 */
export function tryHandle(mountPath: string, type: number, handle: Buffer): Promise<number> {
  return addon().tryHandle(mountPath, type, handle);
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
export function openBeneath(directory: number, path: string, flags: number, mode = 0): number {
  return addon().openat2(
    directory,
    path,
    flags,
    mode,
    RESOLVE.BENEATH | RESOLVE.NO_SYMLINKS | RESOLVE.NO_MAGICLINKS,
  );
}
