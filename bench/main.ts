// `npm run bench`: our shim and containerd's own side by side, on one private containerd, in turn within each round. Prints
// medians and the ratio, and writes them as JSON into bench/results/.
//   --rounds N (20)   --containers N (20), for memory
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Live } from "../test/live/harness/live.ts";

const OURS = "io.containerd.cedana.v2";
const THEIRS = "io.containerd.runc.v2";
const IMAGE = "cedana.local/busybox:latest";

const argument = (name: string, otherwise: number) => {
  const at = process.argv.indexOf(`--${name}`);
  return at < 0 ? otherwise : Number(process.argv[at + 1]);
};
const rounds = argument("rounds", 20);
const containers = argument("containers", 20);

const median = (values: number[]) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;
const timeMs = async (work: () => Promise<unknown>) => {
  const start = process.hrtime.bigint();
  await work();
  return Number(process.hrtime.bigint() - start) / 1e6;
};

interface Row {
  what: string;
  unit: string;
  ours: number;
  theirs: number;
  ratio: number;
}
const rows: Row[] = [];
const add = (what: string, unit: string, ours: number, theirs: number) =>
  rows.push({ what, unit, ours, theirs, ratio: ours / theirs });

const keepAlive = setInterval(() => {}, 60_000); // the harness waits on things that Node does not count as work
const live = await Live.start({ containerd: "1.7", engine: "runc" });
try {
  const times = new Map<string, Record<string, number[]>>();
  const measure = async (what: string, runtime: string, work: () => Promise<unknown>) => {
    const entry = times.get(what) ?? { [OURS]: [], [THEIRS]: [] };
    times.set(what, entry);
    entry[runtime]!.push(await timeMs(work));
  };
  for (let round = -2; round < rounds; round++) {
    if (round === 0) times.clear(); // two rounds to warm up
    for (const runtime of round % 2 === 0 ? [OURS, THEIRS] : [THEIRS, OURS]) {
      const id = live.newId("bench");
      const flags = ["--runtime", runtime];
      await measure("run -d", runtime, () =>
        live.ctr("run", "-d", "--null-io", ...flags, IMAGE, id, "sh", "-c", "while :; do sleep 60; done"),
      );
      await measure("task exec true", runtime, () => live.ctr("task", "exec", "--exec-id", "x", id, "true"));
      await measure("task delete -f", runtime, () =>
        live.ctr("task", "delete", "-f", id).catch(() => undefined),
      );
      await live.ctr("container", "delete", id);
      await measure("run --rm true", runtime, () =>
        live.ctr("run", "--rm", ...flags, IMAGE, live.newId("bench"), "true"),
      );
    }
  }
  for (const [what, entry] of times) add(what, "ms", median(entry[OURS]!), median(entry[THEIRS]!));

  for (const count of [1, containers]) {
    const pss: Record<string, number> = {};
    for (const runtime of [OURS, THEIRS]) {
      const ids = Array.from({ length: count }, () => live.newId("bench"));
      for (const id of ids)
        await live.ctr(
          "run",
          "-d",
          "--null-io",
          "--runtime",
          runtime,
          IMAGE,
          id,
          "sh",
          "-c",
          "while :; do sleep 60; done",
        );
      const owners = live
        .processes()
        .filter((info) => info.kind === "shim" || (runtime === OURS && info.kind === "cedanad"));
      pss[runtime] = owners.reduce((sum, info) => sum + pssKb(info.pid), 0);
      if (runtime === OURS && count > 1) {
        const keepers = owners.filter((info) => info.kind === "shim").map((info) => privateKb(info.pid));
        console.log(`private memory of a keeper: ${median(keepers)} kB`);
      }
      for (const id of ids) {
        await live.ctr("task", "delete", "-f", id).catch(() => undefined);
        await live.ctr("container", "delete", id);
      }
    }
    add(`memory of ${count} containers (PSS)`, "kB", pss[OURS]!, pss[THEIRS]!);
  }
} finally {
  await live.stop();
  clearInterval(keepAlive);
}

function rollup(pid: number): string {
  return readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
}
function pssKb(pid: number): number {
  return Number(/^Pss:\s+(\d+)/m.exec(rollup(pid))![1]);
}
function privateKb(pid: number): number {
  return [...rollup(pid).matchAll(/^Private_\w+:\s+(\d+)/gm)].reduce(
    (sum, match) => sum + Number(match[1]),
    0,
  );
}

console.table(
  rows.map(({ what, unit, ours, theirs, ratio }) => ({
    what,
    unit,
    ours: ours.toFixed(1),
    "runc's shim": theirs.toFixed(1),
    ratio: ratio.toFixed(2),
  })),
);
const results = join(import.meta.dirname, "results");
mkdirSync(results, { recursive: true });
writeFileSync(
  join(results, "latest.json"),
  `${JSON.stringify({ rounds, containers, rows }, undefined, 2)}\n`,
);
