import { BrokenImage, ResourceExhausted } from "../../errors/index.ts";
import {
  BLOCK,
  decodeBlock,
  decodePax,
  type Extent,
  MAX_EXTENTS,
  type Prelude,
  rawName,
  showName,
  type TarEntry,
  toEntry,
} from "./format.ts";

/** Pax records of one member. Linux allows 64 KiB of attributes; more than this is an attack on our memory. */
const MAX_RECORDS_BYTES = 1024 * 1024;
/** A pax header, a comment for all, a long name and a long target; more would be work without end for a few compressed bytes. */
const MAX_PRELUDES = 4;
/** Writers pad to their record size, of 10 KiB as a rule. */
const MAX_PADDING_BYTES = 1024 * 1024;

/**
 * Bytes by count out of a stream of chunks. Whoever makes the chunks may use a chunk's memory again as soon as the next one is asked for,
 * so what `some` gives is good until the next call; what `upTo` gives is the caller's.
 */
export class ByteSource {
  readonly #chunks: AsyncIterator<Buffer>;
  #rest: Buffer = Buffer.alloc(0);
  /** bytes taken so far */
  position = 0;

  constructor(chunks: AsyncIterable<Buffer>) {
    this.#chunks = chunks[Symbol.asyncIterator]();
  }

  /** Ends the stream, with whoever makes its chunks. */
  async close(): Promise<void> {
    await this.#chunks.return?.();
  }

  /** The next bytes, at least one and at most `most`; undefined at the end. */
  async some(most: number): Promise<Buffer | undefined> {
    while (this.#rest.length === 0) {
      const next = await this.#chunks.next();
      if (next.done) return undefined;
      this.#rest = next.value;
    }
    const part = this.#rest.subarray(0, most);
    this.#rest = this.#rest.subarray(part.length);
    this.position += part.length;
    return part;
  }

  /**
   * Exactly so many bytes; fewer only at the end.
   * @param into  where they are put; of at least that size
   */
  async upTo(size: number, into = Buffer.allocUnsafe(size)): Promise<Buffer> {
    let length = 0;
    while (length < size) {
      const part = await this.some(size - length);
      if (!part) break;
      length += part.copy(into, length);
    }
    return into.subarray(0, length);
  }
}

export interface TarMember {
  readonly entry: TarEntry;
  /**
   * The contents of a file, piece by piece; holes are left out. Once, and before the next member; what is not read is skipped.
   * @throws BrokenImage when the archive ends in the middle
   */
  contents(): AsyncIterable<Extent & { data: Buffer }>;
}

/**
 * The members of a tar, one after another. What is malformed, cut off or followed by something else is refused: an archive is
 * read to its end or not at all.
 * @param limits.members  more are refused
 * @throws BrokenImage, Unsupported, ResourceExhausted
 */
export async function* readTar(
  source: ByteSource,
  limits: { members?: number } = {},
): AsyncGenerator<TarMember, void, void> {
  let prelude: Prelude = { pax: new Map(), longName: undefined, longLink: undefined };
  let members = 0;
  let preludes = 0;
  for (;;) {
    const at = source.position;
    const block = await source.upTo(BLOCK);
    if (block.length < BLOCK)
      throw new BrokenImage(`tar is truncated: it ends at byte ${source.position} without an end mark`);
    if (isZero(block)) break;
    const header = decodeBlock(block, at);
    if (/[xgLK]/.test(header.flag) && ++preludes > MAX_PRELUDES)
      throw new BrokenImage(`tar: more records than a member can have, at byte ${at}`);
    if (header.flag === "x" || header.flag === "g" || header.flag === "L" || header.flag === "K") {
      const body = await readRecords(source, header.size, at);
      if (header.flag === "x") prelude.pax = decodePax(body, at);
      else if (header.flag === "L") prelude.longName = untilNul(body);
      else if (header.flag === "K") prelude.longLink = untilNul(body);
      else if ([...decodePax(body, at).keys()].some((key) => key !== "comment"))
        throw new BrokenImage(`tar: global pax records at byte ${at}: we take none but comments`);
      continue;
    }
    if (++members > (limits.members ?? Number.POSITIVE_INFINITY))
      throw new ResourceExhausted(`tar has more than ${limits.members} members`);
    const { entry, stored, sparse } = toEntry(header, prelude, at);
    prelude = { pax: new Map(), longName: undefined, longLink: undefined };
    preludes = 0;
    let left = stored;
    if (sparse) {
      const map = await readMap(source, entry, stored);
      entry.extents = map.extents;
      left -= map.bytes;
    }
    const name = showName(entry.name);
    let offset = 0;
    const take = async function* (): AsyncGenerator<Extent & { data: Buffer }> {
      for (const extent of entry.extents ?? [{ offset: 0, size: entry.size }]) {
        for (offset = extent.offset; offset < extent.offset + extent.size; ) {
          const data = await source.some(extent.offset + extent.size - offset);
          if (!data) throw new BrokenImage(`tar is truncated in the contents of ${name}`);
          left -= data.length;
          const piece = { offset, size: data.length, data };
          offset += data.length;
          yield piece;
        }
      }
    };
    yield { entry, contents: take };
    while (left > 0) {
      const skipped = await source.some(left);
      if (!skipped) throw new BrokenImage(`tar is truncated in the contents of ${name}`);
      left -= skipped.length;
    }
    const pad = (BLOCK - (stored % BLOCK)) % BLOCK;
    if ((await source.upTo(pad)).length < pad)
      throw new BrokenImage(`tar is truncated after the contents of ${name}`);
  }
  if (prelude.pax.size > 0 || prelude.longName !== undefined || prelude.longLink !== undefined)
    throw new BrokenImage("tar ends after records that belong to no member");
  await expectEnd(source);
}

