import { execFile } from "node:child_process";
import { existsSync } from "node:fs";
import { delimiter, join } from "node:path";
import { promisify } from "node:util";
import { installedPlugins } from "../criu/plugins.ts";
import { InvalidRequest, messageOf, TimedOut, Unavailable, Unsupported } from "../errors/index.ts";
import { code, failureOf, type ProcessStateName, stateName } from "./codes.ts";
import type { Deadlines } from "./deadlines.ts";
import type { Coded } from "./helper/messages.ts";
import { GpuHelper } from "./helper.ts";

const run = promisify(execFile);

/** A GPU as the driver names it; uuid: 32 hexadecimal digits. */
export interface GpuDevice {
  readonly uuid: string;
  readonly name: string;
  readonly memoryBytes: number;
}

/** By what a process's GPU state is moved. In this order they are tried; never two at once. */
export type MeansName = "driver" | "cuda-checkpoint" | "criu-plugin";

/** What moves the GPU state of a process. */
export interface Means {
  readonly name: MeansName;
  /** cuDriverGetVersion's, 13000 for 13.0; undefined where it isn't told */
  readonly driverVersion: number | undefined;
  /** undefined: the process uses no GPU */
  restoreThread(pid: number): Promise<number | undefined>;
  state(pid: number): Promise<ProcessStateName>;
  /** @throws TimedOut, and the process runs on */
  lock(pid: number, timeoutMs: number): Promise<void>;
  checkpoint(pid: number): Promise<void>;
  /** @param pairs  which GPU becomes which, all of them; empty: each is where it was */
  restore(pid: number, pairs: readonly [string, string][]): Promise<void>;
  unlock(pid: number): Promise<void>;
  /** The GPUs of this machine. */
  devices(): Promise<GpuDevice[]>;
}

/** Where a remap came: before, the bytes of the argument are reserved. */
export const REMAP_SINCE = 13000;
/** Beyond the driver's own timeout. */
const SLACK_MS = 2_000;

const required = [
  "cuCheckpointProcessGetState",
  "cuCheckpointProcessGetRestoreThreadId",
  "cuCheckpointProcessLock",
  "cuCheckpointProcessCheckpoint",
  "cuCheckpointProcessRestore",
  "cuCheckpointProcessUnlock",
];

/** The driver's library: what the linker finds, unless the environment says where. */
export function driverLibrary(): string {
  return process.env.CEDANA_GPU_DRIVER || "libcuda.so.1";
}

/** Names processes in messages. */
export type Describe = (pid: number) => string;

/** The driver's API, by a helper process. It is started anew when a watchdog had to end it. */
export class DriverMeans implements Means, AsyncDisposable {
  readonly name = "driver";
  readonly #deadlines: Deadlines;
  readonly #describe: Describe;
  readonly #helpers: HelperKeeper;
  #version = 0;
  #initialised = false;
  #opened: GpuHelper | undefined;

  constructor(helpers: HelperKeeper, deadlines: Deadlines, describe: Describe) {
    this.#helpers = helpers;
    this.#deadlines = deadlines;
    this.#describe = describe;
  }

  get driverVersion(): number {
    return this.#version;
  }

  /** @throws Unavailable without a driver, Unsupported when it can't checkpoint */
  async open(): Promise<void> {
    await this.#helper();
  }

