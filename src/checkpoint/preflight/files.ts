import { splitDevice } from "../../linux/fdinfo.ts";
import type { FileStat, MappedFile, OpenFile, ProcessInventory } from "../../linux/inventory.ts";
import type { MountInfo } from "../../linux/mount-options.ts";
import { inodeInBrackets } from "../../linux/proc.ts";
import { type Context, nameOf } from "./context.ts";
import { isTerminal, outsideTerminals } from "./facts.ts";

// What processes have open or mapped. CRIU's side of it: criu/files.c (dump_one_file), files-reg.c, proc_parse.c.

const O_DIRECT = 0o40000;
/** Of a pidfd: PIDFD_THREAD. */
const O_EXCL = 0o200;

/** Anonymous inodes that CRIU dumps, as their links name them. */
const supportedAnonymous = new Set([
  "[eventfd]",
  "[eventpoll]",
  "inotify",
  "[fanotify]",
  "[signalfd]",
  "[timerfd]",
  "[pidfd]",
]);

export async function checkFiles(context: Context): Promise<void> {
  for (const process of context.tree)
    for (const file of process.files) {
      checkFile(context, process, file);
      const pause = context.breathe();
      if (pause) await pause;
    }
}

function checkFile(context: Context, process: ProcessInventory, file: OpenFile): void {
  const { link } = file;
  const name = nameOf(file);
  if (file.info.locks.length > 0) {
    const kinds = [...new Set(file.info.locks.map((lock) => `${lock.kind} ${lock.mode}`))].join(", ");
    context.require("file-locks", process, `${name} (${kinds})`, context.policy.fileLocks === true);
  }
  if (link.startsWith("pipe:[")) {
    if ((file.info.flags & O_DIRECT) !== 0) context.report("packet-pipe", process, name, link);
    return;
  }
  if (link.startsWith("socket:[")) return; // checkSockets
  if (link.startsWith("anon_inode:") || link.startsWith("pidfd:")) {
    checkAnonymous(context, process, file, name);
    return;
  }
  if (/^\w+:\[\d+\]$/.test(link)) {
    const inode = inodeInBrackets(link)!;
    if (!context.knowsNamespace(inode)) context.report("foreign-namespace-file", process, name, link);
    return;
  }
  if (link.startsWith("/memfd:")) return;
  if (link.startsWith("/secretmem")) {
    context.report("secret-memory", process, name, `${link} ${file.info.inode}`);
    return;
  }
  if (!link.startsWith("/")) {
    context.report("unsupported-file", process, name, link);
    return;
  }
  checkPath(context, process, file, name);
}

