/*
 * An image file of CRIU (little-endian):
 *
 *   at  size  field
 *   0   4     IMG_COMMON, or IMG_SERVICE (stats-*, irmap-cache); not in inventory.img, and not in images of version 1.0
 *   4   4     type word: says what the entries are
 *   …         entries: 4 bytes size, that many bytes of a protobuf message, and with some types data behind it ("extra")
 *
 * Raw images have no words at all: memory pages, and what other tools wrote (routes, firewall rules, tarballs). Only the name tells.
 * Sources: magic(5) of file(1), CRIU's wiki page "Images", crit.
 */

export const IMG_COMMON = 0x5456_4319;
export const IMG_SERVICE = 0x5510_5940;

/** What lies behind a message. */
export type ExtraKind =
  /** `bytes` (pipes) or `length` (socket queues) bytes */
  | { readonly kind: "blob"; readonly sizes: readonly string[] }
  /** bytes in receive queue, then in send queue */
  | { readonly kind: "queues"; readonly sizes: readonly string[] }
  /** 16-bit values of a semaphore set, padded to 8 bytes */
  | { readonly kind: "semaphores" }
  /** messages of a System V queue: an ipc_msg and its text padded to 8 bytes, `qnum` times */
  | { readonly kind: "messages" }
  /** memory of a System V segment padded to 4 bytes; nothing when it is in a pagemap */
  | { readonly kind: "segment" }
  /** a deleted file's content: the rest of the image, or as ghost_chunk_entry with `len` bytes each */
  | { readonly kind: "ghost" };

export interface ImageFormat {
  /** as crit calls it */
  readonly name: string;
  readonly magic: number;
  /** message of the entries */
  readonly message: string;
  /** message of the first one, where it is another */
  readonly head?: string;
  readonly extra?: ExtraKind;
  /** how its files are called */
  readonly file: RegExp;
}

const PID = "\\d+";
const HEX = "[0-9a-f]+";

function format(name: string, magic: number, message: string, file: string, more: Partial<ImageFormat> = {}) {
  return { name, magic, message, file: new RegExp(`^${file}$`), ...more };
}
const perTask = (name: string) => `${name}-${PID}\\.img`;
const one = (name: string) => `${name}\\.img`;
const blob = (...sizes: string[]): ExtraKind => ({ kind: "blob", sizes });

