import { rm } from "node:fs/promises";
import { join } from "node:path";
import { messageOf, NotFound, Unsupported } from "../../errors/index.ts";
import { followFiles } from "../follow.ts";
import {
  type Changes,
  DELETED_FILES_NAME,
  overlayLayers,
  prepareRootfsDiff,
  ROOTFS_DIFF_NAME,
  snapshotOf,
  takeRootfsDiff,
} from "../rootfs-diff/index.ts";
import { type DumpContext, imagesIn, isSyncedSoon, noteAttempt } from "./context.ts";

// What a container has changed in its root file system; and the digests of what a dump writes.

/** Before anything is frozen: where the changed files are, and a thread that is ready to read them. */
export async function findChanges(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request, signal } = context;
  await using _ = { [Symbol.asyncDispose]: async () => await context.base?.[Symbol.asyncDispose]() };
  // What was dumped past the gate has ended, and its files aren't taken yet.
  const isThere = !target.hasEnded || context.attempt.pastGate;
  if (request.rootfs && !context.attempt.rootfsDiff && isThere) {
    context.changes = await changesOf(context);
    await prepareRootfsDiff(context.changes, request.rootfs.exclude, signal);
  } else if (request.rootfs && request.repeated && context.attempt.rootfsDiff?.source !== "overlay")
    await target.rootfsBase
      ?.forget()
      .catch((error) =>
        target.log.warn({ err: error }, "remove what a dump before a crash was compared with"),
      );
  await next();
}

async function changesOf(context: DumpContext): Promise<Changes> {
  const { target, signal } = context;
  const { rootfs } = target;
  const advice = 'cedana.io/rootfs-diff: "false" leaves them out';
  const what = `changed files of ${target.what} can't be taken`;
  if (rootfs === undefined)
    throw new Unsupported(`${what}: nothing is known of where its root file system is; ${advice}`);
  try {
    return await overlayLayers(rootfs);
  } catch (error) {
    if (!(error instanceof NotFound)) throw error;
    if (!target.rootfsBase)
      throw new Unsupported(
        `${what}: ${messageOf(error)}, and nobody says here what it was made of. Give the container an overlay (Podman's and Docker's driver overlay or overlay2); ${advice}`,
        { cause: error },
      );
  }
  try {
    context.base = await target.rootfsBase.open(signal);
    return await snapshotOf(rootfs, context.base.path, context.base.sameAtNs);
  } catch (error) {
    if (error instanceof Error)
      error.message = `${what}: its root file system is no overlay, and what it was made of can't be had: ${error.message}; ${advice}`;
    throw error;
  }
}

export async function takeRootfs(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { request, changes, base, staging, signal } = context;
  if (changes && request.rootfs) {
    const { exclude, maxBytes } = request.rootfs;
    for (const name of [ROOTFS_DIFF_NAME, DELETED_FILES_NAME])
      await rm(join(staging.path, name), { force: true }); // of an attempt before a crash
    const { bytes, members, deleted, sockets } = await takeRootfsDiff(changes, staging.path, {
      exclude,
      maxBytes,
      signal,
    });
    const source = base
      ? ({ source: "snapshot", snapshotter: base.snapshotter } as const)
      : ({ source: "overlay" } as const);
    noteAttempt(context, {
      rootfsDiff: { ...source, bytes, members, deleted, exclude: [...exclude], sockets },
    });
  }
  await next();
}

/** Where it costs no time of its own: the container's owner waits for the end of it all. */
export async function digestAlongside(context: DumpContext, next: () => Promise<void>): Promise<void> {
  if (context.request.digests !== "alongside") {
    await next();
    return;
  }
  const follower = followFiles(context.staging.path, {
    images: imagesIn(context),
    toDisk: isSyncedSoon(context),
  });
  try {
    await next();
    context.follower = follower;
  } catch (error) {
    follower.abandon();
    throw error;
  }
}
