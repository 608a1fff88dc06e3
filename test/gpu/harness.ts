// The stand-in driver and its clients, built once per content; a directory of "GPUs" for each test. All of it is test code: see libcuda/RULES.md.

import { type ChildProcess, execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { promisify } from "node:util";
import { cached } from "../live/harness/programs.ts";
import { until } from "../live/harness/until.ts";

const run = promisify(execFile);
const sources = import.meta.dirname;

/**
 * Directory with libcuda.so.1, r550/libcuda.so.1, libnvidia-ml.so.1, cuda-checkpoint, criu-plugin/cuda_plugin.so, the clients, and in rt/ all
 * that these load.
 */
export function standIn(): Promise<string> {
  const inputs = ["libcuda", "clients", "nvml", "criu-plugin"].flatMap((name) =>
    readdirSync(join(sources, name))
      .filter((file) => /\.[ch]$/.test(file))
      .map((file) => join(sources, name, file)),
  );
  const all = [...inputs, join(sources, "cuda-abi.h"), join(sources, "Makefile"), LINKER];
  return cached("gpu", all, async (directory) => {
    await run("make", ["-s", "-C", sources, `OUT=${directory}`]);
    // For containers, whose image has no libraries at all.
    const runtime = makeDirectory(join(directory, "rt"));
    const { stdout } = await run("ldd", [join(directory, "client-dlsym")]);
    const libraries = [...stdout.matchAll(/=> (\/\S+)/g)].map((match) => match[1]!);
    await run("cp", ["-L", LINKER, ...libraries, join(directory, "libcuda.so.1"), runtime]);
  });
}

/** The dynamic linker, at the path that programs name. */
export const LINKER = process.arch === "arm64" ? "/lib/ld-linux-aarch64.so.1" : "/lib64/ld-linux-x86-64.so.2";

/** The opt-in tier: the same clients on the machine's own driver and GPU. */
export const onRealGpu = process.env.CEDANA_TEST_REAL_GPU === "1";

export const UUIDS = ["a0".repeat(16), "a1".repeat(16), "b0".repeat(16), "b1".repeat(16)] as const;

/** A directory that is the machine's GPUs. */
export class Gpus implements Disposable {
  readonly path: string;

  constructor(parent = "/tmp") {
    this.path = mkdtempSync(join(parent, "cedana-test-gpu-"));
  }

  /** What is plugged in. */
  plug(...devices: (readonly [uuid: string, chip: string, mib: number])[]): void {
    writeFileSync(join(this.path, "devices"), devices.map((device) => `${device.join(" ")}\n`).join(""));
  }

  /** Sets the fault switches; none takes them away. */
  faults(...switches: string[]): void {
    writeFileSync(join(this.path, "faults.new"), `${switches.join("\n")}\n`);
    rmSync(join(this.path, "faults"), { force: true });
    if (switches.length > 0) writeFileSync(join(this.path, "faults"), `${switches.join("\n")}\n`);
    rmSync(join(this.path, "faults.new"));
  }

  /** The driver's calls from now on, each as "OPERATION NAME". */
  watchCalls(): () => string[] {
    return this.#watch("calls");
  }

  /** Who asks NVML from now on: each helper does, before anything else. */
  watchQueries(): () => string[] {
    return this.#watch("queries");
  }

  #watch(name: string): () => string[] {
    const path = join(this.path, name);
    writeFileSync(path, "", { mode: 0o666 });
    return () => readFileSync(path, "utf8").split("\n").filter(Boolean);
  }

  /** What is on the GPUs goes, as at a reboot or on another machine. */
  wipe(): void {
    for (const name of readdirSync(this.path))
      if (name.startsWith("mem-")) rmSync(join(this.path, name), { recursive: true });
  }

  /** How many allocations are on a GPU. */
  allocations(uuid: string): number {
    const name = `mem-${uuid.slice(0, 6)}${uuid.slice(30)}`;
    try {
      return readdirSync(join(this.path, name)).length;
    } catch {
      return 0; // ENOENT: never any
    }
  }

  [Symbol.dispose](): void {
    rmSync(this.path, { recursive: true, force: true });
  }
}

/** A client that runs here, in no container. */
export class Client implements AsyncDisposable {
  readonly process: ChildProcess;
  readonly lines: string[] = [];

  private constructor(process: ChildProcess) {
    this.process = process;
    createInterface({ input: process.stdout! }).on("line", (line) => this.lines.push(line));
  }

  static async start(
    directory: string,
    gpus: Gpus,
    args: string[] = [],
    { kind = "dlsym" as "linked" | "dlsym" | "procaddress", env = {} as Record<string, string> } = {},
  ): Promise<Client> {
    const client = new Client(
      spawn(join(directory, `client-${kind}`), args, {
        env: { LD_LIBRARY_PATH: directory, CEDANA_TEST_GPU_DIR: gpus.path, ...env },
        stdio: ["ignore", "pipe", "inherit"],
      }),
    );
    await client.next();
    return client;
  }

  get pid(): number {
    return this.process.pid!;
  }

  /** The counter in the newest line of a process of that name. */
  last(name = "client"): number {
    const line = this.lines.findLast((one) => one.startsWith(`${name} `));
    return Number(line?.split(" ")[1] ?? Number.NaN);
  }

  /** Waits for a line that comes from now on; fails for one that says FAILED. */
  async next(count = 1): Promise<number> {
    const before = this.lines.length;
    await until(() => this.lines.length >= before + count || this.process.exitCode !== null, {
      what: () => `a line of the client; it said ${JSON.stringify(this.lines.slice(-3))}`,
    });
    const failed = this.lines.find((line) => line.includes("FAILED"));
    if (failed) throw new Error(failed);
    return Number(this.lines.at(-1)!.split(" ")[1]);
  }

  /** Whether nothing comes for a while, in which several lines would. */
  async standsStill(ms = 150): Promise<boolean> {
    await new Promise((resolve) => setTimeout(resolve, 30)); // what is in the pipe
    const before = this.lines.length;
    await new Promise((resolve) => setTimeout(resolve, ms));
    return this.lines.length === before;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return;
    const ended = once(this.process, "exit");
    this.process.kill("SIGKILL");
    await ended;
  }
}

/** The environment that makes ours find the stand-in. */
export function driverEnvironment(directory: string, gpus: Gpus): Record<string, string> {
  return {
    CEDANA_GPU_DRIVER: join(directory, "libcuda.so.1"),
    CEDANA_GPU_NVML: join(directory, "libnvidia-ml.so.1"),
    CEDANA_TEST_GPU_DIR: gpus.path,
  };
}

/** Sets variables of our own environment until it is disposed of. */
export function withEnvironment(values: Record<string, string | undefined>): Disposable {
  const before = Object.fromEntries(Object.keys(values).map((name) => [name, process.env[name]]));
  const set = (all: Record<string, string | undefined>) => {
    for (const [name, value] of Object.entries(all))
      if (value === undefined) delete process.env[name];
      else process.env[name] = value;
  };
  set(values);
  return { [Symbol.dispose]: () => set(before) };
}

export function makeDirectory(path: string): string {
  mkdirSync(path, { recursive: true });
  return path;
}
