import { spawn } from "node:child_process";
import { once } from "node:events";
import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  rmSync,
  unlinkSync,
  writeSync,
} from "node:fs";
import { stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, it, vi } from "vitest";
import { findAddon } from "../../src/linux/addon.ts";
import { O_PATH } from "../../src/linux/apart.ts";
import { answerWithin, isKernelMemory, parseStatus, takeInventory } from "../../src/linux/inventory.ts";
import { namespaceInode } from "../../src/linux/proc.ts";
import { canFuse, deadFuse } from "../live/harness/dead-fuse.ts";

it("reads the lines of status that count", () => {
  const text =
    "Name:\tnginx\nState:\tS (sleeping)\nTracerPid:\t17\nNSpid:\t4711\t12\t1\nVmRSS:\t   5000 kB\nRssAnon:\t     1024 kB\n" +
    "RssFile:\t    3000 kB\nRssShmem:\t       8 kB\nVmSwap:\t       4 kB\nHugetlbPages:\t    2048 kB\nThreads:\t3\nSeccomp:\t2\n";
  expect(parseStatus(text)).toEqual({
    tracerPid: 17,
    pidsInNamespaces: [4711, 12, 1],
    anonymousBytes: 1024 * 1024,
    sharedBytes: 8192,
    swapBytes: 4096,
    hugetlbBytes: 2048 * 1024,
    seccomp: 2,
  });
  // A kernel thread has no memory.
  expect(parseStatus("Name:\tkworker/0:1\nTracerPid:\t0\n")).toMatchObject({
    anonymousBytes: 0,
    pidsInNamespaces: [],
  });
});

it("knows memory that only looks like a file", () => {
  for (const path of [
    "/SYSV00000000 (deleted)",
    "/memfd:x (deleted)",
    "/dev/zero (deleted)",
    "/[aio] (deleted)",
  ])
    expect(isKernelMemory(path)).toBe(true);
  for (const path of ["/dev/zero", "/memfd", "/usr/lib/libc.so.6", "/dev/shm/x"])
    expect(isKernelMemory(path)).toBe(false);
});

const built = (() => {
  try {
    return findAddon() !== "";
  } catch {
    return false;
  }
})();

it.skipIf(!built)("finds what a process has open, mapped and mounted (needs `npm run build`)", async () => {
  const directory = mkdtempSync(join(tmpdir(), "cedana-inventory-"));
  const path = join(directory, "file");
  const file = openSync(path, "w");
  writeSync(file, Buffer.alloc(10_000));
  unlinkSync(path);
  const child = spawn("sleep", ["60"], { stdio: ["ignore", file, "pipe"], cwd: directory });
  await once(child, "spawn");
  closeSync(file);
  // Until then it is still us.
  const look = async () => {
    const inventory = await takeInventory([child.pid!, child.pid!, 2 ** 22 + 1]);
    return inventory.processes[0]?.stat.comm === "sleep" ? inventory : undefined;
  };
  let inventory = await look();
  while (!inventory) inventory = await look();
  expect(inventory.processes).toHaveLength(1);
  const [process_] = inventory.processes as [(typeof inventory.processes)[0]];
  expect(process_).toMatchObject({ pid: child.pid, threads: 1, stat: { parentPid: process.pid } });
  expect(process_.namespaces.mnt).toBe(namespaceInode("self", "mnt"));
  const open = new Map(process_.files.map((one) => [one.what === "fd" ? one.fd : one.what, one]));
  expect(open.get(0)).toMatchObject({ link: "/dev/null", stat: { type: "char" } });
  expect(open.get(1)).toMatchObject({
    link: `${path} (deleted)`,
    stat: { type: "file", links: 0, bytes: 10_000, allocatedBytes: expect.any(Number) },
  });
  expect(open.get(2)).toMatchObject({ link: expect.stringMatching(/^socket:\[\d+\]$/) });
  expect(open.get("cwd")).toMatchObject({ link: directory, stat: { type: "directory" } });
  const mountIds = new Set(inventory.mounts.get(process_.namespaces.mnt!)!.map((mount) => mount.mountId));
  expect(mountIds).toContain(open.get(0)!.info.mountId);
  expect(mountIds).toContain(open.get("exe")!.info.mountId);
  expect(process_.mappings.some((mapping) => mapping.path.includes("sleep"))).toBe(true);
  const sockets = inventory.sockets.get(process_.namespaces.net!)!;
  expect(sockets.byInode.get(Number(/\d+/.exec(open.get(2)!.link)![0]))).toMatchObject({
    family: "unix",
    type: "stream",
    state: "ESTABLISHED",
  });
  child.kill("SIGKILL");
  await once(child, "exit");
  rmSync(directory, { recursive: true });
});

