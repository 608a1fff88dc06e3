import { type FileHandle, open } from "node:fs/promises";
import { basename } from "node:path";
import { BrokenImage, InvalidRequest } from "../../errors/index.ts";
import { readApart } from "../../linux/apart.ts";
import { WireError } from "../../proto/wire.ts";
import {
  type ExtraKind,
  formatOfMagic,
  IMG_COMMON,
  IMG_SERVICE,
  type ImageFormat,
  isService,
} from "./format.ts";
import { decodeMessage, parseMessage } from "./message.ts";
import type { Message } from "./value.ts";

/** Bytes of a file, that only are read when somebody wants them. */
export interface Blob {
  readonly offset: number;
  readonly length: number;
  /** zeros behind it, up to a multiple of 4 or 8 bytes */
  readonly padding: number;
}

export type Extra =
  | { readonly kind: "blob" | "segment" | "semaphores"; readonly data: Blob }
  | { readonly kind: "queues"; readonly received: Blob; readonly sent: Blob }
  | {
      readonly kind: "messages";
      readonly messages: readonly { readonly head: Message; readonly text: Blob }[];
    };

export interface ImageEntry {
  /** of its size word, in the file */
  readonly offset: number;
  readonly message: string;
  readonly value: Message;
  readonly extra: Extra | undefined;
}

/** A broken image: where, in which file. */
export class ImageFault extends BrokenImage {
  override name = "ImageFault";
  readonly file: string;
  readonly offset: number;
  readonly what: string;
  /** its words, a size or the file's end, or a message */
  readonly kind: "magic" | "length" | "message";

  constructor(kind: ImageFault["kind"], file: string, offset: number, what: string, options?: ErrorOptions) {
    super(`${file} at ${offset}: ${what}`, options);
    this.kind = kind;
    this.file = file;
    this.offset = offset;
    this.what = what;
  }
}

const BUFFER_BYTES = 256 * 1024;
/** What is read with the words: all of a small image. */
const FIRST_BYTES = 16 * 1024;
/** Up to here an image is read by one call instead of four: each waits for a thread. */
const WHOLE_BYTES = 1024 * 1024;
/** No message is longer. The longest that we have seen are some 100 KiB (a seccomp or AppArmor policy, a mm with its areas: 10 MB). */
const MAX_MESSAGE_BYTES = 512 * 1024 * 1024;

interface ImageReaderOptions {
  /** encodeMessage will be asked for the same bytes (default true); else reading is twice as quick */
  exact?: boolean;
  /** the name by which errors call it; default: the file's own */
  name?: string;
}

/**
 * An image file, entry by entry: needs the memory of one entry. What lies behind an entry is skipped and can be read by `blob`.
 *
 *   await using image = await ImageReader.open(path);
 *   for await (const entry of image.entries()) …
 */
export class ImageReader implements AsyncDisposable {
  readonly name: string;
  readonly format: ImageFormat;
  /** "1.0" has only the type word */
  readonly version: "1.0" | "1.1";
  /** of the file, in bytes */
  readonly size: number;
  /** undefined: all of it is in the buffer */
  readonly #file: FileHandle | undefined;
  readonly #decode: typeof decodeMessage;
  #position: number;
  #buffer: Buffer = Buffer.alloc(0);
  #bufferStart = 0;

  private constructor(
    file: FileHandle | undefined,
    size: number,
    head: { format: ImageFormat; version: "1.0" | "1.1"; length: number },
    { name, exact }: { name: string; exact: boolean },
  ) {
    this.#file = file;
    this.#decode = exact ? decodeMessage : parseMessage;
    this.name = name;
    this.size = size;
    this.format = head.format;
    this.version = head.version;
    this.#position = head.length;
  }

  /**
   * @throws ImageFault  when its words are not those of an image (raw images have none)
   * @throws the error of open(2) or read(2)
   */
  static async open(path: string, options: ImageReaderOptions = {}): Promise<ImageReader> {
    const file = await open(path);
    try {
      const { size } = await file.stat();
      const name = options.name ?? basename(path);
      const first = Buffer.allocUnsafe(Math.min(size, FIRST_BYTES));
      const { bytesRead } = await file.read(first, 0, first.length, 0);
      const head = readWords(name, first.subarray(0, Math.min(bytesRead, 8)));
      const image = new ImageReader(file, size, head, { name, exact: options.exact ?? true });
      image.#buffer = first.subarray(0, bytesRead);
      return image;
    } catch (error) {
      await file.close();
      throw error;
    }
  }

