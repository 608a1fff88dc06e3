import { closeSync } from "node:fs";
import { mkdir, rmdir } from "node:fs/promises";
import { join } from "node:path";
import type { RootfsBase } from "../checkpoint/rootfs-diff/index.ts";
import { NotFound, Unsupported } from "../errors/index.ts";
import { openDirectory } from "../linux/fd.ts";
import { Containers } from "../proto/generated/containerd_containers.ts";
import { Leases } from "../proto/generated/containerd_leases.ts";
import { Snapshots } from "../proto/generated/containerd_snapshots.ts";
import { nsFromTimestamp } from "../proto/wellknown.ts";
import type { Container } from "./container.ts";
import { Containerd } from "./containerd.ts";
import { mountAll } from "./mounts.ts";

/*
 * What a task's root file system was made of, for a dump that compares the two: a read-only view of the snapshot below the container's,
 * which containerd makes and our keeper mounts.
 *
 * The view hangs on a lease of containerd's that runs out, so that a crash leaves nothing for ever. It is mounted for a moment alone: an
 * open directory of a mount that is detached keeps it, and what it is made of (a loop device), as long as cedanad lives.
 */

const PATIENCE_MS = 10_000;
/** Some snapshotters copy for a view. */
const VIEW_PATIENCE_MS = 120_000;
/** No dump takes longer. */
const LEASE_MS = 24 * 60 * 60_000;

/** Of the view and its lease. */
const nameFor = (task: Container) => `cedana-base-${task.id}`;
const mountPointFor = (task: Container) => join(task.bundle, "cedana-base");

/**
 * @throws Unsupported for a root file system that is no snapshot of containerd's; Unavailable, TimedOut, RemoteFailed when containerd
 *   doesn't answer, or not as it should
 */
export async function openRootfsBase(task: Container, signal: AbortSignal): Promise<RootfsBase> {
  const containerd = connectTo(task);
  try {
    const { snapshotter, parent, createdAtNs } = await snapshotBelow(containerd, task, signal);
    await removeView(containerd, task, snapshotter); // of a dump that a crash cut off
    const name = nameFor(task);
    const expire = new Date(Date.now() + LEASE_MS).toISOString().replace(/\.\d+/, "");
    const patience = { timeoutMs: PATIENCE_MS, signal };
    await containerd.call(
      Leases,
      "Create",
      { id: name, labels: { "containerd.io/gc.expire": expire } },
      patience,
    );
    const close = async () => {
      using _ = containerd;
      await removeView(containerd, task, snapshotter).catch((error) =>
        task.log.warn({ err: error, view: name }, "remove a view of containerd's: its lease will run out"),
      );
    };
    let directory: number;
    try {
      const view = { snapshotter, key: name, parent };
      const { mounts } = await containerd.call(Snapshots, "View", view, {
        signal,
        timeoutMs: VIEW_PATIENCE_MS,
        lease: name,
      });
      directory = await openMounted(task, mounts);
    } catch (error) {
      await close();
      throw error;
    }
    return {
      path: `/proc/self/fd/${directory}`,
      snapshotter,
      sameAtNs: createdAtNs,
      [Symbol.asyncDispose]: async () => {
        closeSync(directory); // before the snapshot goes, which may be a device
        await close();
      },
    };
  } catch (error) {
    containerd[Symbol.dispose]();
    throw error;
  }
}

/** After a crash: the next dump would do it, too, but there may be none. */
export async function forgetRootfsBase(task: Container): Promise<void> {
  await unmountBase(task);
  using containerd = connectTo(task);
  const { container } = await containerd.call(Containers, "Get", { id: task.id }, { timeoutMs: PATIENCE_MS });
  if (container?.snapshotter) await removeView(containerd, task, container.snapshotter);
}

function connectTo({ pod }: Container): Containerd {
  if (pod.containerdAddress === "")
    throw new Unsupported("containerd's address is not known, which alone has what its image was");
  return new Containerd(pod.containerdAddress, pod.namespace);
}

async function snapshotBelow(
  containerd: Containerd,
  task: Container,
  signal: AbortSignal,
): Promise<{ snapshotter: string; parent: string; createdAtNs: bigint }> {
  const options = { timeoutMs: PATIENCE_MS, signal };
  const { container } = await containerd.call(Containers, "Get", { id: task.id }, options);
  const { snapshotter = "", snapshotKey: key = "", createdAt } = container ?? {};
  if (key === "")
    throw new Unsupported(
      "containerd has no snapshot of that container: its caller keeps its files in its own way",
    );
  const { info } = await containerd.call(Snapshots, "Stat", { snapshotter, key }, options);
  if (!info?.parent) throw new Unsupported(`snapshot ${key} of ${snapshotter} is made of nothing`);
  return { snapshotter, parent: info.parent, createdAtNs: createdAt ? nsFromTimestamp(createdAt) : 0n };
}

/** @returns the mounts' root directory; it has no path any more */
async function openMounted(task: Container, mounts: Parameters<typeof mountAll>[1]): Promise<number> {
  const { keeper } = task.pod;
  const target = mountPointFor(task);
  await mkdir(target, { mode: 0o700, recursive: true });
  let directory: number | undefined;
  try {
    await mountAll(keeper, mounts, target, (step) => keeper.ownTag(`mount-base:${step}`));
    directory = openDirectory(target);
  } finally {
    await unmountBase(task).catch((error) => {
      if (directory !== undefined) closeSync(directory);
      throw error;
    });
  }
  return directory;
}

async function unmountBase(task: Container): Promise<void> {
  const { keeper } = task.pod;
  const target = mountPointFor(task);
  await keeper.unmount(keeper.ownTag("unmount-base"), target); // detached while we have it open
  await rmdir(target).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "ENOENT") throw error; // none was mounted
  });
}

async function removeView(containerd: Containerd, task: Container, snapshotter: string): Promise<void> {
  const options = { timeoutMs: VIEW_PATIENCE_MS };
  const name = nameFor(task);
  await unlessMissing(containerd.call(Snapshots, "Remove", { snapshotter, key: name }, options));
  await unlessMissing(containerd.call(Leases, "Delete", { id: name }, options));
}

async function unlessMissing(work: Promise<unknown>): Promise<void> {
  try {
    await work;
  } catch (error) {
    if (!(error instanceof NotFound)) throw error;
  }
}
