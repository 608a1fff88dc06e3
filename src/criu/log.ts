import { type FileHandle, open } from "node:fs/promises";

/*
 * CRIU's log, dump.log or restore.log: one line for each message,
 *
 *   (00.051234) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.
 *   (00.061234)     42: Error (criu/files-reg.c:2211): File /lib/libc.so.6 has bad size 1 (expect 2)     a task being restored
 *   (00.071234) pie: 1: Error (criu/pie/restorer.c:1912): ...                                            the same, from its restorer
 *
 * The time stamp is missing in what is logged before the log file is open. What fails first is usually the cause, and all
 * later errors are consequences, down to "Dumping FAILED.". A log of level 4 has megabytes.
 */

/** A failure that is known, with what helps. */
export interface KnownCause {
  /** short and stable, for code and tests */
  readonly id: string;
  /** as a sentence for people */
  readonly advice: string;
}

export interface CriuLogSummary {
  /** usually the cause; the ones after it are consequences */
  readonly firstError: string | undefined;
  /** the last error lines, oldest first, without time stamps */
  readonly errors: readonly string[];
  /** the end of the log as it is, error or not */
  readonly lastLines: readonly string[];
  /** what the first known error means; undefined: nobody has told us yet */
  readonly cause: KnownCause | undefined;
  /** its last word on the dump or restore; errors may stand before a good one. undefined: it was killed, or is still at work */
  readonly outcome: "finished" | "failed" | undefined;
}

/** Read from the end: what of a long log is looked at as a whole. */
const TAIL_BYTES = 64 * 1024;
/** One read of the search for the first error; between two the event loop goes on. */
const CHUNK_BYTES = 256 * 1024;
/** A log beyond this has its first error sought no further. */
const MAX_SEARCH_BYTES = 256 * 1024 * 1024;
const MAX_ERRORS = 20;
const MAX_LAST_LINES = 10;
/** A line may quote names from inside of the container: cut, and without control characters. */
const MAX_LINE_CHARS = 500;

const ERROR_MARK = "Error (";
const errorLine = /^(?:\(\d+\.\d+\)\s*)?(?:pie:\s*)?(?:\d+:\s*)?(Error \([^)]*\): .*)$/;

/**
 * What a log says of a failure.
 * @throws the error of open(2) or read(2): ENOENT when CRIU was not even started
 */
export async function explainCriuLog(path: string): Promise<CriuLogSummary> {
  await using file = await open(path);
  const { size } = await file.stat();
  const tailStart = Math.max(0, size - TAIL_BYTES);
  const tail = await readAt(file, tailStart, size - tailStart);
  // The first line of a tail that begins in the middle is half a line.
  const whole = tailStart > 0 ? tail.subarray(tail.indexOf("\n") + 1) : tail;
  const summary = summarizeCriuLog(whole.toString("utf8"));
  if (tailStart === 0) return summary;
  const firstError = (await findFirstError(file, size)) ?? summary.firstError;
  return { ...summary, firstError, cause: causeOf([firstError, ...summary.errors]) };
}

/** The same of a log, or its end, that is at hand. */
export function summarizeCriuLog(text: string): CriuLogSummary {
  const lines = text.split("\n").filter((line) => line.trim() !== "");
  const errors = lines.map(errorOf).filter((error) => error !== undefined);
  return {
    firstError: errors.find((error) => !isHarmless(error)) ?? errors[0],
    errors: errors.slice(-MAX_ERRORS),
    lastLines: lines.slice(-MAX_LAST_LINES).map(printable),
    cause: causeOf(errors),
    outcome: lines.map(outcomeOf).findLast((outcome) => outcome !== undefined),
  };
}

/** Whole lines: what a container has named so is in the middle of others. Source: CRIU, cr-dump.c and cr-restore.c. */
function outcomeOf(line: string): CriuLogSummary["outcome"] {
  const said = line.replace(/^\(\d+\.\d+\)\s*/, "");
  if (/^(?:(?:Pre-d|D)umping|Restore) finished successfully/.test(said)) return "finished";
  return /^Error \([^)]*\): (?:Pre-dumping|Dumping|Restoring) FAILED\./.test(said) ? "failed" : undefined;
}

/** The error that a line reports, without its time stamp; undefined for other lines. */
function errorOf(line: string): string | undefined {
  const error = errorLine.exec(line)?.[1];
  return error === undefined ? undefined : printable(error);
}

function printable(line: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what is to be replaced
  const clean = line.replaceAll("\t", " ").replace(/[\u0000-\u001f\u007f-\u009f]/g, "?");
  return clean.length > MAX_LINE_CHARS ? `${clean.slice(0, MAX_LINE_CHARS)}…` : clean;
}

