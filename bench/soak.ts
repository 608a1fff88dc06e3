// `npm run soak`: thousands of lives of containers, and what they must not do: leave anything behind, get a code, an output or
// an event wrong, make cedanad grow. It takes minutes, so the test suite has shorter rounds of it (test/live/crash.test.ts).
//
//   soak [memory|kills|execs|lives]…   which parts (all)
//   --engine runc|crun                 the engine (runc)
//   --count N                          so many lives of each part instead of 2,000 and 1,000
//   --seed N                           for the random moments
//
// Ends with status 1 when something was wrong, and prints what.

import { mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { Live } from "../test/live/harness/live.ts";
import { IMAGE, repository } from "../test/live/harness/programs.ts";
import { generator } from "../test/live/harness/random.ts";
import { cgroupsOf, fdsOf, memoryOf, mountsBelow } from "../test/live/harness/system.ts";
import { until } from "../test/live/harness/until.ts";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    engine: { type: "string", default: "runc" },
    count: { type: "string" },
    seed: { type: "string", default: "1" },
  },
});
const { engine } = options;
if (engine !== "runc" && engine !== "crun") throw new Error(`--engine ${engine}: it is runc or crun`);

const faults: string[] = [];
function expectEqual(what: string, found: unknown, expected: unknown): void {
  const [a, b] = [JSON.stringify(found), JSON.stringify(expected)];
  if (a === b) return;
  faults.push(`${what}: ${a} instead of ${b}`);
  console.error(`FAULT ${faults.at(-1)}`);
}

/** RSS may differ by so much between the end of the first 200 lives and that of the last. */
const GROWTH_LIMIT_KB = 3 * 1024;
const WARM_UP_LIVES = 200;

interface Run {
  status: number;
  stdout: string;
  stderr: string;
}

/** ctr as somebody would use it: its output and its exit code, which is that of the container. */
async function ctr(live: Live, args: string[]): Promise<Run> {
  return await live.ctrCommand(args, { timeoutMs: 60_000 }).then(
    ({ stdout, stderr }) => ({ status: 0, stdout, stderr }),
    (error: { code?: number; stdout?: string; stderr?: string; message: string }) => {
      if (typeof error.code !== "number") throw error; // not even executed, or killed for its time
      return { status: error.code, stdout: error.stdout ?? "", stderr: error.stderr ?? "" };
    },
  );
}

const quiet = engine === "crun" ? ["--cpu-shares", "0"] : []; // see bench.ts

async function life(live: Live, round: number): Promise<string> {
  const id = live.newId("soak");
  const status = round % 200;
  const found = await ctr(live, [
    "run",
    "--rm",
    ...quiet,
    ...live.ctrRuntimeFlags(),
    IMAGE,
    id,
    "sh",
    "-c",
    `echo round ${round}; exit ${status}`,
  ]);
  expectEqual(`life ${round}`, found, { status, stdout: `round ${round}\n`, stderr: "" });
  return id;
}

async function expectEvents(live: Live, id: string, round: number): Promise<void> {
  await live.events.waitFor(id, "delete").catch(() => {}); // what is missing is seen below
  expectEqual(`events of life ${round}`, live.events.summary(id), [
    "create",
    "start",
    `exit ${round % 200}`,
    "delete",
  ]);
  live.events.all.length = 0;
}

/** Links are not followed, as Node's own recursion does: those in a root file system lead out of it, and back. */
function entriesBelow(directory: string): number {
  let count = 0;
  try {
    for (const entry of readdirSync(directory, { withFileTypes: true }))
      count += 1 + (entry.isDirectory() ? entriesBelow(join(directory, entry.name)) : 0);
  } catch {
    return 0; // not there: nothing in it
  }
  return count;
}

/** Everything of ours that may pile up. */
function inventory(live: Live): Record<string, number> {
  const below = (...path: string[]) => entriesBelow(join(live.dir, ...path));
  const processes = live.processes();
  const fds = (kind: string) =>
    processes.filter((info) => info.kind === kind).reduce((sum, info) => sum + fdsOf(info.pid).size, 0);
  return {
    zombies: processes.filter((info) => info.state === "Z").length,
    shims: processes.filter((info) => info.kind === "shim").length,
    cedanads: processes.filter((info) => info.kind === "cedanad").length,
    "fds of shims": fds("shim"),
    "fds of cedanad": fds("cedanad"),
    mounts: mountsBelow(live.dir, live.containerdPid).length,
    cgroups: cgroupsOf(live.namespace).length,
    "entries of the run directory": below("run"),
    "entries of the state directory": below("var"),
    "entries of containerd's task directories": below("state", "io.containerd.runtime.v2.task"),
    "entries of the temporary directory": below("tmp"),
  };
}

/** The inventory once it has stopped changing. */
async function settledInventory(live: Live): Promise<Record<string, number>> {
  let last = inventory(live);
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 300));
    const now = inventory(live);
    if (JSON.stringify(now) === JSON.stringify(last)) return now;
    last = now;
  }
}

