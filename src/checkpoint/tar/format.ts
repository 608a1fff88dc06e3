import { BrokenImage, Unsupported } from "../../errors/index.ts";

/**
 * Tar as POSIX defines it (pax), to the byte. A package's tar won't do: names and extended attributes are bytes, not text;
 * security.capability is binary; holes, owners above 2097151 and nanoseconds must survive; and a hostile archive must be
 * refused, not read as far as it goes.
 *
 * The header, one block of 512 bytes, numbers in octal text:
 *
 *   at   size  field
 *   0    100   name      longer ones, and those that are not ASCII, in the pax record `path`
 *   100  8     mode
 *   108  8     uid       above 7 octal digits: pax record `uid`
 *   116  8     gid
 *   124  12    size      of what follows in the archive; a hard link, a link, a directory, a device: 0
 *   136  12    mtime     seconds; with a fraction, or before 1970: pax record `mtime`
 *   148  8     checksum  sum of the block's bytes with this field as spaces
 *   156  1     type      0 file · 1 hard link · 2 symbolic link · 3 character, 4 block device · 5 directory · 6 FIFO ·
 *                        x pax records for the next header · g for all that follow · L, K: GNU's long name, long target
 *   157  100   linkName
 *   257  8     "ustar\0" "00"; GNU: "ustar " " \0"
 *   329  8     major
 *   337  8     minor
 *   345  155   prefix    of the name, before a slash (not with GNU's magic)
 *
 * Others write numbers that don't fit in binary: first byte 0x80 or 0xff, the rest big-endian two's complement.
 * Pax records are `LENGTH KEY=VALUE\n`, the length counting itself. Extended attributes are `SCHILY.xattr.NAME`, raw bytes.
 * A file with holes is GNU's sparse format 1.0, which Go reads too: records GNU.sparse.{major=1,minor=0,name,realsize}, and the
 * contents begin with a map in decimal lines (count, then offset and size of each piece of data), padded to a block.
 * Two blocks of zeros end the archive.
 *
 * Sources: POSIX pax(1); tar(5); GNU tar manual, "Storing Sparse Files", "PAX Format, Version 1.0".
 */

export const BLOCK = 512;

/**
 * A path or a name as the bytes that it is, one character a byte ("latin1"): two names are the same exactly when these are.
 * `pathBytes` for system calls, `showName` for people.
 */
export type RawName = string;

export type EntryType = "file" | "hardlink" | "symlink" | "char" | "block" | "directory" | "fifo";

export interface TarEntry {
  name: RawName;
  type: EntryType;
  /** permissions with set-uid, set-gid and sticky */
  mode: number;
  uid: number;
  gid: number;
  mtimeNs: bigint;
  /** of a file's contents, holes included; else 0 */
  size: number;
  /** of a hard link: the member's name; of a symbolic link: its target */
  linkName: RawName;
  /** of a device */
  major: number;
  minor: number;
  xattrs: ReadonlyMap<RawName, Buffer>;
  /** the pieces of data of a file with holes, in order; undefined: it has none */
  extents: readonly Extent[] | undefined;
}

/** A file with more pieces is stored with its holes: the map would be what fills our memory. */
export const MAX_EXTENTS = 65_536;

/** A member with what isn't said filled in: an empty file of root's, 0600, of 1970. */
export function tarEntry(some: Partial<TarEntry> & { name: RawName }): TarEntry {
  return {
    type: "file",
    mode: 0o600,
    uid: 0,
    gid: 0,
    mtimeNs: 0n,
    size: 0,
    linkName: "",
    major: 0,
    minor: 0,
    xattrs: new Map(),
    extents: undefined,
    ...some,
  };
}

export interface Extent {
  offset: number;
  size: number;
}

export const pathBytes = (name: RawName): Buffer => Buffer.from(name, "latin1");
export const rawName = (bytes: Buffer | string): RawName =>
  (typeof bytes === "string" ? Buffer.from(bytes) : bytes).toString("latin1");
/** For messages: as UTF-8 where it is, without control characters, not endless. */
export function showName(name: RawName): string {
  const text = pathBytes(name)
    .toString("utf8")
    // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what must not reach a terminal
    .replace(/[\u0000-\u001f\u007f-\u009f]/g, "\ufffd");
  return text.length > 200 ? `${text.slice(0, 200)}…` : text;
}

const typeFlags: Record<EntryType, string> = {
  file: "0",
  hardlink: "1",
  symlink: "2",
  char: "3",
  block: "4",
  directory: "5",
  fifo: "6",
};
const typesByFlag = new Map<string, EntryType>(
  Object.entries(typeFlags).map(([type, flag]) => [flag, type as EntryType]),
);
typesByFlag.set("\0", "file"); // before POSIX
typesByFlag.set("7", "file"); // contiguous

