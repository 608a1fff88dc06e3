import {
  type BigIntStats,
  closeSync,
  constants,
  fstatSync,
  lstatSync,
  openSync,
  readdirSync,
  readlinkSync,
  readSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { BrokenImage, ResourceExhausted, Unsupported, WrongState } from "../../errors/index.ts";
import { getXattr, listXattrs, openBeneath } from "../../linux/addon.ts";
import { openDirectory, withFd } from "../digest.ts";
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
import type { JobContext } from "../worker/jobs.ts";
import { excluder } from "./exclude.ts";

export interface PackInput {
  /** overlay's upper directory */
  upper: string;
  /** the directories below it, the topmost first; undefined: unknown */
  lowers: string[] | undefined;
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
  /^(?:trusted|user)\.overlay\.|^security\.(?:selinux|ima|evm)$/.test(name);

const BUFFER_BYTES = 1024 * 1024;

/**
 * Overlay's upper directory as a tar layer. Overlay's marks are read where they are: a whiteout is a character device 0:0, or an empty
 * file with the attribute `overlay.whiteout`; an opaque directory has `overlay.opaque` ("y", and "x" where whiteouts are in
 * attributes). A directory that was renamed (`overlay.redirect`) or a file of which only the metadata was copied up
 * (`overlay.metacopy`) isn't whole in the upper directory: that is refused.
 * Source: kernel, Documentation/filesystems/overlayfs.rst; OCI image-spec, layer.md.
 */
export function packRootfsDiff(input: PackInput, context: JobContext): PackOutput {
  const packer = new Packer(input, context);
  let done = false;
  try {
    const output = packer.pack();
    done = true;
    return output;
  } finally {
    packer.close();
    if (!done) for (const path of packer.made) rmSync(path, { force: true });
  }
}

class Packer {
  readonly made: string[] = [];
  readonly #input: PackInput;
  readonly #context: JobContext;
  readonly #isExcluded: (path: RawName) => boolean;
  readonly #out: number;
  readonly #buffer = Buffer.allocUnsafeSlow(BUFFER_BYTES);
  readonly #read = Buffer.allocUnsafeSlow(BUFFER_BYTES);
  #filled = 0;
  #bytes = 0;
  #members = 0;
  readonly #deleted: RawName[] = [];
  readonly #sockets: string[] = [];
  /** first name of each file that has several, by device and inode */
  readonly #links = new Map<string, RawName>();

  constructor(input: PackInput, context: JobContext) {
    this.#input = input;
    this.#context = context;
    this.#isExcluded = excluder(input.exclude);
    this.#out = openSync(input.tar, "wx", 0o600);
    this.made.push(input.tar);
  }

  pack(): PackOutput {
    withFd(openDirectory(this.#input.upper), (root) => {
      // The container's root directory itself.
      this.#directory(root, ".", fstatSync(root, { bigint: true }), "");
      this.#walk(root, "");
    });
    this.#write(endOfTar(), "the end mark");
    this.#flush();
    this.#writeDeleted();
    return {
      bytes: this.#bytes,
      members: this.#members,
      deleted: this.#deleted.length,
      sockets: this.#sockets,
    };
  }

  close(): void {
    closeSync(this.#out);
  }

  #walk(directory: number, prefix: RawName): void {
    const names = readdirSync(`/proc/self/fd/${directory}`, { encoding: "buffer" }).map(rawName).sort();
    for (const name of names) {
      this.#context.checkCancelled();
      const path = prefix + name;
      if (this.#isExcluded(path)) continue;
      if (name.startsWith(WHITEOUT))
        throw new Unsupported(
          `rootfs diff: ${showName(path)}: layers can't hold names that begin with ${WHITEOUT}`,
        );
      const info = lstatSync(entryPath(directory, name), { bigint: true });
      if (isWhiteout(directory, name, info)) {
        this.#deleted.push(path);
        if (this.#input.whiteouts) this.#member(tarEntry({ name: prefix + WHITEOUT + name }), path);
      } else if (info.isDirectory())
        withFd(
          openBeneath(directory, pathBytes(name), constants.O_RDONLY | constants.O_DIRECTORY),
          (child) => {
            this.#directory(child, path, info, `${path}/`);
            this.#walk(child, `${path}/`);
          },
        );
      else if (info.isSocket()) this.#sockets.push(showName(path));
      else this.#other(directory, name, path, info);
    }
  }

  /** The directory itself, then its mark, before what is in it: a reader empties it before it fills it. */
  #directory(fd: number, path: RawName, info: BigIntStats, prefix: RawName): void {
    const self = `/proc/self/fd/${fd}/.`;
    const names = listXattrs(self);
    const overlay = (what: string) => overlayAttribute(self, names, what);
    if (overlay("redirect"))
      throw new Unsupported(
        `rootfs diff: directory ${showName(path)} was renamed over layers (overlay.redirect); mount the container's overlay with redirect_dir=off`,
      );
    this.#member({ ...this.#entry(path, "directory", info), xattrs: attributes(self, names) }, path);
    if (overlay("opaque") !== "y") return;
    if (this.#input.whiteouts) this.#member(tarEntry({ name: prefix + OPAQUE }), path);
    this.#listHidden(path === "." ? "" : path);
  }

  #other(directory: number, name: RawName, path: RawName, info: BigIntStats): void {
    const at = entryPath(directory, name);
    const names = listXattrs(at);
    if (overlayAttribute(at, names, "metacopy") !== undefined)
      throw new Unsupported(
        `rootfs diff: of ${showName(path)} only the metadata is in the upper layer (overlay.metacopy); mount the container's overlay with metacopy=off`,
      );
    if (info.nlink > 1n) {
      const key = `${info.dev}:${info.ino}`;
      const first = this.#links.get(key);
      if (first !== undefined) {
        this.#member({ ...this.#entry(path, "hardlink", info), linkName: first }, path);
        return;
      }
      this.#links.set(key, path);
    }
    const xattrs = attributes(at, names);
    if (info.isFile()) {
      // Not waited for, should it have become a FIFO.
      const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
      withFd(openBeneath(directory, pathBytes(name), flags), (fd) => this.#file(fd, path, xattrs));
      return;
    }
    const type = typeOf(info);
    if (!type) throw new Unsupported(`rootfs diff: ${showName(path)} is of a type that no tar holds`);
    const linkName = type === "symlink" ? rawName(readlinkSync(at, { encoding: "buffer" })) : "";
    const device = type === "char" || type === "block" ? deviceNumbers(info.rdev) : { major: 0, minor: 0 };
    this.#member({ ...this.#entry(path, type, info), linkName, ...device, xattrs }, path);
  }

  #file(fd: number, path: RawName, xattrs: ReadonlyMap<RawName, Buffer>): void {
    const info = fstatSync(fd, { bigint: true });
    if (!info.isFile()) throw changed(path);
    const size = Number(info.size);
    const extents = findExtents(fd, size, Number(info.blocks));
    this.#member({ ...this.#entry(path, "file", info), size, extents, xattrs }, path);
    let written = 0;
    for (const extent of extents ?? [{ offset: 0, size }]) {
      for (let offset = extent.offset; offset < extent.offset + extent.size; ) {
        this.#context.checkCancelled();
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

  /** What the layers below have in an opaque directory and the upper one hasn't: gone, with no whiteout of its own. */
  #listHidden(path: RawName): void {
    if (!this.#input.lowers) {
      if (this.#input.whiteouts) return; // the mark says it all
      throw new Unsupported(
        `rootfs diff: what ${showName(path)} hides can't be listed, because the lower layers are not known; use whiteouts`,
      );
    }
    const upper = namesIn(this.#input.upper, path) ?? new Map();
    const lower = new Map<RawName, boolean>();
    for (const layer of this.#input.lowers)
      for (const [name, isDirectory] of namesIn(layer, path) ?? [])
        if (!lower.has(name)) lower.set(name, isDirectory);
    for (const [name, isDirectory] of [...lower].sort(([a], [b]) => (a < b ? -1 : 1))) {
      const child = path === "" ? name : `${path}/${name}`;
      if (this.#isExcluded(child)) continue;
      if (!upper.has(name)) this.#deleted.push(child);
      else if (isDirectory && upper.get(name)) this.#listHidden(child);
    }
  }

  #writeDeleted(): void {
    const paths: string[] = [];
    for (const path of new Set(this.#deleted)) {
      const text = pathBytes(path).toString("utf8");
      if (rawName(text) === path) paths.push(`/${text}`);
      else if (!this.#input.whiteouts)
        throw new Unsupported(
          `rootfs diff: deleted.files is JSON, which can't name ${showName(path)}; use whiteouts`,
        );
    }
    writeFileSync(this.#input.deletedFiles, JSON.stringify(paths), { flag: "wx", mode: 0o600 });
    this.made.push(this.#input.deletedFiles);
  }

  #entry(name: RawName, type: EntryType, info: BigIntStats): TarEntry {
    return tarEntry({
      name,
      type,
      mode: Number(info.mode) & 0o7777,
      uid: Number(info.uid),
      gid: Number(info.gid),
      mtimeNs: info.mtimeNs,
    });
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

/** An entry of an open directory, for calls that don't follow a link at the end. */
export function entryPath(directory: number, name: RawName): Buffer {
  return Buffer.concat([Buffer.from(`/proc/self/fd/${directory}/`), pathBytes(name)]);
}

export function writeAll(fd: number, bytes: Buffer, position?: number): void {
  for (let done = 0; done < bytes.length; )
    done += writeSync(fd, bytes, done, bytes.length - done, position === undefined ? null : position + done);
}

const changed = (path: RawName) =>
  new WrongState(`rootfs diff: ${showName(path)} changed while it was read: the container must be frozen`);

function isWhiteout(directory: number, name: RawName, info: BigIntStats): boolean {
  if (info.isCharacterDevice()) return info.rdev === 0n;
  if (!info.isFile() || info.size !== 0n) return false;
  const at = entryPath(directory, name);
  return overlayAttribute(at, listXattrs(at), "whiteout") !== undefined;
}

/** `user.` where the overlay is mounted with userxattr, as unprivileged ones are. */
function overlayAttribute(
  path: Buffer | string,
  names: readonly RawName[],
  what: string,
): string | undefined {
  for (const name of [`trusted.overlay.${what}`, `user.overlay.${what}`])
    if (names.includes(name)) return getXattr(path, name)?.toString("latin1");
  return undefined;
}

function attributes(path: Buffer | string, names: readonly RawName[]): Map<RawName, Buffer> {
  const found = new Map<RawName, Buffer>();
  for (const name of names) {
    if (isForeignAttribute(name)) continue;
    const value = getXattr(path, name);
    if (value) found.set(name, value);
  }
  return found;
}

function typeOf(info: BigIntStats): EntryType | undefined {
  if (info.isSymbolicLink()) return "symlink";
  if (info.isCharacterDevice()) return "char";
  if (info.isBlockDevice()) return "block";
  if (info.isFIFO()) return "fifo";
  return undefined;
}

/** As gnu_dev_major(3) and gnu_dev_minor(3) take a device number apart. */
export function deviceNumbers(rdev: bigint): { major: number; minor: number } {
  const major = ((rdev >> 8n) & 0xfffn) | ((rdev >> 32n) & 0xfffff000n);
  const minor = (rdev & 0xffn) | ((rdev >> 12n) & 0xffffff00n);
  return { major: Number(major), minor: Number(minor) };
}

/** The names in a layer's directory, and which are directories; undefined when it has none there. Whiteouts count as not there. */
function namesIn(layer: string, path: RawName): Map<RawName, boolean> | undefined {
  let fd: number;
  try {
    fd = withFd(openDirectory(layer), (root) =>
      openBeneath(root, path === "" ? "." : pathBytes(path), constants.O_RDONLY | constants.O_DIRECTORY),
    );
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" || code === "ENOTDIR" || code === "ELOOP") return undefined;
    throw new BrokenImage(`rootfs diff: read layer ${layer}`, { cause: error });
  }
  return withFd(fd, () => {
    const names = new Map<RawName, boolean>();
    for (const bytes of readdirSync(`/proc/self/fd/${fd}`, { encoding: "buffer" })) {
      const name = rawName(bytes);
      const info = lstatSync(entryPath(fd, name), { bigint: true });
      if (!isWhiteout(fd, name, info)) names.set(name, info.isDirectory());
    }
    return names;
  });
}
