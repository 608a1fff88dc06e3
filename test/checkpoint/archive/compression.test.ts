import { execFileSync, spawnSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { gzipSync, zstdCompressSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import {
  type Compression,
  compress,
  decompress,
  detectCompression,
} from "../../../src/checkpoint/archive/compression.ts";
import { BrokenImage } from "../../../src/errors/index.ts";

const hasLz4 = spawnSync("lz4", ["--version"]).status === 0;

/** All in one buffer that is written over, as readers of files do: a chunk is good until the next is asked for. */
async function* reusing(bytes: Buffer, size: number) {
  const buffer = Buffer.alloc(size);
  for (let at = 0; at < bytes.length; at += size) {
    const length = bytes.copy(buffer, 0, at, at + size);
    yield buffer.subarray(0, length);
    buffer.fill(0xee);
  }
}

async function collect(chunks: AsyncIterable<Buffer>): Promise<Buffer> {
  const parts: Buffer[] = [];
  for await (const chunk of chunks) parts.push(Buffer.from(chunk));
  return Buffer.concat(parts);
}

const samples = {
  noise: randomBytes(3_000_000),
  words: Buffer.from("some words again and again ".repeat(300_000)),
  zeros: Buffer.alloc(5_000_000),
  nothing: Buffer.alloc(0),
  "one byte": Buffer.from("x"),
  "exactly two frames": randomBytes(8 * 1024 * 1024),
};

describe.each(Object.entries(samples))("%s", (_what, data) => {
  it.each<[Compression, string[] | undefined]>([
    ["none", undefined],
    ["gzip", ["gzip", "-dc"]],
    ["zstd", ["zstd", "-dcq"]],
    ["lz4", ["lz4", "-dcq"]],
  ])("through %s is the same again, by us and by its program", async (compression, program) => {
    if (compression === "lz4" && !hasLz4) return;
    for (const size of [1000, 1024 * 1024]) {
      const packed = await collect(compress(reusing(data, size), compression));
      if (data.length > 0 || compression !== "none") expect(detectCompression(packed)).toBe(compression);
      expect((await collect(decompress(reusing(packed, size)))).equals(data)).toBe(true);
      if (!program || size === 1000) continue;
      const [name, ...args] = program;
      expect(execFileSync(name!, args, { input: packed, maxBuffer: 2 ** 26 }).equals(data)).toBe(true);
    }
  });
});

const packed: [string, Buffer][] = [
  ["gzip", gzipSync(samples.noise)],
  ["zstd", zstdCompressSync(samples.noise)],
  ...(hasLz4
    ? [
        ["lz4", execFileSync("lz4", ["-q", "-c", "-"], { input: samples.noise, maxBuffer: 2 ** 24 })] as [
          string,
          Buffer,
        ],
      ]
    : []),
];
describe.each(packed)("%s data", (_name, bytes) => {
  it.each([
    ["small", Buffer.from("x")],
    ["long", Buffer.alloc(5_000_000, 7)],
    ["of zeros", Buffer.alloc(3_000_000)],
  ])("with something %s behind it is refused, and not waited for", async (_what, tail) => {
    await expect(collect(decompress(reusing(Buffer.concat([bytes, tail]), 65_536)))).rejects.toThrow(
      BrokenImage,
    );
  });

  it("that is cut off anywhere is refused", async () => {
    for (const length of [4, 9, 20, 1000, bytes.length >> 1, bytes.length - 1])
      await expect(collect(decompress(reusing(bytes.subarray(0, length), 65_536)))).rejects.toThrow(
        BrokenImage,
      );
  });

  it("whose reader stops leaves nothing running, and whose source fails says so", async () => {
    for await (const chunk of decompress(reusing(bytes, 1000))) {
      expect(chunk.length).toBeGreaterThan(0);
      break;
    }
    const failing = async function* () {
      yield* reusing(bytes.subarray(0, 100_000), 1000);
      throw new Error("the disk is gone");
    };
    await expect(collect(decompress(failing()))).rejects.toThrow("the disk is gone");
  });
});

it("a level that there isn't is refused", () => {
  expect(() => compress(reusing(samples.words, 1000), "gzip", 10)).toThrow(/level 10/);
  expect(() => compress(reusing(samples.words, 1000), "zstd", 0)).toThrow(/level 0/);
});