/** The bytes after something of this size up to a whole block. */
export function padding(size: number): Buffer {
  const over = size % BLOCK;
  return over === 0 ? Buffer.alloc(0) : Buffer.alloc(BLOCK - over);
}

export const endOfTar = (): Buffer => Buffer.alloc(2 * BLOCK);

/**
 * Everything of a member that comes before its contents: pax records where they are needed, the header, and the map of a file
 * with holes. What follows is the data alone, then `padding(dataSize(entry))`.
 */
export function encodeHeader(entry: TarEntry): Buffer {
  const records: [key: string, value: RawName][] = [];
  const map = entry.extents && sparseMap(entry.extents, entry.size);
  const stored = entry.type === "file" ? dataSize(entry) + (map?.length ?? 0) : 0;
  const name = entry.type === "directory" && !entry.name.endsWith("/") ? `${entry.name}/` : entry.name;
  let headerName = name;
  if (map) {
    records.push(["GNU.sparse.major", "1"], ["GNU.sparse.minor", "0"]);
    records.push(["GNU.sparse.name", name], ["GNU.sparse.realsize", String(entry.size)]);
    headerName = "GNUSparseFile.0"; // whoever can't read it gets a file of another name, not a wrong one
  } else if (needsRecord(name, 100)) records.push(["path", name]);
  if (needsRecord(entry.linkName, 100)) records.push(["linkpath", entry.linkName]);
  if (stored > 0o77777777777) records.push(["size", String(stored)]);
  if (entry.uid > 0o7777777) records.push(["uid", String(entry.uid)]);
  if (entry.gid > 0o7777777) records.push(["gid", String(entry.gid)]);
  const { mtimeNs } = entry;
  if (mtimeNs < 0n || mtimeNs % 1_000_000_000n !== 0n || mtimeNs >= 0o77777777777n * 1_000_000_000n)
    records.push(["mtime", decimalSeconds(mtimeNs)]);
  for (const [key, value] of entry.xattrs) {
    if (key.includes("="))
      throw new Unsupported(`${showName(entry.name)}: attribute ${showName(key)}: pax has no name with =`);
    records.push([`SCHILY.xattr.${key}`, rawName(value)]);
  }
  const parts: Buffer[] = [];
  if (records.length > 0) {
    const body = Buffer.from(records.map(paxRecord).join(""), "latin1");
    const pax = { name: "PaxHeaders.0", flag: "x", mode: 0o644, uid: 0, gid: 0, size: body.length, mtime: 0 };
    parts.push(encodeBlock(pax), body, padding(body.length));
  }
  parts.push(
    encodeBlock({
      name: headerName,
      flag: typeFlags[entry.type],
      mode: entry.mode & 0o7777,
      uid: entry.uid,
      gid: entry.gid,
      size: stored,
      mtime: mtimeNs < 0n ? 0 : Number(mtimeNs / 1_000_000_000n),
      linkName: entry.linkName,
      major: entry.major,
      minor: entry.minor,
    }),
  );
  if (map) parts.push(map);
  return Buffer.concat(parts);
}

/** Bytes of data that a member has in the archive: without holes. */
function dataSize(entry: TarEntry): number {
  if (entry.type !== "file") return 0;
  return entry.extents ? entry.extents.reduce((sum, { size }) => sum + size, 0) : entry.size;
}

/** A last piece of no size at the very end: GNU tar takes the file's size from it. */
function sparseMap(extents: readonly Extent[], fileSize: number): Buffer {
  const pieces = [...extents, { offset: fileSize, size: 0 }];
  const lines = Buffer.from(
    `${pieces.length}\n${pieces.map(({ offset, size }) => `${offset}\n${size}\n`).join("")}`,
  );
  return Buffer.concat([lines, padding(lines.length)]);
}

// biome-ignore lint/suspicious/noControlCharactersInRegex: all of ASCII but NUL
const needsRecord = (text: RawName, room: number) => text.length > room || !/^[\x01-\x7f]*$/.test(text);

/** Seconds with a fraction, as pax wants them: -1.5 is half a second before -1. */
function decimalSeconds(ns: bigint): string {
  const size = ns < 0n ? -ns : ns;
  const fraction = String(size % 1_000_000_000n)
    .padStart(9, "0")
    .replace(/0+$/, "");
  return `${ns < 0n ? "-" : ""}${size / 1_000_000_000n}${fraction ? `.${fraction}` : ""}`;
}

