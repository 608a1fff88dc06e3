// `npm run bench`: our shim and containerd's own, side by side on one private containerd, in turn within each round.
// Prints medians and ratios as a table, and writes them with all samples as JSON into build/bench/.
//
//   --engine runc|crun   the engine below both shims (runc)
//   --rounds N           rounds (20); what takes long makes fewer
//   --only PATTERN       only rows whose name matches, and what is measured together with them
//   --out FILE           the JSON (build/bench/ENGINE.json)
//   --strict             ends with status 1 when an aim is missed

import { mkdirSync, writeFileSync } from "node:fs";
import { cpus, loadavg } from "node:os";
import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { repository } from "../test/live/harness/programs.ts";
import { Bench, type Side, type Subject } from "./bench.ts";
import { machineFacts } from "./machine.ts";
import { type Result, resultOf, table } from "./report.ts";
import { checkpoint, largeCheckpoint } from "./subjects/checkpoint.ts";
import { launcher } from "./subjects/launcher.ts";
import { lazy } from "./subjects/lazy.ts";
import { lifecycle, parallel } from "./subjects/lifecycle.ts";
import { memory } from "./subjects/memory.ts";
import { firstPodmanCheckpoint, passThrough, podmanAtWork, podmanRuns } from "./subjects/oci-runtime.ts";
import { firstCall, gap } from "./subjects/recovery.ts";
import { archiving, standstill } from "./subjects/standstill.ts";
import { stdout } from "./subjects/stdout.ts";

const subjects: Subject[] = [
  launcher,
  lifecycle,
  parallel,
  stdout,
  checkpoint,
  largeCheckpoint,
  standstill,
  archiving,
  lazy,
  firstCall,
  memory,
  gap,
  passThrough,
  podmanRuns,
  podmanAtWork,
  firstPodmanCheckpoint,
];

const { values: options } = parseArgs({
  options: {
    engine: { type: "string", default: "runc" },
    rounds: { type: "string", default: "20" },
    only: { type: "string", default: "" },
    out: { type: "string" },
    strict: { type: "boolean", default: false },
  },
});
const { engine } = options;
if (engine !== "runc" && engine !== "crun") throw new Error(`--engine ${engine}: it is runc or crun`);
const rounds = Number(options.rounds);
if (!Number.isSafeInteger(rounds) || rounds < 1) throw new Error(`--rounds ${options.rounds}: not a number`);
const pattern = new RegExp(options.only, "i");
const chosen = subjects.filter((subject) => subject.rows.some((row) => pattern.test(row.name)));
if (chosen.length === 0) throw new Error(`--only ${options.only}: no row matches`);

const keepAlive = setInterval(() => {}, 60_000); // the harness waits on things that Node does not count as work
const results: Result[] = [];
const failures: string[] = [];
const loads: number[] = [];
let machine: ReturnType<typeof machineFacts> | undefined;
for (const subject of chosen) {
  const missing = subject.missing?.();
  if (missing !== undefined) {
    console.log(`SKIPPED ${subject.rows.map(({ name }) => name).join("; ")}: ${missing}`);
    continue;
  }
  // A containerd of its own for each: none measures what another has left warm, or broken.
  const bench = await Bench.start(engine);
  try {
    machine ??= machineFacts(bench);
    results.push(...(await measure(bench, subject)));
  } catch (error) {
    failures.push(`${subject.rows[0]!.name}: ${(error as Error).message}`); // the others' figures are worth having all the same
  } finally {
    loads.push(loadavg()[0]!);
    await subject.end?.();
    await bench.live.stop();
  }
}
clearInterval(keepAlive);

console.log(
  `\n${Object.entries(machine ?? {})
    .map(([name, value]) => `${name}: ${value}`)
    .join("\n")}\n\n${table(results)}`,
);
const out = options.out ?? join(repository, "build/bench", `${engine}.json`);
mkdirSync(dirname(out), { recursive: true });
writeFileSync(
  out,
  `${JSON.stringify({ machine, engine, rounds, loads, results, failures }, undefined, 2)}\n`,
);
const busiest = Math.max(...loads);
// A measurement itself keeps about one CPU busy, and the parallel one both.
if (busiest > cpus().length + 1)
  console.log(
    `\nThe load average reached ${busiest.toFixed(1)} on ${cpus().length} CPUs: others were computing, times and their ratios say little.`,
  );
for (const failure of failures) console.error(`FAILED ${failure}`);
if (failures.length > 0) process.exitCode = 1;
if (options.strict && results.some((result) => result.reached === false)) process.exitCode = 1;

/** All rounds of a subject; which side begins changes from round to round. */
async function measure(bench: Bench, subject: Subject): Promise<Result[]> {
  const warmUps = subject.warmUps ?? 2;
  const count = Math.min(rounds, subject.maxRounds ?? Infinity);
  const samples = new Map<string, { ours: number[]; theirs: number[] }>(
    subject.rows.map((row) => [row.name, { ours: [], theirs: [] }]),
  );
  const sides: Side[] = subject.oursOnly ? ["ours"] : ["ours", "theirs"];
  for (let round = -warmUps; round < count; round++) {
    progress(`${subject.rows[0]!.name}: round ${round + 1} of ${count}`);
    for (const side of round % 2 === 0 ? sides : sides.toReversed()) {
      const values = await subject.measure(bench, side);
      await bench.live.expectNoLeftovers();
      if (round >= 0)
        for (const [name, value] of Object.entries(values)) samples.get(name)![side].push(...[value].flat());
    }
  }
  progress("");
  return subject.rows
    .filter((row) => pattern.test(row.name))
    .map((row) => resultOf(row, engine as "runc" | "crun", samples.get(row.name)!));
}

function progress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}`);
}
