// cedana-runtime beside the engine itself: what passing through costs, `podman run --rm`, checkpoint and restore by Podman. Neither is a
// shim's affair, so nothing of it runs below the bench's containerd; the column of the Go shim is the engine's here.

import { spawnSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import {
  CallerPlace,
  missingCallers,
  Podman,
  type Side as Program,
} from "../../test/live/harness/callers.ts";
import type { EngineName } from "../../test/live/harness/live.ts";
import { IMAGE, programs } from "../../test/live/harness/programs.ts";
import { isAlive } from "../../test/live/harness/system.ts";
import { until } from "../../test/live/harness/until.ts";
import { type Aim, type Samples, type Side, type Subject, timeMs } from "../bench.ts";

const binaries: Record<EngineName, string> = { runc: "/usr/sbin/runc", crun: "/usr/bin/crun" };
const programOf = (side: Side): Program => (side === "ours" ? "wrapper" : "engine");

// ---- passing through ---------------------------------------------------------------------------------------------------

const VERSION = "cedana-runtime passes --version through: more than the engine";
const STATE = "cedana-runtime passes state through: more than the engine";
const PEAK = "cedana-runtime passes through: peak memory, more than the engine";
/** Pairs in one round: a difference of a millisecond is found by many. */
const PAIRS = 5;

let place: CallerPlace | undefined;

export const passThrough: Subject = {
  rows: [
    { name: VERSION, unit: "ms", aim: { of: "ours", atMost: 1.5 } },
    { name: STATE, unit: "ms", aim: { of: "ours", atMost: 1.5 } },
    { name: PEAK, unit: "kB", aim: { of: "ours", atMost: 2048 } },
  ],
  oursOnly: true,
  missing: missingCallers,
  async measure(bench) {
    const binary = binaries[bench.engine];
    if (!place) {
      place = await CallerPlace.start(bench.engine);
      writeFileSync(place.config, JSON.stringify({ engine: binary, runDirectory: place.runDir }));
    }
    const { dir } = place;
    const argv = (side: Program, ...args: string[]) => [
      ...(side === "engine" ? [binary] : place!.runtime("wrapper")),
      "--root",
      join(dir, "root"),
      ...args,
    ];
    const run = (side: Program, ...args: string[]) => {
      const [file, ...rest] = argv(side, ...args);
      return timeMs(async () => spawnSync(file!, rest, { stdio: "ignore" }));
    };
    const differences = async (measure: (side: Program) => Promise<number>) => {
      const found: number[] = [];
      for (let pair = 0; pair < PAIRS; pair++) {
        // Who comes second has it warmer.
        const order: Program[] = pair % 2 === 0 ? ["engine", "wrapper"] : ["wrapper", "engine"];
        const took = { engine: 0, wrapper: 0 };
        for (const side of order) took[side] = await measure(side);
        found.push(took.wrapper - took.engine);
      }
      return found;
    };
    return {
      [VERSION]: await differences((side) => run(side, "--version")),
      [STATE]: await differences((side) => run(side, "state", "nobody")), // looks for a marker, too
      [PEAK]: await differences(async (side) => peakKb(argv(side, "--version"))),
    };
  },
  async end() {
    await place?.stop();
    place = undefined;
  },
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

// ---- Podman ------------------------------------------------------------------------------------------------------------

const RUN = "podman run --rm true";
const CHECKPOINT = "podman container checkpoint, 16 MiB";
const RESTORE = "podman container restore, 16 MiB";
const WAITING = "podman container checkpoint, 16 MiB, of a program in epoll_wait";
const COMPUTING = "podman container checkpoint, 16 MiB, of a program that computes";
const FIRST = "podman container checkpoint with no cedanad: more than a warm one";

const CHECKPOINT_AIM: Record<EngineName, Aim> = {
  runc: { of: "ratio", atMost: 0.85 },
  crun: { of: "ratio", atMost: 1 },
};

let podman: Podman | undefined;

/** Its files are on the machine's disk; what is below /run elsewhere is in memory here, too. */
const startPodman = (engine: EngineName) => Podman.start(engine, { inMemory: true });

async function on(side: Program, ...args: string[]): Promise<string> {
  const outcome = await podman!.on(side, ...args);
  if (outcome.status !== 0) throw new Error(`podman ${args.join(" ")}: ${outcome.stderr}`);
  return outcome.stdout;
}

/** A container named after its side, whose memory is filled. @param program  in a directory that is mounted there as /programs */
async function begin(side: Program, directory: string, ...program: string[]): Promise<void> {
  const volume = `${directory}:/programs:ro`;
  await on(side, "run", "--detach", "--name", side, "--volume", volume, IMAGE, ...program);
  await until(async () => /ready/.test(await on(side, "logs", side)), { everyMs: 20 });
}

/** It sums its memory up every 50 ms and sleeps in between, in nanosleep(2): recent kernels freeze it where it sleeps, at once. */
const sleeper = async () => [await programs(), "/programs/memory", "16"] as const;

/** conmon starts a `podman container cleanup` for each container that has ended, for which nobody waits. */
const cleanedUp = () =>
  until(() => !podman!.place.living().some((argv) => /\bcontainer cleanup\b/.test(argv)));

const remove = (side: Program) => on(side, "rm", "--force", "--time", "0", side);

export const podmanRuns: Subject = {
  rows: [
    { name: RUN, unit: "ms", aim: { of: "ratio", atMost: 1.03 } },
    {
      name: CHECKPOINT,
      unit: "ms",
      aim: CHECKPOINT_AIM,
    },
    { name: RESTORE, unit: "ms", aim: { of: "ratio", atMost: 1 } },
  ],
  warmUps: 1,
  missing: missingCallers,
  async measure(bench, side) {
    podman ??= await startPodman(bench.engine);
    const program = programOf(side);
    await cleanedUp(); // after the round before, the other side's
    const samples: Samples = { [RUN]: await timeMs(() => on(program, "run", "--rm", IMAGE, "true")) };
    // crun's own restore fails on a host with cgroups of both versions.
    if (side === "theirs" && bench.engine === "crun") return samples;
    await begin(program, ...(await sleeper()));
    samples[CHECKPOINT] = await timeMs(() => on(program, "container", "checkpoint", program));
    await cleanedUp(); // a restore that follows at once waits for it, the longer the sooner the checkpoint was over
    samples[RESTORE] = await timeMs(() => on(program, "container", "restore", program));
    await remove(program);
    return samples;
  },
  end: endPodman,
};

/**
 * The same of programs that have to run until they reach the place where the kernel freezes them: those that compute, in twice as many threads
 * as there are CPUs, and those that wait for files or sockets. CRIU's own freezer of cgroups version 1 looks whether they have, and if not,
 * again after 100 ms.
 */
export const podmanAtWork: Subject = {
  rows: [WAITING, COMPUTING].map((name) => ({ name, unit: "ms", aim: CHECKPOINT_AIM })),
  warmUps: 1,
  missing: missingCallers,
  async measure(bench, side) {
    // crun's own restore, and so what is compared here, fails on a host with cgroups of both versions.
    if (side === "theirs" && bench.engine === "crun") return {};
    podman ??= await startPodman(bench.engine);
    const program = programOf(side);
    const samples: Samples = {};
    for (const [row, threads] of [
      [WAITING, 0],
      [COMPUTING, 2 * availableParallelism()],
    ] as const) {
      await begin(program, bench.programs, "/programs/worker", "16", String(threads));
      samples[row] = await timeMs(() => on(program, "container", "checkpoint", program));
      await remove(program);
    }
    return samples;
  },
  end: endPodman,
};

/** Apart from the rows above: a cedanad that has just started is not as quick as one that has been at work. */
export const firstPodmanCheckpoint: Subject = {
  rows: [{ name: FIRST, unit: "ms", aim: { of: "ours", atMost: 250 } }],
  oursOnly: true,
  warmUps: 1,
  missing: missingCallers,
  async measure(bench) {
    podman ??= await startPodman(bench.engine);
    await begin("wrapper", ...(await sleeper()));
    const checkpoint = () =>
      timeMs(() => on("wrapper", "container", "checkpoint", "--leave-running", "wrapper"));
    await checkpoint();
    const warmMs = await checkpoint();
    await endCedanad();
    const samples = { [FIRST]: (await checkpoint()) - warmMs };
    await remove("wrapper");
    return samples;
  },
  end: endPodman,
};

async function endPodman(): Promise<void> {
  await podman?.stop();
  podman = undefined;
}

async function endCedanad(): Promise<void> {
  const pid = podman!.place.cedanadPid();
  if (!isAlive(pid)) return;
  process.kill(pid, "SIGKILL");
  await until(() => !isAlive(pid));
}
