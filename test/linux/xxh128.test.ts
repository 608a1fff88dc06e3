import { execFileSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Xxh128, xxh128Files } from "../../src/linux/xxh128.ts";

let directory: string;
let root: number;
beforeAll(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "xxh128-"));
  root = fs.openSync(directory, fs.constants.O_RDONLY | fs.constants.O_DIRECTORY);
});
afterAll(() => {
  fs.closeSync(root);
  fs.rmSync(directory, { recursive: true });
});

// The algorithm has another way for each of these ranges of lengths.
const sizes = [0, 1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 1024, 1025, 262_144, 262_145, 3_000_000];
const bytesOf = (size: number) =>
  Buffer.from(Array.from({ length: size }, (_, at) => (at * 31 + size) & 255));

/** What of a file is in the page cache: cachestat(2). undefined: the kernel doesn't know the call */
function pagesOf(file: string): { dirty: number } | undefined {
  const script = `
import ctypes, os, sys
arguments, found = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
done = ctypes.CDLL(None).syscall(451, os.open(sys.argv[1], os.O_RDONLY), arguments, found, 0)
print(found[1] if done == 0 else -1)`;
  const dirty = Number(execFileSync("python3", ["-c", script, file], { encoding: "utf8" }));
  return dirty < 0 ? undefined : { dirty };
}

describe("XXH3 of 128 bits", () => {
  it("is what xxh128sum prints, however the bytes come", async () => {
    for (const size of sizes) fs.writeFileSync(path.join(directory, `${size}`), bytesOf(size));
    const names = sizes.map(String);
    const expected = execFileSync("xxh128sum", names, { cwd: directory, encoding: "utf8" })
      .trim()
      .split("\n")
      .map((line) => line.split(" ")[0]);
    const whole = sizes.map((size) => {
      const hash = new Xxh128();
      hash.update(bytesOf(size));
      return hash.digest();
    });
    expect(whole).toEqual(expected);
    expect(whole[0]).toBe("99aa06d3014798d86001c324468d497f");
    const read = await Promise.all(
      sizes.map(async (size) => {
        const fd = fs.openSync(path.join(directory, `${size}`), "r");
        try {
          const hash = new Xxh128();
          const half = size >> 1;
          expect(await hash.read(fd, 0, half)).toBe(half);
          expect(hash.readSync(fd, half, 2 ** 40)).toBe(size - half);
          return hash.digest();
        } finally {
          fs.closeSync(fd);
        }
      }),
    );
    expect(read).toEqual(expected);
    const files = await xxh128Files(root, names, 2 ** 40, 0);
    expect(files).toEqual(sizes.map((size, at) => ({ size, digest: expected[at] })));
  });

  it("has the disk begin with what it reads, when it is told to", async ({ skip }) => {
    const file = path.join(directory, "dirty");
    fs.writeFileSync(file, Buffer.alloc(4 << 20, 1));
    const before = pagesOf(file);
    skip(before === undefined, "a kernel without cachestat(2), which came with 6.5");
    skip(before!.dirty === 0, "nothing is ever dirty here: a tmpfs");
    const fd = fs.openSync(file, "r");
    try {
      const hash = new Xxh128();
      await hash.read(fd, 0, 2 << 20);
      await hash.read(fd, 2 << 20, 2 << 20, { toDisk: true });
      expect(pagesOf(file)!.dirty).toBeLessThanOrEqual(before!.dirty / 2); // clean, or on their way
    } finally {
      fs.closeSync(fd);
    }
  });

  it("leaves alone what is larger than asked for, and sets the mode", async () => {
    fs.writeFileSync(path.join(directory, "large"), "12345", { mode: 0o644 });
    expect(await xxh128Files(root, ["large"], 4, 0o600)).toEqual([{ size: 5 }]);
    expect(fs.statSync(path.join(directory, "large")).mode & 0o777).toBe(0o600);
  });

  it("follows no link, leaves no directory, waits for no FIFO", async () => {
    fs.symlinkSync("/etc/passwd", path.join(directory, "link"));
    execFileSync("mkfifo", [path.join(directory, "fifo")]);
    for (const [name, code] of [
      ["link", "ELOOP"],
      ["../", "EXDEV"],
      ["fifo", "EINVAL"],
      ["nothing", "ENOENT"],
    ] as const)
      await expect(xxh128Files(root, ["0", name], 10, 0)).rejects.toMatchObject({ code, path: name });
  });

  it("is one reader's at a time, and refuses what is not its own", async () => {
    const fd = fs.openSync(path.join(directory, "3000000"), "r");
    try {
      const hash = new Xxh128();
      const reading = hash.read(fd, 0, 3_000_000);
      expect(() => hash.digest()).toThrow(/is being read/);
      await reading;
      expect(hash.digest()).toMatch(/^[0-9a-f]{32}$/);
      await expect(hash.read(fd, 0, 10)).resolves.toBe(10);
      expect(() => hash.readSync(fd, 0, -1)).toThrow(TypeError);
      expect(() => hash.update("text" as unknown as Uint8Array)).toThrow(TypeError);
      await expect(hash.read(1_000_000, 0, 10)).rejects.toMatchObject({ code: "EBADF", syscall: "pread" });
    } finally {
      fs.closeSync(fd);
    }
  });
});
