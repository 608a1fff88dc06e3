import { type ChildProcess, execFileSync, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import {
  blockersOf,
  type InterceptionReport,
  interceptionReport,
  quiesce,
  resume,
} from "../../src/gpu/interception.ts";
import { readTraces, type Trace } from "../../src/gpu/trace.ts";
import { isAlive } from "../../src/linux/proc.ts";
import { cached } from "../live/harness/programs.ts";
import { until } from "../live/harness/until.ts";
import { onRealGpu, standIn } from "./harness.ts";
import { machineWithGpu } from "./machine.ts";

/** Bytes on all devices. */
function deviceBytes(report: InterceptionReport): number {
  return report.devices
    .flatMap(({ memory }) => Object.values(memory))
    .reduce((sum, { bytes }) => sum + bytes, 0);
}

/*
 * The interception library as it is built, in front of the stand-in driver, and in front of one that only says what it was called with.
 */

const root = resolve(import.meta.dirname, "../..");
const built = join(root, "build/gpu");
const library = join(built, "libcuda.so.1");
const MIB = 1024 * 1024;

let driver: string;
let programs: string;
let place: string;
const children: ChildProcess[] = [];

beforeAll(async () => {
  driver = await standIn();
  programs = await ownPrograms();
}, 120_000);

/** The echo driver and the programs of interception/, built once per content. */
async function ownPrograms(): Promise<string> {
  const sources = join(import.meta.dirname, "interception");
  const [names, library] = [join(built, "obj/names.h"), join(driver, "libcuda.so.1")];
  const inputs = readdirSync(sources).map((name) => join(sources, name));
  return await cached("gpu-interception", [...inputs, names, library], async (directory) => {
    const compile = (...args: string[]) =>
      execFileSync("cc", ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-I", join(built, "obj"), ...args], {
        cwd: sources,
        stdio: "pipe",
      });
    mkdirSync(join(directory, "echo"));
    const echo = ["-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic"];
    const libraryOf = (name: string) => join(directory, name, "libcuda.so.1");
    compile(...echo, "echo-driver.c", "echo-lookup.c", "-o", libraryOf("echo"), "-ldl");
    mkdirSync(join(directory, "importing"));
    compile(...echo, "importing-driver.c", "-o", libraryOf("importing"));
    compile("every-name.c", "-o", join(directory, "every-name"), "-ldl");
    compile("-pthread", "things.c", "-o", join(directory, "things"), library);
  });
}

beforeEach(() => {
  place = mkdtempSync(join(tmpdir(), "cedana-gpu-"));
  for (const name of ["gpu", "trace"]) mkdirSync(join(place, name));
});
afterEach(async () => {
  for (const child of children.splice(0)) {
    if (child.exitCode !== null || child.signalCode !== null) continue;
    child.kill("SIGKILL");
    await once(child, "exit");
  }
  rmSync(place, { recursive: true });
});

function environment(more: Record<string, string> = {}): Record<string, string> {
  return {
    PATH: process.env.PATH!,
    LD_LIBRARY_PATH: driver,
    LD_PRELOAD: library,
    CEDANA_TEST_GPU_DIR: join(place, "gpu"),
    ...more,
  };
}

const tracing = () => ({ CEDANA_GPU_TRACE: join(place, "trace") });

/** A program in a process group of its own, and the lines that it says. */
function start(name: string, args: string[], more: Record<string, string> = {}) {
  const child = spawn(join(name.startsWith("client") ? driver : programs, name), args, {
    env: environment(more),
    stdio: ["pipe", "pipe", "inherit"],
  });
  children.push(child);
  const lines: string[] = [];
  createInterface({ input: child.stdout! }).on("line", (line) => lines.push(line));
  return {
    child,
    pid: child.pid!,
    lines,
    says: (words: string, times = 1) =>
      event(`${name} says ${words}`, () => lines.filter((line) => line === words).length >= times),
    go: () => child.stdin!.write("\n"),
  };
}

/** Other tests keep the machine busy: long, rather than wrong. */
const event = <T>(what: string, probe: () => T | Promise<T>) =>
  until(probe, { timeoutMs: 25_000, what: () => what });

const reportOf = async (pid: number) => (await interceptionReport(pid, { deadlineMs: 10_000 }))!;