it("can be called off, and has nothing to say of nobody", async () => {
  const signal = AbortSignal.abort();
  await expect(takeInventory([process.pid], { signal })).rejects.toMatchObject({ name: "AbortError" });
  expect((await takeInventory([])).processes).toEqual([]);
});

it("does not wait for a dead file system", async () => {
  vi.useFakeTimers();
  try {
    const answer = answerWithin(new Promise(() => undefined));
    await vi.advanceTimersByTimeAsync(2_000);
    expect(await answer).toBeUndefined();
    expect(await answerWithin(Promise.resolve(7))).toBe(7);
    await expect(answerWithin(Promise.reject(new Error("no")))).rejects.toThrow("no");
    expect(vi.getTimerCount()).toBe(0);
  } finally {
    vi.useRealTimers();
  }
});

it.skipIf(!canFuse)("takes no thread of the pool for files whose servers don't answer", async () => {
  const place = mkdtempSync(join(tmpdir(), "cedana-inventory-"));
  const mounts: Disposable[] = [];
  const fds: number[] = [];
  try {
    for (const name of ["a", "b", "c", "d", "e"]) {
      mkdirSync(join(place, name));
      mounts.push(deadFuse(join(place, name)));
      fds.push(openSync(join(place, name), O_PATH));
    }
    const child = spawn("sleep", ["1000"], { stdio: ["ignore", "ignore", "ignore", ...fds] });
    try {
      const taking = takeInventory([child.pid!]);
      expect((await stat("/")).isDirectory()).toBe(true);
      let isTaken = false;
      void taking.then(() => {
        isTaken = true;
      });
      // More at once than the pool has threads, again and again, until the inventory has given its files up.
      while (!isTaken) await Promise.all(["/", "/", "/", "/", "/", "/", "/", "/"].map((path) => stat(path)));
      const { files } = (await taking).processes[0]!;
      expect(files.filter(({ statFailed }) => statFailed === "no answer within 2000 ms")).toHaveLength(5);
      expect(files.find(({ what }) => what === "root")?.stat).toMatchObject({ type: "directory" });
    } finally {
      child.kill("SIGKILL");
    }
  } finally {
    for (const fd of fds) closeSync(fd);
    for (const mount of mounts) mount[Symbol.dispose]();
    rmSync(place, { recursive: true });
  }
});

it.skipIf(!canFuse)(
  "asks few of a container's servers, however many it is, and none twice that was silent",
  async () => {
    const place = mkdtempSync(join(tmpdir(), "cedana-inventory-"));
    const mounts: Disposable[] = [];
    const fds: number[] = [];
    const threads = () => readdirSync("/proc/self/task").length;
    const silent = async (pid: number) => {
      const { files } = (await takeInventory([pid])).processes[0]!;
      return files.filter(({ statFailed }) => statFailed === "no answer within 2000 ms").length;
    };
    try {
      for (let n = 0; n < 40; n++) {
        mkdirSync(join(place, `${n}`));
        mounts.push(deadFuse(join(place, `${n}`)));
        fds.push(openSync(join(place, `${n}`), O_PATH));
      }
      const child = spawn("sleep", ["1000"], { stdio: ["ignore", "ignore", "ignore", ...fds] });
      try {
        const before = threads();
        expect(await silent(child.pid!)).toBe(40);
        expect(threads() - before).toBeLessThan(20); // those asked at once, and those asked while they were given up
        const asked = threads();
        expect(await silent(child.pid!)).toBe(40);
        expect(threads()).toBeLessThanOrEqual(asked);
      } finally {
        child.kill("SIGKILL");
      }
    } finally {
      for (const fd of fds) closeSync(fd);
      for (const mount of mounts) mount[Symbol.dispose]();
      rmSync(place, { recursive: true });
    }
  },
);
