import {
  chmodSync,
  chownSync,
  closeSync,
  constants,
  fstatSync,
  lstatSync,
  mkdirSync,
  type Stats,
  unlinkSync,
} from "node:fs";
import { posix } from "node:path";
import type { Logger } from "pino";
import { SyscallFailed, WrongState } from "../errors/index.ts";
import { makeNode, openBeneath } from "../linux/addon.ts";
import { isServed, O_PATH, openApart, openBeneathApart } from "../linux/apart.ts";
import { splitDevice } from "../linux/fdinfo.ts";
import { pidsInNamespaces } from "../linux/proc.ts";

/*
 * Device nodes of GPUs in a restored container. CRIU brings /dev as it was dumped; a new container may have been given other GPUs, and the
 * numbers of some nodes (nvidia-uvm, nvidia-caps) are the machine's. The driver opens them by name when it gives a process its GPUs back: so
 * they are made as the new container's configuration has them, between CRIU and the driver. Those that the configuration lacks stay: the device
 * cgroup, which is the new container's, keeps everybody from opening them.
 */

export interface GpuNode {
  /** in the container, absolute */
  readonly path: string;
  readonly major: number;
  readonly minor: number;
  /** permissions; default: for everybody, as the driver's own tool makes them */
  readonly mode?: number | undefined;
  readonly uid?: number | undefined;
  readonly gid?: number | undefined;
}

/** Whether a device of the configuration is a GPU's. */
export function isGpuNode(path: string): boolean {
  return /^\/dev\/(nvidia[^/]*|nvidia-caps\/[^/.]+|dxg)$/.test(path);
}

/** The container's own init where it has a pid namespace; else whichever is first: they share the mounts. */
function rootProcess(pids: readonly number[]): number | undefined {
  return pids.find((pid) => pidsInNamespaces(pid).at(-1) === 1) ?? pids[0];
}

/**
 * Makes the nodes as they should be. What is mounted there, or is no device, is left, and told: it is somebody's doing in the container.
 * @param pids  of the container
 * @throws SyscallFailed
 */
export async function makeGpuNodes(
  pids: readonly number[],
  nodes: readonly GpuNode[],
  log: Pick<Logger, "info" | "warn">,
): Promise<void> {
  const pid = rootProcess(pids);
  if (pid === undefined || nodes.length === 0) return;
  const directory = constants.O_DIRECTORY | constants.O_RDONLY;
  const root = await openApart(`/proc/${pid}/root`, directory);
  try {
    for (const node of nodes) {
      // The path may lead through links of the container's: never out of it, so none at all.
      const parent = await openParent(root, posix.dirname(node.path).slice(1));
      try {
        await refuseServed(parent, node.path);
        makeOne(parent, node, log);
      } finally {
        closeSync(parent);
      }
    }
  } catch (error) {
    throw SyscallFailed.from(error);
  } finally {
    closeSync(root);
  }
}

/** What is behind a server of the container's would be waited for. */
async function refuseServed(directory: number, path: string): Promise<void> {
  if (await isServed(`/proc/self/fd/${directory}`))
    throw new WrongState(`${path} is on a file system that the container serves itself`);
}

async function openParent(root: number, path: string): Promise<number> {
  const flags = constants.O_DIRECTORY | constants.O_RDONLY;
  try {
    return await openBeneathApart(root, path, flags);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT" || path === "dev") throw error;
  }
  const above = await openBeneathApart(root, posix.dirname(path), flags); // of nvidia-caps
  try {
    await refuseServed(above, `/${path}`);
    mkdirSync(`/proc/self/fd/${above}/${posix.basename(path)}`, 0o755);
  } finally {
    closeSync(above);
  }
  return await openBeneathApart(root, path, flags);
}

function makeOne(parent: number, node: GpuNode, log: Pick<Logger, "info" | "warn">): void {
  const name = posix.basename(node.path);
  const path = `/proc/self/fd/${parent}/${name}`;
  const there = lstatSync(path, { throwIfNoEntry: false });
  if (there && isSame(there, node)) return;
  if (there && !there.isCharacterDevice()) {
    log.warn(
      { path: node.path },
      "the container has something else where its configuration has a GPU's device",
    );
    return;
  }
  if (there)
    try {
      unlinkSync(path);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EBUSY") throw error;
      log.warn({ path: node.path }, "a GPU's device is mounted in the container with another number");
      return;
    }
  makeNode(path, constants.S_IFCHR, node.major, node.minor);
  // Owner and permissions of that very node: the container's programs run, and may have put another file there meanwhile.
  const made = openBeneath(parent, name, O_PATH);
  try {
    if (!isSame(fstatSync(made), node)) return;
    chownSync(`/proc/self/fd/${made}`, node.uid ?? 0, node.gid ?? 0);
    chmodSync(`/proc/self/fd/${made}`, (node.mode ?? 0o666) & 0o777);
  } finally {
    closeSync(made);
  }
  log.info({ path: node.path, major: node.major, minor: node.minor }, "made a GPU's device in the container");
}

function isSame(stats: Stats, { major, minor }: GpuNode): boolean {
  const numbers = splitDevice(stats.rdev);
  return stats.isCharacterDevice() && numbers.major === major && numbers.minor === minor;
}
