import {
  type BigIntStats,
  constants,
  fstatSync,
  lstatSync,
  readdirSync,
  readlinkSync,
  readSync,
} from "node:fs";
import { Unsupported } from "../../errors/index.ts";
import { listXattrs, openBeneath } from "../../linux/addon.ts";
import { openDirectory, withFd } from "../digest.ts";
import { pathBytes, type RawName, rawName, showName } from "../tar/format.ts";
import { attributes, entryPath, isOverlayAttribute, type LayerWriter, refuseMark } from "./layer.ts";

/** A root file system without layers, and what it was made of: nobody but a comparison knows what has changed. */
export interface Snapshot {
  /** the container's root directory */
  root: string;
  /** what it was before the container began */
  base: string;
  /** what is mounted in the root from elsewhere, relative to it: not the container's files */
  mounted: RawName[];
  /**
   * When the root was as `base`, at the earliest: of files with a younger change time (ctime, which no program sets), the contents are
   * compared, too, where all else is the same.
   */
  sameAtNs: bigint;
}

const BLOCK_BYTES = 1024 * 1024;

/**
 * Finds what differs between a root file system and what it was made of. Owner, mode, times and attributes are compared for everything,
 * contents where they may differ with all of these being equal. Of an unchanged file nothing is read, which matters: the container stands
 * still meanwhile, and most of what it has is its image.
 *
 * What is one file under several names here is one file afterwards, and what isn't, isn't: a name is unchanged only if on both sides it
 * goes with the same first one among the unchanged.
 */
export class SnapshotWalk {
  readonly #snapshot: Snapshot;
  readonly #writer: LayerWriter;
  readonly #mounted: ReadonlySet<RawName>;
  /** first name of each file that has several, by device and inode, and whether it is in the layer */
  readonly #links = new Map<string, { path: RawName; written: boolean }>();
  /** the same of the base: the first name that is unchanged */
  readonly #baseLinks = new Map<string, RawName>();
  readonly #block = Buffer.allocUnsafeSlow(BLOCK_BYTES);
  readonly #baseBlock = Buffer.allocUnsafeSlow(BLOCK_BYTES);

  constructor(snapshot: Snapshot, writer: LayerWriter) {
    this.#snapshot = snapshot;
    this.#writer = writer;
    this.#mounted = new Set(snapshot.mounted);
  }

