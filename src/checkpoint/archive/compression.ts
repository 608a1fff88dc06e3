import { spawn } from "node:child_process";
import { once } from "node:events";
import { readSync } from "node:fs";
import { availableParallelism } from "node:os";
import { Readable } from "node:stream";
import { promisify } from "node:util";
import { constants, createGunzip, createGzip, createZstdDecompress, zstdCompress } from "node:zlib";
import { BrokenImage, CedanaError, InvalidRequest, messageOf, Unavailable } from "../../errors/index.ts";
import type { JobContext } from "../worker/jobs.ts";
import { ZstdFrames } from "./zstd-frames.ts";

/**
 * Compression of streams, in a worker thread.
 *
 * zstd: frames of 4 MiB each, compressed side by side in Node's thread pool and joined, which every reader of zstd takes. (Node's
 * stream can't compress in threads, ZSTD_c_nbWorkers makes it fail, and ends its reading behind the first frame.)
 * lz4: the program of Debian's package `lz4`, which knows the frame format. The registry's packages either know only bare blocks, or
 * keep a whole archive in memory, or have been left for years; and a process of its own is where compression should be.
 */

export const compressions = ["none", "gzip", "lz4", "zstd"] as const;
export type Compression = (typeof compressions)[number];

type Chunks = AsyncIterable<Buffer>;

const CHUNK_BYTES = 1024 * 1024;
const ZSTD_FRAME_BYTES = 4 * 1024 * 1024;
/** Frames at a time: the cores, and one that waits for the writer. The thread pool has 4 threads, and cedanad's files need some. */
const ZSTD_FRAMES_AT_ONCE = Math.min(3, availableParallelism() + 1);
const magics: [Compression, number[]][] = [
  ["gzip", [0x1f, 0x8b]],
  ["zstd", [0x28, 0xb5, 0x2f, 0xfd]],
  ["lz4", [0x04, 0x22, 0x4d, 0x18]],
];

/** By its first bytes. zstd's skippable frames, which some writers begin with, count as zstd. */
export function detectCompression(first: Buffer): Compression {
  if (first.length >= 4 && (first.readUInt32LE(0) & 0xfffffff0) === 0x184d2a50) return "zstd";
  return magics.find(([, bytes]) => bytes.every((byte, i) => first[i] === byte))?.[0] ?? "none";
}

/** A file from its beginning, or from an offset. Whoever opened it closes it. */
export async function* readChunks(fd: number, context: JobContext, offset = 0): AsyncGenerator<Buffer> {
  for (let position = offset; ; ) {
    context.checkCancelled();
    const buffer = Buffer.allocUnsafeSlow(CHUNK_BYTES); // a new one: whoever reads may keep the old one
    const read = readSync(fd, buffer, 0, CHUNK_BYTES, position);
    if (read === 0) return;
    position += read;
    yield buffer.subarray(0, read);
  }
}

/** @param level  of zstd (1 to 19) or gzip (1 to 9); 1 where it isn't given: memory is big, and its owner waits */
export function compress(chunks: Chunks, compression: Compression, level = 1): Chunks {
  if (!Number.isInteger(level) || level < 1 || level > (compression === "zstd" ? 19 : 9))
    throw new InvalidRequest(`compression level ${level} is not one of ${compression}'s`);
  if (compression === "none") return chunks;
  if (compression === "zstd") return compressZstd(chunks, level);
  if (compression === "lz4") return throughProgram(chunks, ["-q", "-c", `-${level}`, "-B7", "-"], "compress");
  return through(chunks, createGzip({ level, chunkSize: CHUNK_BYTES }), "gzip");
}

/**
 * Undoes any of the compressions, by the first bytes.
 * @throws BrokenImage (while reading) for what is truncated, broken, or followed by something else
 */
export async function* decompress(
  chunks: Chunks,
  found?: (compression: Compression) => void,
): AsyncGenerator<Buffer> {
  const { first, all } = await peek(chunks);
  const compression = detectCompression(first);
  found?.(compression);
  if (compression === "gzip") yield* gunzip(all);
  else if (compression === "zstd") yield* decompressZstd(all);
  else if (compression === "lz4") yield* throughProgram(all, ["-q", "-d", "-c", "-"], "decompress");
  else yield* all;
}

/** The first bytes, at least 512 where there are so many, and all of them again. */
export async function peek(chunks: Chunks): Promise<{ first: Buffer; all: Chunks }> {
  const iterator = chunks[Symbol.asyncIterator]();
  const parts: Buffer[] = [];
  let length = 0;
  let ended = false;
  while (length < 512 && !ended) {
    const next = await iterator.next();
    if (next.done) ended = true;
    else {
      parts.push(next.value);
      length += next.value.length;
    }
  }
  const first = parts.length === 1 ? parts[0]! : Buffer.concat(parts);
  return {
    first,
    all: (async function* () {
      try {
        if (first.length > 0) yield first;
        while (!ended) {
          const next = await iterator.next();
          if (next.done) return;
          yield next.value;
        }
      } finally {
        await iterator.return?.();
      }
    })(),
  };
}

