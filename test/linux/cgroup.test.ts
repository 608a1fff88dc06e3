import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, describe, expect, it } from "vitest";
import { NotFound, TimedOut, Unsupported, WrongState } from "../../src/errors/index.ts";
import { Cgroup } from "../../src/linux/cgroup.ts";
import {
  findHierarchies,
  findYard,
  parseMembership,
  resolve,
  upTo,
} from "../../src/linux/cgroup-hierarchy.ts";
import { parseMountInfoLine } from "../../src/linux/mount-options.ts";

const mounts = (text: string) =>
  text
    .trim()
    .split("\n")
    .map((line) => parseMountInfoLine(line.trim())!);

const hybrid = mounts(`
  31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
  32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
  35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
  37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
  40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
  41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate`);

const unified = mounts(`
  31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot`);

describe("the layout", () => {
  it("is v1 where controllers have hierarchies of their own, also beside a v2 mount", () => {
    const { version, byController } = findHierarchies(hybrid);
    expect(version).toBe(1);
    expect([...byController.keys()]).toEqual(["cpu", "cpuacct", "memory", "freezer", "name=systemd", ""]);
    expect(byController.get("cpuacct")?.mountPoint).toBe("/sys/fs/cgroup/cpu,cpuacct");
    expect(byController.get("")?.mountPoint).toBe("/sys/fs/cgroup/unified");
  });

  it("is v2 where only that is mounted", () => {
    const { version, byController } = findHierarchies(unified);
    expect(version).toBe(2);
    expect([...byController]).toEqual([["", { controller: "", mountPoint: "/sys/fs/cgroup", root: "/" }]]);
  });

  it("is v2 where that covers the hierarchies of v1", () => {
    const { version, byController } = findHierarchies([...hybrid, ...unified]);
    expect(version).toBe(2);
    expect(byController.get("")?.mountPoint).toBe("/sys/fs/cgroup");
  });

  it("prefers a mount that shows a whole hierarchy", () => {
    const partly = mounts("50 23 0:34 /a/b /x rw - cgroup cgroup rw,freezer");
    expect(findHierarchies([...partly, ...hybrid]).byController.get("freezer")?.root).toBe("/");
    expect(findHierarchies([...hybrid, ...partly]).byController.get("freezer")?.root).toBe("/");
  });
});

describe("CRIU's yard", () => {
  const yard = (membership: string, layout = hybrid) =>
    findYard(membership, findHierarchies(layout).byController);

  it("is where every hierarchy of a process is mounted by the name that CRIU looks for", () => {
    expect(yard("4:cpu,cpuacct:/b\n3:memory:/b\n2:freezer:/\n1:name=systemd:/\n0::/b\n")).toBe(
      "/sys/fs/cgroup",
    );
    expect(yard("4:cpu,cpuacct:/b\n", hybrid.slice(0, 2))).toBe("/sys/fs/cgroup");
  });

  it("is none where CRIU would find a hierarchy missing, by another name, elsewhere, or only in part", () => {
    expect(yard("5:pids:/b\n3:memory:/b\n")).toBeUndefined();
    expect(yard("4:cpuacct,cpu:/b\n")).toBeUndefined();
    const elsewhere = mounts("50 23 0:39 / /mnt/pids rw - cgroup cgroup rw,pids");
    expect(yard("5:pids:/b\n", [...hybrid, ...elsewhere])).toBeUndefined();
    const partly = mounts("50 23 0:39 /a /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids");
    expect(yard("5:pids:/b\n", [...hybrid, ...partly])).toBeUndefined();
  });
});

