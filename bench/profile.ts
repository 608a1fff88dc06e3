// `npm run profile`: where the time of `ctr task checkpoint` and `ctr container restore --live` goes, through our shim and through
// containerd's own: the client and containerd, the engine, CRIU, and the phases of CRIU. No process is traced: the kernel tells of each that
// begins and ends (bench/profile/procwatch.c), and CRIU's log has its own times.
//
//   --engine runc|crun   the engine below both shims (runc)
//   --rounds N           rounds of each side in turn (9)
//   --mib N              memory of the container (16)
//   --network host|own   whether it has a network namespace of its own (own)
//   --out FILE           the JSON (build/bench/profile-ENGINE.json)

import { type ChildProcess, spawn } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { loadavg } from "node:os";
import { basename, dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { compileProgram, repository } from "../test/live/harness/programs.ts";
import { Bench, median, type Side } from "./bench.ts";
import { machineFacts } from "./machine.ts";
import { forgetCheckpoints } from "./subjects/checkpoint.ts";

const { values: options } = parseArgs({
  options: {
    engine: { type: "string", default: "runc" },
    rounds: { type: "string", default: "9" },
    mib: { type: "string", default: "16" },
    network: { type: "string", default: "own" },
    out: { type: "string" },
  },
});
const { engine } = options;
if (engine !== "runc" && engine !== "crun") throw new Error(`--engine ${engine}: it is runc or crun`);

interface Process {
  pid: number;
  parent: number;
  argv: string[];
  beginMs: number;
  endMs: number;
}

/** What happened between the begin and the end of one command. */
interface Timeline {
  side: Side;
  what: string;
  totalMs: number;
  /** times are from the begin of the command */
  processes: Process[];
  criu: { pid: number; lines: { ms: number; text: string }[] }[];
  /** of the machine, meanwhile: others' work in it */
  load: number;
}

/** Events of a command's time, from `procwatch`. */
class Watch {
  readonly #child: ChildProcess;
  readonly #text: Promise<string>;

  private constructor(child: ChildProcess, text: Promise<string>) {
    this.#child = child;
    this.#text = text;
  }

  static async start(program: string): Promise<Watch> {
    const child = spawn(program, { stdio: ["pipe", "pipe", "inherit"] });
    let text = "";
    const ended = new Promise<string>((resolve) => child.stdout!.once("end", () => resolve(text)));
    await new Promise<void>((resolve, reject) => {
      child.stdout!.on("data", (data: Buffer) => {
        text += data.toString();
        resolve();
      });
      child.once("exit", (status) => reject(new Error(`procwatch ended with ${status}`)));
    });
    return new Watch(child, ended);
  }

  async end(): Promise<string[]> {
    this.#child.stdin!.end();
    return (await this.#text).split("\n");
  }
}

/** The processes of a command and of those that work for it, from the command's begin to its end. */
function timelineOf(side: Side, what: string, lines: string[], command: string, roots: number[]): Timeline {
  const processes = new Map<number, Process>();
  const parents = new Map<number, number>();
  const logs = new Map<number, { ms: number; text: string }[]>();
  const ms = (ns: string) => Number(BigInt(ns) / 1000n) / 1000;
  let begin: Process | undefined;
  const ended: Process[] = [];
  for (const line of lines) {
    const [kind, ...fields] = line.split("\t");
    if (kind === "fork") parents.set(Number(fields[2]), Number(fields[1]));
    else if (kind === "exec") {
      const [pid, argv] = [Number(fields[1]), (fields[2] ?? "").split("\x1f").filter(Boolean)];
      const known = processes.get(pid);
      // One that executes another program is another one; but not env(1), and an engine that executes a copy of itself.
      const isSame = known && (/\/env$/.test(known.argv[0] ?? "") || known.argv.join() === argv.join());
      if (known && !isSame) ended.push({ ...known, endMs: ms(fields[0]!) });
      const process = {
        pid,
        parent: parents.get(pid) ?? 0,
        argv,
        beginMs: isSame ? known.beginMs : ms(fields[0]!),
        endMs: Number.NaN,
      };
      processes.set(pid, process);
      if (argv.join(" ").includes(command) && basename(argv[0] ?? "") === "ctr") begin ??= process;
    } else if (kind === "exit") {
      const process = processes.get(Number(fields[1]));
      if (!process) continue;
      process.endMs = ms(fields[0]!);
      ended.push(process);
      processes.delete(process.pid);
    } else if (kind === "log") {
      const [, seconds, text] = /^\((\d+\.\d+)\)\s*(.*)$/.exec(fields.slice(1).join(" ")) ?? [];
      if (seconds === undefined) continue;
      const pid = Number(fields[0]);
      logs.set(pid, [...(logs.get(pid) ?? []), { ms: Number(seconds) * 1000, text: text! }]);
    }
  }
  if (!begin || Number.isNaN(begin.endMs)) throw new Error(`${command}: its begin or end was not seen`);
  const { beginMs: zero, endMs } = begin;
  const isOurs = (pid: number): boolean => {
    for (
      let at: number | undefined = pid, depth = 0;
      at !== undefined && depth < 50;
      at = parents.get(at), depth++
    )
      if (roots.includes(at) || at === begin!.pid) return true;
    return false;
  };
  const all = [...ended, ...processes.values()]
    .filter((one) => isOurs(one.pid) && one.beginMs >= zero && one.beginMs < endMs)
    .map((one) => ({ ...one, beginMs: one.beginMs - zero, endMs: one.endMs - zero }))
    .sort((a, b) => a.beginMs - b.beginMs);
  return {
    side,
    what,
    totalMs: endMs - zero,
    processes: all,
    criu: [...logs].filter(([pid]) => isOurs(pid)).map(([pid, lines]) => ({ pid, lines })),
    load: loadavg()[0]!,
  };
}

// ---- the two commands --------------------------------------------------------------------------------------------------

const CHECKPOINT = "ctr task checkpoint";
const RESTORE = "ctr container restore --live";

/** Both commands once, for one side: a container is dumped into the content store, and another is made from that. */
async function round(bench: Bench, side: Side, procwatch: string): Promise<Timeline[]> {
  const { live } = bench;
  const id = live.newId("profiled");
  const reference = `checkpoint/${id}:1`;
  const timelines: Timeline[] = [];
  const timed = async (what: string, args: string[]) => {
    const roots = [
      live.containerdPid,
      ...live.shims().map(({ pid }) => pid),
      ...[live.cedanad()?.pid ?? []].flat(),
    ];
    const watch = await Watch.start(procwatch);
    await live.ctrCommand(args);
    await new Promise((resolve) => setTimeout(resolve, 100)); // for the last events
    timelines.push(timelineOf(side, what, await watch.end(), args.join(" "), roots));
  };
  const network = options.network === "host" ? ["--net-host"] : [];
  await live.ctr(
    ...bench.runArgs(
      side,
      ["--detach", ...network, "--mount", `type=bind,src=${live.programs},dst=/programs,options=rbind:ro`],
      id,
      ["/programs/memory", options.mib],
    ),
  );
  try {
    await new Promise((resolve) => setTimeout(resolve, 300)); // its memory is filled
    await timed(CHECKPOINT, ["task", "checkpoint", id]);
    await forgetCheckpoints(bench);
    await live.ctr("container", "checkpoint", "--rw", "--task", id, reference);
  } finally {
    await live.ctr("task", "delete", "--force", id);
    await live.ctr("container", "rm", id);
  }
  try {
    await timed(RESTORE, ["container", "restore", "--rw", "--live", id, reference]);
  } finally {
    await live.ctr("task", "delete", "--force", id);
    await live.ctr("container", "rm", id);
    await forgetCheckpoints(bench);
  }
  return timelines;
}

// ---- what is made of it ------------------------------------------------------------------------------------------------

/** Names without what differs from run to run. */
function nameOf({ argv }: Process): string {
  const [file = "?", ...rest] = argv[0]?.endsWith("/env")
    ? argv.slice(1).filter((one) => !one.includes("="))
    : argv;
  const name = basename(file).replace(/^\d+$/, "engine");
  if (name === "runc" || name === "crun" || name === "engine")
    return `${name} ${rest.find((word) => /^(?:create|start|state|checkpoint|restore|delete|kill|init|features|ps)$/.test(word)) ?? rest[0] ?? ""}`;
  if (name === "criu" || file.startsWith("criu: ")) return "criu swrk";
  if (/^containerd-shim/.test(name))
    return `${name} ${rest.find((word) => /^(?:start|delete)$/.test(word)) ?? ""}`.trim();
  return name;
}

/** A command's time cut into what follows one another; what a row is made of. */
function segmentsOf({ what, totalMs, processes }: Timeline): Record<string, number> {
  const verb = what === CHECKPOINT ? "checkpoint" : "restore";
  const run = processes.findLast((one) => new RegExp(`(?:runc|crun|engine) ${verb}`).test(nameOf(one)));
  const children = processes.filter((one) => one.parent === run?.pid);
  const last = children.findLast((one) => nameOf(one) === "criu swrk");
  if (!run || !last) throw new Error(`${what}: no engine or no CRIU among ${processes.map(nameOf)}`);
  // The one that asks for the version may have ended before its arguments could be read.
  const first = children.find((one) => one === last || /^criu swrk$|^\?/.test(nameOf(one))) ?? last;
  return {
    "client, containerd and shim before the engine": run.beginMs,
    "engine before CRIU": first.beginMs - run.beginMs,
    ...(first !== last && { "CRIU, asked for its version": last.beginMs - first.beginMs }),
    CRIU: last.endMs - last.beginMs,
    "engine after CRIU": run.endMs - last.endMs,
    "shim, containerd and client after the engine": totalMs - run.endMs,
    total: totalMs,
  };
}

/** Where CRIU's log stands still: between which of its lines, and how long. */
function gapsOf(timeline: Timeline, count: number): { ms: number; from: string; to: string }[] {
  const { lines } = timeline.criu.at(-1) ?? { lines: [] };
  return lines
    .slice(1)
    .map((line, at) => ({ ms: line.ms - lines[at]!.ms, from: lines[at]!.text, to: line.text }))
    .sort((a, b) => b.ms - a.ms)
    .slice(0, count);
}

function printTable(head: string[], rows: string[][]): void {
  console.log(`| ${head.join(" | ")} |\n|${head.map((_, at) => (at === 0 ? "---" : "---:")).join("|")}|`);
  for (const row of rows) console.log(`| ${row.join(" | ")} |`);
}

const figure = (value: number | undefined) => (value === undefined ? "" : value.toFixed(1));

function report(timelines: Timeline[]): void {
  for (const what of [CHECKPOINT, RESTORE]) {
    const of = (side: Side) => timelines.filter((one) => one.what === what && one.side === side);
    const sides = (["ours", "theirs"] as const).filter((side) => of(side).length > 0);
    const segments = Object.fromEntries(sides.map((side) => [side, of(side).map(segmentsOf)]));
    const names = [...new Set(Object.values(segments).flatMap((all) => all.flatMap(Object.keys)))];
    const count = of(sides[0]!).length;
    console.log(`\n## ${what}, ${options.mib} MiB, ${engine}: medians and minima of ${count} (ms)\n`);
    // Where others compute, the quickest of many says more than the middle.
    const values = (side: Side, name: string) => segments[side]!.map((one) => one[name] ?? 0);
    printTable(
      ["", ...sides.flatMap((side) => [side, "least"])],
      names.map((name) => [
        name,
        ...sides.flatMap((side) => [
          figure(median(values(side, name))),
          figure(Math.min(...values(side, name))),
        ]),
      ]),
    );
    for (const side of sides) {
      const typical = of(side).toSorted((a, b) => a.totalMs - b.totalMs)[of(side).length >> 1]!;
      console.log(`\n${side}, processes of the median run (ms from the begin, how long)\n`);
      for (const one of typical.processes)
        console.log(
          `${one.beginMs.toFixed(1).padStart(8)} ${(one.endMs - one.beginMs).toFixed(1).padStart(8)}  ${nameOf(one)}`,
        );
      console.log(`\n${side}, where CRIU's log stands still longest (ms)\n`);
      for (const { ms, from, to } of gapsOf(typical, 12))
        console.log(`${ms.toFixed(1).padStart(8)}  ${from.slice(0, 80)}  →  ${to.slice(0, 80)}`);
    }
  }
}

const keepAlive = setInterval(() => {}, 60_000); // the harness waits on things that Node does not count as work
const procwatch = await compileProgram(join(import.meta.dirname, "profile/procwatch.c"));
const bench = await Bench.start(engine);
const timelines: Timeline[] = [];
try {
  // crun is told a work directory that does not exist: under the Go shim its checkpoint fails every time.
  const sides: Side[] = engine === "crun" ? ["ours"] : ["ours", "theirs"];
  for (let at = -1; at < Number(options.rounds); at++)
    for (const side of at % 2 === 0 ? sides : sides.toReversed()) {
      const found = await round(bench, side, procwatch);
      if (at >= 0) timelines.push(...found); // the first warms up
    }
  const machine = machineFacts(bench);
  console.log(
    Object.entries(machine)
      .map(([name, value]) => `${name}: ${value}`)
      .join("\n"),
  );
  report(timelines);
  const out = options.out ?? join(repository, "build/bench", `profile-${engine}.json`);
  mkdirSync(dirname(out), { recursive: true });
  writeFileSync(out, `${JSON.stringify({ machine, options, timelines }, undefined, 1)}\n`);
} finally {
  await bench.live.stop();
  clearInterval(keepAlive);
}