function parseSeconds(text: string): bigint | undefined {
  const found = /^(-?)(\d{1,12})(?:\.(\d*))?$/.exec(text);
  if (!found) return undefined;
  const ns = BigInt(found[2]!) * 1_000_000_000n + BigInt((found[3] ?? "").padEnd(9, "0").slice(0, 9));
  return found[1] ? -ns : ns;
}

function paxRecord([key, value]: [string, RawName]): string {
  const rest = key.length + value.length + 3; // space, = and newline
  let length = rest + String(rest).length;
  if (String(length).length > String(rest).length) length = rest + String(length).length;
  return `${length} ${key}=${value}\n`;
}

interface Block {
  name: RawName;
  flag: string;
  mode: number;
  uid: number;
  gid: number;
  size: number;
  mtime: number;
  linkName?: RawName;
  major?: number;
  minor?: number;
}

function encodeBlock(block: Block): Buffer {
  const bytes = Buffer.alloc(BLOCK);
  const octal = (value: number, at: number, digits: number) => {
    const text = value.toString(8);
    bytes.write(text.length > digits ? "0".repeat(digits) : text.padStart(digits, "0"), at, "latin1"); // else in a record
  };
  bytes.write(block.name.slice(0, 100), 0, "latin1");
  octal(block.mode, 100, 7);
  octal(block.uid, 108, 7);
  octal(block.gid, 116, 7);
  octal(block.size, 124, 11);
  octal(block.mtime, 136, 11);
  bytes.write(block.flag, 156, "latin1");
  bytes.write((block.linkName ?? "").slice(0, 100), 157, "latin1");
  bytes.write("ustar\x0000", 257, "latin1");
  octal(block.major ?? 0, 329, 7);
  octal(block.minor ?? 0, 337, 7);
  bytes.write(`${checksum(bytes).toString(8).padStart(6, "0")}\0 `, 148, "latin1");
  return bytes;
}

function checksum(block: Buffer): number {
  let sum = 8 * 0x20;
  for (let i = 0; i < BLOCK; i++) if (i < 148 || i >= 156) sum += block[i]!;
  return sum;
}

/** A header block as it stands there; what it means with the records before it says `toEntry`. */
export interface RawHeader extends Required<Omit<Block, "mtime">> {
  mtimeNs: bigint;
}

/** @throws BrokenImage when it isn't a header */
export function decodeBlock(block: Buffer, at: number): RawHeader {
  const wrong = (what: string) => new BrokenImage(`tar header at byte ${at}: ${what}`);
  const text = (from: number, size: number): RawName => {
    const bytes = block.subarray(from, from + size);
    const end = bytes.indexOf(0);
    return rawName(end < 0 ? bytes : bytes.subarray(0, end));
  };
  const number = (from: number, size: number, what: string): number => {
    const value = decodeNumber(block.subarray(from, from + size));
    if (value === undefined) throw wrong(`its ${what} is not a number`);
    return value;
  };
  if (number(148, 8, "checksum") !== checksum(block)) throw wrong("its checksum is wrong");
  const magic = block.toString("latin1", 257, 265);
  const gnu = magic === "ustar  \0";
  if (!gnu && !magic.startsWith("ustar\0")) throw wrong("it is of an unknown format");
  const prefix = gnu ? "" : text(345, 155);
  const name = text(0, 100);
  return {
    name: prefix ? `${prefix}/${name}` : name,
    flag: String.fromCharCode(block[156]!),
    mode: number(100, 8, "mode") & 0o7777,
    uid: number(108, 8, "uid"),
    gid: number(116, 8, "gid"),
    size: number(124, 12, "size"),
    mtimeNs: BigInt(decodeNumber(block.subarray(136, 148), true) ?? 0) * 1_000_000_000n,
    linkName: text(157, 100),
    major: number(329, 8, "device"),
    minor: number(337, 8, "device"),
  };
}

function decodeNumber(bytes: Buffer, negative = false): number | undefined {
  const [first] = bytes;
  if (first === 0x80 || (first === 0xff && negative)) {
    let value = first === 0xff ? -1n : 0n;
    for (const byte of bytes.subarray(1)) value = (value << 8n) | BigInt(byte);
    return value > BigInt(Number.MAX_SAFE_INTEGER) || value < BigInt(Number.MIN_SAFE_INTEGER)
      ? undefined
      : Number(value);
  }
  const text = bytes.toString("latin1").replace(/^ +|[ \0]+$/g, "");
  return /^[0-7]*$/.test(text) ? Number.parseInt(text || "0", 8) : undefined;
}