  async #helper(): Promise<GpuHelper> {
    const helper = this.#helpers.helper();
    if (helper === this.#opened) return helper;
    const { symbols, version } = await helper.call("open", { path: driverLibrary() }, this.#deadlines.ask);
    const missing = required.filter((name) => !symbols[name]);
    if (missing.length > 0)
      throw new Unsupported(
        `the GPU driver (${versionText(version)}) can't checkpoint: it has no ${missing[0]}; r570 (CUDA 12.8) or newer has`,
      );
    this.#version = version;
    this.#opened = helper;
    this.#initialised = false;
    return helper;
  }

  async restoreThread(pid: number): Promise<number | undefined> {
    const helper = await this.#helper();
    const { code: result, name, value } = await helper.call("restoreThread", { pid }, this.#deadlines.ask);
    if (result === code.success) return value;
    if (result === code.notInitialized || result === code.invalidValue) return undefined;
    throw failureOf("lock", this.#describe(pid), result, name);
  }

  async state(pid: number): Promise<ProcessStateName> {
    const helper = await this.#helper();
    const { code: result, name, value } = await helper.call("state", { pid }, this.#deadlines.ask);
    if (result !== code.success)
      throw new Unavailable(
        `the GPU state of ${this.#describe(pid)} can't be asked for: ${name} (${result})`,
      );
    return stateName(value);
  }

  async lock(pid: number, timeoutMs: number): Promise<void> {
    const helper = await this.#helper();
    this.#check("lock", pid, await helper.call("lock", { pid, timeoutMs }, timeoutMs + SLACK_MS));
  }

  async checkpoint(pid: number): Promise<void> {
    const helper = await this.#helper();
    this.#check("checkpoint", pid, await helper.call("checkpoint", { pid }, this.#deadlines.checkpoint));
  }

  async restore(pid: number, pairs: readonly [string, string][]): Promise<void> {
    const helper = await this.#initialisedHelper(); // without persistence mode the driver wants that
    if (pairs.length > 0 && this.#version < REMAP_SINCE)
      throw new Unsupported(
        `the GPUs of ${this.#describe(pid)} would become others, which the driver ${versionText(this.#version)} can't do: 13.0 or newer can`,
      );
    const input = { pid, pairs: [...pairs] };
    this.#check("restore", pid, await helper.call("restore", input, this.#deadlines.restore));
  }

  async unlock(pid: number): Promise<void> {
    const helper = await this.#helper();
    this.#check("unlock", pid, await helper.call("unlock", { pid }, this.#deadlines.unlock));
  }

  async devices(): Promise<GpuDevice[]> {
    const helper = await this.#initialisedHelper();
    const { code: result, name, devices } = await helper.call("devices", {}, this.#deadlines.ask);
    if (result !== code.success)
      throw new Unavailable(`the driver's GPUs can't be listed: ${name} (${result})`);
    return devices;
  }

  async #initialisedHelper(): Promise<GpuHelper> {
    const helper = await this.#helper();
    if (!this.#initialised) {
      const { code: result, name } = await helper.call("init", {}, this.#deadlines.ask);
      if (result !== code.success)
        throw new Unavailable(`the GPU driver can't be used: cuInit says ${name} (${result})`);
      this.#initialised = true;
    }
    return helper;
  }

  #check(verb: "lock" | "checkpoint" | "restore" | "unlock", pid: number, answer: Coded): void {
    if (answer.code !== code.success) throw failureOf(verb, this.#describe(pid), answer.code, answer.name);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#helpers[Symbol.asyncDispose]();
  }
}

/** 13000 as "13.0". */
export function versionText(version: number): string {
  if (version <= 0) return "of unknown version";
  return `${Math.trunc(version / 1000)}.${Math.trunc((version % 1000) / 10)}`;
}

/** One helper at a time, made when it is first needed and again when it has ended. */
export class HelperKeeper implements AsyncDisposable {
  #helper: GpuHelper | undefined;

  helper(): GpuHelper {
    if (!this.#helper?.isAlive) this.#helper = GpuHelper.start();
    return this.#helper;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#helper?.[Symbol.asyncDispose]();
    this.#helper = undefined;
  }
}

/** NVIDIA's program over the same calls, for a driver whose library can't be used from here. */
export class ProgramMeans implements Means {
  readonly name = "cuda-checkpoint";
  readonly driverVersion = undefined;
  readonly #path: string;
  readonly #deadlines: Deadlines;
  readonly #describe: Describe;
  #knowsMaps = false;

  private constructor(path: string, deadlines: Deadlines, describe: Describe) {
    this.#path = path;
    this.#deadlines = deadlines;
    this.#describe = describe;
  }

  /** @throws Unavailable when it isn't installed, Unsupported when it is too old */
  static async open(deadlines: Deadlines, describe: Describe): Promise<ProgramMeans> {
    const path = programPath();
    if (path === undefined) throw new Unavailable("the program cuda-checkpoint is not in PATH");
    const means = new ProgramMeans(path, deadlines, describe);
    const help = await means.#run(["--help"], deadlines.ask);
    if (!help.includes("--action"))
      throw new Unsupported(`${path} is too old: it has no --action, which came with driver r555`);
    means.#knowsMaps = help.includes("--device-map");
    return means;
  }

  async restoreThread(pid: number): Promise<number | undefined> {
    const text = await this.#run(["--get-restore-tid", "--pid", String(pid)], this.#deadlines.ask).catch(
      (error: Error) => {
        if (typeof (error.cause as { code?: unknown } | undefined)?.code !== "number") throw error; // it could not be run
        return ""; // its status says that the process is no client of the driver
      },
    );
    const tid = Number(text.trim());
    return Number.isInteger(tid) && tid > 0 ? tid : undefined;
  }

  async state(pid: number): Promise<ProcessStateName> {
    const text = (await this.#run(["--get-state", "--pid", String(pid)], this.#deadlines.ask)).trim();
    return ["running", "locked", "checkpointed", "failed"].includes(text)
      ? (text as ProcessStateName)
      : "busy";
  }

  async lock(pid: number, timeoutMs: number): Promise<void> {
    await this.#action("lock", pid, timeoutMs + SLACK_MS, ["--timeout", String(timeoutMs)]);
  }
  async checkpoint(pid: number): Promise<void> {
    await this.#action("checkpoint", pid, this.#deadlines.checkpoint);
  }
  async restore(pid: number, pairs: readonly [string, string][]): Promise<void> {
    if (pairs.length > 0 && !this.#knowsMaps)
      throw new Unsupported(
        `the GPUs of ${this.#describe(pid)} would become others, which ${this.#path} can't do: it has no --device-map`,
      );
    const map = pairs.map(([from, to]) => `${uuidText(from)}=${uuidText(to)}`).join(",");
    await this.#action("restore", pid, this.#deadlines.restore, map ? ["--device-map", map] : []);
  }
  async unlock(pid: number): Promise<void> {
    await this.#action("unlock", pid, this.#deadlines.unlock);
  }

  /** It lists none; NVML does. */
  async devices(): Promise<GpuDevice[]> {
    return [];
  }

  async #action(verb: string, pid: number, deadlineMs: number, more: string[] = []): Promise<void> {
    await this.#run(["--action", verb, "--pid", String(pid), ...more], deadlineMs).catch((error) => {
      if (error instanceof TimedOut) throw error;
      throw new Unavailable(
        `${verb} of the GPU state of ${this.#describe(pid)} failed: ${messageOf(error)}`,
        {
          cause: error,
        },
      );
    });
  }

  async #run(args: string[], timeout: number): Promise<string> {
    try {
      const { stdout } = await run(this.#path, args, { timeout, killSignal: "SIGKILL" });
      return stdout;
    } catch (error) {
      const { killed, stderr, message } = error as Error & { killed?: boolean; stderr?: string };
      if (killed) throw new TimedOut(`${this.#path} ${args.join(" ")} did not end in ${timeout} ms`);
      throw new Unavailable(`${this.#path} ${args.join(" ")}: ${stderr?.trim() || message}`, {
        cause: error,
      });
    }
  }
}

export function programPath(): string | undefined {
  if (process.env.CEDANA_GPU_PROGRAM) return process.env.CEDANA_GPU_PROGRAM;
  return (process.env.PATH ?? "/usr/local/bin:/usr/bin:/bin")
    .split(delimiter)
    .map((directory) => join(directory, "cuda-checkpoint"))
    .find((path) => existsSync(path));
}

/** As NVIDIA's programs write it. */
export function uuidText(uuid: string): string {
  return `GPU-${uuid.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5")}`;
}

/** Of "GPU-8e1f…" or of 32 digits; undefined when it is neither. */
export function parseUuid(text: string): string | undefined {
  const digits = text.replace(/^GPU-/i, "").replaceAll("-", "").toLowerCase();
  return /^[0-9a-f]{32}$/.test(digits) ? digits : undefined;
}

/** CRIU's own plugin for CUDA, which runs cuda-checkpoint by itself; undefined when CRIU has none. */
export function criuPlugin(): string | undefined {
  const directory = installedPlugins().get("cuda_plugin");
  return directory && join(directory, "cuda_plugin.so");
}

/**
 * The first means that works here, or the one that the administrator has chosen (`CEDANA_GPU_MEANS`). With CRIU's plugin there is nothing for
 * us to do but to stay away.
 * @throws Unsupported with every reason, InvalidRequest for a choice that is none
 */
export async function chooseMeans(
  helpers: HelperKeeper,
  limits: Deadlines,
  describe: Describe,
): Promise<Means | "criu-plugin"> {
  const ways = {
    driver: async () => {
      const driver = new DriverMeans(helpers, limits, describe);
      await driver.open();
      return driver;
    },
    "cuda-checkpoint": () => ProgramMeans.open(limits, describe),
    "criu-plugin": async () => {
      if (criuPlugin() !== undefined && programPath() !== undefined) return "criu-plugin" as const;
      throw new Unavailable(
        criuPlugin() === undefined
          ? "CRIU has no CUDA plugin (cuda_plugin.so; Debian's package comes without)"
          : "CRIU's CUDA plugin has no program cuda-checkpoint to run",
      );
    },
  } satisfies Record<MeansName, () => Promise<Means | "criu-plugin">>;
  const chosen = process.env.CEDANA_GPU_MEANS;
  if (chosen && !Object.hasOwn(ways, chosen))
    throw new InvalidRequest(
      `CEDANA_GPU_MEANS is ${JSON.stringify(chosen)}; it may be ${Object.keys(ways).join(", ")}`,
    );
  const reasons: string[] = [];
  for (const [name, open] of Object.entries(ways)) {
    if (chosen && name !== chosen) continue;
    try {
      return await open();
    } catch (error) {
      reasons.push(messageOf(error));
    }
  }
  throw new Unsupported(`the GPU state can't be checkpointed: ${reasons.join("; ")}`);
}
