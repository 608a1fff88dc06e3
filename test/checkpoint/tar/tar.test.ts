import { execFileSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { encodeHeader, padding, type TarEntry } from "../../../src/checkpoint/tar/format.ts";
import { ByteSource, readTar } from "../../../src/checkpoint/tar/reader.ts";
import { tarEntry as entry, makeTar as tar } from "./make.ts";

let directory: string;
beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "tar-"));
});
afterEach(() => fs.rmSync(directory, { recursive: true }));

/** In pieces of an awkward size: no boundary may matter. */
async function* pieces(bytes: Buffer, size = 1000) {
  for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size);
}

async function read(bytes: Buffer, limits = {}) {
  const members: { entry: TarEntry; data: [number, string][] }[] = [];
  for await (const member of readTar(new ByteSource(pieces(bytes)), limits)) {
    const data: [number, string][] = [];
    for await (const piece of member.contents()) data.push([piece.offset, piece.data.toString("latin1")]);
    members.push({ entry: member.entry, data });
  }
  return members;
}

const samples: [string, TarEntry, string?][] = [
  ["a file", entry({ name: "file", size: 3, mode: 0o4755, uid: 1000, gid: 100 }), "abc"],
  ["a long name", entry({ name: `${"d/".repeat(200)}file` })],
  ["a name that is not UTF-8", entry({ name: "\xff\xfe\x01" })],
  ["an owner above 2097151", entry({ name: "owned", uid: 4_000_000_000, gid: 3_000_000 })],
  ["nanoseconds", entry({ name: "a", mtimeNs: 1_700_000_000_123_456_789n })],
  ["a time before 1970", entry({ name: "a", mtimeNs: -1_500_000_000n })],
  ["a directory", entry({ name: "dir", type: "directory", mode: 0o1777 })],
  ["a hard link", entry({ name: "second", type: "hardlink", linkName: "first" })],
  [
    "a symbolic link to far away",
    entry({ name: "link", type: "symlink", linkName: `../${"x".repeat(300)}` }),
  ],
  ["a device", entry({ name: "null", type: "char", major: 1, minor: 300_000 })],
  ["a FIFO", entry({ name: "fifo", type: "fifo" })],
  [
    "binary attributes",
    entry({
      name: "caps",
      xattrs: new Map([["security.capability", Buffer.from([1, 0, 0, 2, 10, 255, 0x3d])]]),
    }),
  ],
];

describe("a tar", () => {
  it.each(samples)("keeps %s", async (_what, sample, data) => {
    const members = await read(tar([sample, data], [entry({ name: "after", size: 1 }), "!"]));
    expect(members.map((member) => member.entry)).toEqual([sample, entry({ name: "after", size: 1 })]);
    expect(members.map((member) => member.data.map(([, text]) => text).join(""))).toEqual([data ?? "", "!"]);
  });

  it("keeps holes", async () => {
    const extents = [
      { offset: 4096, size: 3 },
      { offset: 1_000_000, size: 2 },
    ];
    const sparse = entry({ name: "sparse", size: 5_000_000, extents });
    const [found] = await read(tar([sparse, "abcde"]));
    expect(found!.entry).toEqual(sparse);
    expect(found!.data).toEqual([
      [4096, "abc"],
      [1_000_000, "de"],
    ]);
  });

  it("keeps a file of nothing but a hole", async () => {
    const sparse = entry({ name: "sparse", size: 2 ** 45, extents: [] });
    expect((await read(tar([sparse])))[0]!.entry).toEqual(sparse);
  });

  it("is read by GNU tar as we mean it", () => {
    const made = tar(
      [entry({ name: "dir", type: "directory", mode: 0o750 })],
      [entry({ name: `dir/${"n".repeat(150)}`, size: 3 }), "abc"],
      [entry({ name: "dir/sparse", size: 1_000_000, extents: [{ offset: 500_000, size: 2 }] }), "xy"],
      [entry({ name: "dir/link", type: "symlink", linkName: "sparse" })],
      [entry({ name: "dir/again", type: "hardlink", linkName: `dir/${"n".repeat(150)}` })],
    );
    execFileSync("tar", ["-xf", "-", "-C", directory], { input: made });
    const at = (name: string) => path.join(directory, "dir", name);
    expect(fs.statSync(at("")).mode & 0o777).toBe(0o750);
    expect(fs.readFileSync(at("again"), "utf8")).toBe("abc");
    expect(fs.statSync(at("again")).nlink).toBe(2);
    const sparse = fs.readFileSync(at("link"));
    expect([sparse.length, sparse.toString("latin1", 500_000, 500_002)]).toEqual([1_000_000, "xy"]);
  });

  it.each(["--format=pax", "--format=gnu", "--format=ustar", "--format=pax --sparse"])(
    "that GNU tar made with %s is read",
    async (options) => {
      const long = options.includes("ustar") ? "short" : "n".repeat(180);
      fs.mkdirSync(path.join(directory, "dir"));
      fs.writeFileSync(path.join(directory, "dir", long), "abc");
      fs.symlinkSync(long, path.join(directory, "dir/link"));
      fs.truncateSync(path.join(directory, "dir", long), 1_000_000);
      const made = execFileSync(
        "tar",
        [...options.split(" "), "-C", directory, "--sort=name", "-cf", "-", "dir"],
        {
          maxBuffer: 2 ** 24,
        },
      );
      const members = await read(made);
      expect(members.map(({ entry }) => [entry.name, entry.type, entry.size])).toEqual(
        expect.arrayContaining([
          ["dir", "directory", 0],
          [`dir/${long}`, "file", 1_000_000],
          ["dir/link", "symlink", 0],
        ]),
      );
      expect(members.find(({ entry }) => entry.type === "file")!.data[0]![1].slice(0, 3)).toBe("abc");
    },
  );
});

