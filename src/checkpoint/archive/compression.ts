import { spawn } from "node:child_process";
import { once } from "node:events";
import { readSync } from "node:fs";
import { availableParallelism } from "node:os";
import type { Writable } from "node:stream";
import {
  constants,
  createGunzip,
  createGzip,
  createZstdCompress,
  createZstdDecompress,
  type Gunzip,
  type Gzip,
  type ZstdDecompress,
  type ZstdOptions,
} from "node:zlib";
import { BrokenImage, CedanaError, InvalidRequest, messageOf, Unavailable } from "../../errors/index.ts";
import type { JobContext } from "../worker/context.ts";
import { type Compression, compressions } from "./compressions.ts";
import { ZstdFrames } from "./zstd-frames.ts";

/**
 * Compression of streams, in a worker thread. Everywhere a chunk is its reader's until that asks for the next one: its memory is used
 * again then, or given back, because the garbage collector sees the size of buffers late and a hundred MiB of them would lie about.
 *
 * zstd: frames of 2 MiB each, compressed side by side in Node's thread pool and joined, which every reader of zstd takes. (Node's
 * stream can't compress in threads, ZSTD_c_nbWorkers makes it fail, and ends its reading behind the first frame.)
 * lz4: the program of Debian's package `lz4`, which knows the frame format. The registry's packages either know only bare blocks, or
 * keep a whole archive in memory, or have been left for years; and a process of its own is where compression should be.
 */

export { type Compression, compressions };

type Chunks = AsyncIterable<Buffer>;

const CHUNK_BYTES = 1024 * 1024;
const ZSTD_FRAME_BYTES = 2 * 1024 * 1024;
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

/** A file from its beginning. Whoever opened it closes it. */
export async function* readChunks(fd: number, context: JobContext): AsyncGenerator<Buffer> {
  const buffer = Buffer.allocUnsafeSlow(CHUNK_BYTES);
  for (let position = 0; ; ) {
    context.checkCancelled();
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
      length += next.value.length;
      parts.push(length < 512 ? Buffer.from(next.value) : next.value); // asked for more, this one is gone
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
  const options = {
    params: { [constants.ZSTD_c_compressionLevel]: level, [constants.ZSTD_c_checksumFlag]: 1 },
    chunkSize: ZSTD_FRAME_BYTES + ZSTD_FRAME_BYTES / 64, // one piece of output, whatever comes out
  };
  const free: Buffer[] = Array.from({ length: ZSTD_FRAMES_AT_ONCE }, () =>
    Buffer.allocUnsafeSlow(ZSTD_FRAME_BYTES),
  );
  const running: { frame: Buffer; job: Promise<Buffer[]> }[] = [];
  const begin = (frame: Buffer, length: number) => {
    const job = compressFrame(frame.subarray(0, length), options);
    job.catch(() => {}); // told when it is waited for
    running.push({ frame, job });
  };
  const finish = async function* () {
    const { frame, job } = running.shift()!;
    const parts = await job;
    free.push(frame);
    yield* parts;
    for (const part of parts) release(part);
  };
  let frame = free.pop()!;
  let length = 0;
  let frames = 0;
  for await (const chunk of chunks) {
    for (let at = 0; at < chunk.length; ) {
      const copied = chunk.copy(frame, length, at);
      at += copied;
      length += copied;
      if (length < ZSTD_FRAME_BYTES) continue;
      begin(frame, length);
      frames++;
      length = 0;
      if (free.length === 0) yield* finish();
      frame = free.pop()!;
    }
  }
  if (length > 0 || frames === 0) begin(frame, length);
  while (running.length > 0) yield* finish();
}

/** In pieces of one buffer: zlib's own call for this would copy them into another one, and leave the first about. */
async function compressFrame(frame: Buffer, options: ZstdOptions): Promise<Buffer[]> {
  const stream = createZstdCompress(options);
  stream.end(frame);
  const parts: Buffer[] = [];
  for await (const part of stream as AsyncIterable<Buffer>) parts.push(part);
  return parts;
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
  stream: Gzip | Gunzip | ZstdDecompress,
  what: string,
): AsyncGenerator<Buffer> {
  let sourceError: unknown;
  const feeding = feed(chunks, stream).catch((error) => {
    if (!stream.destroyed) sourceError = error; // else it is the stream's own, which the reading below sees
    stream.destroy();
  });
  try {
    let last: Buffer | undefined;
    for await (const chunk of stream as AsyncIterable<Buffer>) {
      last = chunk;
      yield chunk;
      // zlib goes on in the same buffer until that is full.
      if (chunk.byteOffset + chunk.byteLength === chunk.buffer.byteLength) release(chunk);
    }
    await feeding; // it may still be given what it doesn't want
    if (last) release(last);
  } catch (error) {
    throw sourceError ?? new BrokenImage(`${what} data can't be read: ${messageOf(error)}`, { cause: error });
  } finally {
    stream.destroy();
  }
  if (sourceError) throw sourceError;
}

/** Each chunk is taken before the next is asked for. */
async function feed(chunks: Chunks, stream: Writable): Promise<void> {
  for await (const chunk of chunks)
    await new Promise<void>((taken, failed) =>
      stream.write(chunk, (error) => (error ? failed(error) : taken())),
    );
  stream.end();
}

/** Gives a buffer's memory back; not that of Node's pool, of which small ones are parts. */
function release({ buffer }: Buffer): void {
  if (buffer instanceof ArrayBuffer && buffer.byteLength >= CHUNK_BYTES && !buffer.detached)
    buffer.transfer(0);
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
  const feeding = feed(chunks, child.stdin).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "EPIPE" && error.code !== "ERR_STREAM_DESTROYED") sourceError = error; // those: its exit status says why
    child.stdin.end();
  });
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