async function expectEnd(source: ByteSource): Promise<void> {
  const second = await source.upTo(BLOCK);
  if (second.length < BLOCK) throw new BrokenImage("tar is truncated: half of its end mark is missing");
  let padded = 0;
  for (let part: Buffer | undefined = second; part; part = await source.some(64 * 1024)) {
    if (!isZero(part))
      throw new BrokenImage(`tar is followed by something else, before byte ${source.position}`);
    padded += part.length;
    if (padded > MAX_PADDING_BYTES)
      throw new BrokenImage("tar is followed by more zeros than a writer pads with");
  }
}

async function readRecords(source: ByteSource, size: number, at: number): Promise<Buffer> {
  if (size > MAX_RECORDS_BYTES)
    throw new ResourceExhausted(`tar: ${size} bytes of records at byte ${at} are too many`);
  const padded = Math.ceil(size / BLOCK) * BLOCK;
  const body = await source.upTo(padded);
  if (body.length < padded) throw new BrokenImage(`tar is truncated in the records at byte ${at}`);
  return body.subarray(0, size);
}

function untilNul(body: Buffer): string {
  const end = body.indexOf(0);
  return rawName(end < 0 ? body : body.subarray(0, end));
}

/** @returns the pieces of data, and the bytes that the map takes in the archive */
async function readMap(
  source: ByteSource,
  entry: TarEntry,
  stored: number,
): Promise<{ extents: Extent[]; bytes: number }> {
  const name = showName(entry.name);
  const wrong = (what: string) => new BrokenImage(`tar member ${name}: its map of holes ${what}`);
  let text = "";
  let bytes = 0;
  const lines: string[] = [];
  let wanted = 1;
  // The count says how many lines there are; blocks are read until they are all there.
  while (lines.length <= wanted) {
    if (text.length > 2 * BLOCK) throw wrong("holds something that is not a number");
    if (bytes + BLOCK > stored) throw wrong("is longer than the member");
    const block = await source.upTo(BLOCK);
    if (block.length < BLOCK) throw new BrokenImage(`tar is truncated in the map of holes of ${name}`);
    bytes += BLOCK;
    const added = (text + block.toString("latin1")).split("\n");
    text = added.pop()!;
    lines.push(...added); // a last line without its newline stays in `text`
    if (lines.length > 0) {
      if (!/^\d{1,8}$/.test(lines[0]!)) throw wrong("has no count");
      wanted = 2 * Number(lines[0]);
      if (wanted > 2 * (MAX_EXTENTS + 1)) throw wrong("is too long");
    }
  }
  const numbers = lines.slice(1, wanted + 1).map((line) => {
    if (!/^\d{1,16}$/.test(line)) throw wrong("holds something that is not a number");
    return Number(line);
  });
  const extents: Extent[] = [];
  let end = 0;
  for (let i = 0; i < numbers.length; i += 2) {
    const extent = { offset: numbers[i]!, size: numbers[i + 1]! };
    if (extent.offset < end || !(extent.offset + extent.size <= entry.size))
      throw wrong("overlaps or leads out of the file");
    end = extent.offset + extent.size;
    if (extent.size > 0) extents.push(extent);
  }
  if (extents.reduce((sum, { size }) => sum + size, 0) !== stored - bytes)
    throw wrong("does not agree with the member's size");
  return { extents, bytes };
}

const zeros = Buffer.alloc(64 * 1024);

/** Of at most 64 KiB. */
function isZero(bytes: Buffer): boolean {
  return bytes.equals(zeros.subarray(0, bytes.length));
}
