import {
  type BigIntStats,
  closeSync,
  constants,
  fstatSync,
  openSync,
  readlinkSync,
  readSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { ResourceExhausted, Unsupported, WrongState } from "../../errors/index.ts";
import { getXattr, openBeneath } from "../../linux/addon.ts";
import { withFd } from "../../linux/fd.ts";
import { findExtents } from "../tar/extents.ts";
import {
  type EntryType,
  encodeHeader,
  endOfTar,
  padding,
  pathBytes,
  type RawName,
  rawName,
  showName,
  type TarEntry,
  tarEntry,
} from "../tar/format.ts";
import { MAX_PATH_BYTES } from "../tar/path.ts";
import type { JobContext } from "../worker/context.ts";
import { excluder } from "./exclude.ts";

export interface LayerInput {
  /** where the tar goes; must not exist */
  tar: string;
  /** where the list of deleted paths goes; must not exist */
  deletedFiles: string;
  exclude: string[];
  /** of the tar */
  maxBytes: number | undefined;
  whiteouts: boolean;
}

export interface PackOutput {
  /** of the tar */
  bytes: number;
  members: number;
  /** how many paths were deleted */
  deleted: number;
  /** sockets, which no tar holds; their servers make them again */
  sockets: string[];
}

export const WHITEOUT = ".wh.";
export const OPAQUE = ".wh..wh..opq";

/**
 * Attributes that belong to the file system or the machine and not to the file: overlay's own, the labels that the engine sets for the
 * container, and signatures over inodes.
 */
export const isForeignAttribute = (name: RawName) =>
  isOverlayAttribute(name) || /^security\.(?:selinux|ima|evm)$/.test(name);

export const isOverlayAttribute = (name: RawName) => /^(?:trusted|user)\.overlay\./.test(name);

const BUFFER_BYTES = 1024 * 1024;

/** The files of a rootfs diff: whoever finds what has changed, writes it here. */
export class LayerWriter {
  readonly isExcluded: (path: RawName) => boolean;
  readonly context: JobContext;
  readonly #input: LayerInput;
  readonly #made: string[] = [];
  readonly #out: number;
  readonly #buffer = Buffer.allocUnsafeSlow(BUFFER_BYTES);
  readonly #read = Buffer.allocUnsafeSlow(BUFFER_BYTES);
  #filled = 0;
  #bytes = 0;
  #members = 0;
  readonly #deleted = new Set<RawName>();
  readonly #sockets: string[] = [];

  constructor(input: LayerInput, context: JobContext) {
    this.#input = input;
    this.context = context;
    this.isExcluded = excluder(input.exclude);
    this.#out = openSync(input.tar, "wx", 0o600);
    this.#made.push(input.tar);
  }

  /** Whether what is deleted is marked in the tar, too. */
  get whiteouts(): boolean {
    return this.#input.whiteouts;
  }

  finish(): PackOutput {
    this.#write(endOfTar(), "the end mark");
    this.#flush();
    this.#writeDeleted();
    return {
      bytes: this.#bytes,
      members: this.#members,
      deleted: this.#deleted.size,
      sockets: this.#sockets,
    };
  }

  close(): void {
    closeSync(this.#out);
  }

  /** When it came to nothing. */
  remove(): void {
    for (const path of this.#made) rmSync(path, { force: true });
  }

  /** A path that is gone. */
  deleted(prefix: RawName, name: RawName): void {
    this.#deleted.add(prefix + name);
    if (this.#input.whiteouts) this.#member(tarEntry({ name: prefix + WHITEOUT + name }), prefix + name);
  }

  /** A path that is gone by a mark of a directory above it. */
  hidden(path: RawName): void {
    this.#deleted.add(path);
  }

  opaque(prefix: RawName, path: RawName): void {
    if (this.#input.whiteouts) this.#member(tarEntry({ name: prefix + OPAQUE }), path);
  }

  directory(path: RawName, info: BigIntStats, xattrs: ReadonlyMap<RawName, Buffer>): void {
    this.#member({ ...entryOf(path, "directory", info), xattrs }, path);
  }

  hardLink(path: RawName, info: BigIntStats, linkName: RawName): void {
    this.#member({ ...entryOf(path, "hardlink", info), linkName }, path);
  }

  /** Everything but directories and hard links to what came before. */
  other(
    directory: number,
    name: RawName,
    path: RawName,
    info: BigIntStats,
    xattrs: ReadonlyMap<RawName, Buffer>,
  ): void {
    if (info.isSocket()) {
      this.#sockets.push(showName(path));
      return;
    }
    if (info.isFile()) {
      // Not waited for, should it have become a FIFO.
      const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
      withFd(openBeneath(directory, pathBytes(name), flags), (fd) => this.#file(fd, path, xattrs));
      return;
    }
    const type = typeOf(info);
    if (!type) throw new Unsupported(`rootfs diff: ${showName(path)} is of a type that no tar holds`);
    const at = entryPath(directory, name);
    const linkName = type === "symlink" ? rawName(readlinkSync(at, { encoding: "buffer" })) : "";
    const device = type === "char" || type === "block" ? deviceNumbers(info.rdev) : { major: 0, minor: 0 };
    this.#member({ ...entryOf(path, type, info), linkName, ...device, xattrs }, path);
  }

  #file(fd: number, path: RawName, xattrs: ReadonlyMap<RawName, Buffer>): void {
    const info = fstatSync(fd, { bigint: true });
    if (!info.isFile()) throw changed(path);
    const size = Number(info.size);
    const extents = findExtents(fd, size, Number(info.blocks));
    this.#member({ ...entryOf(path, "file", info), size, extents, xattrs }, path);
    let written = 0;
    for (const extent of extents ?? [{ offset: 0, size }]) {
      for (let offset = extent.offset; offset < extent.offset + extent.size; ) {
        this.context.checkCancelled();
        const wanted = Math.min(BUFFER_BYTES, extent.offset + extent.size - offset);
        const read = readSync(fd, this.#read, 0, wanted, offset);
        if (read === 0) throw changed(path); // it was cut off
        this.#write(this.#read.subarray(0, read), path);
        offset += read;
        written += read;
      }
    }
    this.#write(padding(written), path);
  }

  #writeDeleted(): void {
    const paths: string[] = [];
    for (const path of this.#deleted) {
      const text = pathBytes(path).toString("utf8");
      if (rawName(text) === path) paths.push(`/${text}`);
      else if (!this.#input.whiteouts)
        throw new Unsupported(
          `rootfs diff: deleted.files is JSON, which can't name ${showName(path)}; use whiteouts`,
        );
    }
    writeFileSync(this.#input.deletedFiles, JSON.stringify(paths), { flag: "wx", mode: 0o600 });
    this.#made.push(this.#input.deletedFiles);
  }

  #member(entry: TarEntry, path: RawName): void {
    this.#members++;
    this.#write(encodeHeader(entry), path);
  }

  #write(bytes: Buffer, path: RawName): void {
    this.#bytes += bytes.length;
    const { maxBytes } = this.#input;
    if (maxBytes !== undefined && this.#bytes > maxBytes)
      throw new ResourceExhausted(
        `rootfs diff: more than the allowed ${maxBytes} bytes, reached at ${showName(path)}; raise the limit or exclude paths`,
      );
    if (this.#filled + bytes.length > BUFFER_BYTES) this.#flush();
    if (bytes.length >= BUFFER_BYTES) writeAll(this.#out, bytes);
    else {
      bytes.copy(this.#buffer, this.#filled);
      this.#filled += bytes.length;
    }
  }

  #flush(): void {
    writeAll(this.#out, this.#buffer.subarray(0, this.#filled));
    this.#filled = 0;
  }
}

/** @throws Unsupported for what is to be in a layer, and which no reader would take as what it is */
export function expectName(name: RawName, path: RawName): void {
  if (path.length > MAX_PATH_BYTES)
    throw new Unsupported(
      `rootfs diff: ${showName(path)} is longer than ${MAX_PATH_BYTES} bytes: nobody could put it back; exclude a directory above it`,
    );
  if (name.startsWith(WHITEOUT))
    throw new Unsupported(
      `rootfs diff: ${showName(path)}: layers can't hold names that begin with ${WHITEOUT}`,
    );
}

/** An entry of an open directory, for calls that don't follow a link at the end. */
export function entryPath(directory: number, name: RawName): Buffer {
  return Buffer.concat([Buffer.from(`/proc/self/fd/${directory}/`), pathBytes(name)]);
}

export function writeAll(fd: number, bytes: Buffer, position?: number): void {
  for (let done = 0; done < bytes.length; )
    done += writeSync(fd, bytes, done, bytes.length - done, position === undefined ? null : position + done);
}

export const changed = (path: RawName) =>
  new WrongState(`rootfs diff: ${showName(path)} changed while it was read: the container must be frozen`);

/** Those that a layer holds. */
export function attributes(path: Buffer | string, names: readonly RawName[]): Map<RawName, Buffer> {
  const found = new Map<RawName, Buffer>();
  for (const name of names) {
    if (isForeignAttribute(name)) continue;
    const value = getXattr(path, name);
    if (value) found.set(name, value);
  }
  return found;
}

function entryOf(name: RawName, type: EntryType, info: BigIntStats): TarEntry {
  return tarEntry({
    name,
    type,
    mode: Number(info.mode) & 0o7777,
    uid: Number(info.uid),
    gid: Number(info.gid),
    mtimeNs: info.mtimeNs,
  });
}

function typeOf(info: BigIntStats): EntryType | undefined {
  if (info.isSymbolicLink()) return "symlink";
  if (info.isCharacterDevice()) return "char";
  if (info.isBlockDevice()) return "block";
  if (info.isFIFO()) return "fifo";
  return undefined;
}

/** As gnu_dev_major(3) and gnu_dev_minor(3) take a device number apart. */
function deviceNumbers(rdev: bigint): { major: number; minor: number } {
  const major = ((rdev >> 8n) & 0xfffn) | ((rdev >> 32n) & 0xfffff000n);
  const minor = (rdev & 0xffn) | ((rdev >> 12n) & 0xffffff00n);
  return { major: Number(major), minor: Number(minor) };
}