describe("membership", () => {
  it("has a path for each controller", () => {
    const membership = parseMembership(
      "9:name=systemd:/a\n4:cpu,cpuacct:/b:c/d\n2:memory:/gone (deleted)\n0::/e\n",
    );
    expect([...membership]).toEqual([
      ["name=systemd", "/a"],
      ["cpu", "/b:c/d"],
      ["cpuacct", "/b:c/d"],
      ["", "/e"],
    ]);
  });

  it("leads to directories, but not to those that everybody is in", () => {
    const membership = parseMembership(
      "4:cpu,cpuacct:/pod/c1\n3:memory:/pod/c1\n2:freezer:/\n1:pids:/pod/c1\n0::/\n",
    );
    expect(resolve(membership, findHierarchies(hybrid))).toEqual({
      version: 1,
      paths: new Map([
        ["cpu", "/sys/fs/cgroup/cpu,cpuacct/pod/c1"],
        ["cpuacct", "/sys/fs/cgroup/cpu,cpuacct/pod/c1"],
        ["memory", "/sys/fs/cgroup/memory/pod/c1"],
      ]),
    });
  });

  it("in v2 counts only the unified hierarchy", () => {
    const membership = parseMembership("2:memory:/x\n0::/system.slice/c1.scope\n");
    expect(resolve(membership, findHierarchies(unified))).toEqual({
      version: 2,
      paths: new Map([["", "/sys/fs/cgroup/system.slice/c1.scope"]]),
    });
  });

  it("is seen through a mount of a part of a hierarchy", () => {
    const part = findHierarchies(
      mounts("50 23 0:34 /docker/outer /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer"),
    );
    expect(resolve(new Map([["freezer", "/docker/outer/c1"]]), part).paths.get("freezer")).toBe(
      "/sys/fs/cgroup/freezer/c1",
    );
    expect(resolve(new Map([["freezer", "/docker/other/c1"]]), part).paths.size).toBe(0);
    expect(resolve(new Map([["freezer", "/../c1"]]), findHierarchies(hybrid)).paths.size).toBe(0);
  });
});

it("is the container's own where its init has moved further down", () => {
  expect(upTo("/kubepods/pod1/c1/init.scope", "c1")).toBe("/kubepods/pod1/c1");
  expect(upTo("/kubepods/pod1/c1", "c1")).toBe("/kubepods/pod1/c1");
  expect(upTo("/c1/docker/c1/x", "c1")).toBe("/c1/docker/c1");
  expect(upTo("/kubepods/pod1/c10/x", "c1")).toBe("/kubepods/pod1/c10/x");
  expect(upTo("/system.slice/c1.scope/container/x", "c1.scope/container")).toBe(
    "/system.slice/c1.scope/container",
  );
  expect(upTo("/system.slice/c1.scope/x", "c1.scope/container")).toBe("/system.slice/c1.scope");
  expect(upTo("/", "c1")).toBe("/");
});

describe("an unknown process or cgroup", () => {
  it("is not found", async () => {
    await expect(Cgroup.of(2 ** 22 + 1)).rejects.toThrow(NotFound);
    const gone = Cgroup.fromPaths({ version: 1, paths: { freezer: "/nowhere/x", memory: "/nowhere/x" } });
    expect(await gone.exists()).toBe(false);
    expect(await gone.pids()).toEqual([]);
    expect(await gone.isFrozen()).toBe(false);
    await expect(gone.freeze()).rejects.toThrow(NotFound);
    await expect(gone.thaw()).rejects.toThrow(NotFound);
    await expect(gone.stats()).rejects.toThrow(NotFound);
    await expect(gone.oomKills()).rejects.toThrow(NotFound);
    await gone.kill();
  });

  it("can't be frozen without a freezer", async () => {
    const none = Cgroup.fromPaths({ version: 1, paths: { memory: "/nowhere/x" } });
    await expect(none.freeze()).rejects.toThrow(Unsupported);
  });
});

// Real cgroups, in both versions: v2's core files (freeze, kill, procs) exist without any controller, so on a hybrid host
// both can be tried side by side.
const v1 = "/sys/fs/cgroup";
const v2 = existsSync(`${v1}/cgroup.procs`) ? v1 : `${v1}/unified`;
const writable = process.getuid?.() === 0;
const haveV1 = writable && existsSync(`${v1}/freezer/cgroup.procs`);
const haveV2 = writable && existsSync(`${v2}/cgroup.procs`);
const controllersV1 = ["freezer", "memory", "pids", "cpu", "cpuacct", "blkio"].filter((name) =>
  existsSync(`${v1}/${name}/cgroup.procs`),
);

let serial = 0;
const directories: string[] = [];
const children: ChildProcess[] = [];

function makeCgroup(version: 1 | 2, name = `cedana-test-${process.pid}-${++serial}`): Cgroup {
  const paths: Record<string, string> = {};
  for (const controller of version === 1 ? controllersV1 : [""]) {
    const path = version === 1 ? `${v1}/${controller}/${name}` : `${v2}/${name}`;
    mkdirSync(path);
    directories.push(path);
    paths[controller] = path;
  }
  return Cgroup.fromPaths({ version, paths });
}

async function start(cgroup: Cgroup, ...argv: string[]): Promise<number> {
  const child = spawn(argv[0] ?? "sleep", argv.length ? argv.slice(1) : ["100"], { stdio: "ignore" });
  children.push(child);
  await once(child, "spawn");
  for (const path of cgroup.paths.values()) writeFileSync(`${path}/cgroup.procs`, String(child.pid));
  return child.pid!;
}

