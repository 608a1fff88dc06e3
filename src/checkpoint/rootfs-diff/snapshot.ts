import {
  type BigIntStats,
  constants,
  fstatSync,
  lstatSync,
  readdirSync,
  readlinkSync,
  readSync,
} from "node:fs";
import { CedanaError, Unsupported } from "../../errors/index.ts";
import { listXattrs, openBeneath } from "../../linux/addon.ts";
import { openDirectory, withFd } from "../../linux/fd.ts";
import { pathBytes, type RawName, rawName, showName } from "../tar/format.ts";
import type { JobContext } from "../worker/context.ts";
import { attributes, entryPath, expectName, isOverlayAttribute, type LayerWriter } from "./layer.ts";

/** A root file system without layers, and what it was made of: nobody but a comparison knows what has changed. */
export interface Snapshot {
  /** the container's root directory */
  root: string;
  /** what it was before the container began */
  base: string;
  /** what is mounted in the root from elsewhere, relative to it: not the container's files */
  mounted: RawName[];
  /** When the root was as `base`, at the earliest. What has a younger change time (ctime, which no program sets) is looked at closely. */
  sameAtNs: bigint;
}

/**
 * Looks at everything that `SnapshotWalk` will look at, while the container still runs: what the kernel has read of both trees by then,
 * the container needn't stand still for.
 */
export function readAhead({ root, base, mounted }: Snapshot, context: JobContext): void {
  const skipped = new Set(mounted.map((path) => `${rawName(root)}/${path}`));
  const visit = (directory: Buffer) => {
    for (const name of readdirSync(directory, { encoding: "buffer" })) {
      context.checkCancelled();
      const path = Buffer.concat([directory, Buffer.from("/"), name]);
      if (skipped.has(rawName(path))) continue;
      const info = lstatSync(path, { throwIfNoEntry: false });
      if (info?.isDirectory())
        try {
          visit(path);
        } catch (error) {
          // The container removes and renames as it likes; what can't be read for another reason is said when it is read in earnest.
          if (error instanceof CedanaError) throw error;
        }
    }
  };
  for (const tree of [root, base]) visit(Buffer.from(tree));
}

interface Directory {
  path: RawName;
  fd: number;
  info: BigIntStats;
  /** what it was; undefined: it is new, with everything in it */
  base: { fd: number; info: BigIntStats } | undefined;
  /** it has come here by no renaming, of itself or of a directory above it */
  inPlace: boolean;
}

const BLOCK_BYTES = 1024 * 1024;

