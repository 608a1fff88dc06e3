// Archives against zstd's and gzip's own programs, on the same file: `node bench/archive.ts [MiB] [rounds]`.
//
// Ratios are of medians of alternating rounds, so that a busy machine does both the same harm. Beside the time: how long the event
// loop of the process that asked was held up, and how much its memory grew.

import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { monitorEventLoopDelay } from "node:perf_hooks";
import { createArchive, extractArchive } from "../src/checkpoint/archive/index.ts";
import { writeManifest } from "../src/checkpoint/manifest-files.ts";
import { writeSampleMemory } from "./sample-memory.ts";

const mebibytes = Number(process.argv[2] ?? 1024);
const rounds = Number(process.argv[3] ?? 5);
const directory = mkdtempSync(join(tmpdir(), "bench-archive-"));
const checkpoint = join(directory, "web");
const pages = join(checkpoint, "checkpoint/pages-1.img");
const median = (values: number[]) => values.toSorted((a, b) => a - b)[values.length >> 1]!;

const times: Record<string, number[]> = {};
const cpu: Record<string, number> = {};
const grew: Record<string, number> = {};
async function time(name: string, work: () => Promise<unknown> | unknown): Promise<void> {
  const startedAt = performance.now();
  const used = process.cpuUsage();
  const before = process.memoryUsage().rss;
  const watch = setInterval(() => {
    grew[name] = Math.max(grew[name] ?? 0, process.memoryUsage().rss - before);
  }, 10);
  await work();
  clearInterval(watch);
  const { user, system } = process.cpuUsage(used);
  times[name] = [...(times[name] ?? []), performance.now() - startedAt];
  cpu[name] = (user + system) / 1000;
}

try {
  mkdirSync(join(checkpoint, "checkpoint"), { recursive: true });
  writeFileSync(join(checkpoint, "checkpoint/inventory.img"), "");
  writeSampleMemory(pages, mebibytes);
  const manifest = {
    createdAt: new Date().toISOString(),
    containerId: "bench",
    namespace: "",
    terminal: false,
    kernel: "",
    engine: { name: "runc", version: "", path: "" },
    options: { fileLocks: false, extUnix: false, shellJob: false, emptyNamespaces: [], leaveRunning: true },
    specDigest: "0".repeat(64),
    timings: { totalMs: 0 },
  };
  const delay = monitorEventLoopDelay({ resolution: 5 });
  delay.enable();
  const at = (name: string) => join(directory, name);
  const rest: (() => Promise<void>)[] = [
    () => time("digests", () => writeManifest(checkpoint, manifest, { digests: true })),
    () => time("ours, zstd", () => createArchive(checkpoint, at("a.zst"), { replace: true })),
    () =>
      time("ours, lz4", () => createArchive(checkpoint, at("a.lz4"), { replace: true, compression: "lz4" })),
    () =>
      time("ours, zstd, encrypted", () =>
        createArchive(checkpoint, at("a.enc"), { replace: true, secret: Buffer.alloc(32, 1) }),
      ),
    () => time("ours, extract zstd", () => extractArchive(at("a.zst"), at("copy"), { replace: true })),
  ];
  for (let round = 0; round < rounds; round++) {
    for (const work of rest) await work();
    // Their programs are waited for, so they don't count for the event loop.
    delay.disable();
    await time("zstd -T2 -1", () =>
      execFileSync("zstd", ["-T2", "-1", "-q", "-f", pages, "-o", at("b.zst")]),
    );
    await time("zstd -T2 -1, and sync", () => {
      execFileSync("zstd", ["-T2", "-1", "-q", "-f", pages, "-o", at("b.zst")]);
      execFileSync("sync", [at("b.zst")]);
    });
    if (round === 0)
      await time("gzip -1", () => execFileSync("sh", ["-c", `gzip -1 -c "${pages}" > "${at("b.gz")}"`]));
    delay.enable();
  }
  for (const [name, values] of Object.entries(times))
    console.log(
      `${name.padEnd(24)} ${median(values).toFixed(0).padStart(7)} ms  ${((mebibytes / median(values)) * 1000).toFixed(0)} MiB/s, CPU ${cpu[name]!.toFixed(0)} ms, memory +${((grew[name] ?? 0) / 2 ** 20).toFixed(0)} MiB`,
    );
  console.log(
    `zstd: ${(median(times["zstd -T2 -1"]!) / median(times["ours, zstd"]!)).toFixed(2)} of zstd -T2 -1's speed`,
  );
  console.log(
    `gzip: ${(median(times["gzip -1"]!) / median(times["ours, zstd"]!)).toFixed(1)} times gzip -1's speed`,
  );
  console.log(`size: ours ${statSync(at("a.zst")).size}, zstd's ${statSync(at("b.zst")).size}`);
  console.log(`event loop: p99 ${(delay.percentile(99) / 1e6 - 5).toFixed(1)} ms late`);
} finally {
  rmSync(directory, { recursive: true, force: true });
}
