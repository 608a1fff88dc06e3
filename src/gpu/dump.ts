import type { DeviceDump, DeviceOwner } from "../checkpoint/device-slot.ts";
import type { GpuFacts } from "../checkpoint/manifest.ts";
import { CedanaError, messageOf, ResourceExhausted, Unsupported, WrongState } from "../errors/index.ts";
import type { NvmlAnswer } from "../linux/cuda.ts";
import { isAlive, pidsInNamespaces } from "../linux/proc.ts";
import { type BackTimes, giveBack, hundredths, reach } from "./back.ts";
import type { ProcessStateName } from "./codes.ts";
import { type Deadlines, deadlines } from "./deadlines.ts";
import { holdThreads, releaseThreads, waitUntilHeld } from "./hold.ts";
import { availableMemory } from "./host-memory.ts";
import { holdAtBoundary, letCallsIn, refuseUncheckpointable } from "./interception.ts";
import { type JournalEntry, readJournal, removeJournal, writeJournal } from "./journal.ts";
import { chooseMeans, type GpuDevice, HelperKeeper, type Means } from "./means.ts";
import { askNvml, devicesOf } from "./nvml.ts";
import { findGpuProcesses, type GpuProcess, refuseMps } from "./processes.ts";
import { recoverInBackground } from "./recover.ts";

/*
 * The GPU's part of a dump:
 *
 *  1. find      who has the driver's library mapped or a device open; what can't work is refused by its name, while all runs
 *  2. lock      all processes at once, within one deadline: their GPU work comes to an end, new calls wait. They must run for it: a
 *               paused cgroup is thawed for the moment
 *  3. (the chain freezes the cgroup)
 *  4. checkpoint  GPU memory goes to host memory, the devices are let go. The driver does it by a thread of the process, so that one
 *               thread must run: the helper holds all others of the container by ptrace(2), the cgroup is thawed, and frozen again
 *  5. (CRIU dumps)
 *  6. resume    where the container goes on, on success or failure: restore and unlock, in reverse
 *
 * A repetition after a crash finds its work done by the processes' states. The journal tells who is to get what back when there is no
 * repetition.
 */

export async function findForDump(owner: DeviceOwner): Promise<DeviceDump | undefined> {
  const found = await findGpuProcesses(await (await owner.cgroup()).pids());
  const journal = readJournal(owner);
  if (found.length === 0) {
    if (journal) removeJournal(owner);
    return undefined;
  }
  if (!journal) for (const process of found) await refuseMps(process, owner.what);
  const limits = deadlines();
  const helpers = new HelperKeeper();
  try {
    const names = new Map(found.map(({ pid, comm }) => [pid, `process ${pid} (${comm}) of ${owner.what}`]));
    const means = await chooseMeans(helpers, limits, (pid) => names.get(pid) ?? `process ${pid}`);
    if (means === "criu-plugin") {
      await helpers[Symbol.asyncDispose]();
      return new CriuPluginDump(found);
    }
    const nvml = await askNvml(helpers, limits);
    if (!journal) {
      refuseMig(found, nvml, owner.what);
      refuseShortMemory(found, nvml, owner.what);
    }
    const listed = devicesOf(nvml);
    const devices = listed.length > 0 ? listed : await means.devices();
    return new GpuDump(owner, helpers, means, limits, found, devices, nvml, journal?.processes ?? []);
  } catch (error) {
    await helpers[Symbol.asyncDispose]();
    throw error;
  }
}

/** A process that is a client of the driver, and what has been done to it. */
interface Client extends GpuProcess {
  readonly restoreThread: number;
  readonly before: JournalEntry["before"];
  abandoned?: boolean;
  lockMs?: number;
  checkpointMs?: number;
}