export type PaxRecords = Map<string, Buffer>;

/** @throws BrokenImage */
export function decodePax(body: Buffer, at: number): PaxRecords {
  const records: PaxRecords = new Map();
  for (let from = 0; from < body.length; ) {
    const space = body.indexOf(0x20, from);
    const digits = space < 0 ? "" : body.toString("latin1", from, space);
    const end = /^[1-9]\d{0,8}$/.test(digits) ? from + Number(digits) : 0;
    const equals = body.indexOf(0x3d, space);
    if (end <= space + 1 || end > body.length || body[end - 1] !== 0x0a || equals < 0 || equals >= end)
      throw new BrokenImage(`tar: the pax records at byte ${at} are malformed`);
    records.set(body.toString("latin1", space + 1, equals), body.subarray(equals + 1, end - 1));
    from = end;
  }
  return records;
}

/** What stands before a header and changes it. */
export interface Prelude {
  pax: PaxRecords;
  longName: RawName | undefined;
  longLink: RawName | undefined;
}

/** The header with what stood before it. The extents of a file with holes are read later: they are in its contents. */
export function toEntry(
  header: RawHeader,
  prelude: Prelude,
  at: number,
): { entry: TarEntry; stored: number; sparse: boolean } {
  const { pax } = prelude;
  const type = typesByFlag.get(header.flag);
  const name = pax.get("GNU.sparse.name") ?? pax.get("path");
  let raw = name ? rawName(name) : (prelude.longName ?? header.name);
  const link = pax.get("linkpath");
  const linkName = link ? rawName(link) : (prelude.longLink ?? header.linkName);
  const shown = showName(raw);
  if (header.flag === "S")
    throw new Unsupported(`tar member ${shown} is in GNU's old format for files with holes`);
  if (!type)
    throw new Unsupported(
      `tar member ${shown} at byte ${at} is of the unknown type ${JSON.stringify(header.flag)}`,
    );
  if (raw.includes("\0") || linkName.includes("\0"))
    throw new BrokenImage(`tar member ${shown}: a NUL in its name`);
  const integer = (key: string, otherwise: number): number => {
    const text = pax.get(key)?.toString("latin1");
    if (text === undefined) return otherwise;
    if (!/^\d{1,16}$/.test(text) || !Number.isSafeInteger(Number(text)))
      throw new BrokenImage(`tar member ${shown}: its pax record ${key} is not a number`);
    return Number(text);
  };
  const sparse = pax.has("GNU.sparse.major") || pax.has("GNU.sparse.map") || pax.has("GNU.sparse.numblocks");
  if (
    sparse &&
    (type !== "file" || integer("GNU.sparse.major", 0) !== 1 || integer("GNU.sparse.minor", 0) !== 0)
  )
    throw new Unsupported(`tar member ${shown} is in a format for files with holes that is not GNU's 1.0`);
  const isDirectory = type === "directory" || (type === "file" && raw.endsWith("/"));
  while (isDirectory && raw.length > 1 && raw.endsWith("/")) raw = raw.slice(0, -1);
  const stored = type === "file" && !isDirectory ? integer("size", header.size) : 0;
  // Readers differ in whether such contents are skipped: one would see members where another sees data.
  if (type !== "file" && header.size !== 0)
    throw new BrokenImage(`tar member ${shown} has contents, which a ${type} hasn't`);
  const time = pax.get("mtime");
  const mtimeNs = time ? parseSeconds(time.toString("latin1")) : header.mtimeNs;
  if (mtimeNs === undefined)
    throw new BrokenImage(`tar member ${shown}: its pax record mtime is not a number`);
  const xattrs = new Map<RawName, Buffer>();
  for (const [key, value] of pax)
    if (key.startsWith("SCHILY.xattr.")) xattrs.set(key.slice("SCHILY.xattr.".length), Buffer.from(value));
  const entry: TarEntry = {
    name: raw,
    type: isDirectory ? "directory" : type,
    mode: header.mode,
    uid: integer("uid", header.uid),
    gid: integer("gid", header.gid),
    mtimeNs,
    size: sparse ? integer("GNU.sparse.realsize", -1) : stored,
    linkName: type === "hardlink" || type === "symlink" ? linkName : "",
    major: type === "char" || type === "block" ? header.major : 0,
    minor: type === "char" || type === "block" ? header.minor : 0,
    xattrs,
    extents: undefined,
  };
  if (entry.size < 0) throw new BrokenImage(`tar member ${shown} has holes, and no real size`);
  return { entry, stored, sparse };
}