export const imageFormats: readonly ImageFormat[] = [
  format("INVENTORY", 0x58313116, "inventory_entry", one("inventory")),
  format("PSTREE", 0x50273030, "pstree_entry", one("pstree")),
  format("CORE", 0x55053847, "core_entry", perTask("core")),
  format("IDS", 0x54432030, "task_kobj_ids_entry", perTask("ids")),
  format("CREDS", 0x54023547, "creds_entry", perTask("creds")),
  format("SIGACT", 0x55344201, "sa_entry", perTask("sigacts")),
  format("SIGNAL", 0x59255647, "siginfo_entry", `signal-[sp]-${PID}\\.img`),
  format("ITIMERS", 0x57464056, "itimer_entry", perTask("itimers")),
  format("POSIX_TIMERS", 0x52603957, "posix_timer_entry", perTask("posix-timers")),
  format("RLIMIT", 0x57113925, "rlimit_entry", perTask("rlimit")),
  format("SECCOMP", 0x64413049, "seccomp_entry", one("seccomp")),
  format("APPARMOR", 0x59423047, "apparmor_entry", one("apparmor")),
  format("CPUINFO", 0x61404013, "cpuinfo_entry", one("cpuinfo")),

  format("MM", 0x57492820, "mm_entry", perTask("mm")),
  format("VMAS", 0x54123737, "vma_entry", perTask("vmas")),
  format("PAGEMAP", 0x56084025, "pagemap_entry", `pagemap-(?:shmem-|secretmem-)?${PID}\\.img`, {
    head: "pagemap_head",
  }),
  format("MEMFD_INODE", 0x48453499, "memfd_inode_entry", one("memfd")),

  format("FDINFO", 0x56213732, "fdinfo_entry", perTask("fdinfo")),
  format("FS", 0x51403912, "fs_entry", perTask("fs")),
  format("FILES", 0x56303138, "file_entry", one("files")),
  format("REG_FILES", 0x50363636, "reg_file_entry", one("reg-files")),
  format("EXT_FILES", 0x59255641, "ext_file_entry", one("ext-files")),
  format("NS_FILES", 0x61394011, "ns_file_entry", one("ns-files")),
  format("EVENTFD_FILE", 0x44523722, "eventfd_file_entry", one("eventfd")),
  format("EVENTPOLL_FILE", 0x45023858, "eventpoll_file_entry", one("eventpoll")),
  format("EVENTPOLL_TFD", 0x44433746, "eventpoll_tfd_entry", one("eventpoll-tfd")),
  format("SIGNALFD", 0x57323820, "signalfd_entry", one("signalfd")),
  format("TIMERFD", 0x50493712, "timerfd_entry", one("timerfd")),
  format("INOTIFY_FILE", 0x48424431, "inotify_file_entry", one("inotify")),
  format("INOTIFY_WD", 0x54562009, "inotify_wd_entry", one("inotify-wd")),
  format("FANOTIFY_FILE", 0x55096122, "fanotify_file_entry", one("fanotify")),
  format("FANOTIFY_MARK", 0x56506035, "fanotify_mark_entry", one("fanotify-mark")),
  format("PIDFD", 0x54435556, "pidfd_entry", one("pidfd")),
  format("PIPES", 0x56513555, "pipe_entry", one("pipes")),
  format("PIPES_DATA", 0x56453709, "pipe_data_entry", one("pipes-data"), { extra: blob("bytes") }),
  format("FIFO", 0x58364939, "fifo_entry", one("fifo")),
  format("FIFO_DATA", 0x59333054, "pipe_data_entry", one("fifo-data"), { extra: blob("bytes") }),
  format("TTY_FILES", 0x59433025, "tty_file_entry", one("tty")),
  format("TTY_INFO", 0x59453036, "tty_info_entry", one("tty-info")),
  format("TTY_DATA", 0x59413026, "tty_data_entry", one("tty-data")),
  format("TUNFILE", 0x57143751, "tunfile_entry", one("tunfile")),
  format("BPFMAP_FILE", 0x57506142, "bpfmap_file_entry", one("bpfmap-file")),
  format("BPFMAP_DATA", 0x64324033, "bpfmap_data_entry", one("bpfmap-data"), {
    extra: blob("keys_bytes", "values_bytes"),
  }),
  format("REMAP_FPATH", 0x59133954, "remap_file_path_entry", one("remap-fpath")),
  format("GHOST_FILE", 0x52583605, "ghost_file_entry", `ghost-file-${HEX}\\.img`, {
    extra: { kind: "ghost" },
  }),
  format("FILE_LOCKS", 0x54323616, "file_lock_entry", one("filelocks")),

  format("UNIXSK", 0x54373943, "unix_sk_entry", one("unixsk")),
  format("INETSK", 0x56443851, "inet_sk_entry", one("inetsk")),
  format("PACKETSK", 0x60454618, "packet_sock_entry", one("packetsk")),
  format("NETLINK_SK", 0x58005614, "netlink_sk_entry", one("netlinksk")),
  format("SK_QUEUES", 0x56264026, "sk_packet_entry", one("sk-queues"), { extra: blob("length") }),
  format("TCP_STREAM", 0x51465506, "tcp_stream_entry", `tcp-stream-${HEX}\\.img`, {
    extra: { kind: "queues", sizes: ["inq_len", "outq_len"] },
  }),

  format("CGROUP", 0x59383330, "cgroup_entry", one("cgroup")),
  format("UTSNS", 0x54473203, "utsns_entry", perTask("utsns")),
  format("TIMENS", 0x43114433, "timens_entry", perTask("timens")),
  format("PIDNS", 0x61157326, "pidns_entry", perTask("pidns")),
  format("USERNS", 0x55474906, "userns_entry", perTask("userns")),
  format("IPC_VAR", 0x53115007, "ipc_var_entry", perTask("ipcns-var")),
  format("IPCNS_SHM", 0x46283044, "ipc_shm_entry", perTask("ipcns-shm"), { extra: { kind: "segment" } }),
  format("IPCNS_SEM", 0x59573019, "ipc_sem_entry", perTask("ipcns-sem"), { extra: { kind: "semaphores" } }),
  format("IPCNS_MSG", 0x55453737, "ipc_msg_entry", perTask("ipcns-msg"), { extra: { kind: "messages" } }),
  format("NETNS", 0x55933752, "netns_entry", perTask("netns")),
  format("NETDEV", 0x57373951, "net_device_entry", perTask("netdev")),
  format("MNTS", 0x55563928, "mnt_entry", perTask("mountpoints")),
  format("AUTOFS", 0x49353943, "autofs_entry", perTask("autofs")),
  format("BINFMT_MISC", 0x67343323, "binfmt_misc_entry", `binfmt-misc(?:-${PID})?\\.img`),

  format("STATS", 0x57093306, "stats_entry", "stats-(?:dump|restore)"),
  format("IRMAP_CACHE", 0x57004059, "irmap_cache_entry", "irmap-cache(?:\\.img)?"),
];

const byMagic = new Map(imageFormats.map((format) => [format.magic, format]));
const byName = new Map(imageFormats.map((format) => [format.name, format]));

export function formatOfMagic(magic: number): ImageFormat | undefined {
  return byMagic.get(magic);
}

export function formatOfName(name: string): ImageFormat | undefined {
  return byName.get(name);
}

/** What a file of this name must hold; undefined: it isn't an image with words, or of a CRIU that is newer than we know. */
export function formatOfFile(fileName: string): ImageFormat | undefined {
  return imageFormats.find((format) => format.file.test(fileName));
}

/** Whether the type's first word is the one of service files. */
export function isService(format: ImageFormat): boolean {
  return format.name === "STATS" || format.name === "IRMAP_CACHE";
}

const rawFiles = new RegExp(
  `^(?:(?:ifaddr|route6?|rule|ip6?tables|nftables|netns-ct|netns-exp|tmpfs|tmpfs-dev)-${PID}(?:\\.tar\\.gz)?\\.img` +
    `|(?:tmpfs|tmpfs-dev)-${PID}\\.tar\\.gz)$`,
);
const pagesFiles = new RegExp(`^pages-(?:shmem-)?${PID}\\.img$`);

/** Files without words: memory pages, or what another program wrote. */
export function rawKindOf(fileName: string): "pages" | "opaque" | undefined {
  if (pagesFiles.test(fileName)) return "pages";
  return rawFiles.test(fileName) ? "opaque" : undefined;
}
