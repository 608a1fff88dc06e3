// Protobuf's wire format: what the generated codecs in generated/ are written in terms of, and what
// src/ttrpc/message.ts uses directly. Nothing here knows a message.
//
// Why not protobufjs's own runtime: with static code for these definitions it costs cedanad 10 ms at every
// start (this: 2 ms), and its 64-bit integers are objects of a library, where `bigint` says the same.

/**
 * Thrown for bytes that are not a message of the expected type. Whoever decodes a request turns it into
 * INVALID_ARGUMENT; whoever decodes a file, into a broken file.
 */
export class WireError extends Error {
  override name = "WireError";
}

/** What a message type offers. `T` is what decoding gives, `I` what encoding takes. */
export interface MessageType<T, I = T> {
  /** Full name, as in an Any's type URL without its host. */
  readonly name: string;
  /** @throws TypeError when a value does not have the field's type */
  encode(message: I): Uint8Array;
  /**
   * Decodes one message. Fields of an unknown number are skipped; `bytes` fields are views of `bytes`.
   * @throws WireError
   */
  decode(bytes: Uint8Array): T;
  /** Appends the message's fields to a writer. */
  write(message: I, writer: Writer): void;
}

/** The wire types; 3 and 4 are the groups that nothing has written for years. */
export const wireType = { varint: 0, fixed64: 1, bytes: 2, startGroup: 3, endGroup: 4, fixed32: 5 } as const;

/** Groups deeper than this are refused: skipping them recurses. */
const maxGroupDepth = 32;

const strictUtf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

export class Reader {
  readonly bytes: Uint8Array;
  /** Next byte to read. */
  position = 0;
  /** Where the message ends. */
  readonly end: number;
  #view: DataView | undefined;

  constructor(bytes: Uint8Array) {
    this.bytes = bytes;
    this.end = bytes.length;
  }

  get done(): boolean {
    return this.position >= this.end;
  }

  /** A field's key: `number << 3 | wireType`. Field number 0 does not exist. */
  tag(): number {
    const tag = this.uint32();
    if (tag >>> 3 === 0) throw new WireError("field number 0");
    return tag;
  }

  /** A varint of up to 10 bytes, its low 32 bits (a negative int32 takes all ten). */
  uint32(): number {
    const { bytes, end } = this;
    let position = this.position;
    let value = 0;
    for (let shift = 0; shift < 70; shift += 7) {
      if (position >= end) throw new WireError("varint is cut short");
      const byte = bytes[position++]!;
      if (shift < 32) value |= (byte & 0x7f) << shift;
      if (byte < 0x80) {
        this.position = position;
        return value >>> 0;
      }
    }
    throw new WireError("varint of more than 10 bytes");
  }

  int32(): number {
    return this.uint32() | 0;
  }

  sint32(): number {
    const value = this.uint32();
    return (value >>> 1) ^ -(value & 1);
  }

  uint64(): bigint {
    const { bytes, end } = this;
    let position = this.position;
    let value = 0n;
    let low = 0; // up to 49 bits, exact in a double; most values end here and never touch a bigint loop
    for (let shift = 0; shift < 70; shift += 7) {
      if (position >= end) throw new WireError("varint is cut short");
      const byte = bytes[position++]!;
      if (shift < 49) low += (byte & 0x7f) * 2 ** shift;
      else value |= BigInt(byte & 0x7f) << BigInt(shift);
      if (byte < 0x80) {
        this.position = position;
        return shift < 49 ? BigInt(low) : BigInt.asUintN(64, value | BigInt(low));
      }
    }
    throw new WireError("varint of more than 10 bytes");
  }

  int64(): bigint {
    return BigInt.asIntN(64, this.uint64());
  }

  sint64(): bigint {
    const value = this.uint64();
    return (value >> 1n) ^ -(value & 1n);
  }

  bool(): boolean {
    return this.uint64() !== 0n;
  }

  fixed32(): number {
    return this.#fixed(4).getUint32(this.position - 4, true);
  }

  sfixed32(): number {
    return this.#fixed(4).getInt32(this.position - 4, true);
  }

  fixed64(): bigint {
    return this.#fixed(8).getBigUint64(this.position - 8, true);
  }

  sfixed64(): bigint {
    return this.#fixed(8).getBigInt64(this.position - 8, true);
  }

  float(): number {
    return this.#fixed(4).getFloat32(this.position - 4, true);
  }

  double(): number {
    return this.#fixed(8).getFloat64(this.position - 8, true);
  }

  /** A length and that many bytes; a view, not a copy. */
  bytesField(): Uint8Array {
    const length = this.uint32();
    const start = this.position;
    if (length > this.end - start) throw new WireError(`${length} bytes announced, ${this.end - start} left`);
    this.position = start + length;
    return this.bytes.subarray(start, start + length);
  }

  /** @throws WireError for bytes that are not UTF-8, as Go's decoder refuses them too */
  string(): string {
    const bytes = this.bytesField();
    if (bytes.length === 0) return "";
    if (bytes.length <= 32) {
      let text = "";
      for (const byte of bytes) {
        if (byte >= 0x80) return decodeUtf8(bytes);
        text += String.fromCharCode(byte);
      }
      return text;
    }
    return decodeUtf8(bytes);
  }

