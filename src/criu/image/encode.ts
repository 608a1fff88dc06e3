import { InvalidRequest } from "../../errors/index.ts";
import { formatOfName, IMG_COMMON, IMG_SERVICE, type ImageFormat, isService } from "./format.ts";
import { piecesOf } from "./json.ts";
import { encodeMessage } from "./message.ts";
import { fromBase64 } from "./text.ts";
import type { Message, Value } from "./value.ts";

/**
 * The bytes of an image from its JSON, as decodeImage and `crit decode` write it. What decodeImage made gives the same bytes.
 * One entry at a time; of an object whose "magic" comes after its "entries" (`jq -S`), the entries wait in memory.
 * @throws InvalidRequest that names the entry and the field which is wrong
 */
export async function* encodeImage(json: AsyncIterable<string | Uint8Array>): AsyncGenerator<Uint8Array> {
  let magic: string | undefined;
  let version = "1.1";
  let raw: Buffer | undefined;
  let encoder: Encoder | undefined;
  let hasEntries = false;
  const waiting: unknown[] = [];
  for await (const piece of piecesOf(json, "entries")) {
    if ("listKey" in piece) {
      waiting.push(piece.value);
      hasEntries = true;
      // With the version before its entries, as decodeImage has it, none of them wait.
      if (magic === undefined) continue;
      if (!encoder) {
        encoder = new Encoder(magic);
        yield encoder.words(version);
      }
      for (const entry of waiting.splice(0)) yield* encoder.entry(entry);
    } else if (piece.key === "magic") magic = String(piece.value);
    else if (piece.key === "__version") {
      if (encoder) throw new InvalidRequest("the JSON has __version behind entries that are already written");
      version = String(piece.value);
    } else if (piece.key === "extra") raw = fieldBytes(piece.value, "extra");
    else if (piece.key === "entries") throw new InvalidRequest("entries is not a list");
    else throw new InvalidRequest(`the JSON has an unknown member ${piece.key}`);
  }
  if (magic === undefined) throw new InvalidRequest("the JSON has no magic: it is not an image's");
  if (magic === "RAW") {
    if (raw === undefined || hasEntries) throw new InvalidRequest("a RAW image has extra, and no entries");
    yield raw;
    return;
  }
  if (raw !== undefined) throw new InvalidRequest("only a RAW image has extra outside of its entries");
  if (!encoder) {
    encoder = new Encoder(magic);
    yield encoder.words(version);
  }
  for (const entry of waiting) yield* encoder.entry(entry);
}

class Encoder {
  readonly #format: ImageFormat;
  #count = 0;
  /** a ghost file in chunks: they follow its first entry */
  #chunks = false;

  constructor(magic: string) {
    const format = formatOfName(magic);
    if (!format) throw new InvalidRequest(`the magic ${JSON.stringify(magic)} is of no image that we know`);
    this.#format = format;
  }

