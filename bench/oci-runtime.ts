// cedana-runtime beside the engine itself, in turn within each round: what passing through costs, `podman run --rm`, and checkpoint
// and restore by Podman. Prints medians.
//   node bench/oci-runtime.ts [--rounds N (100)] [--podman-rounds N (20)]
import { spawnSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { CallerPlace, missingCallers, Podman, type Side, sides } from "../test/live/harness/callers.ts";
import type { EngineName } from "../test/live/harness/live.ts";
import { IMAGE, programs } from "../test/live/harness/programs.ts";
import { isAlive } from "../test/live/harness/system.ts";
import { until } from "../test/live/harness/until.ts";

const argument = (name: string, otherwise: number) => {
  const at = process.argv.indexOf(`--${name}`);
  return at < 0 ? otherwise : Number(process.argv[at + 1]);
};
const rounds = argument("rounds", 100);
const podmanRounds = argument("podman-rounds", 20);
const median = (values: number[]) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;

interface Row {
  what: string;
  unit: string;
  wrapper: number;
  engine: number;
}
const rows: Row[] = [];

/** Both sides in each round, the one first that was second before; two rounds warm up. */
async function inTurn(
  what: string,
  unit: string,
  count: number,
  measure: (side: Side) => number | Promise<number>,
): Promise<void> {
  const values: Record<Side, number[]> = { engine: [], wrapper: [] };
  for (let round = -2; round < count; round++)
    for (const side of round % 2 === 0 ? sides : sides.toReversed()) {
      const value = await measure(side);
      if (round >= 0) values[side].push(value);
    }
  rows.push({ what, unit, wrapper: median(values.wrapper), engine: median(values.engine) });
}

const timeMs = async (work: () => unknown) => {
  const start = process.hrtime.bigint();
  await work();
  return Number(process.hrtime.bigint() - start) / 1e6;
};

/** Peak of a program's memory, of which Node doesn't tell. */
function peakKb(argv: string[]): number {
  const script =
    "import os,sys\nnull=os.open('/dev/null',os.O_RDWR)\npid=os.posix_spawn(sys.argv[1],sys.argv[1:],os.environ,file_actions=[(os.POSIX_SPAWN_DUP2,null,1)])\nprint(os.wait4(pid,0)[2].ru_maxrss)";
  const { stdout, stderr } = spawnSync("python3", ["-c", script, ...argv], { encoding: "utf8" });
  const peak = Number(stdout);
  if (!(peak > 0)) throw new Error(`measure the memory of ${argv.join(" ")}: ${stderr}`);
  return peak;
}

async function passThrough(engine: EngineName): Promise<void> {
  const place = await CallerPlace.start(engine);
  const binary = engine === "runc" ? "/usr/sbin/runc" : "/usr/bin/crun";
  writeFileSync(place.config, JSON.stringify({ engine: binary, runDirectory: place.runDir }));
  const argv = (side: Side, ...args: string[]) =>
    side === "engine" ? [binary, ...args] : place.runtime("wrapper", ...args);
  try {
    const run = (side: Side, ...args: string[]) => {
      const [file, ...rest] = argv(side, "--root", join(place.dir, "root"), ...args);
      spawnSync(file!, rest, { stdio: "ignore" });
    };
    // The one of an unknown container looks for a marker, too.
    await inTurn(`${engine} --version`, "ms", rounds, (side) => timeMs(() => run(side, "--version")));
    await inTurn(`${engine} state`, "ms", rounds, (side) => timeMs(() => run(side, "state", "nobody")));
    await inTurn(`${engine} --version, peak memory`, "kB", Math.min(rounds, 20), (side) =>
      peakKb(argv(side, "--version")),
    );
  } finally {
    await place.stop();
  }
}

async function byPodman(): Promise<void> {
  const podman = await Podman.start("runc");
  const memory = await programs();
  try {
    const on = async (side: Side, ...args: string[]) => {
      const outcome = await podman.on(side, ...args);
      if (outcome.status !== 0) throw new Error(`podman ${args.join(" ")}: ${outcome.stderr}`);
      return outcome.stdout;
    };
    await inTurn("podman run --rm true", "ms", podmanRounds, (side) =>
      timeMs(() => on(side, "run", "--rm", IMAGE, "true")),
    );
    const begin = async (side: Side) => {
      await on(
        side,
        "run",
        "--detach",
        "--name",
        side,
        "--volume",
        `${memory}:/programs:ro`,
        IMAGE,
        "/programs/memory",
        "16",
      );
      await until(async () => /ready/.test(await on(side, "logs", side)), { everyMs: 20 });
    };
    await inTurn("podman container checkpoint, 16 MiB", "ms", podmanRounds, async (side) => {
      await begin(side);
      const ms = await timeMs(() => on(side, "container", "checkpoint", side));
      await on(side, "rm", "--force", "--time", "0", side);
      return ms;
    });
    await inTurn("podman container restore, 16 MiB", "ms", podmanRounds, async (side) => {
      await begin(side);
      await on(side, "container", "checkpoint", side);
      const ms = await timeMs(() => on(side, "container", "restore", side));
      await on(side, "rm", "--force", "--time", "0", side);
      return ms;
    });
    // A warm cedanad against none at all; `engine` is the column of the warm one.
    await inTurn(
      "podman container checkpoint: no cedanad runs / it runs",
      "ms",
      Math.min(podmanRounds, 10),
      async (side) => {
        await begin("wrapper");
        if (side === "engine") await on("wrapper", "container", "checkpoint", "--leave-running", "wrapper");
        else await endCedanad(podman);
        const ms = await timeMs(() => on("wrapper", "container", "checkpoint", "--leave-running", "wrapper"));
        await on("wrapper", "rm", "--force", "--time", "0", "wrapper");
        return ms;
      },
    );
  } finally {
    await podman.stop();
  }
}

async function endCedanad(podman: Podman): Promise<void> {
  const pid = Number(/"pid":(\d+)/.exec(podman.place.cedanadLog().trim().split("\n").at(-1) ?? "")?.[1] ?? 0);
  if (pid === 0 || !isAlive(pid)) return;
  process.kill(pid, "SIGKILL");
  await until(() => !isAlive(pid));
}

const missing = missingCallers();
if (missing) throw new Error(missing);
const keepAlive = setInterval(() => {}, 60_000);
try {
  for (const engine of ["runc", "crun"] as const) await passThrough(engine);
  await byPodman();
} finally {
  clearInterval(keepAlive);
}
console.table(
  rows.map(({ what, unit, wrapper, engine }) => ({
    what,
    unit,
    "cedana-runtime": wrapper.toFixed(2),
    engine: engine.toFixed(2),
    difference: (wrapper - engine).toFixed(2),
    ratio: (wrapper / engine).toFixed(3),
  })),
);
