import { execFileSync } from "node:child_process";
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statfsSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { ensureKernelCache } from "../../src/criu/kernel-cache.ts";

// A directory that is on no tmpfs, as /run may be, and one that is.
const isTmpfs = (path: string) => statfsSync(path).type === 0x01021994;
const disk = [tmpdir(), "/var/tmp", import.meta.dirname].find((path) => !isTmpfs(path));

describe.skipIf(disk === undefined)("CRIU's answers of the kernel", () => {
  let root: string;
  let run: string;
  let memory: string;
  let asked: number;
  beforeEach(() => {
    root = mkdtempSync(join(disk!, "kernel-cache-"));
    run = join(root, "run");
    memory = join(root, "dev");
    for (const path of [run, memory]) mkdirSync(path, { mode: 0o755 });
    execFileSync("mount", ["-t", "tmpfs", "-o", "mode=755", "cedana-test", memory]);
    asked = 0;
  });
  afterEach(() => {
    execFileSync("umount", [memory]);
    rmSync(root, { recursive: true });
  });

  const place = () => ({
    run,
    memory,
    ask: async () => {
      asked++;
      return Buffer.from(`answers ${asked}`);
    },
  });
  const link = () => join(run, "criu.kdat");

  it("are kept in memory where /run is a disk, asked for once", async () => {
    expect(await ensureKernelCache(place())).toBe(true);
    expect(readFileSync(link(), "utf8")).toBe("answers 1");
    expect(lstatSync(readlinkSync(link())).mode & 0o777).toBe(0o600);
    expect(await ensureKernelCache(place())).toBe(true);
    expect(asked).toBe(1);
    expect(readdirSync(memory)).toHaveLength(1);
  });

  it("are asked for again after a boot, and after CRIU has thrown them away", async () => {
    await ensureKernelCache(place());
    unlinkSync(readlinkSync(link())); // the memory is new, the disk has the link
    expect(await ensureKernelCache(place())).toBe(true);
    expect(readFileSync(link(), "utf8")).toBe("answers 2");
    unlinkSync(link());
    expect(await ensureKernelCache(place())).toBe(true);
    expect(readFileSync(link(), "utf8")).toBe("answers 3");
  });

  it("are CRIU's own affair where /run is a tmpfs, and somebody else's file is left alone", async () => {
    expect(await ensureKernelCache({ ...place(), run: memory })).toBe(false);
    writeFileSync(link(), "theirs");
    expect(await ensureKernelCache(place())).toBe(false);
    unlinkSync(link());
    symlinkSync("/nowhere", link());
    expect(await ensureKernelCache(place())).toBe(false);
    expect(asked).toBe(0);
    expect(readdirSync(memory)).toEqual([]);
  });

  it("are not kept where others could change them, or the next boot would find them", async () => {
    chmodSync(memory, 0o1777);
    expect(await ensureKernelCache(place())).toBe(false);
    expect(await ensureKernelCache({ ...place(), memory: root })).toBe(false);
    chmodSync(memory, 0o755);
    expect(await ensureKernelCache({ ...place(), ask: async () => Buffer.alloc(0) })).toBe(false);
    const failing = ensureKernelCache({ ...place(), ask: () => Promise.reject(new Error("no criu")) });
    await expect(failing).rejects.toThrow("no criu");
    expect(existsSync(link())).toBe(false);
    expect(readdirSync(memory)).toEqual([]);
  });
});
