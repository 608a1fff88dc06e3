/**
 * The frames that keepers and launchers exchange with cedanad. The table of numbers, and what each message means, is
 * addon/keeper/PROTOCOL.md; a test holds this file against it.
 *
 * Frame: 8 bytes header, little-endian, then `length` bytes of fields.
 *   at  size  field
 *   0   4     length   of the fields; more than MAX_PAYLOAD_BYTES ends the connection
 *   4   2     type     see `messageType`
 *   6   2     zero
 * Field: 8 bytes header, then the value.
 *   0   2     key      see `fieldKey`; unknown ones are skipped
 *   2   2     zero
 *   4   4     length   of the value. Integers are 8 bytes, strings UTF-8
 */

import { InvalidRequest } from "../errors/index.ts";

export const PROTOCOL_VERSION_MIN = 1;
export const PROTOCOL_VERSION_MAX = 2;

/** The longest value, 10 MiB of runtime options, and room for the fields around it. */
export const MAX_PAYLOAD_BYTES = 10 * 1024 * 1024 + 64 * 1024;

const FRAME_HEADER_BYTES = 8;
const FIELD_HEADER_BYTES = 8;

export const messageType = {
  HELLO: 1,
  WELCOME: 2,
  TASK: 3,
  TASK_GONE: 4,
  REQUEST: 5,
  RESPONSE: 6,
  PARKED: 7,
  CONNECTION_CLOSED: 8,
  END: 9,
  PING: 10,
  PONG: 11,
  EXIT: 12,
  ACK: 13,
  RESULT: 14,
  SPAWNED: 15,
  SPAWN: 16,
  SIGNAL: 17,
  MOUNT: 18,
  UNMOUNT: 19,
  IO_OPEN: 20,
  IO_RESIZE: 21,
  IO_CLOSE_STDIN: 22,
  IO_DRAIN: 23,
  IO_FREE: 24,
  EVENT: 25,
  EVENT_REFUSED: 26,
  LEAVE: 27,
  WATCH_OOM: 28,
  OOM: 29,
  TAKEN: 30,
  START: 40,
  START_ANSWER: 41,
  DELETE: 42,
  DELETE_ANSWER: 43,
  INFO: 44,
  INFO_ANSWER: 45,
  STATUS: 46,
  STATUS_ANSWER: 47,
  RUNTIME: 60,
  RUNTIME_WORKING: 61,
  RUNTIME_RUN: 62,
  RUNTIME_ENDED: 63,
  RUNTIME_ANSWER: 64,
} as const;
export type MessageType = (typeof messageType)[keyof typeof messageType];

export const fieldKey = {
  version: 1,
  versionMin: 2,
  versionMax: 3,
  pid: 4,
  mountNs: 5,
  namespace: 6,
  id: 7,
  bundle: 8,
  containerdAddress: 9,
  ttrpcAddress: 10,
  publishBinary: 11,
  socketPath: 12,
  options: 13,
  maxShimVersion: 14,
  flags: 15,
  answer: 16,
  shimCgroup: 17,
  request: 18,
  connection: 19,
  deliveries: 20,
  ageMs: 21,
  frame: 22,
  step: 23,
  errno: 24,
  message: 25,
  sequence: 26,
  waitStatus: 27,
  atNs: 28,
  userUs: 29,
  systemUs: 30,
  maxRssKb: 31,
  argv: 32,
  env: 33,
  cwd: 34,
  io: 35,
  consoleSocket: 36,
  outputPath: 37,
  signal: 38,
  mountType: 39,
  source: 40,
  target: 41,
  mountFlags: 42,
  mountData: 43,
  loop: 44,
  terminal: 45,
  stdin: 46,
  stdout: 47,
  stderr: 48,
  stdoutKind: 49,
  stderrKind: 50,
  uid: 51,
  gid: 52,
  width: 53,
  height: 54,
  timeoutMs: 55,
  execPid: 56,
  eventKey: 57,
  path: 58,
  nonce: 60,
  closed: 61,
  build: 62,
  driverArgv: 63,
  driverEnv: 64,
  schedCore: 65,
  status: 67,
  sealedFd: 68,
  sealedOf: 69,
  taken: 70,
  globalArgv: 100,
  root: 101,
  marker: 102,
} as const;
export type FieldName = keyof typeof fieldKey;

type FieldValue = number | bigint | boolean | string | Uint8Array | readonly string[] | readonly number[];
export type FieldValues = { readonly [name in FieldName]?: FieldValue | undefined };

/** How a child of the keeper ended, decoded from wait(2)'s status. */
export function exitStatusOf(waitStatus: number): number {
  const signal = waitStatus & 0x7f;
  return signal === 0 ? (waitStatus >> 8) & 0xff : 128 + signal;
}

/**
 * One frame. Fields that are undefined are left out; arrays become repeated fields.
 * @throws InvalidRequest for a string with a NUL, which the other side would take for absent; but a message for people is told without it
 */
