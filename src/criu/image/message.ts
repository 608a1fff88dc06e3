import { enums, type Field, messages } from "../../proto/generated/criu_images.ts";
import { Reader, WireError, Writer, wireType } from "../../proto/wire.ts";
import { numberOf, wordsOfAddress } from "./pretty.ts";
import { base64Lines, fromBase64, fromQuotedPrintable, quotedPrintable } from "./text.ts";
import type { Message, Value } from "./value.ts";

/*
 * The messages of CRIU's images as plain objects (value.ts), from bytes and back. Bytes that decode give the same bytes back.
 */

/** Messages inside of messages, cgroups inside of cgroups. CRIU would overflow its stack long before its images got here. */
const MAX_DEPTH = 100;

const UNKNOWN = "__unknown";
const RAW = "__raw";
const BYTES = "__bytes";

interface Known {
  readonly fields: ReadonlyMap<number, Field>;
  readonly ordered: readonly Field[];
  readonly names: ReadonlySet<string>;
}
const known = new Map<string, Known>();

function tableOf(name: string): Known {
  let table = known.get(name);
  if (!table) {
    const ordered = messages[name];
    if (!ordered) throw new Error(`no message ${name} in proto/criu/images.proto`);
    table = {
      ordered,
      fields: new Map(ordered.map((field) => [field[0], field])),
      names: new Set(ordered.map((field) => field[1])),
    };
    known.set(name, table);
  }
  return table;
}

const enumNames = new Map<string, ReadonlyMap<number, string>>();
function enumName(type: string, number: number): string | number {
  let names = enumNames.get(type);
  if (!names) {
    names = new Map(Object.entries(enums[type]!).map(([name, value]) => [value, name]));
    enumNames.set(type, names);
  }
  return names.get(number) ?? number;
}

/**
 * @param name  of the message, as in proto/criu/images.proto
 * @throws WireError for bytes that aren't one, or lack a required field: CRIU refuses these too
 */
export function decodeMessage(name: string, bytes: Uint8Array): Message {
  const message = readFields(name, bytes, 0);
  if (!sameBytes(encodeMessage(name, message), bytes)) message[RAW] = base64Lines(bytes);
  return message;
}

/** The same for readers who only want to know what it says: twice as quick, and not to be encoded again. */
export function parseMessage(name: string, bytes: Uint8Array): Message {
  return readFields(name, bytes, 0);
}

function readFields(name: string, bytes: Uint8Array, depth: number): Message {
  if (depth > MAX_DEPTH) throw new WireError(`${name} is nested deeper than ${MAX_DEPTH}`);
  const { fields, ordered } = tableOf(name);
  const reader = new Reader(bytes);
  const found = new Map<number, Value>();
  const unknown: Message[] = [];
  while (!reader.done) {
    const start = reader.position;
    const tag = reader.tag();
    const field = fields.get(tag >>> 3);
    const value = field && readValue(field, tag & 7, reader, depth);
    if (field && value !== undefined) {
      const before = found.get(field[0]);
      if (field[3] !== "repeated") found.set(field[0], (value as Value[])[0]!);
      else if (before) (before as Value[]).push(...(value as Value[]));
      else found.set(field[0], value as Value[]);
      continue;
    }
    // Also a known number with another wire type than ours: what it means, only a newer CRIU knows.
    reader.skip(tag);
    unknown.push({ field: tag >>> 3, bytes: base64Lines(bytes.subarray(start, reader.position)) });
  }
  const message: Message = {};
  for (const [id, fieldName, , label] of ordered) {
    const value = found.get(id);
    if (value !== undefined) message[fieldName] = value;
    else if (label === "required") throw new WireError(`${name} lacks its field ${fieldName}`);
  }
  if (unknown.length > 0) message[UNKNOWN] = unknown;
  return message;
}

/** What one key announces, as a list: a packed field has several. Undefined: the wire type isn't the field's. */
function readValue(field: Field, wire: number, reader: Reader, depth: number): Value[] | undefined {
  const [, name, type, label] = field;
  const own = wireTypeOf(type);
  if (wire !== own) {
    if (label !== "repeated" || wire !== wireType.bytes) return undefined;
    const packed = new Reader(reader.bytesField());
    const values: Value[] = [];
    while (!packed.done) values.push(readScalar(field, packed));
    return values;
  }
  if (!(type in messages)) return [readScalar(field, reader)];
  const bytes = reader.bytesField();
  try {
    return [readFields(type, bytes, depth + 1)];
  } catch (error) {
    if (error instanceof WireError) throw new WireError(`${name}: ${error.message}`);
    throw error;
  }
}

