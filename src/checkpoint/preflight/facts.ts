import { splitDevice } from "../../linux/fdinfo.ts";
import {
  type FileStat,
  isKernelMemory,
  type OpenFile,
  type ProcessInventory,
} from "../../linux/inventory.ts";
import { mappedBytes } from "../../linux/maps.ts";
import type { MountInfo } from "../../linux/mount-options.ts";
import type { InetSocket, UnixSocket } from "../../linux/sock-diag.ts";
import type { Context } from "./context.ts";

// What is so, without a judgement: pure functions over the inventory, by which a dump chooses its options.

/** A socket of the tree and one process that holds it. */
export interface HeldSocket<Socket> {
  readonly process: ProcessInventory;
  readonly fd: number;
  readonly socket: Socket;
}

function* heldSockets(context: Context) {
  for (const [inode, { process, file }] of context.treeSockets) {
    const socket = context.socket(inode);
    if (socket) yield { process, fd: file.fd, socket };
  }
}

function heldTcp(context: Context): HeldSocket<InetSocket>[] {
  return [...heldSockets(context)].filter(
    (held): held is HeldSocket<InetSocket> =>
      (held.socket.family === "inet" || held.socket.family === "inet6") && held.socket.protocol === "tcp",
  );
}

export function listeningSockets(context: Context): HeldSocket<InetSocket>[] {
  return heldTcp(context).filter(({ socket }) => socket.state === "LISTEN");
}

/** Every TCP socket that is neither closed nor listening: also those that are being opened or closed. */
export function establishedTcp(context: Context): HeldSocket<InetSocket>[] {
  return heldTcp(context).filter(({ socket }) => socket.state !== "LISTEN" && socket.state !== "CLOSE");
}

/** Unix sockets whose other end no process of the tree holds. */
export function outsideUnixPeers(context: Context): HeldSocket<UnixSocket>[] {
  return [...heldSockets(context)].filter(
    (held): held is HeldSocket<UnixSocket> =>
      held.socket.family === "unix" &&
      (held.socket.peerInode ?? 0) !== 0 &&
      !context.treeSockets.has(held.socket.peerInode!),
  );
}

/** Where a mount comes from: the root, the container's configuration, or somebody in the container. */
export interface ContainerMount {
  readonly mount: MountInfo;
  readonly origin: "root" | "configuration" | "container";
}

/** The mounts of the root process's mount namespace. */
export function mountsOfContainer(context: Context): ContainerMount[] {
  const namespace = context.root?.namespaces.mnt;
  const mounts = namespace === undefined ? [] : (context.inventory.mounts.get(namespace) ?? []);
  const configured = (context.input.spec?.mountPoints ?? []).map((path) => path.replace(/(?<=.)\/+$/, ""));
  return mounts.map((mount) => {
    if (mount.mountPoint === "/") return { mount, origin: "root" };
    // What is mounted below a recursive bind mount comes with it.
    const isConfigured = configured.some(
      (path) => path !== "/" && (mount.mountPoint === path || mount.mountPoint.startsWith(`${path}/`)),
    );
    return { mount, origin: isConfigured ? "configuration" : "container" };
  });
}

/** Mounts of which CRIU must be told that they come from outside: bind mounts of the configuration. */
export function externalMounts(context: Context): MountInfo[] {
  const configured = new Set(
    context.input.spec?.mountPoints.map((path) => path.replace(/(?<=.)\/+$/, "")) ?? [],
  );
  const made = new Set(["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"]);
  return mountsOfContainer(context)
    .map(({ mount }) => mount)
    .filter((mount) => configured.has(mount.mountPoint) && !made.has(mount.type));
}

/** Source: criu/tty.c, get_tty_driver: virtual consoles, the three of major 5, and Unix 98 ptys. */
export function isTerminal(stat: FileStat): boolean {
  if (stat.type !== "char") return false;
  const { major, minor } = splitDevice(stat.device);
  return (major === 4 && minor < 64) || (major === 5 && minor <= 2) || (major >= 136 && major <= 143);
}

export interface OutsideTerminal {
  readonly process: ProcessInventory;
  readonly file: OpenFile;
  /** It is of the container's own devpts, and engines ask CRIU to give such a slave a new master (orphan-pts-master). */
  readonly restoredByEngine: boolean;
}

/** Whether the root's session was made by somebody outside, so that a dump needs shell-job. */
export function sessionFromOutside({ root }: Context): boolean {
  return root !== undefined && root.stat.session !== root.pid;
}

/** Slaves of pseudo terminals whose master no process of the tree has open. */
export function outsideTerminals(context: Context): OutsideTerminal[] {
  const masters = new Set<number>();
  for (const process of context.tree)
    for (const { info } of process.files) if (info.ttyIndex !== undefined) masters.add(info.ttyIndex);
  const found: OutsideTerminal[] = [];
  for (const process of context.tree)
    for (const file of process.files) {
      if (file.what !== "fd" || file.stat?.type !== "char") continue;
      const { major, minor } = splitDevice(file.stat.device);
      if (major < 136 || major > 143 || masters.has((major - 136) * 256 + minor)) continue;
      const restoredByEngine = context.input.engine !== undefined && context.mounts.has(file.info.mountId);
      found.push({ process, file, restoredByEngine });
    }
  return found;
}

/** About what the images will take: private and shared memory, and deleted files. Page tables and the rest are small. */
export function memoryToDump(context: Context): number {
  let privateBytes = 0;
  let sharedBytes = 0;
  const segments = new Map<string, number>();
  const ghosts = new Map<string, number>();
  for (const { status, mappings, files } of context.tree) {
    privateBytes += status.anonymousBytes + status.swapBytes + status.hugetlbBytes;
    sharedBytes += status.sharedBytes;
    for (const mapping of mappings) {
      if (!isKernelMemory(mapping.path) && !mapping.path.startsWith("/dev/shm/")) continue;
      const key = `${mapping.device} ${mapping.inode} ${mapping.path}`;
      segments.set(key, Math.max(segments.get(key) ?? 0, mappedBytes(mapping)));
    }
    for (const { stat, link, info } of files)
      if (stat?.type === "file" && stat.links === 0) ghosts.set(`${link} ${info.inode}`, stat.allocatedBytes);
  }
  const sum = (sizes: Iterable<number>) => [...sizes].reduce((total, size) => total + size, 0);
  // Each shared page counts in every process that maps it, so the segments' sizes are another bound.
  return privateBytes + Math.min(sharedBytes, sum(segments.values())) + sum(ghosts.values());
}