async function expectInventory(live: Live, before: Record<string, number>): Promise<void> {
  const same = () => JSON.stringify(inventory(live)) === JSON.stringify(before);
  await until(same, { timeoutMs: 5_000 }).catch(() => {}); // what ends by itself gets the time; the rest is seen below
  expectEqual("what is there afterwards", inventory(live), before);
}

async function onMachine(part: string, work: (live: Live) => Promise<void>): Promise<void> {
  const before = faults.length;
  const live = await Live.start({
    containerd: "1.7",
    engine: engine as "runc" | "crun",
    logLevel: "info",
  });
  try {
    await life(live, 0);
    await live.expectNoLeftovers();
    await work(live);
    await live.expectNoLeftovers().catch((error: Error) => expectEqual(error.message, "left", "nothing"));
  } finally {
    if (faults.length > before) keepLogs(live, part);
    await live.stop();
  }
}

/** The logs of a part in which something was wrong. */
function keepLogs(live: Live, part: string): void {
  const directory = join(repository, "build/bench");
  mkdirSync(directory, { recursive: true });
  for (const [name, text] of [
    ["cedanad", live.cedanadLog()],
    ["containerd", live.containerdLog()],
  ] as const) {
    const path = join(directory, `soak-${part}-${name}.log`);
    writeFileSync(path, text);
    console.error(`see ${path}`);
  }
}

function progress(what: string, round: number, count: number, more = ""): void {
  if (round % 100 === 0 || round === count)
    console.log(`${what}: ${round} of ${count}${more && `, ${more}`}`);
}

const count = (usual: number) => (options.count === undefined ? usual : Number(options.count));

/** cedanad's RSS over many lives. */
async function memory(live: Live): Promise<void> {
  const lives = count(2_000);
  const rss: number[] = [];
  const before = await settledInventory(live);
  for (let round = 1; round <= lives; round++) {
    await life(live, round);
    if (round % 100 !== 0) continue;
    const { rss: kb, private: privateKb } = memoryOf(live.cedanad()!.pid);
    rss.push(kb);
    progress("memory", round, lives, `cedanad's RSS ${kb} kB, private ${privateKb} kB`);
  }
  await expectInventory(live, before);
  const [early, late] = [rss[WARM_UP_LIVES / 100 - 1], rss.at(-1)];
  if (early === undefined || late === undefined) return;
  console.log(`memory: RSS after ${WARM_UP_LIVES} lives ${early} kB, after ${lives} ${late} kB`);
  if (late - early > GROWTH_LIMIT_KB) expectEqual("growth of cedanad in kB", late - early, GROWTH_LIMIT_KB);
}

/** cedanad is killed once in each life. */
async function kills(live: Live): Promise<void> {
  const lives = count(1_000);
  const random = generator(Number(options.seed));
  const times: number[] = [];
  for (let round = 1; round <= lives; round++) {
    const start = performance.now();
    const killer = new Promise((resolve) => setTimeout(resolve, 1 + random() * 130)).then(() =>
      live.killCedanad(),
    );
    const id = await life(live, round);
    times.push(performance.now() - start);
    await killer;
    await expectEvents(live, id, round);
    progress("kills", round, lives, `${faults.length} faults`);
  }
  times.sort((a, b) => a - b);
  console.log(
    `kills: a life took ${Math.round(times[times.length >> 1]!)} ms (median), ${Math.round(times.at(-1)!)} at most`,
  );
}

/** Further processes in one container. */
async function execs(live: Live): Promise<void> {
  const rounds = count(1_000);
  await using task = await live.run(["sleeper"], { stdio: false });
  const exec = async (round: number) => {
    const script = `echo exec ${round}; exit ${round % 200}`;
    const found = await ctr(live, ["task", "exec", "--exec-id", `x${round}`, task.id, "sh", "-c", script]);
    expectEqual(`exec ${round}`, found, { status: round % 200, stdout: `exec ${round}\n`, stderr: "" });
  };
  await exec(0);
  const before = await settledInventory(live);
  for (let round = 1; round <= rounds; round++) {
    await exec(round);
    progress("execs", round, rounds, `${faults.length} faults`);
  }
  await expectInventory(live, before);
}

/** Lives and nothing else, with their events. */
async function lives(live: Live): Promise<void> {
  const rounds = count(1_000);
  const before = await settledInventory(live);
  for (let round = 1; round <= rounds; round++) {
    await expectEvents(live, await life(live, round), round);
    progress("lives", round, rounds, `${faults.length} faults`);
  }
  await expectInventory(live, before);
}

const parts = { memory, kills, execs, lives };
const names = (positionals.length > 0 ? positionals : Object.keys(parts)) as (keyof typeof parts)[];
for (const name of names) if (!parts[name]) throw new Error(`there is no part ${name}`);

const keepAlive = setInterval(() => {}, 60_000); // the harness waits on things that Node does not count as work
try {
  for (const name of names) await onMachine(name, parts[name]);
} finally {
  clearInterval(keepAlive);
}
console.log(faults.length === 0 ? "soak: nothing was wrong" : `soak: ${faults.length} faults`);
if (faults.length > 0) process.exitCode = 1;