/** CRIU goes on after these: where its hard limit of open files can't be raised, every log begins with one. */
function isHarmless(error: string): boolean {
  return /rlimit: Can't setup RLIMIT_NOFILE/.test(error);
}

/** Looks for the mark in the bytes, and decodes only lines that have it. */
async function findFirstError(file: FileHandle, size: number): Promise<string | undefined> {
  const limit = Math.min(size, MAX_SEARCH_BYTES);
  let rest = Buffer.alloc(0); // the line that the last chunk ended in
  for (let at = 0; at < limit; at += CHUNK_BYTES) {
    const chunk = await readAt(file, at, CHUNK_BYTES);
    if (chunk.length === 0) break; // cut while we read it
    const text = rest.length > 0 ? Buffer.concat([rest, chunk]) : chunk;
    let found = text.indexOf(ERROR_MARK);
    while (found >= 0) {
      const end = text.indexOf("\n", found);
      if (end < 0) break; // the rest of the line is in the next chunk
      const start = text.lastIndexOf("\n", found) + 1;
      const error = errorOf(text.toString("utf8", start, end));
      if (error !== undefined && !isHarmless(error)) return error;
      found = text.indexOf(ERROR_MARK, end);
    }
    rest = Buffer.from(text.subarray(text.lastIndexOf("\n") + 1).subarray(-CHUNK_BYTES));
  }
  return errorOf(rest.toString("utf8"));
}

async function readAt(file: FileHandle, position: number, length: number): Promise<Buffer> {
  const buffer = Buffer.allocUnsafe(length);
  let filled = 0;
  while (filled < length) {
    const { bytesRead } = await file.read(buffer, filled, length - filled, position + filled);
    if (bytesRead === 0) break;
    filled += bytesRead;
  }
  return buffer.subarray(0, filled);
}