describe("the names of the interface", () => {
  it("are all exported, and each call comes to the driver with its arguments and back with its result", () => {
    const echo = join(programs, "echo/libcuda.so.1");
    const { stdout, stderr } = spawnSync(join(programs, "every-name"), [echo], {
      encoding: "utf8",
      env: environment({ CEDANA_GPU_LIBCUDA: echo }),
    });
    const listed = readFileSync(join(root, "addon/gpu/names.list"), "utf8").match(/^cu.*$/gm)!;
    expect(stderr).toBe("");
    expect(stdout.trim().split("\n")).toEqual([
      `${listed.length - 3} by dlsym`,
      `${listed.length - 3 + 16} calls`,
    ]);
  });

  it("are all those of the stand-in driver", () => {
    const control = join(built, "cedana-gpu-control");
    const { status, stdout } = spawnSync(control, ["names", join(driver, "libcuda.so.1")], {
      encoding: "utf8",
    });
    expect(stdout).toBe("");
    expect(status).toBe(0);
  });

  it("that a driver has and the list lacks are told", () => {
    const source = join(place, "new.c");
    execFileSync("cc", ["-shared", "-fPIC", "-x", "c", "-", "-o", join(place, "new.so")], {
      input:
        "int cuInit(void){return 0;} int cuInTheFuture(void){return 0;} int cudbgAttach(void){return 0;}",
    });
    const { status, stdout } = spawnSync(
      join(built, "cedana-gpu-control"),
      ["names", join(place, "new.so")],
      { encoding: "utf8" },
    );
    expect([status, stdout]).toEqual([1, "cuInTheFuture\n"]);
    expect(existsSync(source)).toBe(false);
  });
});

describe("the library", () => {
  it("needs no library by name and no version of a symbol, so that any libc will do", () => {
    const symbols = execFileSync("readelf", ["--dyn-syms", "-W", library], { encoding: "utf8" });
    expect(symbols).not.toMatch(/@+GLIBC/);
    const dynamic = execFileSync("readelf", ["-d", library], { encoding: "utf8" });
    expect(dynamic).not.toContain("NEEDED");
  });

  it("leaves a program alone that doesn't call the driver", async () => {
    const { pid, says } = start("things", ["none"]);
    await says("ready");
    expect(await interceptionReport(pid)).toBeUndefined();
    expect(readdirSync(`/proc/${pid}/task`)).toHaveLength(1);
    expect(readFileSync(`/proc/${pid}/maps`, "utf8")).toContain(library);
  });

  it("answers as a machine without GPUs does where there is no driver", () => {
    const { stdout } = spawnSync(join(programs, "things"), ["init"], {
      encoding: "utf8",
      env: environment({ LD_LIBRARY_PATH: "", CEDANA_GPU_LIBCUDA: "/nowhere/libcuda.so.1" }),
    });
    expect(stdout).toBe("cuInit 100\n");
  });

  it.runIf(existsSync("/lib/ld-musl-x86_64.so.1"))("keeps no program with musl from running", () => {
    execFileSync("musl-gcc", ["-x", "c", "-", "-o", join(place, "musl")], {
      input: '#include <stdio.h>\nint main(void) { puts("runs"); return 0; }',
    });
    const { stdout, stderr } = spawnSync(join(place, "musl"), [], { encoding: "utf8", env: environment() });
    expect([stdout, stderr]).toEqual(["runs\n", ""]);
  });

  it.each(["linked", "dlsym", "procaddress"])(
    "is found by a program that comes to its driver by way of %s",
    async (way) => {
      const { pid, lines } = start(`client-${way}`, ["--devices", "2", "--bytes", "8192"]);
      await event("the client counts", () => lines.length > 2);
      const report = await reportOf(pid);
      expect(report.devices.map(({ memory }) => memory)).toEqual([
        { device: { count: 2, bytes: 16384 } },
        { device: { count: 2, bytes: 16384 } },
      ]);
      expect(report.devices[1]!.uuid).toBe("GPU-a1a1a1a1-a1a1-a1a1-a1a1-a1a1a1a1a1a1");
      expect(report.driverVersion).toBe(13000);
      expect(lines.join("\n")).not.toContain("FAILED");
    },
  );
});

