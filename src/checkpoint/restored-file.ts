import { closeSync, constants, fchmod, readFileSync, writeFile } from "node:fs";
import { mkdir, rename, rm } from "node:fs/promises";
import { promisify } from "node:util";
import { SyscallFailed, WrongState } from "../errors/index.ts";
import { openBeneath } from "../linux/addon.ts";
import { isServed, openApart, openBeneathApart, openInRootApart } from "../linux/apart.ts";
import { parseFdInfo } from "../linux/fdinfo.ts";
import { type MountInfo, readMountInfo } from "../linux/mount-options.ts";
import type { ContainerIdentity } from "./manifest.ts";

/** `/run/cedana/restore.json` in a restored container: what has become of it. */
export interface RestoredFacts {
  readonly version: 1;
  /** how many restores the container has behind it, this one included */
  readonly generation: number;
  /** the caller named the checkpoint, or the container's annotation did */
  readonly why: "caller" | "annotation";
  /** ISO 8601, UTC; absent where the checkpoint doesn't say */
  readonly dumpedAt?: string;
  readonly restoredAt: string;
  /** who it was; absent where the checkpoint doesn't say */
  readonly old?: ContainerIdentity;
  readonly new: ContainerIdentity;
}

const NAME = "restore.json";

/** By an open file. */
const writeTo = promisify<number, string, void>(writeFile);
const changeMode = promisify(fchmod);

/**
 * Writes the file into a running container, whole at once, through /proc/PID/root. The container is not trusted:
 *
 *  1. `run` is opened as the container would (openat2(2), RESOLVE_IN_ROOT): its links may lead anywhere in it, and not out of it.
 *  2. `cedana` in it, and the file, are no links: below `run` none is followed.
 *  3. What is also mounted outside (a volume, a directory of the host) is not written to: the container's user may not be allowed to, and
 *     others would read it.
 *  4. Nor is what a server answers for (FUSE, which the container may be itself, or NFS), unless all of its root is: the answer might
 *     never come.
 *  5. A new file (O_EXCL) is renamed over the old one, which replaces a link instead of following it.
 *
 * @throws why it could not be written: a read-only root file system, no room, `run` in a volume. Nothing is changed then
 */
export async function writeRestoredFile(pid: number, facts: RestoredFacts): Promise<void> {
  const mounts = Promise.all([readMountInfo(pid), readMountInfo("self")]);
  mounts.catch(() => {}); // looked at below
  const root = await openApart(`/proc/${pid}/root`, constants.O_RDONLY | constants.O_DIRECTORY);
  let run: number | undefined;
  let directory: number | undefined;
  try {
    run = await directoryIn(root, "run", openInRootApart);
    const mountOfRun = mountIdOf(run);
    await refuseForeign(run, mountOfRun, await mounts);
    directory = await directoryIn(run, "cedana", openBeneathApart);
    const mount = mountIdOf(directory);
    if (mount !== mountOfRun) await refuseForeign(directory, mount, await mounts);
    await replaceFile(directory, `${JSON.stringify(facts, undefined, 2)}\n`);
  } finally {
    for (const fd of [directory, run, root]) if (fd !== undefined) closeSync(fd);
  }
}

/** Opens a directory in another one, which is made where there is none. The caller closes it. */
async function directoryIn(parent: number, name: string, openIn: typeof openBeneathApart): Promise<number> {
  const flags = constants.O_RDONLY | constants.O_DIRECTORY | constants.O_NOFOLLOW;
  const made = await mkdir(at(parent, name), { mode: 0o755 }).catch((error: NodeJS.ErrnoException) => error);
  try {
    return await openIn(parent, name, openIn === openInRootApart ? flags & ~constants.O_NOFOLLOW : flags);
  } catch (error) {
    const missing = (error as NodeJS.ErrnoException).code === "ENOENT";
    throw SyscallFailed.from(missing && made ? made : error);
  }
}

/** The entry itself, whatever it is; of its parents none can change any more. */
function at(directory: number, name: string): string {
  return `/proc/self/fd/${directory}/${name}`;
}

function mountIdOf(directory: number): number {
  return parseFdInfo(readFileSync(`/proc/self/fdinfo/${directory}`, "utf8")).mountId;
}

/** @throws WrongState for a mount of a file system that we have mounted, too, or of a server's; unless it is the container's root */
async function refuseForeign(
  directory: number,
  mountId: number,
  [containers, ours]: readonly (readonly MountInfo[])[],
): Promise<void> {
  const mount = containers!.find((one) => one.mountId === mountId);
  if (mount?.mountPoint === "/") return;
  if (mount === undefined || ours!.some(({ device }) => device === mount.device))
    throw new WrongState(
      `it would be in ${mount ? `the ${mount.type} mounted at ${mount.mountPoint}` : "a mount that is not the container's"}, which is not the container's alone`,
    );
  if (await isServed(at(directory, ".")))
    throw new WrongState(
      `it would be in the ${mount.type} mounted at ${mount.mountPoint}, which may not answer`,
    );
}

async function replaceFile(directory: number, text: string): Promise<void> {
  const temporary = `.${NAME}.${process.pid}.${process.hrtime.bigint()}`;
  const fd = openBeneath(
    directory,
    temporary,
    constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW,
    0o600,
  );
  try {
    try {
      await writeTo(fd, text);
      await changeMode(fd, 0o644); // whatever our umask has taken
    } finally {
      closeSync(fd);
    }
    await rename(at(directory, temporary), at(directory, NAME));
  } catch (error) {
    await rm(at(directory, temporary), { force: true });
    throw SyscallFailed.from(error as NodeJS.ErrnoException);
  }
}