/** CPU time in ticks: stands still exactly when the process does. */
function cpuTicks(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8").replace(/.*\) /, "").split(" ");
  return Number(fields[11]) + Number(fields[12]);
}

afterEach(async () => {
  for (const directory of directories) {
    if (existsSync(`${directory}/freezer.state`)) writeFileSync(`${directory}/freezer.state`, "THAWED");
    if (existsSync(`${directory}/cgroup.freeze`)) writeFileSync(`${directory}/cgroup.freeze`, "0");
  }
  for (const child of children) child.kill("SIGKILL");
  await Promise.all(children.map((child) => child.exitCode ?? child.signalCode ?? once(child, "exit")));
  children.length = 0;
  // A cgroup stays busy for a moment after its last process was reaped.
  for (const directory of directories.splice(0).reverse()) {
    for (let attempt = 0; existsSync(directory); attempt++) {
      try {
        rmdirSync(directory);
      } catch (err) {
        if (attempt === 200) throw err;
        await sleep(5);
      }
    }
  }
});

describe.each([
  [1, haveV1],
  [2, haveV2],
] as const)("a real cgroup of version %i (as root, where mounted)", (version, available) => {
  const test = it.skipIf(!available);

  test("is removed with what is below when nobody is in it, and named while somebody is", async () => {
    const cgroup = makeCgroup(version);
    const paths = [...cgroup.paths.values()];
    const [path] = paths;
    mkdirSync(`${path}/below/deeper`, { recursive: true });
    const pid = await start(cgroup);
    expect(await cgroup.removeLeft(20)).toEqual(paths);
    expect(existsSync(`${path}/below`)).toBe(false);
    const removed = cgroup.removeLeft();
    process.kill(pid, "SIGKILL");
    expect(await removed).toEqual([]);
    expect(paths.filter((each) => existsSync(each))).toEqual([]);
    expect(await cgroup.removeLeft()).toEqual([]);
  });

  test("lists its processes and those of the cgroups below", async () => {
    const cgroup = makeCgroup(version);
    const name = [...cgroup.paths.values()][0]!.split("/").at(-1)!;
    const below = makeCgroup(version, `${name}/below`);
    const pids = [await start(cgroup), await start(below)];
    expect((await cgroup.pids()).sort()).toEqual(pids.sort());
    expect(await below.pids()).toEqual(pids.slice(1));
    expect(await cgroup.exists()).toBe(true);
  });

  test("freezes and thaws", async () => {
    const cgroup = makeCgroup(version);
    const busy = await start(cgroup, "sh", "-c", "while :; do :; done");
    expect(await cgroup.freezerState()).toBe("thawed");
    await cgroup.freeze();
    expect(await cgroup.isFrozen()).toBe(true);
    const before = cpuTicks(busy);
    await sleep(50);
    expect(cpuTicks(busy)).toBe(before);
    await cgroup.freeze(); // again: nothing to do
    await cgroup.thaw();
    expect(await cgroup.isFrozen()).toBe(false);
    while (cpuTicks(busy) === before) await sleep(5);
    await cgroup.thaw();
  });

  test("freezes processes that fork all the time", async () => {
    const cgroup = makeCgroup(version);
    for (let n = 0; n < 4; n++) await start(cgroup, "sh", "-c", "while :; do /bin/true; done");
    for (let round = 0; round < 20; round++) {
      await cgroup.freeze(5_000);
      const pids = await cgroup.pids();
      await sleep(2);
      expect(await cgroup.pids()).toEqual(pids);
      await cgroup.thaw();
    }
  });

  test("is frozen too when the cgroup above is, and says so when asked to thaw", async () => {
    const above = makeCgroup(version);
    const name = [...above.paths.values()][0]!.split("/").at(-1)!;
    const cgroup = makeCgroup(version, `${name}/below`);
    await start(cgroup);
    await above.freeze();
    expect(await cgroup.isFrozen()).toBe(true);
    await expect(cgroup.thaw(20)).rejects.toThrow(WrongState);
    await above.thaw();
    expect(await cgroup.isFrozen()).toBe(false);
  });

  test("thaws again when the caller loses patience", async () => {
    const cgroup = makeCgroup(version);
    await start(cgroup);
    await expect(cgroup.freeze(1_000, AbortSignal.abort())).rejects.toThrow("aborted");
    expect(await cgroup.freezerState()).toBe("thawed");
  });

  test("kills everybody in it, frozen or not", async () => {
    const cgroup = makeCgroup(version);
    await start(cgroup);
    await start(cgroup, "sh", "-c", "while :; do sleep 0.01; done");
    await cgroup.freeze();
    await cgroup.kill();
    await Promise.all(children.map((child) => child.exitCode ?? child.signalCode ?? once(child, "exit")));
    expect(children.map((child) => child.signalCode)).toEqual(["SIGKILL", "SIGKILL"]);
    while ((await cgroup.pids()).length > 0) await sleep(5);
    await cgroup.kill();
  });

  test("passes on other signals", async () => {
    const cgroup = makeCgroup(version);
    await start(cgroup);
    const exit = once(children[0]!, "exit");
    await cgroup.kill("SIGTERM");
    expect(await exit).toEqual([null, "SIGTERM"]);
  });

  test("survives being written down", async () => {
    const cgroup = makeCgroup(version);
    const pid = await start(cgroup);
    const again = Cgroup.fromPaths(JSON.parse(JSON.stringify(cgroup)));
    expect(await again.pids()).toEqual([pid]);
  });
});

