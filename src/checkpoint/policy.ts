/** What to do with a container's established TCP connections: keep them, close them, or only leave out those half open. */
export type TcpPolicy = "keep" | "close" | "skip-in-flight";

/**
 * What CRIU is to do about the things that it can't decide alone. It comes from three places: the caller's options (containerd's
 * CheckpointOptions, an engine's flags), the container's `cedana.io/…` annotations for what those can't carry, and, at a restore,
 * the manifest beside the images, because images restore only with the options that they were taken with. An annotation of the
 * container that is restored has the last word.
 */
export interface CriuPolicy {
  tcp?: TcpPolicy | undefined;
  fileLocks: boolean;
  extUnix: boolean;
  shellJob: boolean;
  emptyNamespaces: string[];
  /** one of `cgroupsModes`, or nothing */
  cgroupsMode: string;
  /** names for deleted files that have others: of a dump, images say it to a restore */
  linkRemap?: boolean | undefined;
}

/** What both engines know, "ignore" being ours: runc 1.1 refuses it. */
export const cgroupsModes: readonly string[] = ["soft", "full", "strict", "ignore"];

/**
 * How CRIU keeps packets from a network namespace whose sockets it dumps.
 *
 * Its default calls iptables-restore twice for each protocol and again to undo it, at the dump and at the restore: 60 to 90 ms each
 * time, whether or not there is a socket. `skip` is right where there is no socket that a packet could reach.
 */
export type NetworkLock = "skip" | "nftables" | "default";
