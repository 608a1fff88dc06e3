import {
  closeSync,
  constants,
  fstatSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  statfsSync,
  symlinkSync,
} from "node:fs";
import { basename, dirname, join } from "node:path";
import { BrokenImage, InvalidRequest, PermissionDenied, ResourceExhausted } from "../../errors/index.ts";
import { openBeneath } from "../../linux/addon.ts";
import { openDirectory } from "../../linux/fd.ts";
import { algorithmOf, type DigestAlgorithm, FileHash } from "../file-hash.ts";
import { MANIFEST_NAME, parseManifest } from "../manifest.ts";
import { entryPath, writeAll } from "../rootfs-diff/layer.ts";
import { pathBytes, type RawName, rawName, showName } from "../tar/format.ts";
import { confinedPath, splitPath } from "../tar/path.ts";
import { ByteSource, readTar, type TarMember } from "../tar/reader.ts";
import type { JobContext } from "../worker/context.ts";
import { type Compression, decompress, peek, readChunks } from "./compression.ts";
import { decrypt, isEncrypted } from "./encryption.ts";
import { staysInside } from "./links.ts";

/** What an archive may ask of us. */
export interface Limits {
  /** of all files together, holes included; default: what is free at the destination (or beside the archive), less a twentieth */
  bytes?: number | undefined;
  members?: number | undefined;
  /** bytes written, without zeros, for each byte of the archive; looked at above 256 MiB */
  ratio?: number | undefined;
}

export interface ExtractInput {
  archive: string;
  /** an empty directory; undefined: nothing is written, all is read and hashed */
  into: string | undefined;
  secret: Uint8Array | undefined;
  limits: Limits;
  /** contents of these files are returned; small ones at the top */
  wanted: string[];
}

export interface ExtractOutput {
  compression: Compression;
  encrypted: boolean;
  /** of the archive */
  archiveBytes: number;
  /** Of those that a manifest names, with their digest as it has it; of those before the manifest, with both. */
  files: { path: string; size: number; digests: string[] }[];
  contents: Record<string, string>;
}

/** No checkpoint has as many files as that, nor as deep ones. */
const MAX_MEMBERS = 100_000;
const MAX_DEPTH = 32;
/**
 * zstd makes a byte out of some ten thousand that repeat, so a small archive can fill a disk. Memory images are nothing like that but
 * for their zeros, which are not counted and not written.
 */
const MAX_RATIO = 1000;
const RATIO_FROM_BYTES = 256 * 1024 * 1024;
/** Of one file that is returned. */
const MAX_WANTED_BYTES = 16 * 1024 * 1024;
const PAGE = 4096;
const zeroPage = Buffer.alloc(PAGE);

/**
 * Extracts an archive of a checkpoint: regular files and directories and nothing else, 0600 and 0700 whatever it says, each made anew below
 * the destination. Each file that a manifest names is hashed on its way. Zeros become holes. When it throws, what was written is the caller's to remove.
 */
export async function extractArchive(input: ExtractInput, context: JobContext): Promise<ExtractOutput> {
  const fd = openArchive(input.archive);
  const root = input.into === undefined ? undefined : openDirectory(input.into);
  try {
    return await new Extractor(input, fd, root).run(context);
  } finally {
    if (root !== undefined) closeSync(root);
    closeSync(fd);
  }
}

function openArchive(path: string): number {
  const fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  if (fstatSync(fd).isFile()) return fd;
  closeSync(fd);
  throw new InvalidRequest(`archive ${path} is not a regular file`);
}

