import { execFile } from "node:child_process";
import { lstat, readlink, rename, rm, stat, statfs, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";

/*
 * CRIU asks the kernel for its features at every start: network namespaces are made and thrown away, iptables and a 32-bit program run. That
 * takes 20 to 60 ms of a dump and again of a restore. It keeps the answers in /run/criu.kdat, but only where /run is a tmpfs: they must not
 * outlive the boot.
 *
 * Where /run is none (virtual machines and sandboxes with one file system), we keep them in /dev, which is a tmpfs everywhere, root's, and as
 * short-lived; /run/criu.kdat becomes a link there. After a boot the link leads nowhere, and CRIU asks the kernel as before. One of another
 * version doesn't believe the file and removes the link; the next dump makes it again.
 *
 * Source: CRIU, criu/kerndat.c (kerndat_try_load_cache, kerndat_save_cache).
 */

const TMPFS_MAGIC = 0x01021994;
const TIMEOUT_MS = 10_000;
/** struct kerndat_s has some 900 bytes. */
const MAX_BYTES = 64 * 1024;

export interface CachePlace {
  /** where CRIU looks: /run */
  readonly run: string;
  /** a directory of root's on a tmpfs: /dev */
  readonly memory: string;
  /** asks CRIU: what it would keep; empty when it keeps nothing */
  readonly ask: () => Promise<Buffer>;
}

let underWay = false;

/**
 * Sees to the cache, in its own time: called when a dump or a restore is over, whose successors have it. Does nothing where CRIU keeps it by
 * itself, where somebody else's file is, or with `CEDANA_CRIU_CACHE=off`.
 * @param failed  told why it can't be kept; nothing depends on it
 */
export function keepKernelCache(failed: (error: Error) => void): void {
  if (process.env.CEDANA_CRIU_CACHE === "off" || underWay) return;
  underWay = true;
  void ensureKernelCache({ run: "/run", memory: "/dev", ask: askCriu })
    .catch(failed)
    .finally(() => {
      underWay = false;
    });
}

/** @returns whether there is one of ours now. @throws SyscallFailed, or why CRIU could not be asked */
export async function ensureKernelCache({ run, memory, ask }: CachePlace): Promise<boolean> {
  if ((await statfs(run)).type === TMPFS_MAGIC) return false;
  const link = join(run, "criu.kdat");
  const target = join(memory, ".cedana-criu.kdat");
  const found = await lstat(link).catch(() => undefined); // ENOENT
  if (found && (!found.isSymbolicLink() || (await readlink(link)) !== target)) return false;
  if (found && (await stat(target).catch(() => undefined))) return true;
  if (!(await isOurs(memory))) return false;
  const answers = await ask();
  if (answers.length === 0 || answers.length > MAX_BYTES) return false;
  const fresh = `${target}.${process.pid}`;
  try {
    await writeFile(fresh, answers, { mode: 0o600, flag: "wx" });
    await rename(fresh, target);
  } catch (error) {
    await rm(fresh, { force: true });
    throw error;
  }
  await symlink(target, link).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "EEXIST") throw error; // another cedanad's; or CRIU has become able to keep it
  });
  return true;
}

/** Nobody but us can put a file there, and it is gone with the boot. */
async function isOurs(directory: string): Promise<boolean> {
  const [system, info] = await Promise.all([statfs(directory), stat(directory)]);
  return system.type === TMPFS_MAGIC && info.uid === process.getuid!() && (info.mode & 0o022) === 0;
}

/** CRIU in a mount namespace whose /run is a tmpfs, where it keeps its cache. What it is asked doesn't matter. */
async function askCriu(): Promise<Buffer> {
  const script =
    "mount -t tmpfs -o mode=0700,size=1m cedana-criu /run && { criu check --feature mem_dirty_track >/dev/null 2>&1; cat /run/criu.kdat; }";
  return await new Promise((resolve, reject) => {
    const argv = ["--mount", "--propagation", "private", "sh", "-c", script];
    execFile("unshare", argv, { timeout: TIMEOUT_MS, encoding: "buffer" }, (error, stdout) =>
      error ? reject(error) : resolve(stdout),
    );
  });
}
