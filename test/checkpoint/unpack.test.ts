import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { createArchive } from "../../src/checkpoint/archive/index.ts";
import { writeManifest } from "../../src/checkpoint/manifest-files.ts";
import { sweepUnpacked, UnpackedCheckpoint } from "../../src/checkpoint/unpack.ts";
import { BrokenImage } from "../../src/errors/index.ts";
import { sampleManifest } from "./sample.ts";

let directory: string;
let archive: string;
let root: string;
let owner: string;
const { signal } = new AbortController();

async function pack(text: string): Promise<void> {
  const source = path.join(directory, "source");
  fs.rmSync(source, { recursive: true, force: true });
  fs.mkdirSync(path.join(source, "checkpoint"), { recursive: true });
  fs.writeFileSync(path.join(source, "checkpoint/inventory.img"), text);
  await writeManifest(source, sampleManifest, { digests: true });
  await createArchive(source, archive, { compression: "zstd", replace: true });
}

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "unpack-"));
  archive = path.join(directory, "cp.tar.zst");
  root = path.join(directory, "unpacked");
  owner = path.join(directory, "bundle");
  fs.mkdirSync(owner);
  await pack("one");
});
afterEach(() => fs.rmSync(directory, { recursive: true }));

const inventoryOf = (at: string) => fs.readFileSync(path.join(at, "checkpoint/inventory.img"), "utf8");

describe("an unpacked checkpoint", () => {
  it("is unpacked once for an owner, and anew from another archive", async () => {
    const unpacked = new UnpackedCheckpoint(root, owner);
    const at = await unpacked.open(archive, undefined, signal);
    expect(inventoryOf(at)).toBe("one");
    const { ino } = fs.statSync(at);
    expect(await unpacked.open(archive, undefined, signal)).toBe(at);
    expect(fs.statSync(at).ino).toBe(ino);
    await pack("two");
    expect(inventoryOf(await unpacked.open(archive, undefined, signal))).toBe("two");
    await unpacked.remove();
    expect(fs.readdirSync(root).filter((name) => name !== "tmp")).toEqual([]);
  });

  it("is not there when anything of the archive is wrong", async () => {
    const bytes = fs.readFileSync(archive);
    fs.writeFileSync(archive, bytes.subarray(0, bytes.length - 3));
    const unpacked = new UnpackedCheckpoint(root, owner);
    await expect(unpacked.open(archive, undefined, signal)).rejects.toThrow(BrokenImage);
    expect(fs.readdirSync(root).filter((name) => name !== "tmp")).toEqual([]);
  });

  it("whose note the machine's end has left empty is in nobody's way, and is swept", async () => {
    const other = new UnpackedCheckpoint(root, path.join(directory, "other"));
    const broken = await other.open(archive, undefined, signal);
    fs.writeFileSync(`${broken}.json`, "");
    const at = await new UnpackedCheckpoint(root, owner).open(archive, undefined, signal);
    expect(inventoryOf(at)).toBe("one");
    for (const left of [broken, `${broken}.json`]) expect(fs.existsSync(left), left).toBe(false);
    fs.writeFileSync(`${at}.json`, "");
    expect(inventoryOf(await new UnpackedCheckpoint(root, owner).open(archive, undefined, signal))).toBe(
      "one",
    );
  });

  it("is swept when its owner has gone, and only then, and only where its owner could be seen", async () => {
    const other = path.join(directory, "other");
    fs.mkdirSync(other);
    const at = await new UnpackedCheckpoint(root, owner).open(archive, undefined, signal);
    const kept = await new UnpackedCheckpoint(root, other).open(archive, undefined, signal);
    expect(await sweepUnpacked(root)).toEqual([]);
    fs.rmdirSync(owner);
    fs.rmdirSync(other);
    const note = `${kept}.json`;
    const elsewhere = { ...JSON.parse(fs.readFileSync(note, "utf8")), mountNamespace: "mnt:[1]" };
    fs.writeFileSync(note, JSON.stringify(elsewhere));
    expect(await sweepUnpacked(root)).toEqual([owner]);
    expect(fs.existsSync(at)).toBe(false);
    expect(fs.existsSync(kept)).toBe(true);
  });
});