it.skipIf(!haveV1)("is found from a process of its own (v1, as root)", async () => {
  const cgroup = makeCgroup(1);
  const pid = await start(cgroup);
  const found = await Cgroup.of(pid);
  expect(found.version).toBe(1);
  for (const [controller, path] of cgroup.paths) expect(found.paths.get(controller)).toBe(path);
  const name = cgroup.path("freezer")!.split("/").at(-1)!;
  const below = makeCgroup(1, `${name}/init.scope`);
  for (const path of below.paths.values()) writeFileSync(`${path}/cgroup.procs`, String(pid));
  expect((await Cgroup.of(pid)).path("freezer")).toBe(below.path("freezer"));
  expect((await Cgroup.of(pid, name)).path("freezer")).toBe(cgroup.path("freezer"));
  expect(found.oomWatchPath).toEqual({ path: cgroup.paths.get("memory"), flags: 1 });
  expect(await found.oomKills()).toBe(0);
});

it.skipIf(!haveV1)("counts OOM kills (v1, as root)", async () => {
  const cgroup = makeCgroup(1);
  writeFileSync(`${cgroup.path("memory")}/memory.limit_in_bytes`, String(8 << 20));
  await start(cgroup, "sh", "-c", "sleep 0.1; x=x; while :; do x=$x$x; done");
  await once(children[0]!, "exit");
  expect(children[0]!.signalCode).toBe("SIGKILL");
  while ((await cgroup.oomKills()) === 0) await sleep(5);
  expect(await cgroup.oomKills()).toBe(1);
});

it("refuses to freeze or kill the cgroup that it runs in", async () => {
  const own = await Cgroup.of(process.pid).catch(() => undefined);
  if (!own) return; // in the roots only: there is nothing that could be refused
  await expect(own.kill()).rejects.toThrow(WrongState);
  await expect(own.freeze(10)).rejects.toThrow(WrongState);
});

// No process of today's kernels refuses to freeze at will, so files stand in for one that doesn't.
it("thaws again when it can't freeze in time, and names who didn't", async () => {
  const directory = mkdtempSync(join(tmpdir(), "cedana-cgroup-"));
  try {
    writeFileSync(`${directory}/cgroup.freeze`, "0\n");
    writeFileSync(`${directory}/cgroup.events`, "populated 1\nfrozen 0\n");
    writeFileSync(`${directory}/cgroup.procs`, `${process.pid}\n`);
    const cgroup = Cgroup.fromPaths({ version: 2, paths: { "": directory } });
    const error = await cgroup.freeze(30).catch((err: unknown) => err);
    expect(error).toBeInstanceOf(TimedOut);
    expect((error as Error).message).toContain(`did not freeze in 30 ms: ${process.pid} (`);
    expect(readFileSync(`${directory}/cgroup.freeze`, "utf8")).toBe("0\n");
    // Frozen by somebody else meanwhile: not ours to thaw.
    writeFileSync(`${directory}/cgroup.freeze`, "1\n");
    await expect(cgroup.freeze(30)).rejects.toThrow("by somebody else");
    expect(readFileSync(`${directory}/cgroup.freeze`, "utf8")).toBe("1\n");
  } finally {
    rmSync(directory, { recursive: true });
  }
});

it("a cgroup that systemd has removed already is not waited for", async () => {
  await Cgroup.fromPaths({ version: 2, paths: {} }).leaveToSystemd();
  const gone = join(tmpdir(), `cedana-no-cgroup-${process.pid}`);
  await Cgroup.fromPaths({ version: 2, paths: { "": gone } }).leaveToSystemd();
});