/**
 * Finds what differs between a root file system and what it was made of. The container stands still meanwhile, and most of what it has is
 * its image: of a file that nobody has touched, owner, mode, size and time are compared and nothing else is read. Attributes and contents
 * are compared of those whose change time says that somebody has, or which may have come to their place with a directory that was renamed.
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
    withFd(openDirectory(this.#snapshot.root), (fd) =>
      withFd(openDirectory(this.#snapshot.base), (baseFd) => {
        const [info, baseInfo] = [fstatSync(fd, { bigint: true }), fstatSync(baseFd, { bigint: true })];
        this.#directory({ path: ".", fd, info, base: { fd: baseFd, info: baseInfo }, inPlace: true });
      }),
    );
  }

  #directory(directory: Directory): void {
    const { path, fd, info, base } = directory;
    const self = `/proc/self/fd/${fd}/.`;
    const xattrs = attributesOf(self);
    let written = false;
    // Before the first thing in it that is made or removed, which would change its time.
    const write = () => {
      if (written) return;
      written = true;
      this.#refuseLayer(self, path);
      this.#writer.directory(path, info, xattrs);
    };
    if (
      !base ||
      !same(info, base.info) ||
      !sameAttributes(xattrs, attributesOf(`/proc/self/fd/${base.fd}/.`))
    )
      write();
    const prefix = path === "." ? "" : `${path}/`;
    const names = namesIn(fd);
    const baseNames = base ? namesIn(base.fd) : [];
    for (const name of [...new Set([...names, ...baseNames])].sort()) {
      this.#writer.context.checkCancelled();
      const child = prefix + name;
      if (this.#writer.isExcluded(child) || this.#mounted.has(child)) continue;
      if (names.has(name)) this.#entry(directory, name, child, write);
      else {
        write();
        this.#writer.deleted(prefix, name);
      }
    }
  }

  #entry(directory: Directory, name: RawName, path: RawName, write: () => void): void {
    const at = entryPath(directory.fd, name);
    const info = lstatSync(at, { bigint: true });
    const baseInfo =
      directory.base &&
      lstatSync(entryPath(directory.base.fd, name), { bigint: true, throwIfNoEntry: false });
    if (info.isDirectory()) {
      this.#child(directory, name, path, info, baseInfo, write);
      return;
    }
    const known = info.nlink > 1n ? this.#links.get(keyOf(info)) : undefined;
    const unchanged =
      baseInfo !== undefined &&
      !known?.written &&
      (known?.path ?? path) === (this.#baseLinks.get(keyOf(baseInfo)) ?? path) &&
      this.#isSame(directory, name, info, baseInfo);
    if (info.nlink > 1n && !known) this.#links.set(keyOf(info), { path, written: !unchanged });
    if (unchanged) {
      if (baseInfo.nlink > 1n && !known) this.#baseLinks.set(keyOf(baseInfo), path);
      return;
    }
    expectName(name, path);
    this.#refuseLayer(at, path);
    write();
    if (known && !info.isSocket()) this.#writer.hardLink(path, info, known.path);
    else this.#writer.other(directory.fd, name, path, info, attributesOf(at));
  }

  #child(
    parent: Directory,
    name: RawName,
    path: RawName,
    info: BigIntStats,
    baseInfo: BigIntStats | undefined,
    write: () => void,
  ): void {
    const { sameAtNs } = this.#snapshot;
    // Renaming gives a directory, and the one that it is put in, a new change time, and those in it none.
    const inPlace = parent.inPlace && (info.ctimeNs < sameAtNs || parent.info.ctimeNs < sameAtNs);
    withFd(openBelow(parent.fd, name), (fd) => {
      if (baseInfo?.isDirectory())
        withFd(openBelow(parent.base!.fd, name), (baseFd) =>
          this.#directory({ path, fd, info, base: { fd: baseFd, info: baseInfo }, inPlace }),
        );
      else {
        expectName(name, path);
        write();
        this.#directory({ path, fd, info, base: undefined, inPlace });
      }
    });
  }

  #isSame(directory: Directory, name: RawName, info: BigIntStats, baseInfo: BigIntStats): boolean {
    if (!same(info, baseInfo)) return false;
    if (directory.inPlace && info.ctimeNs < this.#snapshot.sameAtNs) return true;
    const base = directory.base!.fd;
    const [at, baseAt] = [entryPath(directory.fd, name), entryPath(base, name)];
    if (!sameAttributes(attributesOf(at), attributesOf(baseAt))) return false;
    if (info.isSymbolicLink())
      return readlinkSync(at, { encoding: "buffer" }).equals(readlinkSync(baseAt, { encoding: "buffer" }));
    if (!info.isFile()) return true;
    return withFd(openFile(directory.fd, name), (fd) =>
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

/** As far as stat(2) says it. The size of a directory says nothing. */
function same(a: BigIntStats, b: BigIntStats): boolean {
  if (a.mode !== b.mode || a.uid !== b.uid || a.gid !== b.gid || a.mtimeNs !== b.mtimeNs) return false;
  if (a.isCharacterDevice() || a.isBlockDevice()) return a.rdev === b.rdev;
  return a.isDirectory() || a.size === b.size;
}

function sameAttributes(a: ReadonlyMap<RawName, Buffer>, b: ReadonlyMap<RawName, Buffer>): boolean {
  if (a.size !== b.size) return false;
  for (const [name, value] of a) if (!b.get(name)?.equals(value)) return false;
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