/** Messages as CRIU 3.17 to 4.2 have them; in the words of CRIU's options, whoever shows them knows its own. */
export const knownCauses: readonly (KnownCause & { pattern: RegExp })[] = [
  {
    id: "tcp-established",
    pattern: /Connected TCP socket/,
    advice:
      "the processes have established TCP connections: allow them (tcp-established; the restore needs the same addresses) or have them closed (tcp-close)",
  },
  {
    id: "tcp-in-flight",
    pattern: /inet: In-flight connections?\b/,
    advice:
      "a listening socket holds connections that nobody has accepted yet: skip them (skip-in-flight) or try again",
  },
  {
    id: "ext-unix-sk",
    pattern:
      /unix: External socket|unix: Can't dump half of stream unix connection|unix: Unix socket .* (?:with unreachable|without) peer/,
    advice:
      "a unix socket is connected to a process outside: allow external unix sockets (ext-unix-sk) where the other side can live with it",
  },
  {
    id: "file-locks",
    pattern: /Some file locks are hold by dumping tasks/,
    advice:
      "the processes hold file locks: allow them (file-locks); no process outside may hold or wait for the same locks",
  },
  {
    id: "shell-job",
    pattern:
      /Consider using --shell-job|No task found with sid|Found dangling tty|Don't have tty to inherit session/,
    advice:
      "the processes belong to a session or terminal outside: allow it (shell-job), or start the container without a terminal",
  },
  {
    id: "ghost-limit",
    pattern: /Can't dump ghost file .* increase limit/,
    advice:
      "a file was deleted while open and is larger than the limit for such files: raise it (ghost-limit)",
  },
  {
    id: "link-remap",
    pattern: /Can't create link remap for|Use link-remap option/,
    advice: "a file was deleted under one of its names while open: allow temporary names for it (link-remap)",
  },
  {
    id: "unsupported-file",
    pattern:
      /Can't dump file \d+ of that type|Unknown file type|Unsupported mapping found|Can't handle .* mapping/,
    advice:
      "a process has a device or kind of file open that CRIU can't dump (io_uring, perf events, devices): close it before the checkpoint",
  },
  {
    id: "ptrace",
    pattern: /Unseizable non-zombie|SEIZE \d+: (?:can't wait task|task not stopped)/,
    advice:
      "a process can't be traced, because a debugger or strace is attached to it, or it is in uninterruptible sleep",
  },
  {
    id: "freezer",
    pattern: /Unable to freeze cgroup|Timeout reached\. Try to interrupt/,
    advice:
      "the processes did not freeze in time: one of them is probably in uninterruptible sleep (NFS, a stuck device)",
  },
  {
    id: "external-mounts",
    pattern:
      /has unreachable sharing|mnt: .*unsupported id|A few mount points can't be mounted|mnt: No mapping for|is autodetected external mount|is a fuse mount but not external/,
    advice:
      "a mount comes from outside and is not known as such, or the restore lacks it: the new container needs the same mounts",
  },
  {
    id: "lost-mount",
    pattern: /Can't lookup mount=|Open files on overmounted mounts|is overmounted so paths are invisible/,
    advice: "a process has a file open on a mount that has been unmounted or mounted over",
  },
  {
    id: "file-changed",
    pattern: /has bad (?:size|build-ID)/,
    advice:
      "a file differs from what it was at the dump: restore with the same image and the same versions of mounted files",
  },
  {
    id: "file-missing",
    pattern: /Can't open file .* on restore/,
    advice:
      "a file that was open at the dump is missing: restore with the root file system and the mounts of the dump",
  },
  {
    id: "pid-taken",
    pattern: /Can't fork for \d+: File exists|Pid \d+ do not match expected|Setting PID failed/,
    advice:
      "a process id of the checkpoint is in use: restore again when it is free, or into a pid namespace of its own",
  },
  {
    id: "address",
    pattern: /inet: Can't bind inet socket/,
    advice:
      "an address or port of the checkpoint can't be bound: the network must have the same addresses, and the ports must be free",
  },
  {
    id: "network-lock",
    pattern: /Locking (?:network|connection) failed|Iptables configuration failed/,
    advice:
      "the network could not be locked: install iptables or nftables, or choose the one that works (network-lock)",
  },
  {
    id: "cpu",
    pattern:
      /cpu: (?:FPU feature required|CPU xfeatures has unsupported|CPU xsave (?:max )?size mismatch|Unsupported CPU vendor|CPU (?:instruction )?capabilities do not match)|Core march mismatch/,
    advice:
      "this CPU lacks what the processes had where they were dumped: restore on one at least as capable",
  },
  {
    id: "plugin-missing",
    pattern: /Missing required plugin/,
    advice: "the dump was made with a CRIU plugin (GPU) that is missing here",
  },
  {
    id: "broken-image",
    pattern:
      /[Mm]agic doesn't match|Not supported images version|image size mismatch|Unexpected EOF|image corruption|Image corrupted|Corrupted (?:ghost )?image/,
    advice:
      "the images are damaged, incomplete, or of a newer CRIU: `cedana image verify` says which and where",
  },
  {
    id: "parent-missing",
    pattern:
      /Can't open parent path|No parent for snapshot pagemap|Missing [0-9a-f]+ in parent pagemap|Invalid parent image directory|Can't link parent snapshot/,
    advice:
      "earlier images (of a pre-dump) that these build on are missing or are others: keep them beside these, under the same relative path",
  },
  {
    id: "memory-tracking",
    pattern: /Tracking memory is not available|Dirty tracking is OFF/,
    advice:
      "this kernel can't track which memory changes, so there are no pre-dumps: dump without them, or use a kernel with CONFIG_MEM_SOFT_DIRTY",
  },
  {
    id: "pid-reused",
    pattern: /Pid-reuse detection failed|Task pid reused|Can't detect pid reuse/,
    advice:
      "whether a pid is still the process of the pre-dump can't be told: dump again without the earlier images",
  },
  {
    id: "multipath-tcp",
    pattern: /multipathtcp=0|Unsupported proto 262 for socket/,
    advice:
      "a program uses MPTCP, which CRIU can't dump (Go does by default): run it with GODEBUG=multipathtcp=0",
  },
  {
    id: "socket-kind",
    pattern:
      /inet: (?:Can't dump \d+ inet socket|Can't dump corked|Unsupported (?:proto|socket)|Unknown inet socket)|unix: Can't dump name-less external/,
    advice:
      "a process has a socket of a kind that CRIU can't dump (SCTP, ICMP, a packet half written): close it before",
  },
  {
    id: "tcp-restore",
    pattern:
      /inet: Can't (?:connect inet socket back|listen on a socket)|TCP_REPAIR|tcp: Can't (?:set|restore)/,
    advice:
      "a TCP connection can't be taken up again: its addresses must exist here and nobody else may use the ports; or restore with tcp-close",
  },
  {
    id: "inotify",
    pattern:
      /fsnotify: .*(?:Can't dump that handle|Can't find suitable path for handle|Unable to lookup a mount)|irmap: Failed to resolve/,
    advice:
      "a file that is watched (inotify) can't be found again by its handle, as on overlay file systems: allow a search (force-irmap, irmap-scan-path), or stop watching before",
  },
  {
    id: "cpuset",
    pattern: /Can't move (?:\d+ )?into cpuset.*No space left|Restoring special cpuset props failed/,
    advice:
      "the cgroup's cpuset has no CPUs or memory nodes yet: set cpuset.cpus and cpuset.mems of it and of those above",
  },
  {
    id: "cgroup",
    pattern:
      /cg: (?:Cgroup dir .* doesn't exist|Can't (?:move|open cgyard|make cgroup dir)|controller .* not found|No (?:cg_controller_entry|set .*) found|Failed (?:opening|writing|accessing))|Abort restore of existing cgroups/,
    advice:
      "the cgroups of the dump can't be made or joined: leave them to the engine (manage-cgroups=ignore), or give another root (cgroup-root)",
  },
  {
    id: "own-cgroup",
    pattern: /All tasks in criu's cgroups|criu itself is within dumped tree/,
    advice:
      "CRIU runs in the very cgroup or process tree that is to be dumped: start it from outside of that",
  },
  {
    id: "restore-root",
    pattern: /The --root option is required|The root task has another root than mntns/,
    advice:
      "the mount namespace's root isn't the container's: dump the container's first process, and restore with its root file system",
  },
  {
    id: "nested-namespace",
    pattern:
      /Nested mount namespaces are not supported|doesn't live in IPC ns|A session leader of .* is outside of its pid namespace/,
    advice:
      "a process shares what belongs to another namespace (host IPC, a mount namespace of its own, a session outside): dump the whole container, or run it with namespaces of its own",
  },
  {
    id: "pid-namespace-init",
    pattern: /Can't (?:dump|restore) a? ?pid namespace without the process init/,
    advice: "the process isn't the first of its pid namespace: dump the container's first process",
  },
  {
    id: "session-conflict",
    pattern: /Current (?:sid|gid) \d+ intersects/,
    advice:
      "a session or group of the checkpoint has the number of the one CRIU runs in: restore from another session (setsid)",
  },
  {
    id: "file-system",
    pattern: /Unable to dump a file system|mnt: Unable to statfs/,
    advice:
      "the contents of a file system in memory could not be saved: tar must be installed, and there must be room for them",
  },
  {
    id: "mount-failed",
    pattern:
      /mnt: (?:Can't (?:mount at|bind-mount|restore ext mount)|Unable to (?:mount|bind-mount|open|find suitable mount point))/,
    advice:
      "a mount of the checkpoint can't be made here: its source, its mount point in the root file system or a privilege is missing",
  },
  {
    id: "leftover-file",
    pattern: /Can't link .*: File exists|Can't create link remap.*File exists|\.cr\.\d+\.ghost/,
    advice:
      "a file of an earlier restore or dump is in the way (link_remap.*, *.ghost): remove it, or start from the root file system of the dump",
  },
  {
    id: "epoll-escaped",
    pattern: /epoll: Escaped\/closed fd/,
    advice:
      "an epoll watches a descriptor that has been closed or given away, which needs a kernel with KCMP_EPOLL_TFD",
  },
  {
    id: "external-terminal",
    pattern: /tty: Found slave peer index .* without correspond master|tty: Corrupted slave peer/,
    advice: "a terminal's other end is outside of the dump: allow it (shell-job), or name it as external",
  },
  {
    id: "stopped-threads",
    pattern: /Individually stopped threads not supported|Zombies? (?:thread|with threads)/,
    advice:
      "a process is about to end or has threads that are stopped one by one: try again when that is over",
  },
  {
    id: "pipe-packets",
    pattern: /packetized mode for pipes/,
    advice: "a pipe keeps packets apart (O_DIRECT), which CRIU can't dump",
  },
  {
    id: "rseq",
    pattern: /has rseq but kernel lacks get_rseq_conf/,
    advice:
      "this kernel is too old for what glibc uses since 2.35 (restartable sequences): Linux 5.13, or run with GLIBC_TUNABLES=glibc.pthread.rseq=0",
  },
  {
    id: "seccomp",
    pattern: /Dumping seccomp filters not supported|PTRACE_O_SUSPEND_SECCOMP/,
    advice:
      "this kernel or CRIU can't dump seccomp filters (CONFIG_CHECKPOINT_RESTORE): run the container without one",
  },
  {
    id: "vdso",
    pattern:
      /fixup vdso|vdso: .*(?:Can't|Not all|Unexpected)|lack the support for mremapping|Compatible mode without vdso/,
    advice:
      "CRIU doesn't understand this kernel's vDSO: it is too old for it (Linux 6.12 and newer want CRIU 4.1)",
  },
  {
    id: "uprobes",
    pattern: /--allow-uprobes/,
    advice:
      "somebody traces the processes with uprobes (bpftrace, perf): stop that, or allow it at dump and restore alike",
  },
  {
    id: "time-namespace",
    pattern: /Time namespaces are not supported|Unable to set a (?:monotonic|boottime) clock offset/,
    advice: "the dump has a time namespace, and this kernel has none (Linux 5.6)",
  },
  {
    id: "security-module",
    pattern:
      /LSM specified but|mismatched lsm types|can't write lsm profile|can't render profile|unknown lsm|don't know how to suspend LSM/,
    advice:
      "the security label can't be set: the host must have the same module (AppArmor, SELinux) and the profile loaded, or choose another label (lsm-profile)",
  },
  {
    id: "lazy-pages",
    pattern:
      /Lazy pages (?:are not available|transfer FAILED)|Non-cooperative UFFD is not supported|Unable to open an userfaultfd/,
    advice:
      "memory can't come later: the kernel must allow userfaultfd (vm.unprivileged_userfaultfd, or CAP_SYS_PTRACE) and the page daemon must run; or restore eagerly",
  },
  {
    id: "page-server",
    pattern:
      /Can't connect to server|page-xfer: (?:Can't write to|Error reading data from|The page server doesn't answer)/,
    advice: "the page server can't be reached or has ended: look whether it runs, and at its own log",
  },
  {
    id: "parasite",
    pattern: /Can't infect \(pid|Parasite (?:failed|exited)|mmap\(PROT_WRITE \| PROT_EXEC\) failed/,
    advice:
      "CRIU could not run its code in a process: a security policy forbids writable code (SELinux execmem), or a limit of memory is reached",
  },
  {
    id: "network-device",
    pattern:
      /net: (?:IP tool failed|Can't add interface|Unable to (?:create a new netns|find an external netns))|IFLA_NEW_IFINDEX isn't supported/,
    advice:
      "the network can't be rebuilt: iproute2 must be installed and the names of interfaces free; or give the network namespace from outside (external)",
  },
  {
    id: "killed",
    pattern: /killed by signal 9/,
    advice:
      "a process was killed while it was restored, most likely for want of memory: look at the cgroup's memory.events and dmesg",
  },
  {
    id: "crashed",
    pattern: /killed by signal (?:4|7|11)\b/,
    advice:
      "a process crashed while it was restored: the CPU lacks an instruction, or CRIU and the kernel don't fit together (a newer CRIU may help)",
  },
  {
    id: "no-such-process",
    pattern: /Unable to open \/proc\/\d+|Can't find task with pid|No such process$/,
    advice: "a process ended while it was looked at: try again",
  },
  {
    id: "unprivileged",
    pattern: /can't dump unprivileged task|Kernel reports more capabilities/,
    advice:
      "CRIU may not look at these processes, or is older than the kernel's capabilities: run it as root, and a newer one",
  },
  {
    id: "disk-full",
    pattern: /No space left on device/,
    advice: "the file system for the images is full",
  },
  {
    id: "out-of-memory",
    pattern: /Cannot allocate memory|Not enough memory/,
    advice: "memory ran out, of the machine or of the cgroup",
  },
  {
    id: "capability",
    pattern: /CRIU needs to have the CAP_SYS_ADMIN|Operation not permitted/,
    advice:
      "a privilege is missing: CRIU needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE and a seccomp filter that lets it work",
  },
];

/** What the kernel says of anything: where there is another error, that says more. */
const vagueCauses = new Set([
  "disk-full",
  "out-of-memory",
  "capability",
  "no-such-process",
  "killed",
  "crashed",
]);

/** What the first error means that is known; words that say little alone (the last of the table) only where no other does. */
function causeOf(errors: readonly (string | undefined)[]): KnownCause | undefined {
  const causes = errors.filter((error) => error !== undefined && !isHarmless(error)).map(knownCause);
  const isVague = (cause: KnownCause) => vagueCauses.has(cause.id);
  return causes.find((cause) => cause && !isVague(cause)) ?? causes.find((cause) => cause !== undefined);
}

/** What an error line means, as far as it is known. */
export function knownCause(error: string | undefined): KnownCause | undefined {
  if (error === undefined) return undefined;
  const known = knownCauses.find(({ pattern }) => pattern.test(error));
  return known && { id: known.id, advice: known.advice };
}
