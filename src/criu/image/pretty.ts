import { type Field, messages } from "../../proto/generated/criu_images.ts";
import type { Message, Value } from "./value.ts";

/*
 * Numbers as people read them: addresses in hexadecimal, flags by name, devices as major:minor. As `crit decode --pretty` and `crit
 * show` do; encode takes both forms. What is shown how, (text) in proto/criu/images.proto says.
 */

/** Sources: mman.h, fcntl.h, CRIU's image.h and pagemap.h, as crit names them. */
const flagNames: Readonly<Record<string, Readonly<Record<string, number>>>> = {
  "mmap.prot": { PROT_READ: 1, PROT_WRITE: 2, PROT_EXEC: 4 },
  "mmap.flags": { MAP_SHARED: 1, MAP_PRIVATE: 2, MAP_DROPPABLE: 8, MAP_ANON: 0x20, MAP_GROWSDOWN: 0x100 },
  "mmap.status": {
    VMA_AREA_NONE: 0,
    VMA_AREA_REGULAR: 2 ** 0,
    VMA_AREA_STACK: 2 ** 1,
    VMA_AREA_VSYSCALL: 2 ** 2,
    VMA_AREA_VDSO: 2 ** 3,
    VMA_AREA_HEAP: 2 ** 5,
    VMA_FILE_PRIVATE: 2 ** 6,
    VMA_FILE_SHARED: 2 ** 7,
    VMA_ANON_SHARED: 2 ** 8,
    VMA_ANON_PRIVATE: 2 ** 9,
    VMA_AREA_SYSVIPC: 2 ** 10,
    VMA_AREA_SOCKET: 2 ** 11,
    VMA_AREA_VVAR: 2 ** 12,
    VMA_AREA_AIORING: 2 ** 13,
    VMA_AREA_MEMFD: 2 ** 14,
    VMA_AREA_SHSTK: 2 ** 15,
    VMA_AREA_UPROBES: 2 ** 17,
    VMA_UNSUPP: 2 ** 31,
  },
  "rfile.flags": {
    O_WRONLY: 0o1,
    O_RDWR: 0o2,
    O_CREAT: 0o100,
    O_EXCL: 0o200,
    O_NOCTTY: 0o400,
    O_TRUNC: 0o1000,
    O_APPEND: 0o2000,
    O_NONBLOCK: 0o4000,
    O_DSYNC: 0o10000,
    FASYNC: 0o20000,
    O_DIRECT: 0o40000,
    O_LARGEFILE: 0o100000,
    O_DIRECTORY: 0o200000,
    O_NOFOLLOW: 0o400000,
    O_NOATIME: 0o1000000,
    O_CLOEXEC: 0o2000000,
  },
  "seals.flags": {
    F_SEAL_SEAL: 1,
    F_SEAL_SHRINK: 2,
    F_SEAL_GROW: 4,
    F_SEAL_WRITE: 8,
    F_SEAL_FUTURE_WRITE: 16,
  },
  "pmap.flags": { PE_PARENT: 1, PE_LAZY: 2, PE_PRESENT: 4 },
};

const valueNames: Readonly<Record<string, Readonly<Record<string, number>>>> = {
  task_state: { Alive: 1, Dead: 2, Stopped: 3, Zombie: 6 },
  socket_family: { UNIX: 1, INET: 2, INET6: 10, NETLINK: 16, PACKET: 17 },
  socket_type: { STREAM: 1, DGRAM: 2, RAW: 3, SEQPACKET: 5, PACKET: 10 },
  socket_state: {
    ESTABLISHED: 1,
    SYN_SENT: 2,
    SYN_RECV: 3,
    FIN_WAIT1: 4,
    FIN_WAIT2: 5,
    TIME_WAIT: 6,
    CLOSE: 7,
    CLOSE_WAIT: 8,
    LAST_ACK: 9,
    LISTEN: 10,
  },
  socket_proto: { IP: 0, TCP: 6, UDP: 17, UDPLITE: 136 },
};

const MINOR_BITS = 20; // of a kernel's dev_t
const HEX = "hex";
const ADDRESS = "address";

/** A copy with numbers as text. */
export function prettify(name: string, message: Message, isHex = false): Message {
  const pretty: Message = { ...message };
  for (const field of messages[name]!) {
    const value = message[field[1]];
    if (value === undefined) continue;
    if (field[4] === ADDRESS) pretty[field[1]] = [addressOf(value as number[])].flat();
    else if (Array.isArray(value)) pretty[field[1]] = value.map((item) => show(field, item, isHex));
    else pretty[field[1]] = show(field, value, isHex);
  }
  return pretty;
}