export function encodeMessage(type: MessageType, values: FieldValues): Buffer {
  const parts: (Buffer | Uint8Array)[] = [Buffer.allocUnsafe(FRAME_HEADER_BYTES)];
  let length = 0;
  const put = (key: number, value: number | bigint | boolean | string | Uint8Array) => {
    let bytes: Uint8Array;
    if (typeof value === "string") {
      if (value.includes("\0") && key !== fieldKey.message)
        throw new InvalidRequest(`${JSON.stringify(value)} has a NUL in it`);
      bytes = Buffer.from(value.replaceAll("\0", "\ufffd"), "utf8");
    } else if (value instanceof Uint8Array) bytes = value;
    else {
      const integer = Buffer.allocUnsafe(8);
      integer.writeBigInt64LE(BigInt.asIntN(64, BigInt(value)));
      bytes = integer;
    }
    const header = Buffer.allocUnsafe(FIELD_HEADER_BYTES);
    header.writeUInt32LE(key, 0);
    header.writeUInt32LE(bytes.length, 4);
    parts.push(header, bytes);
    length += FIELD_HEADER_BYTES + bytes.length;
  };
  for (const [name, value] of Object.entries(values) as [FieldName, FieldValue | undefined][]) {
    if (value === undefined) continue;
    const key = fieldKey[name];
    if (Array.isArray(value)) for (const element of value as readonly (string | number)[]) put(key, element);
    else put(key, value as number | bigint | boolean | string | Uint8Array);
  }
  const header = parts[0] as Buffer;
  header.writeUInt32LE(length, 0);
  header.writeUInt16LE(type, 4);
  header.writeUInt16LE(0, 6);
  return Buffer.concat(parts, FRAME_HEADER_BYTES + length);
}

/** A received message. Absent integers read as 0, absent strings as "", absent bytes as empty. */
export class Message {
  readonly type: number;
  readonly #fields = new Map<number, Buffer[]>();

  constructor(type: number, payload: Buffer) {
    this.type = type;
    let at = 0;
    while (at + FIELD_HEADER_BYTES <= payload.length) {
      const key = payload.readUInt16LE(at);
      const length = payload.readUInt32LE(at + 4);
      at += FIELD_HEADER_BYTES;
      if (at + length > payload.length) throw new Error(`field ${key} of message ${type} is cut short`);
      const value = payload.subarray(at, at + length);
      const known = this.#fields.get(key);
      if (known) known.push(value);
      else this.#fields.set(key, [value]);
      at += length;
    }
    if (at !== payload.length) throw new Error(`message ${type} ends inside a field header`);
  }

  has(name: FieldName): boolean {
    return this.#fields.has(fieldKey[name]);
  }

  bytes(name: FieldName): Buffer {
    return this.#fields.get(fieldKey[name])?.[0] ?? Buffer.alloc(0);
  }

  string(name: FieldName): string {
    return this.bytes(name).toString("utf8");
  }

  /** The values of a repeated field. */
  strings(name: FieldName): string[] {
    return (this.#fields.get(fieldKey[name]) ?? []).map((bytes) => bytes.toString("utf8"));
  }

  bigint(name: FieldName): bigint {
    const bytes = this.bytes(name);
    return bytes.length === 8 ? bytes.readBigInt64LE(0) : 0n;
  }

  int(name: FieldName): number {
    return Number(this.bigint(name));
  }

  ints(name: FieldName): number[] {
    return (this.#fields.get(fieldKey[name]) ?? []).map((bytes) =>
      bytes.length === 8 ? Number(bytes.readBigInt64LE(0)) : 0,
    );
  }
}

/** Cuts a byte stream into messages. Throws on a frame that is too long or malformed; the connection is then useless. */
export class MessageReader {
  #pending: Buffer = Buffer.alloc(0);
  /** after `pending`: put together once, when the frame is whole */
  readonly #more: Buffer[] = [];
  #bytes = 0;
  #needed = FRAME_HEADER_BYTES;

  *push(chunk: Buffer): Generator<Message> {
    this.#more.push(chunk);
    this.#bytes += chunk.length;
    if (this.#bytes < this.#needed) return;
    this.#pending = Buffer.concat([this.#pending, ...this.#more.splice(0)]);
    for (;;) {
      this.#needed = FRAME_HEADER_BYTES;
      if (this.#bytes < this.#needed) return;
      const length = this.#pending.readUInt32LE(0);
      if (length > MAX_PAYLOAD_BYTES) throw new Error(`a frame of ${length} bytes is longer than allowed`);
      this.#needed += length;
      if (this.#bytes < this.#needed) return;
      const type = this.#pending.readUInt16LE(4);
      const payload = this.#pending.subarray(FRAME_HEADER_BYTES, this.#needed);
      this.#pending = this.#pending.subarray(this.#needed);
      this.#bytes -= this.#needed;
      yield new Message(type, payload);
    }
  }
}
