// What /proc/PID/fdinfo/FD says of an open file. Source: proc_pid_fdinfo(5), and the show_fdinfo functions of the kernel.

/** A lock that is held through this descriptor (flock, POSIX, OFD) or a lease. */
export interface HeldLock {
  /** FLOCK, POSIX, OFDLCK, LEASE, DELEG */
  readonly kind: string;
  /** READ or WRITE */
  readonly mode: string;
}

/** A watch of inotify or fanotify. */
export interface Watch {
  readonly inode: number;
  /** `major:minor` of the file system; undefined for a mark on a mount */
  readonly device?: string;
  /** of a mark on a mount (fanotify) */
  readonly mountId?: number;
  /** leads back to the file by open_by_handle_at(2); absent where the file system has none */
  readonly handle?: { readonly type: number; readonly bytes: string };
}

export interface FdInfo {
  /** O_*, with O_CLOEXEC for a descriptor that is closed at exec */
  readonly flags: number;
  /** Of the mount that the file was opened through; the number in mountinfo. */
  readonly mountId: number;
  readonly inode?: number;
  readonly locks: readonly HeldLock[];
  readonly watches: readonly Watch[];
  /** Of a pidfd: the pid of its process in our pid namespace; -1: it has ended, 0: it isn't visible to us. */
  readonly pidfdPid?: number;
  /** Of a pty master: the number of its slave. */
  readonly ttyIndex?: number;
}

const noLocks: readonly HeldLock[] = [];
const noWatches: readonly Watch[] = [];

/** Parses /proc/PID/fdinfo/FD. */
export function parseFdInfo(text: string): FdInfo {
  let flags = 0;
  let mountId = -1;
  let locks = noLocks as HeldLock[];
  let watches = noWatches as Watch[];
  const more: { inode?: number; pidfdPid?: number; ttyIndex?: number } = {};
  for (const line of text.split("\n")) {
    if (line.startsWith("flags:")) flags = Number.parseInt(line.slice(6), 8);
    else if (line.startsWith("mnt_id:")) mountId = Number(line.slice(7));
    else if (line.startsWith("ino:")) more.inode = Number(line.slice(4));
    else if (line.startsWith("Pid:")) more.pidfdPid = Number(line.slice(4));
    else if (line.startsWith("tty-index:")) more.ttyIndex = Number(line.slice(10));
    else if (line.startsWith("lock:")) {
      const lock = parseLock(line);
      if (lock) locks = [...locks, lock];
    } else if (line.startsWith("inotify wd:") || /^fanotify (?:ino|mnt_id|sdev):/.test(line))
      watches = [...watches, parseWatch(line)];
  }
  return { flags, mountId, ...more, locks, watches };
}

// lock:	1: FLOCK  ADVISORY  WRITE 13942 fe:00:2146684 0 EOF
function parseLock(line: string): HeldLock | undefined {
  const [, kind, mode] = /^lock:\s*\d+:\s+(?:->\s+)?(\w+)\s+\w+\s+(\w+)/.exec(line) ?? [];
  return kind === undefined ? undefined : { kind, mode: mode! };
}

// inotify wd:1 ino:20c17c sdev:fe00000 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7cc120003ff836f4
// fanotify ino:3f7e8 sdev:fe00000 mflags:0 mask:20 …   fanotify mnt_id:4e mflags:0 …   fanotify sdev:11 mflags:0 …
function parseWatch(line: string): Watch {
  const fields = new Map(
    line
      .split(" ")
      .slice(1)
      .map((field) => field.split(":") as [string, string]),
  );
  const hex = (name: string) => Number.parseInt(fields.get(name) ?? "0", 16);
  const bytes = fields.get("f_handle");
  return {
    inode: hex("ino"),
    ...(fields.has("sdev") && { device: kernelDevice(hex("sdev")) }),
    ...(fields.has("mnt_id") && { mountId: hex("mnt_id") }),
    ...(bytes && { handle: { type: hex("fhandle-type"), bytes: bytes.slice(0, hex("fhandle-bytes") * 2) } }),
  };
}

/** The kernel's own form of a device number, 20 bits of minor, as `major:minor`. */
function kernelDevice(device: number): string {
  return `${device >>> 20}:${device & 0xfffff}`;
}

/** A device number as stat(2) gives it. Source: gnu_dev_major(3). */
export function splitDevice(device: number): { major: number; minor: number } {
  const big = BigInt(device);
  return {
    major: Number(((big >> 8n) & 0xfffn) | ((big >> 32n) & 0xfffff000n)),
    minor: Number((big & 0xffn) | ((big >> 12n) & 0xffffff00n)),
  };
}
