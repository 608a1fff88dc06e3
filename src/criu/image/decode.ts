import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { basename } from "node:path";
import { InvalidRequest, Unsupported } from "../../errors/index.ts";
import { rawKindOf } from "./format.ts";
import { stringify } from "./json.ts";
import { prettify } from "./pretty.ts";
import { type Blob, type ImageEntry, ImageReader } from "./read.ts";
import { BASE64_LINE_BYTES, base64Lines } from "./text.ts";

/** Of base64 in one go: whole lines, so that pieces can be joined. */
const BLOB_CHUNK_BYTES = BASE64_LINE_BYTES * 8192;
const BATCH_CHARS = 64 * 1024;
/** What follows a message is one JSON string. V8, jq and crit all stop somewhere; a file this big isn't read as JSON. */
const MAX_BLOB_BYTES = 256 * 1024 * 1024;

export interface DecodeOptions {
  /** what lies behind messages (pipe contents, deleted files …); false: only its size, as `crit decode --nopl`. Default true */
  payload?: boolean;
  /** numbers as people read them: addresses in hexadecimal, flags by name … as `crit decode --pretty`. Default false */
  pretty?: boolean;
  /** the file's name, which tells what a raw image is; default: that of the path */
  name?: string;
}

/**
 * An image as JSON text, as `crit decode` has it, one entry a line:
 *
 *   { "magic": "PSTREE", "entries": [ { "pid": 1, … }, … ] }        "extra" in an entry: the data behind it
 *   { "magic": "RAW", "extra": "<base64>" }                          what another tool wrote
 *
 * An image of version 1.0 also has "__version": "1.0". src/criu/image/value.ts has the other names with underscores.
 * @throws ImageFault      where it is broken
 * @throws InvalidRequest  for memory pages: their pagemap says what they are
 * @throws Unsupported     for data of more than 256 MiB behind one message, unless `payload` is false
 */
export async function* decodeImage(path: string, options: DecodeOptions = {}): AsyncGenerator<string> {
  const name = options.name ?? basename(path);
  const raw = rawKindOf(name);
  if (raw === "pages")
    throw new InvalidRequest(
      `${name} holds memory pages, which have no JSON: the pagemap image with its number says which`,
    );
  if (raw === "opaque") {
    yield* decodeRaw(path, options);
    return;
  }
  await using image = await ImageReader.open(path, { name });
  const version = image.version === "1.0" ? `, "__version": "1.0"` : "";
  yield `{"magic": ${JSON.stringify(image.format.name)}${version}, "entries": [`;
  let separator = "\n";
  let text = ""; // of entries without data, many at once
  for await (const entry of image.entries()) {
    text += separator + stringify(options.pretty ? prettify(entry.message, entry.value) : entry.value);
    separator = ",\n";
    if (entry.extra) {
      yield Object.keys(entry.value).length === 0
        ? `${text.slice(0, -1)}"extra": `
        : `${text.slice(0, -1)}, "extra": `;
      text = "}";
      yield* (options.payload ?? true)
        ? decodeExtra(image, entry)
        : [JSON.stringify(`... <${sizeOfExtra(entry)}>`)];
    } else if (text.length >= BATCH_CHARS) {
      yield text;
      text = "";
    }
  }
  yield `${text}\n]}\n`;
}

async function* decodeExtra(image: ImageReader, { extra, offset }: ImageEntry): AsyncGenerator<string> {
  switch (extra!.kind) {
    case "blob":
    case "segment":
      yield* decodeBlob(image, extra!.data, offset);
      yield* decodePadding(image, extra!.data);
      return;
    case "semaphores": {
      const bytes = await image.blob(extra!.data);
      const values = Array.from({ length: bytes.length / 2 }, (_, i) => bytes.readUInt16LE(2 * i));
      yield JSON.stringify(values);
      yield* decodePadding(image, extra!.data);
      return;
    }
    case "queues":
      yield `{"inq": `;
      yield* decodeBlob(image, extra!.received, offset);
      yield `, "outq": `;
      yield* decodeBlob(image, extra!.sent, offset);
      yield "}";
      return;
    case "messages":
      yield "[";
      for (const [i, { head, text }] of extra!.messages.entries()) {
        yield `${i > 0 ? ", " : ""}${stringify(head)}, `;
        yield* decodeBlob(image, text, offset);
      }
      yield "]";
      yield* decodePaddings(
        image,
        extra!.messages.map(({ text }) => text),
      );
  }
}

/** CRIU pads messages with what its buffer held before. */
async function* decodePaddings(image: ImageReader, blobs: readonly Blob[]): AsyncGenerator<string> {
  const paddings: string[] = [];
  for (const blob of blobs) paddings.push(base64Lines((await image.padding(blob)) ?? Buffer.alloc(0)));
  if (paddings.some((padding) => padding !== "")) yield `, "__padding": ${JSON.stringify(paddings)}`;
}

/** Zeros are understood; anything else is kept beside the extra. */
async function* decodePadding(image: ImageReader, blob: Blob): AsyncGenerator<string> {
  const padding = await image.padding(blob);
  if (padding) yield `, "__padding": ${JSON.stringify(base64Lines(padding))}`;
}

async function* decodeBlob(image: ImageReader, blob: Blob, offset: number): AsyncGenerator<string> {
  if (blob.length > MAX_BLOB_BYTES)
    throw new Unsupported(
      `${image.name} at ${offset}: ${blob.length} bytes of data are too many for one JSON string; decode without payload`,
    );
  yield '"';
  for (let at = 0; at < blob.length; at += BLOB_CHUNK_BYTES) {
    const bytes = await image.blob(blob, at, BLOB_CHUNK_BYTES);
    yield base64Lines(bytes).replaceAll("\n", "\\n");
  }
  yield '"';
}

async function* decodeRaw(path: string, options: DecodeOptions): AsyncGenerator<string> {
  const { size } = await stat(path);
  yield `{"magic": "RAW", "extra": `;
  if (options.payload === false) yield JSON.stringify(`... <${readableSize(size)}>`);
  else if (size > MAX_BLOB_BYTES)
    throw new Unsupported(`${path}: ${size} bytes are too many for one JSON string; decode without payload`);
  else {
    yield '"';
    let rest = Buffer.alloc(0);
    for await (const chunk of createReadStream(path) as AsyncIterable<Buffer>) {
      const bytes = Buffer.concat([rest, chunk]);
      const whole = bytes.length - (bytes.length % BASE64_LINE_BYTES);
      yield base64Lines(bytes.subarray(0, whole)).replaceAll("\n", "\\n");
      rest = bytes.subarray(whole);
    }
    yield `${base64Lines(rest).replaceAll("\n", "\\n")}"`;
  }
  yield "}\n";
}

function sizeOfExtra({ extra, value }: ImageEntry): string {
  switch (extra!.kind) {
    case "queues":
      return readableSize(extra!.received.length + extra!.sent.length);
    case "messages":
      return readableSize(extra!.messages.reduce((sum, { text }) => sum + text.length, 0));
    case "segment":
      return readableSize(Number(value.size ?? 0));
    default:
      return readableSize(extra!.data.length);
  }
}

/** As crit: 5B, 1.5KB, 2MB. */
function readableSize(bytes: number): string {
  let size = bytes;
  for (const unit of ["", "K", "M", "G", "T"]) {
    if (size < 1024) return `${Number.isInteger(size) ? size : size.toFixed(1)}${unit}B`;
    size /= 1024;
  }
  return `${size.toFixed(1)}PB`;
}
