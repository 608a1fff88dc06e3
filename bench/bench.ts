// What every measurement has: a private containerd, the two shims, and a stopwatch.

import { execFile } from "node:child_process";
import { join } from "node:path";
import { promisify } from "node:util";
import { type EngineName, GO_SHIM, Live, OURS } from "../test/live/harness/live.ts";
import { compiled, IMAGE } from "../test/live/harness/programs.ts";
import { forgetKernelCacheLater } from "../test/live/harness/system.ts";

const run = promisify(execFile);
process.once("exit", forgetKernelCacheLater());

export type Side = "ours" | "theirs";

/** A bound of our figure, or of its ratio to the Go shim's in the same run. */
export interface Aim {
  of: "ratio" | "ours";
  atMost?: number;
  atLeast?: number;
}

export interface Row {
  name: string;
  unit: string;
  aim?: Aim | Record<EngineName, Aim>;
}

/** Values of rows, by name: one, or several from one round. A side that can't do it leaves its row out. */
export type Samples = Record<string, number | number[]>;

/** Rows that are measured together. `measure` makes one round of them for one side and leaves nothing behind. */
export interface Subject {
  rows: Row[];
  /** the Go shim has nothing to compare with */
  oursOnly?: boolean;
  /** where a round takes long: how many of them are enough */
  maxRounds?: number;
  /** rounds of which nothing is kept (2) */
  warmUps?: number;
  measure(bench: Bench, side: Side): Promise<Samples>;
  /** what this machine lacks for it, or undefined */
  missing?(): string | undefined;
  /** after the last round, also of one that failed */
  end?(): Promise<void>;
}

export interface TimedOptions {
  cwd?: string;
  stdin?: string;
  /** copies that run at once; `@` in an argument is the copy's number */
  count?: number;
  env?: Record<string, string>;
  /** exit statuses that are no failure */
  statuses?: number[];
}

export class Bench {
  readonly live: Live;
  readonly engine: EngineName;
  /** directory of the compiled bench/programs */
  readonly programs: string;

  private constructor(live: Live, engine: EngineName, programs: string) {
    this.live = live;
    this.engine = engine;
    this.programs = programs;
  }

  static async start(engine: EngineName): Promise<Bench> {
    const programs = await compiled("bench", join(import.meta.dirname, "programs"));
    // At its usual level: at `debug`, both shims would be measured at writing logs.
    const env = { CEDANA_CRIU_CACHE: "on" }; // as in service; the Go shim's CRIU has it, too
    const live = await Live.start({ containerd: "1.7", engine, runtime: OURS, logLevel: "info", env });
    return new Bench(live, engine, programs);
  }

  runtime(side: Side): string {
    return side === "ours" ? OURS : GO_SHIM;
  }

  /** How many milliseconds a program takes in containerd's mount namespace, and what it printed. */
  async timed(
    argv: string[],
    { cwd = "/", stdin = "/dev/null", count = 1, env = {}, statuses = [0] }: TimedOptions = {},
  ): Promise<{ ms: number; output: string }> {
    const { live } = this;
    const enter = live.options.cgroup === "v2" ? ["-m", `/proc/${live.containerdPid}/ns/mnt`] : [];
    const { stdout } = await run(
      join(this.programs, "stopwatch"),
      [...enter, "-C", cwd, "-i", stdin, "-n", String(count), "--", ...argv],
      { env: live.environment(env), maxBuffer: 64 << 20 },
    );
    const [head = "", ...rest] = stdout.split("\n");
    const [ns, ...exits] = head.split(" ").map(Number);
    const output = rest.join("\n");
    const bad = exits.find((status) => !statuses.includes(status));
    if (bad !== undefined) throw new Error(`${argv.join(" ")} ended with ${bad}: ${output}`);
    return { ms: ns! / 1e6, output };
  }

  /** The same for containerd's own client. */
  async ctrMs(args: string[], options: TimedOptions = {}): Promise<number> {
    const { live } = this;
    const ctr = [join(live.binaries, "ctr"), "--address", live.address, "--namespace", live.namespace];
    return (await this.timed([...ctr, ...args], options)).ms;
  }

  /** `ctr run` with the side's runtime and our image. */
  runArgs(side: Side, flags: string[], id: string, command: string[]): string[] {
    // crun refuses ctr's default of CPU shares where version 2 of cgroups has no controllers.
    const shares = this.engine === "crun" ? ["--cpu-shares", "0"] : [];
    return [
      "run",
      ...flags,
      ...shares,
      ...this.live.ctrRuntimeFlags(this.runtime(side)),
      IMAGE,
      id,
      ...command,
    ];
  }

  /** Containers that do nothing, each in a shim of its own unless `annotations` say otherwise. */
  async addIdle(
    side: Side,
    count: number,
    annotations: (index: number) => Record<string, string> = () => ({}),
  ): Promise<AsyncDisposable> {
    const tasks: Awaited<ReturnType<Live["run"]>>[] = [];
    const dispose = async () => {
      for (const task of tasks.reverse()) await task.destroy();
    };
    try {
      for (let index = 0; index < count; index++)
        tasks.push(
          await this.live.run(["sleeper"], {
            runtime: this.runtime(side),
            stdio: false,
            annotations: annotations(index),
          }),
        );
    } catch (error) {
      await dispose();
      throw error;
    }
    return { [Symbol.asyncDispose]: dispose };
  }
}

export const median = (values: number[]): number => {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
};

export async function timeMs(work: () => Promise<unknown>): Promise<number> {
  const start = process.hrtime.bigint();
  await work();
  return Number(process.hrtime.bigint() - start) / 1e6;
}
