import { execFileSync, spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, rmSync, symlinkSync, utimesSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { injectGpu } from "../../src/runtime/gpu-injection.ts";
import { sweepGpuFiles } from "../../src/runtime/gpu-sweep.ts";
import { readSpec } from "../../src/runtime/spec.ts";

const DAY = 86_400;
const now = Date.now() / 1000;
const log = {
  info: () => {},
  warn: (fields: object) => {
    throw (fields as { err: Error }).err;
  },
};

let place: string;
let libraries: string;
let traces: string;
const environment = { ...process.env };
beforeEach(() => {
  place = mkdtempSync(join(tmpdir(), "cedana-gpu-sweep-"));
  libraries = join(place, "gpu-library");
  traces = join(place, "gpu-traces");
  process.env.CEDANA_STATE_DIR = place;
  process.env.CEDANA_CONFIG = join(place, "config.json");
});
afterEach(() => {
  for (const name of ["CEDANA_STATE_DIR", "CEDANA_CONFIG", "CEDANA_GPU_FILES"]) delete process.env[name];
  Object.assign(process.env, environment);
  rmSync(place, { recursive: true });
});

const configure = (gpu: object) =>
  writeFileSync(join(place, "config.json"), JSON.stringify({ gpu }), { mode: 0o600 });

function age(path: string, days: number): void {
  utimesSync(path, now - days * DAY, now - days * DAY);
}

/** Numbered by age; the digest has the number in front. */
function library(number: number, days: number): string {
  const name = String(number).padStart(2, "0").padEnd(64, "a");
  mkdirSync(join(libraries, name), { recursive: true });
  writeFileSync(join(libraries, name, "libcuda.so.1"), "");
  age(join(libraries, name), days);
  return name;
}

function trace(directory: string, name: string, bytes: number, days: number): string {
  mkdirSync(join(traces, directory), { recursive: true });
  const path = join(traces, directory, name);
  writeFileSync(path, Buffer.alloc(bytes));
  age(path, days);
  return path;
}

describe("versions of the interception library", () => {
  it("stay while there are few, or they are young", async () => {
    for (let number = 0; number < 16; number++) library(number, 1000 + number);
    expect((await sweepGpuFiles(log)).libraries).toEqual([]);
    for (let number = 16; number < 30; number++) library(number, 80);
    const { libraries: removed } = await sweepGpuFiles(log);
    expect(removed.sort().map((name) => Number(name.slice(0, 2)))).toEqual(
      Array.from({ length: 14 }, (_, at) => at + 2),
    );
  });

  it("go when many newer ones have been used, but for one that a container has mounted", async () => {
    for (let number = 0; number < 16; number++) library(number, number);
    const [mounted, ended] = [library(16, 100), library(17, 101)];

    const at = join(place, "at");
    mkdirSync(at);
    // A mount namespace such as a container has.

    const container = spawn("unshare", [
      "--mount",
      "sh",
      "-c",
      `mount --bind ${join(libraries, mounted)} ${at} && echo mounted && read end`,
    ]);
    await new Promise((resolve) => container.stdout.once("data", resolve));
    try {
      expect((await sweepGpuFiles(log)).libraries).toEqual([ended]);
      expect((await sweepGpuFiles(log)).libraries).toEqual([]);
    } finally {
      const exit = new Promise((resolve) => container.once("exit", resolve));
      container.stdin.end();
      await exit;
    }
    expect(readdirSync(libraries)).toContain(mounted);
    age(join(libraries, mounted), 100);
    expect((await sweepGpuFiles(log)).libraries).toEqual([mounted]);
  });

  it("are all whole when containers are created at once, and nothing else is left", async () => {
    mkdirSync(join(place, "files"));
    writeFileSync(join(place, "files/libcuda.so.1"), "x".repeat(1 << 20));
    process.env.CEDANA_GPU_FILES = join(place, "files");
    const bundles = Array.from({ length: 8 }, (_, at) => join(place, `bundle-${at}`));
    await Promise.all(
      bundles.map(async (bundle) => {
        mkdirSync(bundle);
        const spec = { process: { args: ["sh"] }, annotations: { "cedana.io/gpu": "intercept" } };
        writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
        await injectGpu(bundle, await readSpec(bundle), { namespace: "", id: "c" });
      }),
    );
    const [version, ...more] = readdirSync(libraries);
    expect(more).toEqual([]);
    writeFileSync(join(libraries, `${version}.1-2.new`), "");
    age(join(libraries, `${version}.1-2.new`), 2);
    await sweepGpuFiles(log);
    expect(readdirSync(libraries)).toEqual([version]);
  });
});

describe("traces", () => {
  it("go when they are old, and the oldest when all are too much; what isn't a plain file stays", async () => {
    configure({ tracesMaxBytes: "1Mi", tracesMaxAge: "7d" });
    const old = trace("a", "gpu-1-1.json", 10, 8);
    const kept = trace("a", "gpu-1-2.json", 600 << 10, 1);
    const beyond = trace("b", "gpu-2-2.json", 600 << 10, 2);
    mkdirSync(join(traces, "b/directory"));
    writeFileSync(join(traces, "b/directory/file"), "");
    age(join(traces, "b/directory/file"), 100);
    symlinkSync(kept, join(traces, "b/link"));
    execFileSync("touch", ["-h", "-d", "10 days ago", join(traces, "b/link")]);
    const { traces: removed } = await sweepGpuFiles(log);
    expect(removed.sort()).toEqual([old, beyond, join(traces, "b/link")].sort());
    expect(readdirSync(join(traces, "a"))).toEqual(["gpu-1-2.json"]);
    expect(readdirSync(join(traces, "b/directory"))).toEqual(["file"]);
  });

  it("leave their directory to a restore, for a while", async () => {
    const old = trace("a", "gpu-1-1.json", 10, 31);
    trace("b", "gpu-1-1.json", 10, 1);
    expect((await sweepGpuFiles(log)).traces).toEqual([old]);
    expect((await sweepGpuFiles(log)).traces).toEqual([]);
    age(join(traces, "a"), 91);
    age(join(traces, "b"), 91);
    expect((await sweepGpuFiles(log)).traces).toEqual([join(traces, "a")]);
    expect(readdirSync(traces)).toEqual(["b"]);
  });
});
