import { appendFileSync, copyFileSync, mkdirSync, readFileSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { type CpuDescription, checkCpu, missingFromCpu, readCpu, thisCpu } from "../../src/criu/cpu.ts";
import { encodeMessage } from "../../src/criu/image/message.ts";
import { rpcNames } from "../../src/criu/options.ts";
import {
  checkCriu,
  criuFeatures,
  hasCriuFeature,
  probeCriu,
  unsupportedOptions,
} from "../../src/criu/probe.ts";
import { readDumpStats, readRestoreStats } from "../../src/criu/stats.ts";
import { CriuWorker } from "../../src/criu/worker.ts";
import { BrokenImage, Unavailable } from "../../src/errors/index.ts";
import { allOptions } from "./all-options.ts";
import { Victim, Workplace, whyNoDump } from "./harness.ts";

const reason = whyNoDump();
let place: Workplace;
beforeEach(() => {
  place = new Workplace();
});
afterEach(() => place[Symbol.dispose]());

describe.skipIf(reason)(`this machine's CRIU${reason ? ` (${reason})` : ""}`, () => {
  it("is asked once for each binary", async () => {
    const calls = join(place.path, "calls");
    const wrapper = join(place.path, "criu");
    writeFileSync(wrapper, `#!/bin/sh\necho "$1" >> ${calls}\nexec criu "$@"\n`, { mode: 0o755 });
    const [one, two] = await Promise.all([probeCriu(wrapper), probeCriu(wrapper)]);
    expect(one).toBe(two);
    expect(one.version.text).toMatch(/^\d+\.\d+/);
    expect(one.version.number).toBeGreaterThan(30_000);
    const check = await checkCriu(wrapper);
    await checkCriu(wrapper);
    expect(check.usable).toBe(true);
    expect(check.ok || check.errors.length + check.warnings.length > 0).toBe(true);
    expect(readFileSync(calls, "utf8")).toBe("swrk\ncheck\n");

    // Another binary under the same name: a new time is enough.
    utimesSync(wrapper, 1, 1);
    expect(await probeCriu(wrapper)).not.toBe(one);
    expect(readFileSync(calls, "utf8")).toBe("swrk\ncheck\nswrk\n");
  });

  it("knows every feature that we ask for", async () => {
    const { path, version } = await probeCriu();
    // All of them one by one would take seconds: the names are in the binary, maybe as the end of another one.
    const binary = readFileSync(path, "latin1");
    if (version.number >= 40_200)
      for (const feature of Object.keys(criuFeatures))
        expect(binary.includes(`${feature}\0`), feature).toBe(true);
    expect(await hasCriuFeature("timerfd")).toBe(true);
    expect(await hasCriuFeature("no such feature" as never)).toBe(false);
  });

  it("knows all our options, or says which it doesn't", async () => {
    // None of ours is lost on the way to CRIU: five of TLS, one directory, and one for each other.
    expect(rpcNames(allOptions)).toHaveLength(Object.keys(allOptions).length + 5 + 1);
    const probe = await probeCriu();
    if (probe.version.number >= 40_200) expect(unsupportedOptions(probe, allOptions)).toEqual([]);
    const older = {
      ...probe,
      knowsOption: (name: string) => name !== "network_lock" && probe.knowsOption(name),
    };
    expect(unsupportedOptions(older, allOptions)).toEqual(["network_lock"]);
    expect(probe.knowsOption("tcp_teleport")).toBe(false);
  });

  it("describes a CPU that lacks nothing of itself", async () => {
    const cpu = await thisCpu();
    expect(missingFromCpu(cpu, cpu)).toEqual([]);
    {
      await using worker = await CriuWorker.start();
      await worker.dumpCpu({ imagesDir: place.path });
    }
    expect(await readCpu(place.path)).toEqual(cpu);
    expect(await checkCpu(place.path)).toBeUndefined();
  });

  it("has the features that the kernel says, by their names", async () => {
    const cpu = await thisCpu();
    const line = /^flags\s*: (.*)$/m.exec(readFileSync("/proc/cpuinfo", "utf8"))?.[1];
    if (cpu.architecture !== "x86" || !line) return;
    const none = {
      ...cpu,
      capabilities: [],
      xfeatures: undefined,
      xsaveBytes: undefined,
      vendor: cpu.vendor,
    };
    const ours = missingFromCpu(cpu, none).map((text) => / feature (\S+) /.exec(text)?.[1]);
    const named = ours.filter((name) => name !== undefined && !name.includes(":"));
    expect(named.length).toBeGreaterThan(15);
    // The kernel hides some that the CPU has; what it shows, we have by the same name or by number.
    const shown = new Set(line.split(" "));
    for (const name of ["sse2", "avx", "avx2", "avx512f", "sha_ni", "vaes", "popcnt", "bmi2", "fma"])
      if (shown.has(name)) expect(named, name).toContain(name);
  });

  it("refuses a CPU with more features than this one", async () => {
    const message = encodeMessage("cpuinfo_entry", {
      x86_entry: [
        {
          vendor_id: "INTEL",
          cpu_family: 6,
          model: 1,
          stepping: 1,
          capability_ver: 2,
          capability: Array.from({ length: 20 }, () => 0xffff_ffff),
          model_id: "everything",
          xfeatures_mask: 0xffffn,
          xsave_size: 4096,
          xsave_size_max: 4096,
        },
      ],
    });
    const head = Buffer.alloc(12);
    head.writeUInt32LE(0x54564319, 0);
    head.writeUInt32LE(0x61404013, 4);
    head.writeUInt32LE(message.length, 8);
    writeFileSync(join(place.path, "cpuinfo.img"), Buffer.concat([head, message]));
    expect(await checkCpu(place.path)).toMatch(/cpuinfo check failed/);
    expect(missingFromCpu(await readCpu(place.path), await thisCpu()).join()).toMatch(
      /CPU feature \S+ is missing/,
    );
  });

  it("leaves its statistics", async () => {
    const images = join(place.path, "images");
    mkdirSync(images);
    await using victim = await Victim.program("sleeper");
    {
      await using worker = await CriuWorker.start();
      await worker.dump({ pid: victim.pid, imagesDir: images });
    }
    await victim.ended();
    const dump = await readDumpStats(images);
    expect(dump.frozenUs).toBeGreaterThan(0);
    expect(dump.pagesWritten).toBeGreaterThan(0n);
    {
      await using worker = await CriuWorker.start();
      process.kill(await worker.restore({ imagesDir: images }), "SIGKILL");
    }
    const restore = await readRestoreStats(images);
    expect(restore.restoreUs).toBeGreaterThan(0);
    expect(restore.pagesRestored).toBeGreaterThan(0n);
    copyFileSync(join(images, "stats-dump"), join(images, "stats-restore"));
    await expect(readRestoreStats(images)).rejects.toThrow(/no statistics of a restore/);
    appendFileSync(join(images, "stats-dump"), "xx");
    await expect(readRestoreStats(join(place.path, "none"))).rejects.toMatchObject({ code: "ENOENT" });
    await expect(readRestoreStats(images)).rejects.toThrow(BrokenImage);
  });
});

describe("CRIU that isn't there", () => {
  it("is unavailable", async () => {
    await expect(probeCriu("/nowhere/criu")).rejects.toThrow(Unavailable);
    await expect(checkCriu("no-such-criu")).rejects.toThrow(/no-such-criu.*not installed/);
  });
});

describe("two CPUs", () => {
  const cpu: CpuDescription = {
    architecture: "x86",
    vendor: "INTEL",
    model: "one",
    capabilities: [0b1011n, 0b1n],
    xfeatures: 0b111n,
    xsaveBytes: 832,
  };

  it("differ in words", () => {
    expect(missingFromCpu(cpu, { ...cpu, model: "another", capabilities: [0b1111n, 0b1n] })).toEqual([]);
    expect(missingFromCpu(cpu, { ...cpu, capabilities: [0b0010n] })).toEqual([
      "CPU feature fpu is missing here",
      "CPU feature 0:3 is missing here",
      "CPU feature 1:0 is missing here",
    ]);
    expect(missingFromCpu(cpu, { ...cpu, vendor: "AMD", xfeatures: 0b11n, xsaveBytes: 512 })).toEqual([
      "the dump is of a CPU by INTEL, this one is by AMD",
      "register state 0x4 (XSAVE) is missing here",
      "the dump's register state has 832 bytes, this CPU's 512",
    ]);
    expect(missingFromCpu(cpu, { ...cpu, architecture: "s390" })).toEqual([
      "the dump is of a x86 CPU, this is s390",
    ]);
  });
});