class Extractor {
  readonly #input: ExtractInput;
  readonly #fd: number;
  readonly #root: number | undefined;
  readonly #limits: { bytes: number; members: number; ratio: number };
  readonly #seen = new Map<RawName, TarMember["entry"]["type"]>();
  readonly #output: ExtractOutput = {
    compression: "none",
    encrypted: false,
    archiveBytes: 0,
    files: [],
    contents: {},
  };
  /** digests of the manifest, when it was read; ours is the first member */
  #named: Map<string, string> | undefined;
  #bytes = 0;
  #written = 0;
  /** of the archive, read so far */
  #consumed = 0;

  constructor(input: ExtractInput, fd: number, root: number | undefined) {
    this.#input = input;
    this.#fd = fd;
    this.#root = root;
    const { bytes, members = MAX_MEMBERS, ratio = MAX_RATIO } = input.limits;
    this.#limits = { bytes: bytes ?? this.#free(), members, ratio };
  }

  #free(): number {
    const { bavail, bsize } = statfsSync(this.#input.into ?? dirname(this.#input.archive));
    return Math.floor(bavail * bsize * 0.95);
  }

  async run(context: JobContext): Promise<ExtractOutput> {
    const { first, all } = await peek(this.#counted(readChunks(this.#fd, context)));
    this.#output.encrypted = isEncrypted(first);
    const { secret } = this.#input;
    if (this.#output.encrypted && !secret)
      throw new PermissionDenied(`archive ${this.#input.archive} is encrypted: give its key`);
    // Whoever expects an encrypted archive must not be given another one instead.
    if (!this.#output.encrypted && secret)
      throw new InvalidRequest(`archive ${this.#input.archive} is not encrypted, and a key was given for it`);
    const plain = this.#output.encrypted ? decrypt(all, secret!) : all;
    const found = (compression: Compression) => {
      this.#output.compression = compression;
    };
    const source = new ByteSource(decompress(plain, found));
    try {
      for await (const member of readTar(source, { members: this.#limits.members })) {
        context.checkCancelled();
        await this.#member(member);
      }
    } finally {
      await source.close();
    }
    this.#output.archiveBytes = this.#consumed;
    return this.#output;
  }

  async *#counted(chunks: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
    for await (const chunk of chunks) {
      this.#consumed += chunk.length;
      yield chunk;
    }
  }

  async #member(member: TarMember): Promise<void> {
    const { entry } = member;
    const path = confinedPath(entry.name);
    if (path === "" && entry.type === "directory") return;
    const shown = showName(path);
    const text = pathBytes(path).toString("utf8");
    if (rawName(text) !== path) throw new BrokenImage(`archive member ${shown}: its name is not UTF-8`);
    if (path.split("/").length > MAX_DEPTH)
      throw new BrokenImage(`archive member ${shown} is deeper than a checkpoint's files are`);
    const before = this.#seen.get(path);
    if (before && !(before === "directory" && entry.type === "directory"))
      throw new BrokenImage(`archive member ${shown} is in it twice`);
    this.#seen.set(path, entry.type);
    // A parent that is a file, or a link, is caught here too when nothing is written.
    for (let { parent } = splitPath(path); parent !== ""; { parent } = splitPath(parent)) {
      const type = this.#seen.get(parent) ?? "directory"; // some writers leave out members for directories
      this.#seen.set(parent, type);
      if (type !== "directory")
        throw new BrokenImage(`archive member ${shown} is below ${showName(parent)}, a ${type}`);
    }
    if (entry.type === "directory") this.#makeDirectory(path);
    else if (entry.type === "file") await this.#file(path, text, member);
    else if (entry.type === "symlink" && staysInside(text, pathBytes(entry.linkName).toString("utf8"))) {
      if (this.#root === undefined) return;
      const { parent, base } = splitPath(path);
      this.#inDirectory(parent, (fd) => symlinkSync(pathBytes(entry.linkName), entryPath(fd, base)));
    } else
      throw new BrokenImage(
        `archive member ${shown} is a ${entry.type}: a checkpoint has only files and directories`,
      );
  }

  #makeDirectory(path: RawName): void {
    if (this.#root === undefined) return;
    const { parent, base } = splitPath(path);
    this.#inDirectory(parent, (fd) => {
      try {
        mkdirSync(entryPath(fd, base), { mode: 0o700 });
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error; // a directory: #seen knows everything else
      }
    });
  }

  /** Parents that have no member of their own, as some writers leave them out, are made. */
  #inDirectory<T>(path: RawName, use: (fd: number) => T): T {
    if (path === "") return use(this.#root!);
    const flags = constants.O_RDONLY | constants.O_DIRECTORY;
    let fd: number;
    try {
      fd = openBeneath(this.#root!, pathBytes(path), flags);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ENOENT")
        throw new BrokenImage(`archive: open ${showName(path)}`, { cause: error });
      this.#makeDirectory(path);
      fd = openBeneath(this.#root!, pathBytes(path), flags);
    }
    try {
      return use(fd);
    } finally {
      closeSync(fd);
    }
  }

  async #file(path: RawName, text: string, member: TarMember): Promise<void> {
    const { entry } = member;
    this.#bytes += entry.size;
    if (this.#bytes > this.#limits.bytes)
      throw new ResourceExhausted(`archive: more than ${this.#limits.bytes} bytes, reached at ${text}`);
    const { parent, base } = splitPath(path);
    const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW;
    const fd =
      this.#root === undefined
        ? undefined
        : this.#inDirectory(parent, (directory) => openBeneath(directory, pathBytes(base), flags, 0o600));
    const hashes = this.#algorithmsFor(text).map((algorithm) => new FileHash(algorithm));
    const wanted = this.#input.wanted.includes(text) ? ([] as Buffer[]) : undefined;
    if (wanted && entry.size > MAX_WANTED_BYTES)
      throw new ResourceExhausted(`archive member ${text} is too big`);
    let end = 0;
    try {
      for await (const { data, offset } of member.contents()) {
        for (const hash of hashes) {
          hashZeros(hash, offset - end);
          hash.update(data);
        }
        wanted?.push(Buffer.alloc(offset - end), Buffer.from(data));
        end = offset + data.length;
        this.#write(fd, data, offset, text);
      }
      for (const hash of hashes) hashZeros(hash, entry.size - end);
      if (fd !== undefined) ftruncateSync(fd, entry.size); // a hole at the end
    } finally {
      if (fd !== undefined) closeSync(fd);
    }
    this.#output.files.push({ path: text, size: entry.size, digests: hashes.map((hash) => hash.digest()) });
    if (!wanted) return;
    const contents = Buffer.concat([...wanted, Buffer.alloc(entry.size - end)]).toString("utf8");
    this.#output.contents[text] = contents;
    if (basename(text) === MANIFEST_NAME) this.#named ??= digestsIn(contents, dirname(text));
  }

  /** Nothing is compared where the caller doesn't ask for the manifest. */
  #algorithmsFor(path: string): DigestAlgorithm[] {
    if (!this.#input.wanted.some((wanted) => basename(wanted) === MANIFEST_NAME)) return [];
    if (!this.#named) return ["xxh128", "sha256"];
    const digest = this.#named.get(path);
    return digest === undefined ? [] : [algorithmOf(digest)];
  }

  /** What isn't zero, in runs of pages. */
  #write(fd: number | undefined, data: Buffer, offset: number, name: string): void {
    let from = 0;
    for (let at = 0; at < data.length; ) {
      const end = Math.min(data.length, at + PAGE - ((offset + at) % PAGE));
      const page = data.subarray(at, end);
      if (page.length === PAGE && page[0] === 0 && page.equals(zeroPage)) {
        this.#put(fd, data.subarray(from, at), offset + from, name);
        from = end;
      }
      at = end;
    }
    this.#put(fd, data.subarray(from), offset + from, name);
  }

  #put(fd: number | undefined, data: Buffer, offset: number, name: string): void {
    if (data.length === 0) return;
    this.#written += data.length;
    if (this.#written > RATIO_FROM_BYTES && this.#written > this.#consumed * this.#limits.ratio)
      throw new ResourceExhausted(
        `archive: ${this.#written} bytes out of ${this.#consumed}, at ${name}: more than ${this.#limits.ratio} for each is not believed`,
      );
    if (fd !== undefined) writeAll(fd, data, offset);
  }
}

/** By the files' paths in the archive. Whoever reads the manifest later says what is wrong with it. */
function digestsIn(manifest: string, directory: string): Map<string, string> | undefined {
  try {
    const { files } = parseManifest(manifest, MANIFEST_NAME);
    return new Map(files.flatMap(({ path, digest }) => (digest ? [[join(directory, path), digest]] : [])));
  } catch {
    return undefined;
  }
}

const zeros = Buffer.alloc(1024 * 1024);

function hashZeros(hash: FileHash, count: number): void {
  for (let left = count; left > 0; left -= zeros.length)
    hash.update(left >= zeros.length ? zeros : zeros.subarray(0, left));
}