class GpuDump implements DeviceDump {
  readonly withoutCriuPlugins = true;
  readonly #owner: DeviceOwner;
  readonly #helpers: HelperKeeper;
  readonly #means: Means;
  readonly #limits: Deadlines;
  readonly #found: readonly GpuProcess[];
  readonly #devices: readonly GpuDevice[];
  readonly #nvml: NvmlAnswer;
  readonly #earlier: readonly JournalEntry[];
  readonly #back = new Map<number, BackTimes>();
  #clients: Client[] = [];
  /** something may have to be given back */
  #touched: boolean;
  #resumed = false;

  constructor(
    owner: DeviceOwner,
    helpers: HelperKeeper,
    means: Means,
    limits: Deadlines,
    found: readonly GpuProcess[],
    devices: readonly GpuDevice[],
    nvml: NvmlAnswer,
    earlier: readonly JournalEntry[],
  ) {
    this.#owner = owner;
    this.#helpers = helpers;
    this.#means = means;
    this.#limits = limits;
    this.#found = found;
    this.#devices = devices;
    this.#nvml = nvml;
    this.#earlier = earlier;
    this.#touched = earlier.length > 0;
  }

  get devices(): string[] {
    return [...new Set(this.#found.flatMap(({ devices }) => devices))];
  }

  async lock(): Promise<void> {
    if (this.#owner.hasEnded) return;
    await this.#whileRunning(async () => {
      this.#clients = await this.#confirm();
      if (this.#clients.length === 0) return;
      await refuseUncheckpointable(this.#clients, this.#owner.what, this.#owner.log);
      writeJournal(this.#owner, (await this.#owner.cgroup()).toJSON(), this.#clients);
      this.#touched = true;
      await this.#lockAll();
    });
  }

  /** Who is a client of the driver, and in what state. */
  async #confirm(): Promise<Client[]> {
    const found = await findGpuProcesses(await (await this.#owner.cgroup()).pids()); // some may have come since the first look
    const clients = await Promise.all(
      found.map(async (process) => {
        const restoreThread = await this.#means.restoreThread(process.pid);
        if (restoreThread === undefined) return undefined; // it has the library, but has not begun to use it
        const before = this.#before(process, await this.#means.state(process.pid));
        return { ...process, restoreThread, before };
      }),
    );
    return clients.filter((client) => client !== undefined);
  }

  #before({ pid, comm, startTime }: GpuProcess, state: ProcessStateName): JournalEntry["before"] {
    const earlier = this.#earlier.find((entry) => entry.pid === pid && entry.startTime === startTime);
    if (earlier) return earlier.before;
    const name = `process ${pid} (${comm}) of ${this.#owner.what}`;
    if (state === "failed")
      throw new WrongState(
        `the GPU state of ${name} is marked as failed by the driver: it can only be ended`,
      );
    if (state === "busy") throw new WrongState(`somebody else is moving the GPU state of ${name}`);
    return state;
  }

  /** All at once: those that wait for each other's GPU work come to an end only together. */
  async #lockAll(): Promise<void> {
    const until = performance.now() + this.#limits.lock;
    const states = await Promise.all(this.#clients.map(({ pid }) => this.#means.state(pid)));
    const running = this.#clients.filter((_client, at) => states[at] === "running");
    await using _held = await holdAtBoundary(running, this.#limits.lock / 2, this.#owner.log);
    await this.#each("lockMs", async ({ pid }) => {
      if ((await this.#means.state(pid)) !== "running") return; // before us, or by a cedanad before us
      const leftMs = Math.max(1, Math.round(until - performance.now()));
      await reach(this.#means, pid, "locked", this.#means.lock(pid, leftMs));
    });
    // Those that a cedanad before us had locked may still be held by it.
    if (this.#earlier.length > 0) await letCallsIn(this.#clients);
  }

  async checkpoint(): Promise<void> {
    if (this.#owner.hasEnded || this.#clients.length === 0) return;
    const cgroup = await this.#owner.cgroup();
    await this.#refuseNewcomers(await cgroup.pids());
    let failure: unknown;
    try {
      const free = new Map(this.#clients.map(({ pid, restoreThread }) => [pid, restoreThread]));
      const all = (await cgroup.pids()).map((pid) => ({ pid, restoreThread: free.get(pid) }));
      await holdThreads(this.#helpers, this.#limits, all);
      await cgroup.thaw();
      await waitUntilHeld(this.#helpers, this.#limits, this.#owner.what);
      await this.#each("checkpointMs", async ({ pid }) => {
        if ((await this.#means.state(pid)) === "checkpointed") return;
        await reach(this.#means, pid, "checkpointed", this.#means.checkpoint(pid));
      });
    } catch (error) {
      failure = error;
    }
    // In this order nobody runs in between. A helper that was ended has let go of them already.
    try {
      await cgroup.freeze();
      await releaseThreads(this.#helpers, this.#limits);
    } catch (error) {
      failure ??= error;
    }
    if (failure) throw failure;
  }

  /** A process that has begun to use a GPU since we asked is not locked, and now it is frozen: nobody can ask it any more. */
  async #refuseNewcomers(pids: readonly number[]): Promise<void> {
    const known = new Set(this.#clients.map(({ pid }) => pid));
    const newcomer = (await findGpuProcesses(pids)).find(
      ({ pid, devices }) => devices.length > 0 && !known.has(pid),
    );
    if (newcomer)
      throw new WrongState(
        `process ${newcomer.pid} (${newcomer.comm}) of ${this.#owner.what} has begun to use a GPU in the middle of the checkpoint: try again`,
      );
  }

  /** Does something to every client at once. @throws all that failed, in one error of the first one's class */
  async #each(time: "lockMs" | "checkpointMs", work: (client: Client) => Promise<void>): Promise<void> {
    const results = await Promise.allSettled(
      this.#clients.map(async (client) => {
        const since = performance.now();
        await work(client).catch((error) => {
          client.abandoned = true; // the driver's answer, or none: asking again is sure
          throw error;
        });
        client[time] = hundredths(performance.now() - since);
      }),
    );
    const errors = results.flatMap((result) =>
      result.status === "rejected" ? [result.reason as Error] : [],
    );
    const [first] = errors;
    if (first === undefined) return;
    if (errors.length === 1 || !(first instanceof CedanaError)) throw first;
    const Type = first.constructor as new (message: string, options: ErrorOptions) => Error;
    throw new Type([...new Set(errors.map(messageOf))].join("; "), { cause: first });
  }

  async resume(): Promise<void> {
    if (!this.#touched || this.#owner.hasEnded) return;
    const entries =
      this.#clients.length > 0
        ? this.#clients
        : this.#earlier.map((entry) => ({ ...entry, abandoned: true }));
    const failures: string[] = [];
    await this.#whileRunning(async () => {
      failures.push(...(await giveBack(this.#means, entries, this.#back)));
    });
    if (failures.length > 0)
      throw new CedanaError(
        `processes of ${this.#owner.what} did not get their GPU back, which is tried again in the background: ${failures.join("; ")}`,
      );
    this.#resumed = true;
  }

  /** A container that its owner has paused runs for the moment. */
  async #whileRunning(work: () => Promise<void>): Promise<void> {
    const cgroup = await this.#owner.cgroup();
    if (await cgroup.isFrozen()) await cgroup.thaw();
    try {
      await work();
    } finally {
      if (this.#owner.paused && !this.#owner.hasEnded) await cgroup.freeze();
    }
  }

  facts(earlier?: GpuFacts): GpuFacts | undefined {
    if (earlier && this.#clients.length === 0) {
      const pids = new Map(this.#found.map(({ pid, pidInContainer }) => [pidInContainer, pid]));
      const withTimes = earlier.processes.map((process) => ({
        ...process,
        times: { ...process.times, ...this.#back.get(pids.get(process.pidInContainer) ?? 0) },
      }));
      return { ...earlier, processes: withTimes };
    }
    if (this.#clients.length === 0) return undefined;
    const { driverVersion } = this.#means;
    return {
      means: this.#means.name,
      ...(driverVersion !== undefined && { driverVersion }),
      ...(this.#nvml.error === undefined && { driver: this.#nvml.driver }),
      devices: this.#devices.map(({ uuid, name, memoryBytes }) => ({ uuid, name, memoryBytes })),
      processes: this.#clients.map((client) => {
        const { pid, pidInContainer, comm, before, restoreThread, lockMs, checkpointMs } = client;
        const tidInContainer = pidsInNamespaces(restoreThread).at(-1);
        const use = useOf(pid, this.#nvml);
        return {
          pidInContainer,
          comm,
          before,
          ...(tidInContainer !== undefined && { restoreThread: tidInContainer }),
          ...(use && { devices: use.uuids }),
          ...(use?.bytes !== undefined && { memoryBytes: use.bytes }),
          times: {
            ...(lockMs !== undefined && { lockMs }),
            ...(checkpointMs !== undefined && { checkpointMs }),
            ...this.#back.get(pid),
          },
        };
      }),
    };
  }

  async close(): Promise<void> {
    await this.#helpers[Symbol.asyncDispose]();
    if (!this.#touched) return;
    const entries = this.#clients.length > 0 ? this.#clients : this.#earlier;
    if (this.#resumed || !entries.some(({ pid, startTime }) => isAlive(pid, startTime)))
      removeJournal(this.#owner);
    else recoverInBackground(this.#owner);
  }
}

/** CRIU does it all, by its own plugin. */
class CriuPluginDump implements DeviceDump {
  readonly withoutCriuPlugins = false;
  readonly #means = "criu-plugin";
  readonly #found: readonly GpuProcess[];

  constructor(found: readonly GpuProcess[]) {
    this.#found = found;
  }
  get devices(): string[] {
    return [...new Set(this.#found.flatMap(({ devices }) => devices))];
  }
  async lock(): Promise<void> {}
  async checkpoint(): Promise<void> {}
  async resume(): Promise<void> {}
  facts(): GpuFacts {
    return { means: this.#means, devices: [], processes: [] };
  }
  async close(): Promise<void> {}
}

/** What NVML says that a process has on the devices; undefined when it doesn't know the process. It may not know how much. */
function useOf(pid: number, nvml: NvmlAnswer): { uuids: string[]; bytes?: number } | undefined {
  if (nvml.error !== undefined) return undefined;
  const used = nvml.devices.flatMap(({ uuid, processes }) =>
    processes.filter((process) => process.pid === pid).map(({ usedBytes }) => ({ uuid, usedBytes })),
  );
  if (used.length === 0) return undefined;
  const isKnown = used.every(({ usedBytes }) => usedBytes !== undefined);
  return {
    uuids: used.map(({ uuid }) => uuid.replace(/^GPU-/, "").replaceAll("-", "")),
    ...(isKnown && { bytes: used.reduce((sum, { usedBytes = 0 }) => sum + usedBytes, 0) }),
  };
}

function refuseMig(found: readonly GpuProcess[], nvml: NvmlAnswer, what: string): void {
  if (nvml.error !== undefined) return;
  const pids = new Set(found.map(({ pid }) => pid));
  const divided = nvml.devices.find(
    ({ migMode, processes }) => migMode === 1 && processes.some(({ pid }) => pids.has(pid)),
  );
  if (divided)
    throw new Unsupported(
      `${what} uses ${divided.uuid}, which is divided into instances (MIG): the driver can't checkpoint these; run it on a whole GPU`,
    );
}

/** GPU memory goes to host memory for the time of the dump. */
function refuseShortMemory(found: readonly GpuProcess[], nvml: NvmlAnswer, what: string): void {
  const needed = found.reduce((sum, { pid }) => sum + (useOf(pid, nvml)?.bytes ?? 0), 0);
  const free = availableMemory();
  if (needed > free)
    throw new ResourceExhausted(
      `${what} uses ${mib(needed)} MiB of GPU memory, which must fit into host memory for a checkpoint: ${mib(free)} MiB are available`,
    );
}

const mib = (bytes: number) => Math.ceil(bytes / 2 ** 20);
