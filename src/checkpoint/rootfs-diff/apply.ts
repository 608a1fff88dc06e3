import {
  chmodSync,
  closeSync,
  constants,
  fchmodSync,
  fchownSync,
  fstatSync,
  ftruncateSync,
  lchownSync,
  linkSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  symlinkSync,
  unlinkSync,
} from "node:fs";
import { BrokenImage, PermissionDenied, ResourceExhausted, SyscallFailed } from "../../errors/index.ts";
import {
  getXattr,
  listXattrs,
  makeNode,
  openBeneath,
  removeXattr,
  setTimes,
  setXattr,
} from "../../linux/addon.ts";
import { openDirectory, withFd } from "../../linux/fd.ts";
import { decompress, readChunks } from "../archive/compression.ts";
import { pathBytes, type RawName, rawName, showName, type TarEntry } from "../tar/format.ts";
import { confinedPath, splitPath } from "../tar/path.ts";
import { ByteSource, readTar, type TarMember } from "../tar/reader.ts";
import type { JobContext } from "../worker/context.ts";
import { entryPath, isForeignAttribute, OPAQUE, WHITEOUT, writeAll } from "./layer.ts";

export interface ApplyInput {
  /** plain, or compressed with gzip, zstd or lz4; undefined: there are only deletions */
  tar: string | undefined;
  /** the root directory of the container */
  target: string;
  /** list of deleted paths, as Podman and CRI-O keep it */
  deletedFiles: string | undefined;
  maxBytes: number | undefined;
  maxMembers: number | undefined;
  devices: boolean;
}

export interface ApplyOutput {
  /** of the files' contents */
  bytes: number;
  members: number;
  deleted: number;
}

const MAX_DELETED_BYTES = 64 * 1024 * 1024;

/**
 * Applies a layer to a directory. Nothing is followed: each parent is opened below the target (openat2(2), RESOLVE_BENEATH and
 * RESOLVE_NO_SYMLINKS), each entry is made anew in it and never written through one that was there. Whatever doesn't fit (a parent that
 * is missing or a link, a member twice, a link to something outside) is an error, and what was done until then stays: the caller
 * discards the target.
 */
export async function applyRootfsDiff(input: ApplyInput, context: JobContext): Promise<ApplyOutput> {
  const applier = new Applier(input);
  try {
    if (input.deletedFiles !== undefined) applier.deleteListed(input.deletedFiles);
    if (input.tar !== undefined)
      await withOpen(input.tar, async (fd) => {
        const source = new ByteSource(decompress(readChunks(fd, context)));
        try {
          for await (const member of readTar(source, {
            members: input.maxMembers ?? Number.POSITIVE_INFINITY,
          })) {
            context.checkCancelled();
            await applier.apply(member);
          }
        } finally {
          await source.close();
        }
      });
    applier.setDirectoryTimes();
    return applier.output;
  } finally {
    applier.close();
  }
}

async function withOpen(path: string, use: (fd: number) => Promise<void>): Promise<void> {
  const fd = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  try {
    if (!fstatSync(fd).isFile()) throw new BrokenImage(`rootfs diff ${path} is not a regular file`);
    await use(fd);
  } finally {
    closeSync(fd);
  }
}

class Applier {
  readonly output: ApplyOutput = { bytes: 0, members: 0, deleted: 0 };
  readonly #input: ApplyInput;
  readonly #root: number;
  /** members so far: a whiteout or a mark is about what was there before */
  readonly #unpacked = new Set<RawName>();
  readonly #directories: { path: RawName; mtimeNs: bigint }[] = [];
  #parent: { path: RawName; fd: number } | undefined;

  constructor(input: ApplyInput) {
    this.#input = input;
    this.#root = openDirectory(input.target);
  }

