import { tryHandle } from "../../linux/addon.ts";
import type { Watch } from "../../linux/fdinfo.ts";
import type { ProcessInventory } from "../../linux/inventory.ts";
import type { MountInfo } from "../../linux/mount-options.ts";
import { type Context, nameOf } from "./context.ts";
import { mountsOfContainer } from "./facts.ts";

/**
 * File systems that CRIU makes anew or dumps. Source: criu/filesystems.c.
 */
const supportedTypes = new Set([
  "proc",
  "sysfs",
  "devtmpfs",
  "binfmt_misc",
  "tmpfs",
  "devpts",
  "simfs",
  "btrfs",
  "pstore",
  "mqueue",
  "securityfs",
  "fusectl",
  "debugfs",
  "tracefs",
  "cgroup",
  "cgroup2",
  "aufs",
  "autofs",
  "overlay",
]);

export function checkMounts(context: Context): void {
  // In our own mount namespace CRIU dumps no mounts at all.
  if (!context.ownsNamespace("mnt")) return;
  // An engine tells CRIU which mounts come from outside, by a configuration that we weren't given.
  if (context.input.engine && !context.input.spec) return;
  const mounts = mountsOfContainer(context);
  for (const { mount, origin } of mounts) {
    const name = `${mount.mountPoint} (${mount.type} of ${mount.source})`;
    if (origin === "container") {
      const hasWhole = mounts.some(
        (other) =>
          other.mount.device === mount.device && (other.origin !== "container" || other.mount.root === "/"),
      );
      if (!supportedTypes.has(mount.type) && !hasWholeElsewhere(mount, mounts))
        context.report("unsupported-mount", undefined, name);
      else if (mount.root !== "/" && !hasWhole)
        context.report("unsupported-mount", undefined, `${name}, of it only ${mount.root}`);
      if (mount.options.includes("idmapped")) context.report("id-mapped-mount", undefined, name);
    }
  }
}

/** A bind mount of what the configuration mounts, or of the root, is made from that one. */
function hasWholeElsewhere(mount: MountInfo, mounts: ReturnType<typeof mountsOfContainer>): boolean {
  return mounts.some((other) => other.origin !== "container" && other.mount.device === mount.device);
}

/** CRIU finds the watched file by its handle, through some mount of its file system. */
export async function checkWatches(context: Context): Promise<void> {
  const tried = new Map<string, number>();
  for (const process of context.tree) {
    for (const file of process.files) {
      for (const watch of file.info.watches) {
        const fault = await findFault(context, process, watch, tried);
        if (fault !== undefined) context.report("watch-unreachable", process, `${nameOf(file)} (${fault})`);
      }
    }
  }
}

async function findFault(
  context: Context,
  process: ProcessInventory,
  watch: Watch,
  tried: Map<string, number>,
): Promise<string | undefined> {
  if (watch.mountId !== undefined)
    return context.mounts.has(watch.mountId) ? undefined : `mount ${watch.mountId} can't be seen`;
  if (watch.device === undefined) return undefined;
  const mount = [...context.mounts.values()].find(({ device }) => device === watch.device);
  if (!mount) return `no mount of file system ${watch.device} can be seen`;
  if (!watch.handle) return undefined;
  const key = `${watch.device} ${watch.handle.type} ${watch.handle.bytes}`;
  let errno = tried.get(key);
  if (errno === undefined) {
    errno = await tryHandle(
      `/proc/${process.pid}/root${mount.mountPoint}`,
      watch.handle.type,
      Buffer.from(watch.handle.bytes, "hex"),
    );
    tried.set(key, errno);
  }
  return errno === 0 ? undefined : `a file of ${mount.mountPoint} (${mount.type})`;
}