/** The opt-in tier: the same clients, and the same library in front of the machine's own driver. */
const noGpu = onRealGpu ? machineWithGpu() : "npm run test:gpu";
const missing = typeof noGpu === "string" ? noGpu : undefined;
describe.skipIf(missing)(`on a real GPU, the library${missing ? ` (${missing})` : ""}`, () => {
  it.each(["linked", "dlsym", "procaddress"])("reports, quiesces and traces a client (%s)", async (way) => {
    const client = start(`client-${way}`, ["--bytes", "8192"], { ...tracing(), LD_LIBRARY_PATH: "" });
    await event("the client counts", () => client.lines.length > 2);
    expect((await reportOf(client.pid)).devices[0]!.memory.device).toEqual({ count: 2, bytes: 16384 });
    expect((await quiesce(client.pid, { deadlineMs: 20_000, leaseMs: 0 }))!.state).toBe("quiesced");
    await resume(client.pid);
    const before = client.lines.length;
    await event("it counts on", () => client.lines.length > before + 2);
    expect(client.lines.join("\n")).not.toContain("FAILED");
    const { calls } = (await readTraces(join(place, "trace"))).otherData;
    expect(calls.cuLaunchKernel?.calls).toBeGreaterThan(2);
  });
});

describe("a report", () => {
  it("counts memory of other processes for as long as it is there, by its handle or where it is mapped", async () => {
    const { pid, says, go } = start("things", ["imports"], {
      CEDANA_GPU_LIBCUDA: join(programs, "importing/libcuda.so.1"),
    });
    await says("ready");
    const ipc = "memory of another process (IPC)";
    const blockers = async () => {
      const report = await reportOf(pid);
      return [...blockersOf(report), report.untracked];
    };
    expect(await blockers()).toEqual([`${ipc}, 3 times`, "a multicast object", 0]);
    go();
    await says("ready", 2);
    expect(await blockers()).toEqual([`${ipc}, 2 times`, 0]);
    go();
    await says("ready", 3);
    expect(await blockers()).toEqual([0]);
  });

  it("says what there is by device and kind, and what of it a checkpoint won't take", async () => {
    const { pid, says, go, lines } = start("things", []);
    await says("ready");
    const pitch = Number(/pitch (\d+)/.exec(lines.join("\n"))![1]);
    const first = await reportOf(pid);
    expect(first.devices.map(({ memory }) => memory)).toEqual([
      {
        device: { count: 3, bytes: 4096 + 8192 + pitch * 10 },
        pool: { count: 1, bytes: 8192 },
        managed: { count: 1, bytes: 12288 },
      },
      { device: { count: 1, bytes: 65536 }, virtual: { count: 1, bytes: 2 * MIB } },
    ]);
    expect(first.host).toEqual({ pinned: { count: 1, bytes: 16384 } });
    expect(first.objects).toEqual({ contexts: 2, streams: 2, events: 2, modules: 0, graphs: 0 });
    expect(blockersOf(first)).toEqual(["managed memory (UVM)"]);
    expect(deviceBytes(first)).toBe(4096 + 8192 + pitch * 10 + 8192 + 12288 + 65536 + 2 * MIB);
    go();
    await says("ready", 2);
    const second = await reportOf(pid);
    expect(second.devices.map(({ memory }) => memory)).toEqual([
      { device: { count: 2, bytes: 8192 + pitch * 10 }, pool: { count: 1, bytes: 8192 } },
      { virtual: { count: 1, bytes: 2 * MIB } },
    ]);
    expect(second.objects).toMatchObject({ contexts: 1, streams: 1, events: 1 });
    expect(second.blockers).toEqual([]);
    go();
    await says("ready", 3);
    const third = await reportOf(pid);
    expect([deviceBytes(third), third.host, third.untracked]).toEqual([0, {}, 0]);
    expect(third.objects).toEqual({ contexts: 0, streams: 0, events: 0, modules: 0, graphs: 0 });
    expect(lines).not.toContain("freed a wrong address");
  });

  it("is right when many threads make and free at once", async () => {
    const { pid, lines } = start("things", ["busy", "8"]);
    await event("a thousand rounds", () => Number(lines.at(-1)) > 1000);
    await quiesce(pid, { deadlineMs: 20_000, leaseMs: 0 });
    const report = await reportOf(pid);
    // Between the making and the freeing of its event each thread may be held; none is counted twice or lost.
    expect(report.objects.events).toBeLessThanOrEqual(10);
    expect(report.objects.contexts).toBe(1);
    expect(lines).not.toContain("another context");
  });
});