function checkAnonymous(context: Context, process: ProcessInventory, file: OpenFile, name: string): void {
  const kind = file.link.replace(/^anon_inode:/, "");
  const object = `${file.link} ${file.info.inode} ${file.fd}`;
  if (file.link.startsWith("pidfd:") || kind === "[pidfd]") {
    const { pidfdPid, flags } = file.info;
    if ((flags & O_EXCL) !== 0) context.report("pidfd-thread", process, name, object);
    else if (pidfdPid !== undefined && pidfdPid >= 0 && !context.treePids.has(pidfdPid))
      context.report(
        "pidfd-outside",
        process,
        `${name} (process ${pidfdPid || "of another pid namespace"})`,
        object,
      );
  } else if (kind === "[io_uring]") context.report("io-uring", process, name, object);
  else if (kind === "[userfaultfd]") context.report("userfaultfd", process, name, object);
  else if (kind === "[perf_event]") context.report("perf-event", process, name, object);
  else if (/^\[?bpf/.test(kind)) {
    if (!(kind === "bpf-map" && context.input.criu?.bpfMaps)) context.report("bpf", process, name, object);
  } else if (!supportedAnonymous.has(kind)) context.report("unsupported-file", process, name, object);
}

function checkPath(context: Context, process: ProcessInventory, file: OpenFile, name: string): void {
  const { stat, info } = file;
  const object = `${file.link} ${info.mountId} ${info.inode ?? ""}`;
  if (file.statFailed !== undefined)
    context.report("no-answer", process, `${name} (${file.statFailed})`, object);
  if (stat && (stat.type === "char" || stat.type === "block")) {
    const device = splitDevice(stat.device);
    if (isTerminal(stat)) return; // checkTerminals
    if (!canDumpDevice(context, stat, device)) {
      context.report("device", process, `${name} (${stat.type} ${device.major}:${device.minor})`, object);
      return;
    }
  }
  checkMount(context, process, file.info.mountId, name, object);
  if (file.what === "fd" && stat) checkDeleted(context, process, name, file.link, stat, object);
}

// Source: criu/files.c, get_mem_dev_ops and get_misc_dev_ops: all of major 1 (null, zero, random, kmsg, …), tun, autofs.
function canDumpDevice(context: Context, stat: FileStat, { major, minor }: Device): boolean {
  if (isPluginDevice(context, { major, minor })) return true;
  if (stat.type !== "char") return false;
  if (major === 1) return true;
  if (major !== 10) return false;
  if (minor === 200) return context.ownsNamespace("net"); // tun: its link must be in a namespace that is dumped
  return minor === 235;
}

type Device = ReturnType<typeof splitDevice>;

function isPluginDevice(context: Context, { major, minor }: Device): boolean {
  const plugins = context.input.pluginDevices ?? [];
  return plugins.includes(`${major}:${minor}`) || plugins.includes(`${major}:*`);
}

/** /dev/zero, the only device that may be mapped. Source: criu/proc_parse.c, vma_get_mapfile. */
function isZeroDevice({ major, minor }: Device): boolean {
  return major === 1 && minor === 5;
}

function checkMount(
  context: Context,
  process: ProcessInventory,
  mountId: number,
  name: string,
  object: string,
): void {
  if (mountId < 0) return; // it could not be had
  const mount = context.mounts.get(mountId);
  if (!mount) context.report("lost-mount", process, name, object);
  else if (isCovered(context, mount))
    context.report("overmounted-file", process, `${name} (below ${mount.mountPoint})`, object);
}

const covered = new WeakMap<MountInfo, boolean>();

function isCovered(context: Context, mount: MountInfo): boolean {
  const known = covered.get(mount) ?? isOvermounted(mount, context.mounts);
  covered.set(mount, known);
  return known;
}

/**
 * Whether something is mounted over a mount, or over a directory that it lies in.
 *
 * Over the mount itself: a child of it at the same place. Over a directory above: a sibling whose place is above.
 */
export function isOvermounted(mount: MountInfo, mounts: ReadonlyMap<number, MountInfo>): boolean {
  for (const other of mounts.values()) {
    if (other === mount) continue;
    if (other.parentId === mount.mountId && other.mountPoint === mount.mountPoint) return true;
    if (other.parentId === mount.parentId && mount.mountPoint.startsWith(`${other.mountPoint}/`)) return true;
  }
  const parent = mounts.get(mount.parentId);
  if (!parent || parent === mount) return false;
  // A root that is mounted over "/" (pivot_root) has a parent at the same place; it hides that one, not itself.
  return parent.mountPoint !== mount.mountPoint && isOvermounted(parent, mounts);
}

function checkDeleted(
  context: Context,
  process: ProcessInventory,
  name: string,
  path: string,
  stat: FileStat,
  object: string,
): void {
  if (stat.type !== "file" || !path.endsWith(" (deleted)")) return;
  if (stat.links === 0) {
    if (stat.allocatedBytes > context.ghostLimitBytes)
      context.require("ghost-file", process, `${name} (${stat.allocatedBytes} bytes)`, false, {
        object,
        value: stat.allocatedBytes,
      });
    else if (stat.allocatedBytes > 1024 * 1024)
      context.require("ghost-file", process, `${name} (${stat.allocatedBytes} bytes)`, true, {
        object,
        value: stat.allocatedBytes,
      });
  } else context.require("deleted-hard-link", process, name, context.policy.linkRemap === true, { object });
}

export async function checkMappings(context: Context): Promise<void> {
  for (const process of context.tree) {
    // What is open as well has been told already.
    const open = new Set(process.files.map((file) => file.link));
    for (const mapping of process.mappings) {
      if (open.has(mapping.path) && !mapping.path.startsWith("/SYSV")) continue;
      const name = `mapping ${mapping.start}-${mapping.end}: ${mapping.path}`;
      const object = `${mapping.path} ${mapping.inode}`;
      if (mapping.path === "anon_inode:[io_uring]") context.report("io-uring", process, name, object);
      else if (mapping.path === "anon_inode:[perf_event]")
        context.report("perf-event", process, name, object);
      else if (/^anon_inode:\[?bpf/.test(mapping.path)) context.report("bpf", process, name, object);
      else if (mapping.path.startsWith("anon_inode:"))
        context.report("unsupported-mapping", process, name, object);
      else if (mapping.path.startsWith("/secretmem")) context.report("secret-memory", process, name, object);
      else if (mapping.path.startsWith("/SYSV") && !ownsIpc(context, process))
        context.report("shared-memory-outside", process, name, object);
      const pause = context.breathe();
      if (pause) await pause;
    }
    for (const file of process.mappedFiles) checkMappedFile(context, process, file);
  }
}

function ownsIpc(context: Context, process: ProcessInventory): boolean {
  return process.namespaces.ipc !== context.inventory.own.ipc;
}

function checkMappedFile(context: Context, process: ProcessInventory, file: MappedFile): void {
  const { mapping, stat } = file;
  const name = `mapped file: ${mapping.path}`;
  const object = `${mapping.path} ${file.mountId} ${mapping.inode}`;
  if (stat && (stat.type === "char" || stat.type === "block")) {
    const device = splitDevice(stat.device);
    if (!isZeroDevice(device) && !isPluginDevice(context, device)) {
      context.report(
        "unsupported-mapping",
        process,
        `${name} (${stat.type} ${device.major}:${device.minor})`,
        object,
      );
      return;
    }
  }
  checkMount(context, process, file.mountId, name, object);
  if (stat) checkDeleted(context, process, name, mapping.path, stat, object);
}

export function checkTerminals(context: Context): void {
  for (const { process, file, restoredByEngine } of outsideTerminals(context))
    if (!restoredByEngine)
      context.require("terminal-outside", process, nameOf(file), context.policy.shellJob === true, {
        object: `${file.link} ${file.info.mountId}`,
      });
}