/** A pax record before a member. */
function withPax(text: string, name = "file"): Buffer {
  const header = encodeHeader(entry({ name: "x".repeat(8), size: Buffer.byteLength(text) }));
  header[156] = "x".charCodeAt(0);
  fixChecksum(header);
  const body = Buffer.from(text, "latin1");
  return Buffer.concat([header, body, padding(body.length), tar([entry({ name })])]);
}

function fixChecksum(header: Buffer): void {
  header.fill(" ", 148, 156);
  const sum = header.reduce((all, byte) => all + byte, 0);
  header.write(`${sum.toString(8).padStart(6, "0")}\0 `, 148, "latin1");
}

function changed(change: (header: Buffer) => void): Buffer {
  const bytes = tar([entry({ name: "file", size: 3 }), "abc"]);
  change(bytes);
  fixChecksum(bytes.subarray(0, 512));
  return bytes;
}

describe("a hostile tar is refused, and says why:", () => {
  const whole = tar([entry({ name: "file", size: 3 }), "abc"]);
  it.each<[string, RegExp, Buffer]>([
    ["empty", /truncated/, Buffer.alloc(0)],
    ["without an end mark", /truncated/, whole.subarray(0, -1024)],
    ["with half an end mark", /half of its end mark/, whole.subarray(0, -512)],
    ["cut off in a header", /truncated/, whole.subarray(0, 100)],
    ["cut off in a file", /truncated in the contents of file/, whole.subarray(0, 514)],
    ["cut off behind a file", /truncated after the contents of file/, whole.subarray(0, 520)],
    [
      "with something behind it",
      /followed by something else/,
      Buffer.concat([whole, Buffer.from("garbage")]),
    ],
    ["with a second tar behind it", /followed by something else/, Buffer.concat([whole, whole])],
    ["with endless zeros behind it", /more zeros/, Buffer.concat([whole, Buffer.alloc(2 ** 21)])],
    ["with a flipped bit", /checksum/, Buffer.concat([Buffer.from([0x67]), whole.subarray(1)])],
    ["of another format", /unknown format/, changed((header) => header.write("ustar!!!", 257))],
    ["with a type of its own", /unknown type "Z"/, changed((header) => header.write("Z", 156))],
    ["with GNU's old holes", /old format/, changed((header) => header.write("S", 156))],
    ["with a size that is no number", /size is not a number/, changed((header) => header.write("12x", 124))],
    ["with a negative size", /size is not a number/, changed((header) => header.fill(0xff, 124, 136))],
    [
      "with a link that has contents",
      /contents, which a symlink hasn't/,
      changed((header) => header.write("2", 156)),
    ],
    ["with records without a length", /malformed/, withPax("path=x\n")],
    ["with records that are too long", /malformed/, withPax("99 path=x\n")],
    ["with records without an end", /malformed/, withPax("9 path=xy")],
    ["with a size in words", /size is not a number/, withPax("13 size=many\n")],
    ["with a negative size in its records", /size is not a number/, withPax("11 size=-1\n")],
    ["with a NUL in a name", /NUL/, withPax("12 path=a\0b\n")],
    ["with holes of an older format", /not GNU's 1.0/, withPax("22 GNU.sparse.major=0\n")],
    ["with holes and no size", /no real size/, withPax("22 GNU.sparse.major=1\n")],
    [
      "with holes that overlap",
      /overlaps/,
      tar([
        entry({
          name: "f",
          size: 10,
          extents: [
            { offset: 5, size: 2 },
            { offset: 6, size: 1 },
          ],
        }),
        "abc",
      ]),
    ],
    [
      "with data behind a file's end",
      /leads out/,
      tar([entry({ name: "f", size: 10, extents: [{ offset: 8, size: 3 }] }), "abc"]),
    ],
  ])("%s", async (_what, message, bytes) => {
    await expect(read(bytes)).rejects.toThrow(message);
  });

  it("endless records and members", async () => {
    const record = withPax("8 a=bcd\n").subarray(0, 1024);
    await expect(read(Buffer.concat(Array.from({ length: 6 }, () => record)))).rejects.toThrow(
      /more records than/,
    );
    const header = encodeHeader(entry({ name: "x", size: 2 ** 30 }));
    header[156] = "x".charCodeAt(0);
    fixChecksum(header);
    await expect(read(header)).rejects.toThrow(/records at byte 0 are too many/);
    const many = tar(...["a", "b", "c"].map((name): [TarEntry] => [entry({ name })]));
    await expect(read(many, { members: 2 })).rejects.toThrow(/more than 2 members/);
  });

  it("with any single bit flipped in its header, but one that means the same", async () => {
    const meant = JSON.stringify(await read(whole), (_key, value) =>
      typeof value === "bigint" ? `${value}` : value,
    );
    for (let bit = 0; bit < 512 * 8; bit++) {
      const bytes = Buffer.from(whole);
      bytes[bit >> 3]! ^= 1 << (bit & 7);
      const found = await read(bytes).catch(() => undefined);
      // The checksum's own digits: "0" and " " are the same in front of a number.
      if (found && bit >> 3 >= 148 && bit >> 3 < 156)
        expect(JSON.stringify(found, (_key, value) => (typeof value === "bigint" ? `${value}` : value))).toBe(
          meant,
        );
      else expect(found, `bit ${bit}`).toBeUndefined();
    }
  });
});