describe("a quiesced process", () => {
  it("gets no call to the driver until it is resumed", async () => {
    const { pid, lines } = start("things", ["busy", "4"]);
    await event("it is busy", () => Number(lines.at(-1)) > 100);
    const report = await quiesce(pid, { deadlineMs: 20_000, leaseMs: 0 });
    expect(report).toMatchObject({ state: "quiesced", callsInFlight: 0 });
    // Rounds that were counted when the gate closed: each thread may end the one that it was in, outside of the driver.
    const heard = lines.length;
    await event("more lines", () => lines.length > heard + 2);
    const still = lines.at(-1);
    await event("more lines", () => lines.length > heard + 12);
    expect(lines.at(-1)).toBe(still);
    expect((await resume(pid))!.state).toBe("running");
    await event("it goes on", () => Number(lines.at(-1)) > Number(still) + 100);
  });

  it("still gets its questions answered, by functions that no symbol has, too", async () => {
    const { pid, lines } = start("things", ["given"], {
      CEDANA_GPU_LIBCUDA: join(programs, "importing/libcuda.so.1"),
    });
    const counts = () => lines.filter((line) => line === "cuDeviceGetCount 1").length;
    const versions = () => lines.filter((line) => line === "cuDriverGetVersion 12081").length;
    await event("both are called", () => counts() > 1 && versions() > 1);
    await quiesce(pid, { deadlineMs: 20_000, leaseMs: 0 });
    // A call that had returned when the gate closed may still be on its way here.
    let heard = versions();
    await event("more versions", () => versions() > heard + 3);
    const [still, since] = [counts(), versions()];
    await event("more versions", () => versions() > since + 10);
    expect(counts()).toBe(still);
    heard = counts();
    await resume(pid);
    await event("more counts", () => counts() > heard + 2);
  });

  it("has waited for what its GPU was doing; what takes too long makes it run on", async () => {
    const { pid, lines } = start("client-linked", ["--spin", "400", "--interval", "1"]);
    await event("a first step", () => lines.length > 0);
    await expect(quiesce(pid, { deadlineMs: 1, leaseMs: 0 })).rejects.toThrow(
      /could not be quiesced: (1 calls of the driver had not returned by the deadline, among them cu\w+|its GPUs were still at work)/,
    );
    const before = lines.length;
    await event("it runs on", () => lines.length > before);
    // Once without its deadline's being in the way; an earlier wait may still be on.
    await event("it is quiet", async () =>
      quiesce(pid, { deadlineMs: 20_000, leaseMs: 0 }).then(
        (report) => report?.state === "quiesced",
        () => undefined,
      ),
    );
    await resume(pid);
  });

  it("goes on by itself when its lease is over", async () => {
    const { pid, lines } = start("things", ["busy", "2"]);
    await event("it is busy", () => Number(lines.at(-1)) > 100);
    await quiesce(pid, { deadlineMs: 20_000, leaseMs: 50 });
    const at = Number(lines.at(-1));
    await event("it goes on", () => Number(lines.at(-1)) > at + 1000);
    await event("it says so", async () => (await reportOf(pid)).state === "running");
  });

  it("is told from one that doesn't answer", async () => {
    const { pid, child, lines } = start("things", ["busy", "1"]);
    await event("it is busy", () => Number(lines.at(-1)) > 0);
    child.kill("SIGSTOP");
    await expect(interceptionReport(pid, { deadlineMs: 1 })).rejects.toThrow(/frozen/);
    child.kill("SIGCONT");
    expect((await reportOf(pid)).state).toBe("running");
  });
});

describe("processes", () => {
  it("that fork have each a mailbox of its own, the child from its first call on", async () => {
    const { pid, lines, says, go } = start("things", ["fork"]);
    await says("forked");
    const [, child] = lines[0]!.split(" ").map(Number);
    try {
      expect(await interceptionReport(child!)).toBeUndefined();
      await quiesce(pid, { deadlineMs: 20_000, leaseMs: 0 });
      go(); // the gate of the parent is not the child's
      await says("ready");
      const [ours, theirs] = [await reportOf(pid), await reportOf(child!)];
      expect([ours.state, ours.pid, ours.objects.contexts]).toEqual(["quiesced", pid, 1]);
      expect([theirs.state, theirs.pid, theirs.objects.contexts]).toEqual(["running", child, 0]);
    } finally {
      process.kill(child!, "SIGKILL");
      await event("the child ends", () => !isAlive(child!));
    }
  });

  it("that pretend to have a mailbox are not believed", async () => {
    const { pid, says } = start("things", ["impostor"]);
    await says("ready");
    expect(await interceptionReport(pid)).toBeUndefined();
  });

  it("may close all their descriptors", async () => {
    const { pid, says } = start("things", ["close"]);
    await says("ready");
    expect((await reportOf(pid)).objects.contexts).toBe(1);
  });
});

