import { spawn } from "node:child_process";
import { once } from "node:events";
import { readlinkSync } from "node:fs";
import { describe, expect, it } from "vitest";
import {
  bootId,
  childrenOf,
  inodeInBrackets,
  isAlive,
  namespaceInode,
  ownMountNamespace,
  parseStat,
  pidsInNamespaces,
  processStat,
  processTree,
  startTime,
  tracerPid,
} from "../../src/linux/proc.ts";

// A pid that no process has: pid_max is at most 2^22.
const noProcess = 2 ** 22 + 1;

describe("parseStat", () => {
  const tail =
    "1 2 3 0 -1 4194560 100 0 0 0 7 8 0 0 20 0 1 0 4242 1000000 100 18446744073709551615 1 1 0 0 0 0 0";

  it("reads a plain line", () => {
    expect(parseStat(`17 (sleep) S ${tail}`)).toEqual({
      pid: 17,
      comm: "sleep",
      state: "S",
      parentPid: 1,
      processGroup: 2,
      session: 3,
      terminal: 0,
      startTime: 4242,
    });
  });

  it("is not taken in by a command that looks like the rest of the line", () => {
    const stat = parseStat(`17 (a) R 9 9 (b) Z ${tail}`);
    expect(stat).toMatchObject({ comm: "a) R 9 9 (b", state: "Z", parentPid: 1, startTime: 4242 });
  });
});

describe("a process", () => {
  it("is told from another one with its pid by its start time", () => {
    const started = startTime(process.pid)!;
    expect(started).toBeGreaterThan(0);
    expect(isAlive(process.pid, started)).toBe(true);
    expect(isAlive(process.pid, started + 1)).toBe(false);
    expect(isAlive(process.pid)).toBe(true);
  });

  it("that never was has nothing to say", () => {
    expect(startTime(noProcess)).toBeUndefined();
    expect(processStat(noProcess)).toBeUndefined();
    expect(isAlive(noProcess)).toBe(false);
    expect(namespaceInode(noProcess, "mnt")).toBeUndefined();
    expect(pidsInNamespaces(noProcess)).toEqual([]);
    expect(tracerPid(noProcess)).toBeUndefined();
    expect(childrenOf(noProcess)).toEqual([]);
  });

  it("is not alive as a zombie", async () => {
    // The shell's child ends when exec has put a program in the shell's place that never waits, so nobody reaps it.
    const child = spawn("sh", ["-c", "sh -c 'sleep 0.3; exit 3' & echo $!; exec sleep 60"], {
      stdio: ["ignore", "pipe", "ignore"],
    });
    const [line] = (await once(child.stdout, "data")) as [Buffer];
    const pid = Number(line.toString());
    while (processStat(pid)?.state !== "Z") await new Promise((resolve) => setTimeout(resolve, 5));
    expect(isAlive(pid, startTime(pid))).toBe(false);
    child.kill("SIGKILL");
    await once(child, "exit");
  });

  it("knows its children, its tracer and that it is not pid 1 of a namespace", async () => {
    const child = spawn("sleep", ["60"], { stdio: "ignore" });
    await once(child, "spawn");
    expect(childrenOf(process.pid)).toContain(child.pid);
    expect(tracerPid(child.pid!)).toBe(0);
    expect(pidsInNamespaces(child.pid!)).toEqual([child.pid]);
    child.kill("SIGKILL");
    await once(child, "exit");
  });

  it.skipIf(process.getuid?.() !== 0)("has a pid in each namespace that it is in", async () => {
    const child = spawn("unshare", ["--pid", "--fork", "--kill-child", "sleep", "60"], { stdio: "ignore" });
    await once(child, "spawn");
    let inner: number | undefined;
    while (inner === undefined || processStat(inner)?.comm !== "sleep") {
      await new Promise((resolve) => setTimeout(resolve, 5));
      inner = childrenOf(child.pid!)[0];
    }
    expect(pidsInNamespaces(inner!)).toEqual([inner, 1]);
    child.kill("SIGKILL");
    await once(child, "exit");
  });
});

it("names namespaces by their inode", () => {
  expect(inodeInBrackets("mnt:[4026531841]")).toBe(4026531841);
  expect(inodeInBrackets("/dev/null")).toBeUndefined();
  expect(`mnt:[${ownMountNamespace()}]`).toBe(readlinkSync("/proc/self/ns/mnt"));
});

it("knows this boot", () => {
  expect(bootId()).toMatch(/^[0-9a-f]{8}-[0-9a-f-]{27}$/);
});

describe("a tree of processes", () => {
  it("is listed parents first, and others have their turn meanwhile", async () => {
    const script = "for i in 1 2 3; do sh -c 'sleep 1000 & sleep 1000 & echo; wait' & done; wait";
    const child = spawn("sh", ["-c", script], { stdio: ["ignore", "pipe", "ignore"], detached: true });
    try {
      for (let lines = 0; lines < 3; ) lines += (await once(child.stdout, "data"))[0].length;
      let turns = 0;
      const tree = await processTree(child.pid!, () => {
        turns += 1;
        return new Promise((resolve) => setImmediate(resolve));
      });
      expect(tree).toHaveLength(1 + 3 + 6);
      expect(turns).toBe(tree.length);
      for (const [at, { parentPid }] of tree.entries())
        if (at > 0) expect(tree.slice(0, at).map(({ pid }) => pid)).toContain(parentPid);
    } finally {
      process.kill(-child.pid!, "SIGKILL");
      await once(child, "exit");
    }
    expect(await processTree(noProcess, () => undefined)).toEqual([]);
  });
});
