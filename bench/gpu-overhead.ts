// What the GPU interception library adds to a call of the driver: the same program on the stand-in driver alone, with the library in
// front of it, and with tracing, in turn within each round. The differences are what counts; the driver's own times are the stand-in's.
//   node bench/gpu-overhead.ts [--rounds N (9)] [--strict: ends with status 1 past the aim of 100 ns]
import { execFileSync, spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";

const root = resolve(import.meta.dirname, "..");
const at = process.argv.indexOf("--rounds");
const rounds = at < 0 ? 9 : Number(process.argv[at + 1]);
const aimNs = 100;
const variants = ["driver", "library", "tracing"] as const;

const place = mkdtempSync(join(tmpdir(), "cedana-gpu-bench-"));
try {
  const standIn = join(root, "build/test-gpu");
  execFileSync("make", ["-s", "-C", join(root, "test/gpu"), `OUT=${standIn}`], { stdio: "inherit" });
  const program = join(place, "gpu-calls");
  execFileSync(
    "cc",
    ["-O2", join(root, "bench/programs/gpu-calls.c"), "-o", program, join(standIn, "libcuda.so.1")],
    { stdio: "inherit" },
  );
  for (const name of ["gpu", "trace"]) mkdirSync(join(place, name));
  const samples = new Map<string, Record<(typeof variants)[number], number[]>>();
  for (let round = 0; round < rounds; round++)
    for (const variant of variants)
      for (const [call, ns] of run(program, standIn, variant)) {
        const values = samples.get(call) ?? { driver: [], library: [], tracing: [] };
        values[variant].push(ns);
        samples.set(call, values);
      }
  const rows = [...samples].map(([call, values]) => {
    const [driver, library, tracing] = variants.map((variant) => median(values[variant]));
    return { call, driver: driver!, adds: library! - driver!, addsWithTracing: tracing! - driver! };
  });
  console.log("| call | the stand-in alone | the library adds | and with tracing |\n|---|---|---|---|");
  for (const { call, driver, adds, addsWithTracing } of rows)
    console.log(
      `| ${call} | ${driver.toFixed(1)} ns | ${adds.toFixed(1)} ns | ${addsWithTracing.toFixed(1)} ns |`,
    );
  mkdirSync(join(root, "build/bench"), { recursive: true });
  writeFileSync(
    join(root, "build/bench/gpu-overhead.json"),
    JSON.stringify({ rounds, rows, samples: Object.fromEntries(samples) }),
  );
  // A pair of calls has twice the room.
  const missed = rows.filter(({ call, adds }) => adds > aimNs * (call.includes("+") ? 2 : 1));
  if (missed.length > 0 && process.argv.includes("--strict")) process.exitCode = 1;
} finally {
  rmSync(place, { recursive: true });
}

function run(program: string, standIn: string, variant: (typeof variants)[number]): [string, number][] {
  const { status, stdout, stderr } = spawnSync(program, ["200000", "7"], {
    encoding: "utf8",
    env: {
      PATH: process.env.PATH,
      LD_LIBRARY_PATH: standIn,
      CEDANA_TEST_GPU_DIR: join(place, "gpu"),
      ...(variant !== "driver" && {
        LD_PRELOAD: join(root, "build/gpu/libcuda.so.1"),
        CEDANA_GPU_LIBCUDA: join(standIn, "libcuda.so.1"),
      }),
      ...(variant === "tracing" && { CEDANA_GPU_TRACE: join(place, "trace") }),
    },
  });
  if (status !== 0) throw new Error(`${program} with ${variant}: status ${status}: ${stderr}`);
  return stdout
    .trim()
    .split("\n")
    .map((line) => {
      const [call, ns] = line.split(" ");
      return [call!, Number(ns)];
    });
}

function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;
}