  close(): void {
    if (this.#parent) closeSync(this.#parent.fd);
    closeSync(this.#root);
  }

  async apply(member: TarMember): Promise<void> {
    const { entry } = member;
    const path = confinedPath(entry.name);
    this.output.members++;
    if (path === "") {
      if (entry.type !== "directory") throw new BrokenImage("rootfs diff: its root is not a directory");
      this.#setAttributes(this.#root, ".", entry);
      this.#directories.push({ path, mtimeNs: entry.mtimeNs });
      return;
    }
    const { parent, base } = splitPath(path);
    const directory = this.#open(parent, path);
    if (base === OPAQUE) this.#empty(directory, parent);
    else if (base.startsWith(WHITEOUT)) this.#whiteout(directory, parent, base.slice(WHITEOUT.length), path);
    else {
      if (this.#unpacked.has(path)) {
        const both = entry.type === "directory" && lstatSync(entryPath(directory, base)).isDirectory();
        if (!both) throw new BrokenImage(`rootfs diff: ${showName(path)} is in it twice`);
      }
      this.#unpacked.add(path);
      try {
        await this.#make(directory, base, path, member);
      } catch (error) {
        const failure = SyscallFailed.from(error);
        if (failure instanceof SyscallFailed)
          throw new SyscallFailed(`rootfs diff: make ${showName(path)}: ${failure.message}`, {
            cause: error,
            errno: failure.errno,
            code: failure.code,
            syscall: failure.syscall,
          });
        throw error;
      }
    }
  }

  /** Innermost first doesn't matter: only what is made in a directory changes its time, and nothing is made any more. */
  setDirectoryTimes(): void {
    for (const { path, mtimeNs } of this.#directories)
      setTimes(entryPath(path === "" ? this.#root : this.#open(path, path), "."), mtimeNs);
  }

  deleteListed(listPath: string): void {
    const wrong = (why: string) => new BrokenImage(`rootfs diff: ${listPath} ${why}`);
    const text = withFd(
      openSync(listPath, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK),
      (fd) => {
        const info = fstatSync(fd);
        if (!info.isFile() || info.size > MAX_DELETED_BYTES) throw wrong("is not a file of reasonable size");
        return readFileSync(fd, "utf8");
      },
    );
    let list: unknown;
    try {
      list = JSON.parse(text);
    } catch {
      throw wrong("is not JSON");
    }
    if (list === null) return; // as Go writes an empty list
    if (!Array.isArray(list) || !list.every((item) => typeof item === "string"))
      throw wrong("is not a list of paths");
    for (const item of list as string[]) {
      const path = confinedPath(rawName(item.replace(/^\//, "")) || ".");
      if (path === "") throw wrong("deletes the root directory");
      const { parent, base } = splitPath(path);
      let directory: number;
      try {
        directory = this.#open(parent, path);
      } catch (error) {
        const code = ((error as Error).cause as NodeJS.ErrnoException | undefined)?.code;
        if (code === "ENOENT" || code === "ENOTDIR") continue; // gone with its parent
        throw error;
      }
      if (this.#remove(directory, base)) this.output.deleted++;
    }
  }

  /**
   * The directory of a member. It stays open until the next one's, because members come directory by directory, and no longer: what a
   * member replaces may be the directory of one before.
   */
  #open(parent: RawName, path: RawName): number {
    if (parent !== "" && this.#parent?.path === parent) return this.#parent.fd;
    if (this.#parent) closeSync(this.#parent.fd);
    this.#parent = undefined;
    if (parent === "") return this.#root;
    let fd: number;
    try {
      fd = openBeneath(this.#root, pathBytes(parent), constants.O_RDONLY | constants.O_DIRECTORY);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      const why =
        code === "ELOOP"
          ? "is below a symbolic link"
          : code === "ENOENT"
            ? "has no parent directory: is the container's image another one?"
            : code === "ENOTDIR"
              ? "is below something that is no directory"
              : `can't be reached: ${code}`;
      throw new BrokenImage(`rootfs diff: ${showName(path)} ${why}`, { cause: error });
    }
    this.#parent = { path: parent, fd };
    return fd;
  }

  /** Removes what was there before this layer. */
  #empty(directory: number, path: RawName): void {
    for (const bytes of readdirSync(`/proc/self/fd/${directory}`, { encoding: "buffer" })) {
      const name = rawName(bytes);
      const child = path === "" ? name : `${path}/${name}`;
      if (!this.#unpacked.has(child)) {
        if (this.#remove(directory, name)) this.output.deleted++;
      } else if (lstatSync(entryPath(directory, name)).isDirectory())
        withFd(openBeneath(directory, bytes, constants.O_RDONLY | constants.O_DIRECTORY), (fd) =>
          this.#empty(fd, child),
        );
    }
  }

  #whiteout(directory: number, parent: RawName, name: RawName, path: RawName): void {
    if (name === "" || name === "." || name === ".." || name.startsWith(WHITEOUT))
      throw new BrokenImage(`rootfs diff: ${showName(path)} is no whiteout that we know`);
    if (this.#unpacked.has(parent === "" ? name : `${parent}/${name}`))
      throw new BrokenImage(`rootfs diff: ${showName(path)} deletes what is in the same layer`);
    if (this.#remove(directory, name)) this.output.deleted++;
  }

  /** With everything below it; of a link the link. @returns false when there was nothing */
  #remove(directory: number, name: RawName): boolean {
    const at = entryPath(directory, name);
    const info = lstatSync(at, { throwIfNoEntry: false });
    if (!info) return false;
    if (!info.isDirectory()) unlinkSync(at);
    else {
      withFd(openBeneath(directory, pathBytes(name), constants.O_RDONLY | constants.O_DIRECTORY), (fd) => {
        for (const child of readdirSync(`/proc/self/fd/${fd}`, { encoding: "buffer" }))
          this.#remove(fd, rawName(child));
      });
      rmdirSync(at);
    }
    return true;
  }

  async #make(directory: number, name: RawName, path: RawName, member: TarMember): Promise<void> {
    const { entry } = member;
    const at = entryPath(directory, name);
    const old = lstatSync(at, { throwIfNoEntry: false });
    if (entry.type === "directory") {
      if (old && !old.isDirectory()) unlinkSync(at);
      if (!old?.isDirectory()) mkdirSync(at, { mode: 0o700 });
      withFd(openBeneath(directory, pathBytes(name), constants.O_RDONLY | constants.O_DIRECTORY), (fd) =>
        this.#setAttributes(fd, ".", entry),
      );
      this.#directories.push({ path, mtimeNs: entry.mtimeNs });
      return;
    }
    if (entry.type === "hardlink") {
      this.#link(directory, name, path, entry, old !== undefined);
      return;
    }
    if (old) this.#remove(directory, name);
    if (entry.type === "file") {
      await this.#file(directory, name, member);
      return;
    }
    if (entry.type === "symlink") symlinkSync(pathBytes(entry.linkName), at);
    else {
      if (entry.type !== "fifo" && !this.#input.devices)
        throw new PermissionDenied(`rootfs diff: ${showName(path)} is a device, and devices are not allowed`);
      const kind = { fifo: constants.S_IFIFO, char: constants.S_IFCHR, block: constants.S_IFBLK }[entry.type];
      makeNode(at, kind | 0o600, entry.major, entry.minor);
    }
    this.#setAttributes(directory, name, entry);
    setTimes(at, entry.mtimeNs);
  }

  #link(directory: number, name: RawName, path: RawName, entry: TarEntry, exists: boolean): void {
    const target = confinedPath(entry.linkName);
    if (target === "" || target === path)
      throw new BrokenImage(
        `rootfs diff: ${showName(path)} is a hard link to ${showName(target) || "the root"}`,
      );
    const { parent, base } = splitPath(target);
    // Not by `#open`: that would close the directory that the link goes to.
    const link = (from: number) => {
      const source = entryPath(from, base);
      const info = lstatSync(source, { throwIfNoEntry: false });
      if (!info || info.isDirectory())
        throw new BrokenImage(
          `rootfs diff: ${showName(path)} is a hard link to ${showName(target)}, which is ${info ? "a directory" : "not there"}`,
        );
      if (exists) this.#remove(directory, name);
      linkSync(source, entryPath(directory, name)); // link(2) doesn't follow a link at the end
    };
    if (parent === "") link(this.#root);
    else {
      let fd: number;
      try {
        fd = openBeneath(this.#root, pathBytes(parent), constants.O_RDONLY | constants.O_DIRECTORY);
      } catch (error) {
        throw new BrokenImage(
          `rootfs diff: ${showName(path)} is a hard link to ${showName(target)}, which can't be reached`,
          {
            cause: error,
          },
        );
      }
      withFd(fd, link);
    }
  }

  async #file(directory: number, name: RawName, member: TarMember): Promise<void> {
    const { entry } = member;
    this.output.bytes += entry.size;
    const { maxBytes } = this.#input;
    if (maxBytes !== undefined && this.output.bytes > maxBytes)
      throw new ResourceExhausted(
        `rootfs diff: more than the allowed ${maxBytes} bytes, reached at ${showName(entry.name)}`,
      );
    const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW;
    const fd = openBeneath(directory, pathBytes(name), flags, 0o600);
    try {
      for await (const { data, offset } of member.contents()) writeAll(fd, data, offset);
      if (entry.extents) ftruncateSync(fd, entry.size); // a hole at the end
      fchownSync(fd, entry.uid, entry.gid);
      fchmodSync(fd, entry.mode); // after the owner, which takes set-uid away
      this.#setXattrs(entryPath(directory, name), entry);
    } finally {
      closeSync(fd);
    }
    setTimes(entryPath(directory, name), entry.mtimeNs);
  }

  #setAttributes(directory: number, name: RawName, entry: TarEntry): void {
    const at = entryPath(directory, name);
    lchownSync(at, entry.uid, entry.gid);
    if (entry.type !== "symlink") chmodSync(at, entry.mode);
    this.#setXattrs(at, entry); // after the owner, which takes capabilities away
  }

  /** As the member has them: those that an existing directory has and the member hasn't go. */
  #setXattrs(at: Buffer, entry: TarEntry): void {
    if (entry.type === "directory")
      for (const name of listXattrs(at))
        if (!isForeignAttribute(name) && !entry.xattrs.has(name)) removeXattr(at, name);
    for (const [name, value] of entry.xattrs) {
      if (isForeignAttribute(name)) continue;
      if (entry.type === "directory" && getXattr(at, name)?.equals(value)) continue;
      setXattr(at, name, value);
    }
  }
}
