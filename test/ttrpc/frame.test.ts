import { describe, expect, it } from "vitest";
import {
  decodeFrame,
  encodeFrame,
  type Frame,
  FrameReader,
  frameType,
  HEADER_BYTES,
  MAX_MESSAGE_BYTES,
} from "../../src/ttrpc/index.ts";
import { Random } from "./random.ts";

function header(length: number, streamId: number, type = 1, flags = 0): Buffer {
  const bytes = Buffer.alloc(HEADER_BYTES);
  bytes.writeUInt32BE(length, 0);
  bytes.writeUInt32BE(streamId, 4);
  bytes.writeUInt8(type, 8);
  bytes.writeUInt8(flags, 9);
  return bytes;
}

/** Payloads copied: a frame's may be a view of a chunk that the test reuses. */
function read(reader: FrameReader, chunks: Iterable<Uint8Array>): Frame[] {
  const frames: Frame[] = [];
  for (const chunk of chunks)
    for (const frame of reader.push(chunk))
      frames.push({ ...frame, payload: frame.payload && Buffer.from(frame.payload) });
  return frames;
}

describe("a frame", () => {
  it("has these bytes", () => {
    const bytes = encodeFrame(
      { streamId: 0x01020304, type: frameType.request, flags: 2 },
      Buffer.from("abc"),
    );
    expect(bytes.toString("hex")).toBe("00000003" + "01020304" + "01" + "02" + "616263");
    expect(decodeFrame(bytes)).toEqual({
      length: 3,
      streamId: 0x01020304,
      type: 1,
      flags: 2,
      payload: Buffer.from("abc"),
    });
  });

  it("of 4 MiB is the longest", () => {
    expect(encodeFrame({ streamId: 1, type: 1, flags: 0 }, new Uint8Array(MAX_MESSAGE_BYTES))).toHaveLength(
      4194314,
    );
    expect(() =>
      encodeFrame({ streamId: 1, type: 1, flags: 0 }, new Uint8Array(MAX_MESSAGE_BYTES + 1)),
    ).toThrow(RangeError);
  });

  it("that is too long is known by its header alone", () => {
    expect(decodeFrame(header(MAX_MESSAGE_BYTES + 1, 7))).toMatchObject({ streamId: 7, payload: undefined });
  });

  it("must be whole", () => {
    expect(() => decodeFrame(new Uint8Array(9))).toThrow(RangeError);
    expect(() => decodeFrame(header(1, 1))).toThrow(RangeError);
    expect(() => decodeFrame(Buffer.concat([header(1, 1), Buffer.alloc(2)]))).toThrow(RangeError);
  });

  it("is read from the middle of a larger buffer", () => {
    const bytes = Buffer.concat([
      Buffer.from("junk"),
      encodeFrame({ streamId: 9, type: 2, flags: 0 }, Buffer.from("x")),
    ]);
    expect(decodeFrame(bytes.subarray(4))).toMatchObject({ streamId: 9, type: 2, length: 1 });
  });
});

describe("FrameReader", () => {
  const stream = Buffer.concat([
    encodeFrame({ streamId: 1, type: 1, flags: 0 }, Buffer.from("first")),
    encodeFrame({ streamId: 3, type: 1, flags: 0 }, Buffer.alloc(0)),
    encodeFrame({ streamId: 5, type: 3, flags: 1 }, Buffer.from("third")),
  ]);
  const whole = read(new FrameReader(), [stream]);

  it("finds three frames in one chunk", () => {
    expect(whole.map((frame) => [frame.streamId, Buffer.from(frame.payload!).toString()])).toEqual([
      [1, "first"],
      [3, ""],
      [5, "third"],
    ]);
  });

  it("finds the same however the stream is cut", () => {
    for (let first = 0; first <= stream.length; first++) {
      for (let second = first; second <= stream.length; second++) {
        const reader = new FrameReader();
        const chunks = [stream.subarray(0, first), stream.subarray(first, second), stream.subarray(second)];
        expect(read(reader, chunks)).toEqual(whole);
        expect(reader.atFrameEnd).toBe(true);
      }
    }
    const bytes = [...stream].map((byte) => Buffer.from([byte]));
    expect(read(new FrameReader(), bytes)).toEqual(whole);
  });

  it("knows whether it is inside a frame", () => {
    for (let cut = 0; cut <= 15; cut++) {
      const reader = new FrameReader();
      read(reader, [stream.subarray(0, cut)]);
      expect(reader.atFrameEnd).toBe(cut === 0 || cut === 15);
    }
  });

  it("skips the payload of a frame that is too long, wherever it is cut", () => {
    const size = MAX_MESSAGE_BYTES + 3;
    const long = Buffer.concat([header(size, 11), Buffer.alloc(size, 1), stream]);
    for (const cut of [1, 9, 10, 11, 4096, size + 9, size + 10, size + 11, size + 20]) {
      const reader = new FrameReader();
      const frames = read(reader, [long.subarray(0, cut), long.subarray(cut)]);
      expect(frames[0]).toEqual({ length: size, streamId: 11, type: 1, flags: 0, payload: undefined });
      expect(frames.slice(1)).toEqual(whole);
      expect(reader.atFrameEnd).toBe(true);
    }
  });

  it("reports a frame that is too long as soon as its header is there", () => {
    const reader = new FrameReader();
    expect(read(reader, [header(0xffff_ffff, 13)])).toMatchObject([{ streamId: 13, payload: undefined }]);
    expect(reader.atFrameEnd).toBe(false);
  });

  it("holds no more than what has come", () => {
    const readers = Array.from({ length: 1000 }, () => new FrameReader());
    const before = process.memoryUsage().arrayBuffers;
    for (const reader of readers)
      read(reader, [Buffer.concat([header(MAX_MESSAGE_BYTES, 1), Buffer.alloc(1)])]);
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(64 * 1024 * 1024); // announced: 4 GiB
  });

  it("puts a payload of 4 MiB together from small pieces", () => {
    const payload = new Random(1).bytes(64 * 1024);
    const big = Buffer.concat(Array.from({ length: 64 }, () => payload));
    const bytes = encodeFrame({ streamId: 1, type: 1, flags: 0 }, big);
    const chunks = Array.from({ length: Math.ceil(bytes.length / 1000) }, (_, i) =>
      bytes.subarray(i * 1000, i * 1000 + 1000),
    );
    const [frame] = read(new FrameReader(), chunks);
    expect(Buffer.compare(big, frame!.payload!)).toBe(0);
  });

  it.each([1, 2, 3, 4, 5, 6, 7, 8])("cuts random streams in random places, seed %i", (seed) => {
    const random = new Random(seed);
    const sent = Array.from({ length: 50 }, () => ({
      streamId: random.int(2 ** 32),
      type: random.int(256),
      flags: random.int(256),
      payload: random.bytes(random.int(3) === 0 ? random.int(40_000) : random.int(30)),
    }));
    const bytes = Buffer.concat(sent.map(({ payload, ...rest }) => encodeFrame(rest, payload)));
    const chunks: Buffer[] = [];
    for (let at = 0; at < bytes.length; ) {
      const size = random.int(4) === 0 ? random.int(70_000) : random.int(12);
      chunks.push(bytes.subarray(at, at + size));
      at += size;
    }
    // Compared as text: a comparison byte by byte of arrays this long takes a second.
    const line = ({ streamId, type, flags, payload }: Omit<Frame, "length">) =>
      `${streamId} ${type} ${flags} ${Buffer.from(payload!).toString("hex")}`;
    expect(read(new FrameReader(), chunks).map(line)).toEqual(sent.map(line));
  });
});