function show([, , type, , text]: Field, value: Value, isHex: boolean): Value {
  const hex = isHex || text === HEX;
  if (type in messages) return prettify(type, value as Message, hex);
  if (typeof value !== "number" && typeof value !== "bigint") return value;
  if (hex) return `${value < 0 ? "-" : ""}0x${(value < 0 ? -value : value).toString(16)}`;
  if (text === undefined) return value;
  if (text === "device") return `${Number(value) >>> MINOR_BITS}:${Number(value) & ((1 << MINOR_BITS) - 1)}`;
  if (text === "old-device") return oldDevice(Number(value));
  if (text in flagNames) return showFlags(Number(value), flagNames[text]!);
  const found = Object.entries(valueNames[text] ?? {}).find(([, number]) => number === value);
  return found?.[0] ?? value;
}

function showFlags(value: number, names: Readonly<Record<string, number>>): string {
  let rest = value;
  const shown: string[] = [];
  for (const [name, bit] of Object.entries(names)) {
    if (bit === 0 || Math.floor(rest / bit) % 2 === 0) continue;
    shown.push(name);
    rest -= bit;
  }
  if (rest !== 0) shown.push(`0x${rest.toString(16)}`);
  return shown.join(" | ");
}

/** As makedev(3) of glibc has them. */
function oldDevice(value: number): string {
  return `${(value >>> 8) & 0xfff}:${(value & 0xff) | ((value >>> 12) & 0xfff00)}`;
}

/** One or four words, each in the network's byte order; of another number of them, they stay. */
function addressOf(words: readonly number[]): string | readonly number[] {
  const bytes = Buffer.alloc(4 * words.length);
  for (const [i, word] of words.entries()) bytes.writeUInt32LE(word, 4 * i);
  if (words.length === 1) return [...bytes].join(".");
  if (words.length !== 4) return words;
  const groups = Array.from({ length: 8 }, (_, i) => bytes.readUInt16BE(2 * i).toString(16));
  return shortest(groups);
}

/** The longest run of zeros, the first of equals, is "::". Source: RFC 5952. */
function shortest(groups: readonly string[]): string {
  let best = { at: 0, length: 1 };
  for (let at = 0; at < groups.length; at++) {
    let length = 0;
    while (groups[at + length] === "0") length++;
    if (length > best.length) best = { at, length };
  }
  if (best.length < 2) return groups.join(":");
  return `${groups.slice(0, best.at).join(":")}::${groups.slice(best.at + best.length).join(":")}`;
}

/** The number that a text stands for. @returns undefined for text that isn't one of this field */
export function numberOf(text: string, kind: string | undefined): bigint | undefined {
  if (/^-?0x[0-9a-f]+$/i.test(text)) return text.startsWith("-") ? -BigInt(text.slice(1)) : BigInt(text);
  if (/^-?\d+$/.test(text)) return BigInt(text);
  if (kind === "device" || kind === "old-device") return numberOfDevice(text, kind);
  if (kind !== undefined && kind in flagNames) return numberOfFlags(text, flagNames[kind]!);
  const value = kind === undefined ? undefined : valueNames[kind]?.[text];
  return value === undefined ? undefined : BigInt(value);
}

function numberOfDevice(text: string, kind: string): bigint | undefined {
  const [, major, minor] = (/^(\d+):(\d+)$/.exec(text) ?? []).map(Number);
  if (major === undefined || minor === undefined) return undefined;
  if (kind === "device") return (BigInt(major) << BigInt(MINOR_BITS)) | BigInt(minor);
  return BigInt(((major & 0xfff) * 0x100 + (minor & 0xff) + (minor & 0xfff00) * 0x1000) >>> 0);
}

function numberOfFlags(text: string, names: Readonly<Record<string, number>>): bigint | undefined {
  let sum = 0n;
  for (const part of text === "" ? [] : text.split("|").map((part) => part.trim())) {
    const number = Object.hasOwn(names, part) ? BigInt(names[part]!) : numberOf(part, undefined);
    if (number === undefined) return undefined;
    sum |= number;
  }
  return sum;
}

/** The words of a list that is one address as text; undefined: it is a list of numbers. @throws TypeError */
export function wordsOfAddress(list: readonly Value[]): number[] | undefined {
  const [text] = list;
  if (list.length !== 1 || typeof text !== "string" || /^\d+$/.test(text)) return undefined;
  const bytes = text.includes(":") ? bytesOfIpv6(text) : text.split(".").map(Number);
  const isWhole = bytes.length === 4 || bytes.length === 16;
  if (!isWhole || bytes.some((byte) => !Number.isInteger(byte) || byte < 0 || byte > 255))
    throw new TypeError("is not an address");
  const buffer = Buffer.from(bytes);
  return Array.from({ length: bytes.length / 4 }, (_, i) => buffer.readUInt32LE(4 * i));
}

function bytesOfIpv6(text: string): number[] {
  const [head = "", tail] = text.split("::");
  const groups = (part: string) =>
    part === "" ? [] : part.split(":").map((group) => Number.parseInt(group, 16));
  const [before, after] = [groups(head), groups(tail ?? "")];
  const zeros =
    tail === undefined ? [] : Array.from({ length: Math.max(0, 8 - before.length - after.length) }, () => 0);
  return [...before, ...zeros, ...after].flatMap((group) => [group >> 8, group & 0xff]);
}
