import { BrokenImage } from "../../errors/index.ts";
import { ByteSource } from "../tar/reader.ts";

/**
 * Finds where zstd's frames end, without decompressing them:
 *
 *   frame      magic 28 b5 2f fd · descriptor (1) · window (0 or 1) · dictionary id (0, 1, 2 or 4) · content size (0, 1, 2, 4 or 8)
 *              · blocks · checksum (0 or 4)
 *   block      3 bytes little-endian: bit 0 last · bits 1 to 2 type (0 raw, 1 one byte repeated, 2 compressed) · the rest: size
 *   skippable  magic 5? 2a 4d 18 · 4 bytes little-endian: size · so many bytes, which mean nothing to us
 *
 * Source: RFC 8878, 3.1.
 */
export class ZstdFrames {
  /**
   * The frames in pieces, the last piece of each marked; skippable frames are left out.
   * @throws BrokenImage for what is truncated, or isn't a frame
   */
  async *split(chunks: AsyncIterable<Buffer>): AsyncGenerator<{ data: Buffer; last: boolean }, void, void> {
    const source = new ByteSource(chunks);
    try {
      for (;;) {
        const magic = await source.upTo(4);
        if (magic.length === 0) return;
        if (magic.length === 4 && (magic.readUInt32LE(0) & 0xfffffff0) === 0x184d2a50) {
          const size = (await exactly(source, 4)).readUInt32LE(0);
          for await (const _ of pieces(source, size)); // skipped
        } else if (magic.length === 4 && magic.readUInt32LE(0) === 0xfd2fb528) yield* frame(source, magic);
        else
          throw new BrokenImage(
            `zstd data is followed by something else, at byte ${source.position - magic.length}`,
          );
      }
    } finally {
      await source.close();
    }
  }
}

/** A block has at most as much, whoever wrote it. */
const MAX_BLOCK_BYTES = 128 * 1024;

async function* frame(source: ByteSource, magic: Buffer): AsyncGenerator<{ data: Buffer; last: boolean }> {
  const descriptor = (await exactly(source, 1))[0]!;
  const singleSegment = (descriptor & 0x20) !== 0;
  const hasChecksum = (descriptor & 0x04) !== 0;
  const contentSizeBytes = [singleSegment ? 1 : 0, 2, 4, 8][descriptor >> 6]!;
  const header = (singleSegment ? 0 : 1) + [0, 1, 2, 4][descriptor & 3]! + contentSizeBytes;
  yield {
    data: Buffer.concat([magic, Buffer.from([descriptor]), await exactly(source, header)]),
    last: false,
  };
  const buffer = Buffer.allocUnsafeSlow(MAX_BLOCK_BYTES); // used again: a piece is good until the next is asked for
  for (;;) {
    const blockHeader = await exactly(source, 3);
    const value = blockHeader.readUIntLE(0, 3);
    const lastBlock = (value & 1) !== 0;
    const type = (value >> 1) & 3;
    const size = type === 1 ? 1 : value >> 3;
    const ends = lastBlock && !hasChecksum;
    if (size > MAX_BLOCK_BYTES) throw new BrokenImage(`zstd data is broken: a block of ${size} bytes`);
    yield { data: blockHeader, last: ends && size === 0 };
    if (size > 0) yield { data: await exactly(source, size, buffer), last: ends };
    if (!lastBlock) continue;
    if (hasChecksum) yield { data: await exactly(source, 4), last: true };
    return;
  }
}

async function* pieces(source: ByteSource, size: number): AsyncGenerator<Buffer> {
  for (let left = size; left > 0; ) {
    const part = await source.some(left);
    if (!part) throw new BrokenImage("zstd data is truncated");
    left -= part.length;
    yield part;
  }
}

async function exactly(source: ByteSource, size: number, into?: Buffer<ArrayBuffer>): Promise<Buffer> {
  const bytes = await source.upTo(size, into);
  if (bytes.length < size) throw new BrokenImage("zstd data is truncated");
  return bytes;
}