async function* compressZstd(chunks: Chunks, level: number): AsyncGenerator<Buffer> {
  const zstd = promisify(zstdCompress);
  const options = {
    params: { [constants.ZSTD_c_compressionLevel]: level, [constants.ZSTD_c_checksumFlag]: 1 },
    chunkSize: ZSTD_FRAME_BYTES + ZSTD_FRAME_BYTES / 64, // never more than one piece of output
  };
  const running: Promise<Buffer>[] = [];
  const begin = (parts: Buffer[]) => {
    const job = zstd(Buffer.concat(parts), options);
    job.catch(() => {}); // told when it is waited for
    running.push(job);
  };
  let parts: Buffer[] = [];
  let length = 0;
  let frames = 0;
  for await (let chunk of chunks) {
    while (chunk.length > 0) {
      const part = chunk.subarray(0, ZSTD_FRAME_BYTES - length);
      parts.push(part);
      length += part.length;
      chunk = chunk.subarray(part.length);
      if (length < ZSTD_FRAME_BYTES) continue;
      begin(parts);
      frames++;
      parts = [];
      length = 0;
      if (running.length >= ZSTD_FRAMES_AT_ONCE) yield await running.shift()!;
    }
  }
  if (length > 0 || frames === 0) begin(parts);
  for (const job of running) yield await job;
}

async function* decompressZstd(chunks: Chunks): AsyncGenerator<Buffer> {
  const frames = new ZstdFrames();
  const pieces = frames.split(chunks);
  // Each frame has a decompressor of its own; the frames' borders are known before.
  for (;;) {
    const begin = await pieces.next();
    if (begin.done) break;
    let piece = begin.value;
    yield* through(
      (async function* () {
        for (;;) {
          yield piece.data;
          if (piece.last) return;
          const next = await pieces.next();
          if (next.done) throw new BrokenImage("zstd data is truncated");
          piece = next.value;
        }
      })(),
      createZstdDecompress({ chunkSize: CHUNK_BYTES }),
      "zstd",
    );
  }
}

/** Node ends silently where something that isn't gzip follows a member: what it took is counted. */
async function* gunzip(chunks: Chunks): AsyncGenerator<Buffer> {
  let given = 0;
  const counted = (async function* () {
    for await (const chunk of chunks) {
      given += chunk.length;
      yield chunk;
    }
  })();
  const stream = createGunzip({ chunkSize: CHUNK_BYTES });
  yield* through(counted, stream, "gzip");
  for await (const chunk of counted) given += chunk.length; // it may have stopped before the end
  if (stream.bytesWritten !== given)
    throw new BrokenImage(`gzip data is followed by ${given - stream.bytesWritten} bytes of something else`);
}

/** Data through one of zlib's streams; what fails in it is data's fault. */
async function* through(
  chunks: Chunks,
  stream: NodeJS.ReadWriteStream & { destroy(error?: Error): unknown },
  what: string,
): AsyncGenerator<Buffer> {
  let sourceError: unknown;
  const source = Readable.from(
    (async function* () {
      try {
        yield* chunks;
      } catch (error) {
        sourceError = error;
        throw error;
      }
    })(),
    { objectMode: true, highWaterMark: 1 },
  );
  source.on("error", (error) => stream.destroy(error));
  source.pipe(stream as NodeJS.WritableStream);
  try {
    yield* stream as AsyncIterable<Buffer>;
  } catch (error) {
    throw sourceError ?? new BrokenImage(`${what} data can't be read: ${messageOf(error)}`, { cause: error });
  } finally {
    source.destroy();
    stream.destroy();
  }
}

/** Data through a process that reads stdin and writes stdout. */
async function* throughProgram(chunks: Chunks, args: string[], verb: string): AsyncGenerator<Buffer> {
  const child = spawn("lz4", args, { stdio: ["pipe", "pipe", "pipe"] });
  const ended = once(child, "close") as Promise<[number | null, NodeJS.Signals | null]>;
  ended.catch(() => {}); // told below
  let words = "";
  child.stderr.on("data", (data: Buffer) => {
    words = (words + data.toString("utf8")).slice(-500);
  });
  let sourceError: unknown;
  const feeding = (async () => {
    try {
      for await (const chunk of chunks) if (!child.stdin.write(chunk)) await once(child.stdin, "drain");
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EPIPE") sourceError = error; // EPIPE: its exit status says why
    }
    child.stdin.end();
  })();
  child.stdin.on("error", () => {}); // EPIPE, which the feeding sees too
  try {
    yield* child.stdout as AsyncIterable<Buffer>;
    await feeding;
    if (sourceError) throw sourceError;
    const [status, signal] = await ended.catch((error: NodeJS.ErrnoException) => {
      if (error.code === "ENOENT")
        throw new Unavailable("lz4 is not installed, which lz4 archives need: apt-get install lz4", {
          cause: error,
        });
      throw new CedanaError(`${verb} with lz4: ${error.message}`, { cause: error });
    });
    if (status === 0) return;
    const why = `${verb} with lz4: ${signal ?? `exit status ${status}`}: ${words.trim()}`;
    throw verb === "decompress" ? new BrokenImage(`lz4 data can't be read: ${why}`) : new CedanaError(why);
  } finally {
    child.kill("SIGKILL");
    child.stdin.destroy();
  }
}