  /** Skips the value of a field whose key has just been read. */
  skip(tag: number, depth = 0): void {
    switch (tag & 7) {
      case wireType.varint:
        this.uint32();
        return;
      case wireType.fixed64:
        this.#advance(8);
        return;
      case wireType.bytes:
        this.bytesField();
        return;
      case wireType.fixed32:
        this.#advance(4);
        return;
      case wireType.startGroup:
        if (depth >= maxGroupDepth) throw new WireError("groups nested too deep");
        for (;;) {
          const inner = this.tag();
          if ((inner & 7) === wireType.endGroup) {
            if (inner >>> 3 !== tag >>> 3) throw new WireError("group ends with another field's number");
            return;
          }
          this.skip(inner, depth + 1);
        }
      default:
        throw new WireError(`wire type ${tag & 7}`);
    }
  }

  #advance(count: number): void {
    if (count > this.end - this.position) throw new WireError("value is cut short");
    this.position += count;
  }

  #fixed(count: number): DataView {
    this.#advance(count);
    this.#view ??= new DataView(this.bytes.buffer, this.bytes.byteOffset, this.bytes.byteLength);
    return this.#view;
  }
}

function decodeUtf8(bytes: Uint8Array): string {
  try {
    return strictUtf8.decode(bytes);
  } catch {
    throw new WireError("string is not UTF-8");
  }
}

export class Writer {
  #buffer: Buffer;
  #length = 0;

  constructor(size = 256) {
    this.#buffer = Buffer.allocUnsafe(size);
  }

  /** What has been written. The writer must not be used afterwards: the bytes are its buffer. */
  finish(): Uint8Array {
    return this.#buffer.subarray(0, this.#length);
  }

  get length(): number {
    return this.#length;
  }

  uint32(value: number): this {
    this.#reserve(5);
    let rest = value >>> 0;
    while (rest > 0x7f) {
      this.#buffer[this.#length++] = (rest & 0x7f) | 0x80;
      rest >>>= 7;
    }
    this.#buffer[this.#length++] = rest;
    return this;
  }

  /** A negative number takes ten bytes: it is extended to 64 bits first. */
  int32(value: number): this {
    return value < 0 ? this.uint64(value) : this.uint32(value);
  }

  sint32(value: number): this {
    return this.uint32((value << 1) ^ (value >> 31));
  }

  uint64(value: bigint | number): this {
    this.#reserve(10);
    if (value >= 0 && value <= Number.MAX_SAFE_INTEGER) {
      // Most values: several times quicker than by bigint.
      let small = Number(value);
      while (small > 0x7f) {
        this.#buffer[this.#length++] = (small % 0x80) | 0x80;
        small = Math.floor(small / 0x80);
      }
      this.#buffer[this.#length++] = small;
      return this;
    }
    let rest = BigInt.asUintN(64, BigInt(value));
    while (rest > 0x7fn) {
      this.#buffer[this.#length++] = Number(rest & 0x7fn) | 0x80;
      rest >>= 7n;
    }
    this.#buffer[this.#length++] = Number(rest);
    return this;
  }

  int64(value: bigint | number): this {
    return this.uint64(value);
  }

  sint64(value: bigint | number): this {
    const wide = BigInt(value);
    return this.uint64((wide << 1n) ^ (wide >> 63n));
  }

  bool(value: boolean): this {
    return this.uint32(value ? 1 : 0);
  }

  fixed32(value: number): this {
    this.#reserve(4);
    this.#length = this.#buffer.writeUInt32LE(value >>> 0, this.#length);
    return this;
  }

  sfixed32(value: number): this {
    return this.fixed32(value);
  }

  fixed64(value: bigint | number): this {
    this.#reserve(8);
    this.#length = this.#buffer.writeBigUInt64LE(BigInt.asUintN(64, BigInt(value)), this.#length);
    return this;
  }

  sfixed64(value: bigint | number): this {
    return this.fixed64(value);
  }

  float(value: number): this {
    this.#reserve(4);
    this.#length = this.#buffer.writeFloatLE(value, this.#length);
    return this;
  }

  double(value: number): this {
    this.#reserve(8);
    this.#length = this.#buffer.writeDoubleLE(value, this.#length);
    return this;
  }

  bytes(value: Uint8Array): this {
    return this.uint32(value.length).raw(value);
  }

  /** Bytes that are already keys and values. */
  raw(value: Uint8Array): this {
    this.#reserve(value.length);
    this.#buffer.set(value, this.#length);
    this.#length += value.length;
    return this;
  }

  string(value: string): this {
    if (typeof value !== "string") throw new TypeError(`a string is expected, not ${typeof value}`);
    const length = Buffer.byteLength(value);
    this.uint32(length);
    this.#reserve(length);
    this.#length += this.#buffer.write(value, this.#length, length, "utf8");
    return this;
  }

  /**
   * Begins a value whose length is not known yet, and returns where it begins for `close`. One byte is left
   * for the length, which most messages fit; a longer one is moved.
   */
  open(tag: number): number {
    this.uint32(tag);
    this.#reserve(1);
    return ++this.#length;
  }

  close(start: number): void {
    const size = this.#length - start;
    if (size > 0x7f) {
      const extra = varintSize(size) - 1;
      this.#reserve(extra);
      this.#buffer.copyWithin(start + extra, start, this.#length);
      const end = this.#length + extra;
      this.#length = start - 1;
      this.uint32(size);
      this.#length = end;
    } else {
      this.#buffer[start - 1] = size;
    }
  }

  #reserve(count: number): void {
    const needed = this.#length + count;
    if (needed <= this.#buffer.length) return;
    const bigger = Buffer.allocUnsafe(Math.max(needed, this.#buffer.length * 2));
    bigger.set(this.#buffer.subarray(0, this.#length));
    this.#buffer = bigger;
  }
}

function varintSize(value: number): number {
  let size = 1;
  for (let rest = value; rest > 0x7f; rest = Math.floor(rest / 128)) size++;
  return size;
}