describe("a trace", () => {
  it("has each call with time and bytes, and the sums, while the program runs and after it was killed", async () => {
    const { pid, child, lines } = start("client-procaddress", ["--bytes", "4096"], tracing());
    await event("some steps", () => lines.length > 5);
    await reportOf(pid); // who asks finds the trace up to here
    const running = await readTraces(join(place, "trace"));
    expectSound(running, pid);
    child.kill("SIGKILL");
    await once(child, "exit");
    const [file] = readdirSync(join(place, "trace"));
    const text = readFileSync(join(place, "trace", file!), "utf8");
    const trace = JSON.parse(text) as Trace; // a document as it lies there
    expectSound(trace, pid);
    expect(await readTraces(join(place, "trace", file!))).toEqual({
      ...trace,
      otherData: { ...trace.otherData, broken: 0 },
    });
    expect(trace.traceEvents[0]).toMatchObject({ ph: "M", args: { name: "client" } });
    const copies = trace.traceEvents.filter(({ name }) => name === "cuMemcpyDtoH_v2");
    expect(copies.length).toBeGreaterThan(3);
    expect(copies.every(({ args }) => Number(args?.bytes) > 0)).toBe(true);
  });

  it("is written to the end by a program that ends", () => {
    const { status } = spawnSync(join(programs, "things"), ["error"], { env: environment(tracing()) });
    expect(status).toBe(0);
    const [file] = readdirSync(join(place, "trace"));
    const trace = JSON.parse(readFileSync(join(place, "trace", file!), "utf8")) as Trace;
    const failed = trace.traceEvents.filter(({ name }) => name === "cuMemAlloc_v2");
    expect(failed.map(({ args }) => args)).toEqual([{ error: 2 }, { error: 2 }, { error: 2 }]);
    expect(trace.otherData.calls.cuMemAlloc_v2).toMatchObject({ calls: 3, errors: 3, bytes: 0 });
  });

  it("is bounded, and made of two parts at most", async () => {
    const bounded = { ...tracing(), CEDANA_GPU_TRACE_BYTES: String(2 * MIB) };
    const { pid, child } = start("things", ["busy", "4"], bounded);
    await event("a part has been put aside", () =>
      readdirSync(join(place, "trace")).some((name) => name.endsWith(".old.json")),
    );
    await reportOf(pid);
    child.kill("SIGKILL");
    await once(child, "exit");
    const files = readdirSync(join(place, "trace"));
    expect(files.length).toBeLessThanOrEqual(2);
    const sizes = files.map((name) => readFileSync(join(place, "trace", name)).length);
    expect(sizes.reduce((sum, size) => sum + size, 0)).toBeLessThan(2 * MIB + 512 * 1024);
    const trace = await readTraces(join(place, "trace"));
    expect(trace.otherData.broken).toBeLessThanOrEqual(1); // the kill may have come in the middle of a line
    const sum = Object.values(trace.otherData.calls).reduce((all, { calls }) => all + calls, 0);
    if (trace.otherData.broken === 0) expect(sum).toBeGreaterThan(trace.traceEvents.length);
  });

  it("that can't be written costs the program nothing", () => {
    const nowhere = { CEDANA_GPU_TRACE: join(place, "missing") };
    const { status } = spawnSync(join(programs, "things"), ["error"], { env: environment(nowhere) });
    expect(status).toBe(0);
    expect(existsSync(join(place, "missing"))).toBe(false);
  });

  function expectSound({ traceEvents, otherData }: Trace, pid: number) {
    const calls = traceEvents.filter(({ ph }) => ph === "X");
    expect(calls.length).toBeGreaterThan(10);
    for (const { pid: of, ts, dur } of calls) {
      expect(of).toBe(pid);
      expect(ts).toBeGreaterThan(0);
      expect(dur).toBeGreaterThanOrEqual(0);
    }
    const counted: Record<string, number> = {};
    for (const { name } of calls) counted[name] = (counted[name] ?? 0) + 1;
    expect(otherData.dropped).toBe(0);
    expect(
      Object.fromEntries(Object.entries(otherData.calls).map(([name, { calls }]) => [name, calls])),
    ).toEqual(counted);
  }
});
