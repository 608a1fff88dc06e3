/**
 * Everything that a preflight may say. A finding's id is stable: scripts and the documentation name it.
 *
 * blocker        CRIU can't dump the container as it is, whatever it is told
 * needs-option   it can, when an option is set
 * note           the dump works, but something is lost or changed by it
 *
 * Which of them CRIU really refuses was tried with CRIU 4.2.1 on Linux 6.18: test/live/preflight.test.ts does it again.
 */
export type Severity = "blocker" | "needs-option" | "note";

export type OptionName =
  | "tcp"
  | "skip-in-flight"
  | "ext-unix"
  | "file-locks"
  | "shell-job"
  | "ghost-limit"
  | "link-remap"
  | "irmap-scan-path";

interface Entry {
  readonly severity: Severity;
  readonly why: string;
  readonly advice: string;
  readonly option?: OptionName;
}

const closeIt = "close it before the checkpoint, or run the program in a way that doesn't use it";

export const catalogue = {
  "criu-missing": {
    severity: "blocker",
    why: "there is no CRIU that could dump it",
    advice: "install CRIU 4.2 or newer",
  },
  "criu-too-old": {
    severity: "blocker",
    why: "this CRIU does not know this kernel",
    advice: "install CRIU 4.2 or newer",
  },
  "criu-lacks": {
    severity: "blocker",
    why: "CRIU can't work here: criu check says that something is missing",
    advice: "see criu check; it needs root, and a kernel with CONFIG_CHECKPOINT_RESTORE",
  },
  "process-traced": {
    severity: "blocker",
    why: "a process has one tracer at most, and CRIU must be it",
    advice: "end the debugger, strace or whatever traces it",
  },
  "process-uninterruptible": {
    severity: "blocker",
    why: "a process in uninterruptible sleep can't be stopped, so CRIU waits in vain",
    advice:
      "find out what it waits for (a device, a file server; the parent of a vfork waits so for its child) and try again",
  },
  "process-stopped": {
    severity: "blocker",
    why: "a stopped process (SIGSTOP, job control) in a cgroup that version 1's freezer has frozen makes CRIU wait for ever",
    advice: "let it go on (SIGCONT) before the checkpoint, or use cgroup version 2",
  },
  "process-shares-memory": {
    severity: "blocker",
    why: "CRIU can't dump processes that share one address space (clone with CLONE_VM, vfork)",
    advice: "wait until the child has executed its program, or use threads",
  },
  "leader-ended": {
    severity: "blocker",
    why: "CRIU can't dump a process whose first thread has ended before the others",
    advice: "let the first thread wait for the others (pthread_join instead of pthread_exit)",
  },
  "nested-namespace": {
    severity: "blocker",
    why: "CRIU can't dump a process in another namespace of this kind than the container's init",
    advice: "don't run containers or sandboxes inside the container while it is checkpointed",
  },
  "io-uring": {
    severity: "blocker",
    why: "CRIU can't dump io_uring",
    advice:
      "forbid io_uring: by the seccomp profile (the default ones of newer containerds and Dockers do), or for all by sysctl kernel.io_uring_disabled=2",
  },
  userfaultfd: { severity: "blocker", why: "CRIU can't dump a userfaultfd", advice: closeIt },
  "perf-event": { severity: "blocker", why: "CRIU can't dump perf events", advice: "end the profiler" },
  bpf: {
    severity: "blocker",
    why: "CRIU can't dump BPF programs and links, and maps only when it was built with libbpf, and then only hashes and arrays",
    advice: closeIt,
  },
  device: { severity: "blocker", why: "CRIU can't dump this device", advice: closeIt },
  "unsupported-file": { severity: "blocker", why: "CRIU can't dump a file of this kind", advice: closeIt },
  "unsupported-mapping": {
    severity: "blocker",
    why: "CRIU can't dump a mapping of this kind",
    advice: closeIt,
  },
  "secret-memory": {
    severity: "blocker",
    why: "nobody can read memory of memfd_secret, CRIU neither",
    advice: closeIt,
  },
  "packet-pipe": {
    severity: "blocker",
    why: "CRIU can't dump a pipe in packet mode (O_DIRECT)",
    advice: closeIt,
  },
  "pidfd-outside": {
    severity: "blocker",
    why: "a pidfd can't come back without its process, and that one is not in the checkpoint",
    advice: closeIt,
  },
  "pidfd-thread": {
    severity: "blocker",
    why: "CRIU can't dump a pidfd of a thread (PIDFD_THREAD)",
    advice: closeIt,
  },
  "lost-mount": {
    severity: "blocker",
    why: "the file lies on a mount that no process of the container can see: unmounted lazily, detached, or of another mount namespace",
    advice: "close it; give the container the file by a bind mount, and output by a pipe",
  },
  "overmounted-file": {
    severity: "blocker",
    why: "something is mounted over the file, so its path leads elsewhere",
    advice: "close it, or unmount what covers it",
  },
  "foreign-namespace-file": {
    severity: "blocker",
    why: "it holds a namespace that no process of the container is in",
    advice: closeIt,
  },
  "watch-outside": {
    severity: "blocker",
    why: "an inotify or fanotify watch is on a file system that no process of the container can see",
    advice: "remove the watch before the checkpoint",
  },
  "unsupported-mount": {
    severity: "blocker",
    why: "CRIU can dump neither this file system nor does the mount come with the container's configuration",
    advice: "unmount it, or give it to the container as a bind mount of its configuration",
  },
  "shared-memory-outside": {
    severity: "blocker",
    why: "the System V shared memory belongs to an IPC namespace that is not the container's own",
    advice: "give the container its own IPC namespace",
  },
  "unsupported-socket": {
    severity: "blocker",
    why: "CRIU can't dump sockets of this family or protocol",
    advice: closeIt,
  },
  mptcp: {
    severity: "blocker",
    why: "CRIU can't dump Multipath TCP",
    advice: "run the program without it (Go: GODEBUG=multipathtcp=0; for all: sysctl net.mptcp.enabled=0)",
  },
  "foreign-socket": {
    severity: "blocker",
    why: "the socket belongs to a network namespace that no process of the container is in",
    advice: "make the socket inside of the container's network namespace",
  },
  "unix-connection-outside": {
    severity: "blocker",
    why: "half of a connection can't be dumped: the other end of this unix socket is outside of the checkpoint, and ext-unix is for datagrams to a socket with a name only",
    advice: "close the connection before the checkpoint and connect again after it",
  },
  "netlink-unread": {
    severity: "blocker",
    why: "CRIU can't dump a netlink socket with something left to read",
    advice: "try again: the program has not read an answer of the kernel's yet",
  },
  "netlink-groups": {
    severity: "blocker",
    why: "CRIU can't dump a netlink socket that has joined a multicast group above 32",
    advice: "leave the group before the checkpoint",
  },
  "credentials-unread": {
    severity: "blocker",
    why: "CRIU can't dump messages in a socket that carry their sender's credentials (SO_PASSCRED)",
    advice: "try again: the program has not read a message yet",
  },
  "destination-full": {
    severity: "blocker",
    why: "the memory to be dumped is larger than the free space at the destination",
    advice: "free space there, or choose another destination",
  },
  "tcp-established": {
    severity: "needs-option",
    option: "tcp",
    why: "connections are dumped only on request, because they come back only at the same address",
    advice: "cedana.io/tcp: keep, or close to have them closed at the restore",
  },
  "tcp-in-flight": {
    severity: "needs-option",
    option: "skip-in-flight",
    why: "a connection that nobody has accepted yet can't be dumped",
    advice: "cedana.io/tcp: skip-in-flight (the peer connects again), or try again when it has been accepted",
  },
  "unix-outside": {
    severity: "needs-option",
    option: "ext-unix",
    why: "a unix datagram socket is connected to one outside, which must be there again at the restore",
    advice: 'cedana.io/ext-unix: "true"',
  },
  "file-locks": {
    severity: "needs-option",
    option: "file-locks",
    why: "file locks are dumped only on request, because processes outside may wait for them or have taken them before the restore",
    advice: 'cedana.io/file-locks: "true"',
  },
  "terminal-outside": {
    severity: "needs-option",
    option: "shell-job",
    why: "the terminal belongs to a process outside, and the restored process gets that of whoever restores it",
    advice: 'cedana.io/shell-job: "true"',
  },
  "no-session-leader": {
    severity: "needs-option",
    option: "shell-job",
    why: "the session of the process was made by one outside of the checkpoint",
    advice: 'cedana.io/shell-job: "true"; or start it with setsid',
  },
  "watch-unreachable": {
    severity: "needs-option",
    option: "irmap-scan-path",
    why: "CRIU finds the file of an inotify or fanotify watch by its handle, and this file system (overlay without nfs_export, proc, sysfs) doesn't lead back from it: it must search for the file",
    advice: "CRIU's option irmap-scan-path, with the directory in which the watched file or directory lies",
  },
  "ghost-file": {
    severity: "needs-option",
    option: "ghost-limit",
    why: "the contents of deleted files that are open go into the checkpoint only up to a size",
    advice: "CRIU's option ghost-limit, in bytes",
  },
  "deleted-hard-link": {
    severity: "needs-option",
    option: "link-remap",
    why: "the name by which the file was opened is gone, and others exist: CRIU must make a temporary one",
    advice: "CRIU's option link-remap",
  },
  "left-out": {
    severity: "note",
    why: "the process does not descend from the container's init (it came by exec), so CRIU doesn't dump it; it doesn't come back",
    advice: "run it from the container's init when it is to be in the checkpoint",
  },
  "id-mapped-mount": {
    severity: "note",
    why: "CRIU doesn't know id-mapped mounts: when it makes the mount anew, it has no mapping",
    advice: "give the mount to the container in its configuration, so that the engine makes it",
  },
  "foreign-socket-unbound": {
    severity: "note",
    why: "the socket belongs to the host's network namespace; after a restore it is in that of its process",
    advice: "make the socket inside of the container's network namespace",
  },
  "kernel-tls": {
    severity: "note",
    why: "CRIU doesn't know the keys that the kernel encrypts this connection with, so it won't work after a restore",
    advice: "cedana.io/tcp: close",
  },
  "no-answer": {
    severity: "note",
    why: "the file system of an open file did not say what the file is",
    advice: "see whether its server is alive: CRIU asks the same and has no limit for it",
  },
} as const satisfies Record<string, Entry>;

export type FindingId = keyof typeof catalogue;

export interface Finding {
  readonly id: FindingId;
  readonly severity: Severity;
  /** absent for what concerns the whole container */
  readonly process?: { readonly pid: number; readonly pidInContainer: number; readonly comm: string };
  /** in how many more processes the same is found (a descriptor that children have inherited) */
  readonly alsoIn?: number;
  /** "fd 3: anon_inode:[io_uring]" */
  readonly what: string;
  readonly why: string;
  readonly advice: string;
}

/** An option that the dump will need. */
export interface Requirement extends Finding {
  readonly option: OptionName;
  /** of ghost-limit: bytes */
  readonly value?: number;
  /** whether the policy has it set already */
  readonly met: boolean;
}