function readScalar([, , type, , text]: Field, reader: Reader): Value {
  switch (type) {
    case "uint32":
      return reader.uint32();
    case "int32":
      return reader.int32();
    case "sint32":
      return reader.sint32();
    case "uint64":
      return reader.uint64();
    case "int64":
      return reader.int64();
    case "sint64":
      return reader.sint64();
    case "fixed64":
      return reader.fixed64();
    case "bool":
      return reader.bool();
    case "string":
      return stringOf(reader.bytesField());
    case "bytes": {
      const bytes = reader.bytesField();
      return text === "quoted-printable" ? quotedPrintable(bytes) : base64Lines(bytes);
    }
    default:
      return enumName(type, reader.int32());
  }
}

const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
function stringOf(bytes: Uint8Array): Value {
  try {
    return utf8.decode(bytes);
  } catch {
    return { [BYTES]: base64Lines(bytes) };
  }
}

function wireTypeOf(type: string): number {
  if (type === "fixed64") return wireType.fixed64;
  return type === "string" || type === "bytes" || type in messages ? wireType.bytes : wireType.varint;
}

/**
 * The bytes of a message: fields in the order of their numbers, as CRIU writes them.
 * @throws TypeError that names the field when a value doesn't fit, is missing, or is of no field
 */
export function encodeMessage(name: string, message: Message): Uint8Array {
  const raw = message[RAW];
  if (raw !== undefined) {
    if (typeof raw !== "string") throw new TypeError(`${name}.${RAW} is not base64`);
    const bytes = fromBase64(raw);
    if (saysTheSame(name, bytes, message)) return bytes;
  }
  const writer = new Writer();
  writeFields(name, message, writer, name, 0);
  return writer.finish();
}

function saysTheSame(name: string, bytes: Uint8Array, message: Message): boolean {
  const { [RAW]: _, ...edited } = message;
  const plain = new Writer();
  const decoded = new Writer();
  try {
    writeFields(name, readFields(name, bytes, 0), decoded, name, 0);
  } catch {
    return false; // it isn't even a message: somebody edited it, and the fields count
  }
  writeFields(name, edited, plain, name, 0);
  return sameBytes(plain.finish(), decoded.finish());
}

function writeFields(name: string, message: Message, writer: Writer, path: string, depth: number): void {
  if (depth > MAX_DEPTH) throw new TypeError(`${path} is nested deeper than ${MAX_DEPTH}`);
  if (typeof message !== "object" || message === null || Array.isArray(message))
    throw new TypeError(`${path} is not an object`);
  const { ordered, names } = tableOf(name);
  for (const key of Object.keys(message))
    if (!names.has(key) && key !== UNKNOWN && key !== RAW) throw new TypeError(`${path} has no field ${key}`);
  const unknown = unknownOf(message, path);
  for (const field of ordered) {
    while (unknown.length > 0 && unknown[0]!.field < field[0]) writer.raw(unknown.shift()!.bytes);
    const value = message[field[1]];
    if (value === undefined) {
      if (field[3] === "required") throw new TypeError(`${path}.${field[1]} is missing`);
      continue;
    }
    if (field[3] !== "repeated") writeValue(field, value, writer, `${path}.${field[1]}`, depth);
    else if (!Array.isArray(value)) throw new TypeError(`${path}.${field[1]} is not a list`);
    else
      for (const [at, item] of plainList(field, value, path).entries())
        writeValue(field, item, writer, `${path}.${field[1]}[${at}]`, depth);
  }
  for (const { bytes } of unknown) writer.raw(bytes);
}

/** An address may stand as text for its words. */
function plainList([, name, , , text]: Field, list: Value[], path: string): Value[] {
  try {
    return (text === "address" && wordsOfAddress(list)) || list;
  } catch (error) {
    throw new TypeError(`${path}.${name} ${(error as Error).message}`);
  }
}