  walk(): void {
    withFd(openDirectory(this.#snapshot.root), (root) =>
      withFd(openDirectory(this.#snapshot.base), (base) =>
        this.#directory(
          root,
          base,
          ".",
          fstatSync(root, { bigint: true }),
          fstatSync(base, { bigint: true }),
        ),
      ),
    );
  }

  /** @param base  what it was; undefined: it is new, with everything in it */
  #directory(
    fd: number,
    base: number | undefined,
    path: RawName,
    info: BigIntStats,
    baseInfo: BigIntStats | undefined,
  ): void {
    const xattrs = attributesOf(`/proc/self/fd/${fd}/.`);
    let written = false;
    // Before the first thing in it that is made or removed, which would change its time.
    const write = () => {
      if (written) return;
      written = true;
      this.#refuseLayer(`/proc/self/fd/${fd}/.`, path);
      this.#writer.directory(path, info, xattrs);
    };
    if (base === undefined || !same(info, baseInfo!, xattrs, attributesOf(`/proc/self/fd/${base}/.`)))
      write();
    const prefix = path === "." ? "" : `${path}/`;
    const names = namesIn(fd);
    const baseNames = base === undefined ? [] : namesIn(base);
    for (const name of [...new Set([...names, ...baseNames])].sort()) {
      this.#writer.context.checkCancelled();
      const child = prefix + name;
      if (this.#writer.isExcluded(child) || this.#mounted.has(child)) continue;
      if (names.has(name)) this.#entry(fd, base, name, child, write);
      else {
        write();
        this.#writer.deleted(prefix, name);
      }
    }
  }

  #entry(directory: number, base: number | undefined, name: RawName, path: RawName, write: () => void): void {
    const info = lstatSync(entryPath(directory, name), { bigint: true });
    const baseInfo =
      base === undefined
        ? undefined
        : lstatSync(entryPath(base, name), { bigint: true, throwIfNoEntry: false });
    if (info.isDirectory()) {
      const wasDirectory = baseInfo?.isDirectory() ?? false;
      if (!wasDirectory) {
        refuseMark(name, path);
        write();
      }
      withFd(openBelow(directory, name), (fd) => {
        if (!wasDirectory) this.#directory(fd, undefined, path, info, undefined);
        else withFd(openBelow(base!, name), (baseFd) => this.#directory(fd, baseFd, path, info, baseInfo));
      });
      return;
    }
    const at = entryPath(directory, name);
    const xattrs = attributesOf(at);
    const known = info.nlink > 1n ? this.#links.get(keyOf(info)) : undefined;
    const unchanged =
      baseInfo !== undefined &&
      !known?.written &&
      (known?.path ?? path) === (this.#baseLinks.get(keyOf(baseInfo)) ?? path) &&
      this.#isSame(directory, base!, name, info, baseInfo, xattrs);
    if (info.nlink > 1n && !known) this.#links.set(keyOf(info), { path, written: !unchanged });
    if (unchanged) {
      if (baseInfo.nlink > 1n && !known) this.#baseLinks.set(keyOf(baseInfo), path);
      return;
    }
    refuseMark(name, path);
    this.#refuseLayer(at, path);
    write();
    if (known && !info.isSocket()) this.#writer.hardLink(path, info, known.path);
    else this.#writer.other(directory, name, path, info, xattrs);
  }

  #isSame(
    directory: number,
    base: number,
    name: RawName,
    info: BigIntStats,
    baseInfo: BigIntStats,
    xattrs: ReadonlyMap<RawName, Buffer>,
  ): boolean {
    const [at, baseAt] = [entryPath(directory, name), entryPath(base, name)];
    if (!same(info, baseInfo, xattrs, attributesOf(baseAt))) return false;
    if (info.isSymbolicLink())
      return readlinkSync(at, { encoding: "buffer" }).equals(readlinkSync(baseAt, { encoding: "buffer" }));
    if (!info.isFile() || info.ctimeNs < this.#snapshot.sameAtNs) return true;
    return withFd(openFile(directory, name), (fd) =>
      withFd(openFile(base, name), (baseFd) => this.#sameContents(fd, baseFd)),
    );
  }

  #sameContents(fd: number, baseFd: number): boolean {
    for (let offset = 0; ; offset += BLOCK_BYTES) {
      this.#writer.context.checkCancelled();
      const read = readBlock(fd, this.#block, offset);
      if (readBlock(baseFd, this.#baseBlock, offset) !== read) return false;
      if (!this.#block.subarray(0, read).equals(this.#baseBlock.subarray(0, read))) return false;
      if (read < BLOCK_BYTES) return true;
    }
  }

  /** Marks of an overlay that the container itself has mounted on these files: no layer holds them as they are. */
  #refuseLayer(at: Buffer | string, path: RawName): void {
    if (listXattrs(at).some(isOverlayAttribute))
      throw new Unsupported(
        `rootfs diff: ${showName(path)} belongs to the layer of an overlay in the container, whose marks (overlay.*) no layer of an image holds; exclude it, or keep it on a volume`,
      );
  }
}

/** All but contents. Of a directory, what is in it is looked at by itself. */
function same(
  a: BigIntStats,
  b: BigIntStats,
  xattrs: ReadonlyMap<RawName, Buffer>,
  baseXattrs: ReadonlyMap<RawName, Buffer>,
): boolean {
  if (a.mode !== b.mode || a.uid !== b.uid || a.gid !== b.gid || a.mtimeNs !== b.mtimeNs) return false;
  if (!a.isDirectory() && a.size !== b.size) return false;
  if ((a.isCharacterDevice() || a.isBlockDevice()) && a.rdev !== b.rdev) return false;
  if (xattrs.size !== baseXattrs.size) return false;
  for (const [name, value] of xattrs) if (!baseXattrs.get(name)?.equals(value)) return false;
  return true;
}

const attributesOf = (at: Buffer | string) => attributes(at, listXattrs(at));
const keyOf = (info: BigIntStats) => `${info.dev}:${info.ino}`;

function namesIn(directory: number): Set<RawName> {
  return new Set(readdirSync(`/proc/self/fd/${directory}`, { encoding: "buffer" }).map(rawName));
}

function openBelow(directory: number, name: RawName): number {
  return openBeneath(directory, pathBytes(name), constants.O_RDONLY | constants.O_DIRECTORY);
}

function openFile(directory: number, name: RawName): number {
  const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
  return openBeneath(directory, pathBytes(name), flags);
}

/** As much as there is, up to a block: a read may come short in the middle of a file. */
function readBlock(fd: number, into: Buffer, offset: number): number {
  let done = 0;
  for (let read = -1; read !== 0 && done < into.length; done += read)
    read = readSync(fd, into, done, into.length - done, offset + done);
  return done;
}
