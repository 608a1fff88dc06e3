import { chmod, chown, readdir, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { overlayLayers } from "../checkpoint/rootfs-diff/index.ts";
import { Unsupported } from "../errors/index.ts";
import { readRecord, writeRecord } from "../linux/record-file.ts";

/*
 * Files of a container whose restore may fail and be followed by a start afresh (`cedana.io/on-restore-failure: fresh`): what the restore
 * writes goes into an upper layer that was empty, so emptying it takes everything back.
 */

/** The upper layer as it was before a checkpoint's changed files were written to it: there was nothing in it. */
interface FreshUpper {
  path: string;
  mode: number;
  uid: number;
  gid: number;
}

const freshUpperFile = (bundle: string) => join(bundle, "rootfs-upper.json");

/**
 * A container that may have to start afresh after all gets its files back as they were by emptying its upper layer: there must be one,
 * and nothing in it. What it was is on disk before anything is written.
 */
export async function noteFreshUpper(bundle: string, rootfs: string): Promise<void> {
  if (await readFreshUpper(bundle)) return; // noted before a crash
  const { upper } = await overlayLayers(rootfs).catch((cause: unknown) => {
    throw new Unsupported(
      `the checkpoint's changed files can't be taken back on ${rootfs}, as cedana.io/on-restore-failure: fresh would have it`,
      { cause },
    );
  });
  if ((await readdir(upper)).length > 0)
    throw new Unsupported(
      `the checkpoint's changed files are for a new root file system, and ${rootfs} has changes already (cedana.io/on-restore-failure: fresh)`,
    );
  const { mode, uid, gid } = await stat(upper);
  const note: FreshUpper = { path: upper, mode: mode & 0o7777, uid, gid };
  await writeRecord(freshUpperFile(bundle), note);
}

/** @returns undefined when it didn't come to that */
async function readFreshUpper(bundle: string): Promise<FreshUpper | undefined> {
  return await readRecord<FreshUpper>(freshUpperFile(bundle));
}

/**
 * Takes back the files that a failed restore has written, if it has.
 * @param unmounted  unmounts the rootfs, and mounts it again when its work is done: overlay has no changes of its layers under it
 */
export async function takeFilesBack(
  bundle: string,
  unmounted: (work: () => Promise<void>) => Promise<void>,
): Promise<void> {
  const upper = await readFreshUpper(bundle);
  if (!upper) return;
  await unmounted(async () => {
    for (const name of await readdir(upper.path))
      await rm(join(upper.path, name), { recursive: true, force: true });
    await chown(upper.path, upper.uid, upper.gid);
    await chmod(upper.path, upper.mode);
  });
}