  /** The same, for who wants all of it: read at once where it is small. @throws also what `readApart` does */
  static async openWhole(path: string): Promise<ImageReader> {
    const bytes = await readApart(path, WHOLE_BYTES).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== "EFBIG") throw error;
    });
    if (!bytes) return await ImageReader.open(path, { exact: false });
    const name = basename(path);
    const head = readWords(name, bytes.subarray(0, 8));
    const image = new ImageReader(undefined, bytes.length, head, { name, exact: false });
    image.#buffer = bytes;
    return image;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#file?.close();
  }

  /** @throws ImageFault when the file ends too early, or an entry isn't what it should be */
  async *entries(): AsyncGenerator<ImageEntry> {
    const { format } = this;
    let message = format.head ?? format.message;
    while (this.#position < this.size) {
      yield this.#entryInBuffer(message) ?? (await this.#entry(message, format.extra));
      message = format.message;
      if (format.extra?.kind !== "ghost") continue;
      message = "ghost_chunk_entry";
      // Without chunks, the first entry's extra has taken all there is.
    }
  }

  /** The bytes of a blob, from `start` on, at most `length`. */
  async blob(blob: Blob, start = 0, length = blob.length - start): Promise<Buffer> {
    return await this.#read(blob.offset + start, Math.min(length, blob.length - start), "data");
  }

  /** What stands in the place of zeros; undefined when it is zeros. */
  async padding(blob: Blob): Promise<Buffer | undefined> {
    const bytes = await this.#read(blob.offset + blob.length, blob.padding, "padding");
    return bytes.some((byte) => byte !== 0) ? Buffer.from(bytes) : undefined;
  }

  /** The quick way, for an entry without data behind it that has been read already. A pagemap has a million of these. */
  #entryInBuffer(message: string): ImageEntry | undefined {
    if (this.format.extra) return undefined;
    const offset = this.#position;
    const head = this.#inBuffer(offset, 4);
    const payload = head && this.#inBuffer(offset + 4, head.readUInt32LE(0));
    if (!payload) return undefined;
    this.#position = offset + 4 + payload.length;
    return { offset, message, value: this.#decoded(message, payload, offset), extra: undefined };
  }

  #inBuffer(position: number, length: number): Buffer | undefined {
    const start = position - this.#bufferStart;
    if (start < 0 || start + length > this.#buffer.length) return undefined;
    return this.#buffer.subarray(start, start + length);
  }

  async #entry(message: string, extra: ExtraKind | undefined): Promise<ImageEntry> {
    const offset = this.#position;
    const value = await this.#message(message);
    return { offset, message, value, extra: extra && (await this.#extra(extra, message, value, offset)) };
  }

  async #message(message: string): Promise<Message> {
    const offset = this.#position;
    const size = (await this.#take(4, `size of a ${message}`)).readUInt32LE(0);
    if (size > this.size - this.#position || size > MAX_MESSAGE_BYTES)
      throw new ImageFault(
        "length",
        this.name,
        offset,
        `a ${message} of ${size} bytes, where the file has ${this.size - this.#position} left`,
      );
    return this.#decoded(message, await this.#take(size, message), offset);
  }

  #decoded(message: string, payload: Buffer, offset: number): Message {
    try {
      return this.#decode(message, payload);
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      throw new ImageFault("message", this.name, offset, `not a ${message}: ${error.message}`, {
        cause: error,
      });
    }
  }

  async #extra(
    extra: ExtraKind,
    message: string,
    value: Message,
    offset: number,
  ): Promise<Extra | undefined> {
    const sizeOf = (field: string) => Number(value[field] ?? 0);
    switch (extra.kind) {
      case "blob": {
        const length = extra.sizes.reduce((sum, field) => sum + sizeOf(field), 0);
        return { kind: "blob", data: this.#skip(length, 1, message, offset) };
      }
      case "queues": {
        const [received, sent] = extra.sizes.map((field) => this.#skip(sizeOf(field), 1, message, offset));
        return { kind: "queues", received: received!, sent: sent! };
      }
      case "semaphores":
        return { kind: "semaphores", data: this.#skip(2 * sizeOf("nsems"), 8, message, offset) };
      case "segment": {
        const length = value.in_pagemaps === true ? 0 : sizeOf("size");
        return { kind: "segment", data: this.#skip(length, 4, message, offset) };
      }
      case "messages": {
        const messages: { head: Message; text: Blob }[] = [];
        for (let i = 0; i < sizeOf("qnum"); i++) {
          const head = await this.#message("ipc_msg");
          messages.push({ head, text: this.#skip(Number(head.msize), 8, "ipc_msg", offset) });
        }
        return { kind: "messages", messages };
      }
      case "ghost": {
        if (value.chunks === true && message === "ghost_file_entry") return undefined;
        const length = message === "ghost_chunk_entry" ? sizeOf("len") : this.size - this.#position;
        return { kind: "blob", data: this.#skip(length, 1, message, offset) };
      }
    }
  }

  #skip(length: number, multiple: number, message: string, offset: number): Blob {
    const padding = (multiple - (length % multiple)) % multiple;
    if (length + padding > this.size - this.#position)
      throw new ImageFault(
        "length",
        this.name,
        offset,
        `${length + padding} bytes of data belong to this ${message}, where the file has ${this.size - this.#position} left`,
      );
    const blob = { offset: this.#position, length, padding };
    this.#position += length + padding;
    return blob;
  }

  async #take(length: number, what: string): Promise<Buffer> {
    const bytes = await this.#read(this.#position, length, what);
    this.#position += length;
    return bytes;
  }

  /** A view of the buffer, valid until the next read. */
  async #read(position: number, length: number, what: string): Promise<Buffer> {
    if (length > this.size - position)
      throw new ImageFault(
        "length",
        this.name,
        position,
        `ends inside of the ${what}: ${length} bytes wanted, ${this.size - position} there`,
      );
    const buffered = this.#inBuffer(position, length);
    if (buffered) return buffered;
    const wanted = Math.min(Math.max(length, BUFFER_BYTES), this.size - position);
    const buffer = Buffer.allocUnsafe(wanted);
    let filled = 0;
    while (filled < wanted) {
      const { bytesRead } = await this.#file!.read(buffer, filled, wanted - filled, position + filled);
      if (bytesRead === 0)
        throw new ImageFault("length", this.name, position + filled, "was cut while we read it");
      filled += bytesRead;
    }
    this.#buffer = buffer;
    this.#bufferStart = position;
    return buffer.subarray(0, length);
  }
}

function readWords(name: string, words: Buffer) {
  if (words.length < 4)
    throw new ImageFault("magic", name, 0, `${words.length} bytes are no image: its words are missing`);
  const first = words.readUInt32LE(0);
  const hex = (word: number) => `0x${word.toString(16)}`;
  if (first !== IMG_COMMON && first !== IMG_SERVICE) {
    const format = formatOfMagic(first);
    if (!format)
      throw new ImageFault(
        "magic",
        name,
        0,
        `begins with ${hex(first)}, which no image does; raw images have no words`,
      );
    return { format, version: format.name === "INVENTORY" ? "1.1" : "1.0", length: 4 } as const;
  }
  if (words.length < 8) throw new ImageFault("magic", name, 4, "ends before its type word");
  const type = words.readUInt32LE(4);
  const format = formatOfMagic(type);
  if (!format) throw new ImageFault("magic", name, 4, `the type word ${hex(type)} is unknown`);
  const wanted = isService(format) ? IMG_SERVICE : IMG_COMMON;
  if (first !== wanted)
    throw new ImageFault(
      "magic",
      name,
      0,
      `begins with ${hex(first)}, where ${format.name} has ${hex(wanted)}`,
    );
  if (format.name === "INVENTORY") throw new ImageFault("magic", name, 0, "an inventory has one word only");
  return { format, version: "1.1", length: 8 } as const;
}

/** All entries' values of an image that is known to be small. @throws as ImageReader */
export async function readImage(path: string): Promise<Message[]> {
  await using image = await ImageReader.openWhole(path);
  const values: Message[] = [];
  for await (const { value } of image.entries()) values.push(value);
  return values;
}

/** The one entry of an image that has one. @throws ImageFault when there is none, InvalidRequest when it is of another type */
export async function readOne(path: string, formatName: string): Promise<Message> {
  await using image = await ImageReader.openWhole(path);
  if (image.format.name !== formatName)
    throw new InvalidRequest(`${path} is a ${image.format.name} image, not ${formatName}`);
  for await (const { value } of image.entries()) return value;
  throw new ImageFault("length", image.name, image.size, "has no entry");
}
