import {
  closeSync,
  constants,
  fdatasync,
  fstatSync,
  fsyncSync,
  openSync,
  readdirSync,
  readlinkSync,
  readSync,
  rmSync,
} from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import { BrokenImage, InvalidRequest, Unavailable, WrongState } from "../../errors/index.ts";
import { flock, openBeneath } from "../../linux/addon.ts";
import { openDirectory } from "../../linux/fd.ts";
import { listFilesHere } from "../digest-job.ts";
import { algorithmOf, FileHash } from "../file-hash.ts";
import { MANIFEST_NAME } from "../manifest.ts";
import { WHITEOUT, writeAll } from "../rootfs-diff/layer.ts";
import { ROOTFS_DIFF_NAME } from "../rootfs-diff/names.ts";
import { findExtents } from "../tar/extents.ts";
import { encodeHeader, endOfTar, padding, rawName, type TarEntry, tarEntry } from "../tar/format.ts";
import { splitPath } from "../tar/path.ts";
import { ByteSource, readTar } from "../tar/reader.ts";
import type { JobContext } from "../worker/context.ts";
import { type Compression, compress, decompress, readChunks } from "./compression.ts";
import { encrypt } from "./encryption.ts";
import { staysInside } from "./links.ts";

export interface CreateInput {
  directory: string;
  /** the file to write; must not exist */
  archive: string;
  compression: Compression;
  level: number;
  secret: Uint8Array | undefined;
  /** before the name of each file of the directory in the archive: "" or "checkpoint/" */
  prefix: string;
  /** files that are not in the directory, or stand for those there; by their name in the archive */
  extra: Record<string, string>;
  /** paths of the directory that don't come along */
  omit: string[];
  /** deletions are in deleted.files alone, as Podman and CRI-O want it */
  dropWhiteouts: boolean;
  /** by path, as the manifest has them: what is read must have it */
  digests: Record<string, string>;
}

export interface CreateOutput {
  files: number;
  /** of the tar, and of the archive */
  tarBytes: number;
  archiveBytes: number;
}

const CHUNK_BYTES = 1024 * 1024;
const FLUSH_BYTES = 32 * 1024 * 1024;

/** A checkpoint as one file, in constant memory. What it is made of must not change meanwhile. */
export async function createArchive(input: CreateInput, context: JobContext): Promise<CreateOutput> {
  const out = openSync(input.archive, "wx", 0o600);
  if (!flock(out, "exclusive")) {
    // Whoever has it takes it for what a killed writer left, and removes it.
    closeSync(out);
    throw new Unavailable(`archive ${input.archive} is being swept by another writer of it: try again`);
  }
  const scratch = `${input.archive}.diff`;
  let done = false;
  const flusher = new Flusher(out);
  try {
    if (input.dropWhiteouts) await repackWithoutWhiteouts(input.directory, scratch, context);
    const output: CreateOutput = { files: 0, tarBytes: 0, archiveBytes: 0 };
    const tar = (async function* () {
      for (const chunk of packTree(input, scratch, output, context)) {
        output.tarBytes += chunk.length;
        yield chunk;
      }
    })();
    const compressed = compress(tar, input.compression, input.level);
    for await (const chunk of input.secret ? encrypt(compressed, input.secret) : compressed) {
      context.checkCancelled();
      writeAll(out, chunk);
      output.archiveBytes += chunk.length;
      flusher.wrote(chunk.length);
    }
    await flusher.end();
    fsyncSync(out);
    done = true;
    return output;
  } finally {
    await flusher.end().catch(() => {}); // told above, or there is another reason to fail
    closeSync(out);
    rmSync(scratch, { force: true });
    if (!done) rmSync(input.archive, { force: true });
  }
}

/** Has the disk write while we compress: the sync at the end would wait for all of it. */
class Flusher {
  readonly #fd: number;
  #bytes = 0;
  #flushing: Promise<void> | undefined;

  constructor(fd: number) {
    this.#fd = fd;
  }