  words(version: string): Buffer {
    if (version !== "1.0" && version !== "1.1")
      throw new InvalidRequest(`__version is ${version}, not 1.0 or 1.1`);
    const type = word(this.#format.magic);
    if (this.#format.name === "INVENTORY" || version === "1.0") return type;
    return Buffer.concat([word(isService(this.#format) ? IMG_SERVICE : IMG_COMMON), type]);
  }

  *entry(entry: unknown): Generator<Uint8Array> {
    const at = this.#count++;
    const path = `entry ${at}`;
    if (typeof entry !== "object" || entry === null || Array.isArray(entry))
      throw new InvalidRequest(`${path} is not an object`);
    const { extra, __padding, ...value } = entry as Record<string, Value>;
    const format = this.#format;
    let message = at === 0 && format.head ? format.head : format.message;
    if (format.extra?.kind === "ghost" && at > 0) {
      if (!this.#chunks)
        throw new InvalidRequest(`${path}: only a ghost file with chunks has more than one entry`);
      message = "ghost_chunk_entry";
    }
    yield* sized(message, value, path);
    if (format.extra?.kind === "ghost" && at === 0 && value.chunks === true) this.#chunks = true;
    else if (format.extra) yield* this.#extra(value, extra, __padding, path);
    else if (extra !== undefined) throw new InvalidRequest(`${path}: ${format.name} images have no extra`);
  }

  *#extra(
    value: Message,
    extra: Value | undefined,
    padding: Value | undefined,
    path: string,
  ): Generator<Uint8Array> {
    const { kind, sizes = [] } = this.#format.extra as { kind: string; sizes?: readonly string[] };
    const paddings = Array.isArray(padding) ? padding : padding === undefined ? [] : [padding];
    const own = (i = 0) =>
      paddings[i] === undefined ? undefined : fieldBytes(paddings[i], `${path}.__padding`);
    const wanted = (fields: readonly string[]) =>
      fields.reduce((sum, field) => sum + Number(value[field] ?? 0), 0);
    switch (kind) {
      case "blob":
        yield exactly(fieldBytes(extra, `${path}.extra`), wanted(sizes), sizes.join(" + "), path);
        return;
      case "ghost": {
        const bytes = fieldBytes(extra, `${path}.extra`);
        yield this.#chunks ? exactly(bytes, wanted(["len"]), "len", path) : bytes;
        return;
      }
      case "segment": {
        if (value.in_pagemaps === true) return;
        yield* padded(exactly(fieldBytes(extra, `${path}.extra`), wanted(["size"]), "size", path), 4, own());
        return;
      }
      case "semaphores": {
        const isList =
          Array.isArray(extra) &&
          extra.every((item) => Number.isInteger(item) && Number(item) >= 0 && Number(item) < 65536);
        if (!isList) throw new InvalidRequest(`${path}.extra is not a list of 16-bit numbers`);
        const bytes = Buffer.alloc(2 * extra.length);
        for (const [i, item] of extra.entries()) bytes.writeUInt16LE(Number(item), 2 * i);
        yield* padded(exactly(bytes, 2 * wanted(["nsems"]), "nsems", path), 8, own());
        return;
      }
      case "queues": {
        const { inq, outq } = (extra ?? {}) as Record<string, Value>;
        yield exactly(fieldBytes(inq, `${path}.extra.inq`), wanted([sizes[0]!]), sizes[0]!, path);
        yield exactly(fieldBytes(outq, `${path}.extra.outq`), wanted([sizes[1]!]), sizes[1]!, path);
        return;
      }
      case "messages": {
        const list = Array.isArray(extra) ? extra : [];
        if (list.length !== 2 * wanted(["qnum"]))
          throw new InvalidRequest(`${path}.extra must have a message and its text for each of qnum`);
        for (let i = 0; i < list.length; i += 2) {
          const head = list[i] as Message;
          yield* sized("ipc_msg", head, `${path}.extra[${i}]`);
          const text = fieldBytes(list[i + 1], `${path}.extra[${i + 1}]`);
          yield* padded(exactly(text, Number(head.msize), "msize", path), 8, own(i / 2));
        }
      }
    }
  }
}

function* sized(message: string, value: Message, path: string): Generator<Uint8Array> {
  let bytes: Uint8Array;
  try {
    bytes = encodeMessage(message, value);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    throw new InvalidRequest(`${path}: ${error.message}`, { cause: error });
  }
  yield word(bytes.length);
  yield bytes;
}

function exactly(bytes: Buffer, length: number, fields: string, path: string): Buffer {
  if (bytes.length === length) return bytes;
  throw new InvalidRequest(`${path}: ${fields} says ${length} bytes, extra has ${bytes.length}`);
}

function* padded(bytes: Buffer, multiple: number, padding?: Buffer): Generator<Uint8Array> {
  yield bytes;
  const length = (multiple - (bytes.length % multiple)) % multiple;
  yield padding?.length === length ? padding : Buffer.alloc(length);
}

function fieldBytes(value: unknown, path: string): Buffer {
  if (typeof value !== "string") throw new InvalidRequest(`${path} is not base64`);
  try {
    return fromBase64(value);
  } catch (error) {
    throw new InvalidRequest(`${path} ${(error as Error).message}`, { cause: error });
  }
}

function word(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}