function unknownOf(message: Message, path: string): { field: number; bytes: Buffer }[] {
  const unknown = message[UNKNOWN];
  if (unknown === undefined) return [];
  const isOne = (item: Value): item is { field: number; bytes: string } =>
    typeof item === "object" &&
    "field" in item &&
    typeof item.field === "number" &&
    typeof item.bytes === "string";
  if (!Array.isArray(unknown) || !unknown.every(isOne))
    throw new TypeError(`${path}.${UNKNOWN} is not a list of { field, bytes }`);
  return unknown
    .map(({ field, bytes }) => ({ field, bytes: fromBase64(bytes) }))
    .sort((a, b) => a.field - b.field);
}

function writeValue(field: Field, value: Value, writer: Writer, path: string, depth: number): void {
  const [id, , type, , text] = field;
  const tag = (id << 3) | wireTypeOf(type);
  if (type in messages) {
    const at = writer.open(tag);
    writeFields(type, value as Message, writer, path, depth + 1);
    writer.close(at);
    return;
  }
  writer.uint32(tag);
  switch (type) {
    case "uint32":
      writer.uint32(Number(integer(value, path, 0, 0xffff_ffff, text)));
      return;
    case "int32":
      writer.int32(Number(integer(value, path, -0x8000_0000, 0x7fff_ffff, text)));
      return;
    case "sint32":
      writer.sint32(Number(integer(value, path, -0x8000_0000, 0x7fff_ffff, text)));
      return;
    case "uint64":
      writer.uint64(integer(value, path, 0n, 0xffff_ffff_ffff_ffffn, text));
      return;
    case "int64":
      writer.int64(integer(value, path, -(1n << 63n), (1n << 63n) - 1n, text));
      return;
    case "sint64":
      writer.sint64(integer(value, path, -(1n << 63n), (1n << 63n) - 1n, text));
      return;
    case "fixed64":
      writer.fixed64(integer(value, path, 0n, 0xffff_ffff_ffff_ffffn, text));
      return;
    case "bool":
      if (typeof value !== "boolean") throw new TypeError(`${path} is not true or false`);
      writer.bool(value);
      return;
    case "string":
      writer.bytes(bytesOfString(value, path));
      return;
    case "bytes":
      writer.bytes(bytesOfText(value, path, text === "quoted-printable" ? fromQuotedPrintable : fromBase64));
      return;
    default:
      writer.int32(enumNumber(type, value, path));
  }
}

/** Text too, as prettify makes it. */
function integer(
  value: Value,
  path: string,
  least: number | bigint,
  most: number | bigint,
  text?: string,
): number | bigint {
  let number: number | bigint | undefined;
  if (typeof value === "bigint" || (typeof value === "number" && Number.isSafeInteger(value))) number = value;
  else if (typeof value === "string") number = numberOf(value, text);
  if (number === undefined) throw new TypeError(`${path} is not an integer`);
  if (number < least || number > most)
    throw new TypeError(`${path} is ${number}, not within ${least} to ${most}`);
  return number;
}

function enumNumber(type: string, value: Value, path: string): number {
  if (typeof value === "number") return Number(integer(value, path, -0x8000_0000, 0x7fff_ffff));
  const number =
    typeof value === "string" && Object.hasOwn(enums[type]!, value) ? enums[type]![value] : undefined;
  if (number === undefined)
    throw new TypeError(`${path} is ${String(value)}, not one of ${Object.keys(enums[type]!).join(", ")}`);
  return number;
}

function bytesOfString(value: Value, path: string): Uint8Array {
  if (typeof value === "string") return Buffer.from(value, "utf8");
  const bytes = typeof value === "object" && !Array.isArray(value) ? value[BYTES] : undefined;
  if (bytes === undefined) throw new TypeError(`${path} is not a string`);
  return bytesOfText(bytes, path, fromBase64);
}

function bytesOfText(value: Value, path: string, decode: (text: string) => Buffer): Uint8Array {
  if (typeof value !== "string") throw new TypeError(`${path} is not a string`);
  try {
    return decode(value);
  } catch (error) {
    throw new TypeError(`${path} ${(error as Error).message}`);
  }
}

function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  return Buffer.from(a.buffer, a.byteOffset, a.byteLength).equals(b);
}