  wrote(bytes: number): void {
    this.#bytes += bytes;
    if (this.#bytes < FLUSH_BYTES || this.#flushing) return;
    this.#bytes = 0;
    const flushing = promisify(fdatasync)(this.#fd);
    this.#flushing = flushing;
    flushing.then(
      () => {
        this.#flushing = undefined;
      },
      () => {}, // `end` tells
    );
  }

  async end(): Promise<void> {
    await this.#flushing;
  }
}

/** The manifest first: who reads the archive knows what is to come. Then what is small, so that `show` needs no images. */
function* packTree(
  input: CreateInput,
  scratch: string,
  output: CreateOutput,
  context: JobContext,
): Generator<Buffer, void, void> {
  const { extra } = input;
  const omit = new Set([...input.omit, ...Object.keys(extra)]);
  const { prefix } = input;
  const found = listFilesHere({ directory: input.directory }, context).filter(({ path }) => !omit.has(path));
  const rank = (path: string) =>
    path === MANIFEST_NAME || path === prefix + MANIFEST_NAME
      ? 0
      : path.includes("/")
        ? 3
        : path === ROOTFS_DIFF_NAME
          ? 2
          : 1;
  const names = [
    ...Object.keys(extra).map((path) => ({ path, type: "extra" as const })),
    ...found.map(({ path, type }) => ({ path: prefix + path, type })),
  ].sort((a, b) => rank(a.path) - rank(b.path) || (a.path < b.path ? -1 : 1));
  const root = openDirectory(input.directory);
  const buffer = Buffer.allocUnsafeSlow(CHUNK_BYTES); // used again, see compression.ts
  try {
    for (const { path, type } of names) {
      if (type === "extra") {
        const bytes = Buffer.from(extra[path]!);
        yield Buffer.concat([
          encodeHeader(entryOf(path, { size: bytes.length })),
          bytes,
          padding(bytes.length),
        ]);
        output.files++;
      } else if (type === "directory") yield encodeHeader(entryOf(path, { type, mode: 0o700 }));
      else if (type === "symlink") yield encodeHeader(parentLink(root, path.slice(prefix.length), path));
      else if (type !== "file")
        throw new InvalidRequest(`${path} is neither a file nor a directory: it is no part of a checkpoint`);
      else {
        const fd =
          path === ROOTFS_DIFF_NAME && input.dropWhiteouts
            ? openSync(scratch, constants.O_RDONLY | constants.O_NOFOLLOW)
            : openBeneath(
                root,
                path.slice(prefix.length),
                constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK,
              );
        try {
          yield* packFile(fd, path, input.digests[path.slice(prefix.length)], buffer, context);
        } finally {
          closeSync(fd);
        }
        output.files++;
      }
    }
  } finally {
    closeSync(root);
  }
  yield endOfTar();
}

function* packFile(
  fd: number,
  path: string,
  digest: string | undefined,
  buffer: Buffer,
  context: JobContext,
): Generator<Buffer, void, void> {
  const info = fstatSync(fd, { bigint: true });
  const size = Number(info.size);
  if (!info.isFile()) throw new BrokenImage(`${path} is not a regular file`);
  const extents = digest === undefined ? findExtents(fd, size, Number(info.blocks)) : undefined;
  yield encodeHeader(entryOf(path, { size, extents, mtimeNs: info.mtimeNs }));
  const hash = digest === undefined ? undefined : new FileHash(algorithmOf(digest));
  let written = 0;
  for (const extent of extents ?? [{ offset: 0, size }]) {
    for (let offset = extent.offset; offset < extent.offset + extent.size; ) {
      context.checkCancelled();
      const wanted = Math.min(buffer.length, extent.offset + extent.size - offset);
      const read = readSync(fd, buffer, 0, wanted, offset);
      if (read === 0) throw new WrongState(`${path} became shorter while it was archived`);
      hash?.update(buffer.subarray(0, read));
      yield buffer.subarray(0, read);
      offset += read;
      written += read;
    }
  }
  yield padding(written);
  if (hash && hash.digest() !== digest)
    throw new BrokenImage(`${path} is not as the manifest says: its digest is another one`);
}

/** CRIU's link to an earlier checkpoint comes along only where that is in the archive, too. */
function parentLink(root: number, found: string, path: string): TarEntry {
  const target = readlinkSync(`/proc/self/fd/${root}/${found}`);
  if (!staysInside(path, target))
    throw new InvalidRequest(
      `${path} is a link to ${target}: an archive holds a whole checkpoint, and no links but CRIU's "parent" to images in it`,
    );
  return entryOf(path, { type: "symlink", linkName: rawName(target), mode: 0o777 });
}

const entryOf = (path: string, some: Partial<TarEntry>) => tarEntry({ name: rawName(path), ...some });

async function repackWithoutWhiteouts(directory: string, to: string, context: JobContext): Promise<void> {
  if (!readdirSync(directory).includes(ROOTFS_DIFF_NAME)) return;
  const from = openSync(
    join(directory, ROOTFS_DIFF_NAME),
    constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK,
  );
  const source = new ByteSource(decompress(readChunks(from, context)));
  try {
    const out = openSync(to, "wx", 0o600);
    await usingFd(out, async () => {
      for await (const member of readTar(source)) {
        const { entry } = member;
        if (splitPath(entry.name).base.startsWith(WHITEOUT)) continue;
        writeAll(out, encodeHeader(entry));
        let size = 0;
        for await (const { data } of member.contents()) {
          context.checkCancelled();
          writeAll(out, data);
          size += data.length;
        }
        writeAll(out, padding(size));
      }
      writeAll(out, endOfTar());
    });
  } finally {
    await source.close(); // with the program that may be decompressing
    closeSync(from);
  }
}

async function usingFd(fd: number, use: () => Promise<void>): Promise<void> {
  try {
    await use();
  } finally {
    closeSync(fd);
  }
}
