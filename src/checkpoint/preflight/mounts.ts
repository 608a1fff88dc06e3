import { TimedOut, Unavailable } from "../../errors/index.ts";
import { tryHandleApart } from "../../linux/apart.ts";
import type { Watch } from "../../linux/fdinfo.ts";
import { PATIENCE_MS } from "../../linux/file-servers.ts";
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

/** CRIU finds the watched file by its handle, through some mount of its file system, or else by a search. */
export async function checkWatches(context: Context): Promise<void> {
  const tried = new Map<string, number | undefined>();
  const scanned = (context.policy.irmapScanPaths ?? []).length > 0;
  for (const process of context.tree) {
    for (const file of process.files) {
      for (const watch of file.info.watches) {
        const name = nameOf(file);
        const object = `${file.info.inode} ${watch.device} ${watch.inode} ${watch.mountId}`;
        const mount = mountOf(context, watch);
        if (!mount) context.report("watch-outside", process, name, object);
        else if (watch.handle) {
          const found = await leadsBack(process, mount, watch.handle, tried);
          const what = `${name} (on ${mount.mountPoint}, ${mount.type})`;
          if (found === undefined) context.report("no-answer", process, what, object);
          else if (!found) context.require("watch-unreachable", process, what, scanned, { object });
        }
      }
    }
  }
}

function mountOf(context: Context, { mountId, device }: Watch): MountInfo | undefined {
  if (mountId !== undefined) return context.mounts.get(mountId);
  return [...context.mounts.values()].find((mount) => mount.device === device);
}

/** undefined: the file system doesn't answer. */
async function leadsBack(
  process: ProcessInventory,
  mount: MountInfo,
  handle: NonNullable<Watch["handle"]>,
  tried: Map<string, number | undefined>,
): Promise<boolean | undefined> {
  const key = `${mount.device} ${handle.type} ${handle.bytes}`;
  if (!tried.has(key)) {
    const path = `/proc/${process.pid}/root${mount.mountPoint}`;
    const bytes = Buffer.from(handle.bytes, "hex");
    const found = tryHandleApart(path, handle.type, bytes, PATIENCE_MS).catch((error) => {
      if (error instanceof TimedOut || error instanceof Unavailable) return undefined;
      throw error;
    });
    tried.set(key, await found);
  }
  const errno = tried.get(key);
  return errno === undefined ? undefined : errno === 0;
}
