import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { hashFiles } from "../../src/checkpoint/digest.ts";
import { digestTree, type Follower, followFiles } from "../../src/checkpoint/follow.ts";
import { Cancelled } from "../../src/errors/index.ts";

let directory: string;
const at = (name: string) => path.join(directory, name);
beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "follow-"));
  fs.writeFileSync(at("small"), "x", { mode: 0o644 });
});
afterEach(() => fs.rmSync(directory, { recursive: true }));

const MIB = 1024 * 1024;

async function untilHashed(follower: Follower, bytes: number): Promise<void> {
  while (follower.bytes < bytes) await new Promise((resolve) => setTimeout(resolve, 5));
}

const openBelow = () =>
  fs.readdirSync("/proc/self/fd").filter((fd) => {
    try {
      return fs.readlinkSync(`/proc/self/fd/${fd}`).startsWith(directory);
    } catch {
      return false; // the one that lists them
    }
  });

describe("CRIU's pages", () => {
  for (const images of ["", "checkpoint"])
    it(`are hashed while they are written${images && `, in ${images}/ of a store's checkpoint too`}`, async () => {
      fs.mkdirSync(at(images), { recursive: true });
      const pages = (number: number) => path.join(images, `pages-${number}.img`);
      const follower = followFiles(directory, { images: at(images) });
      // The first has an end by the second's being there, whatever it is a multiple of.
      for (const [number, bytes] of [
        [1, 3 * MIB],
        [2, 1000],
        [3, 20 * MIB],
      ] as const)
        fs.writeFileSync(at(pages(number)), Buffer.alloc(bytes, number), { mode: 0o644 });
      await untilHashed(follower, 19 * MIB);
      for (let round = 0; round < 5; round++) fs.appendFileSync(at(pages(3)), Buffer.alloc(300_000, round));
      fs.mkdirSync(at("sub"));
      fs.writeFileSync(at("sub/pages-1.img"), "not CRIU's");
      fs.symlinkSync("/etc", at("parent"));
      const files = await follower.finish();
      expect(files.map((file) => file.path)).toEqual(
        [pages(1), pages(2), pages(3), "small", "sub/pages-1.img"].sort(),
      );
      expect(files).toEqual(await hashFiles(directory, files));
      for (const file of files) expect(fs.statSync(at(file.path)).mode & 0o777).toBe(0o600);
      expect(openBelow()).toEqual([]);
    });

  it("are let go when nobody asks for the end", async () => {
    fs.writeFileSync(at("pages-1.img"), Buffer.alloc(9 * MIB));
    const follower = followFiles(directory);
    await untilHashed(follower, 8 * MIB);
    follower.abandon();
    fs.appendFileSync(at("pages-1.img"), Buffer.alloc(9 * MIB));
    await new Promise((resolve) => setTimeout(resolve, 30));
    expect(follower.bytes).toBeLessThan(10 * MIB);
    expect(openBelow()).toEqual([]);
  });
});

describe("a checkpoint's files", () => {
  it("are hashed as they are, many and large ones", async () => {
    for (let number = 0; number < 300; number++) fs.writeFileSync(at(`core-${number}.img`), `${number}`);
    for (const [name, bytes] of [
      ["one-bite", 8 * MIB],
      ["just-small", MIB],
      ["just-large", MIB + 1],
      ["empty", 0],
      ["two-bites", 16 * MIB + 5],
    ] as const)
      fs.writeFileSync(at(name), Buffer.alloc(bytes, name));
    const files = await digestTree(directory);
    expect(files.length).toBe(306);
    expect(files).toEqual(await hashFiles(directory, files));
  });

  it("are given up when the caller does", async () => {
    fs.writeFileSync(at("pages-1.img"), "");
    fs.truncateSync(at("pages-1.img"), 2 ** 40); // minutes
    const stop = new AbortController();
    const digests = digestTree(directory, { signal: stop.signal });
    setTimeout(() => stop.abort(), 20);
    await expect(digests).rejects.toThrow(Cancelled);
    expect(openBelow()).toEqual([]);
  });
});
