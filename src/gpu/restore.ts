import type { DeviceRestore, RestoreWithDevice } from "../checkpoint/device-slot.ts";
import type { GpuFacts } from "../checkpoint/manifest.ts";
import { CedanaError, messageOf, Unsupported } from "../errors/index.ts";
import { isAlive, pidsInNamespaces, processStat, threadsOf } from "../linux/proc.ts";
import { hundredths, reach } from "./back.ts";
import { type Deadlines, deadlines } from "./deadlines.ts";
import { mapDevices } from "./device-map.ts";
import { holdThreads, releaseThreads, waitUntilHeld } from "./hold.ts";
import { chooseMeans, criuPlugin, HelperKeeper, type Means } from "./means.ts";
import { askNvml, devicesOf } from "./nvml.ts";
import { describeProcess } from "./processes.ts";

/*
 * The GPU's part of a restore. CRIU makes the processes with what the driver had put into their memory, checkpointed; they run, and wait at
 * their next call of the driver. All of them get their GPUs, then all go on, and only then is anybody told that the container runs.
 */

export async function prepareRestore(target: RestoreWithDevice, facts: GpuFacts): Promise<DeviceRestore> {
  if (facts.means === "criu-plugin") {
    if (criuPlugin() === undefined)
      throw new Unsupported(
        `the checkpoint's GPU state was taken by CRIU's CUDA plugin, which this machine's CRIU doesn't have: install it, or take the checkpoint with a driver of r570 or newer`,
      );
    if (target.deviceMap)
      throw new Unsupported(
        `the checkpoint's GPU state was taken by CRIU's CUDA plugin, which gives processes the GPUs that they had and can't give them other GPUs: restore it without cedana.io/gpu-map`,
      );
    return { withoutCriuPlugins: false, restore: async () => {}, close: async () => {} };
  }
  const limits = deadlines();
  const helpers = new HelperKeeper();
  try {
    const names = new Map<number, string>();
    const means = await chooseMeans(helpers, limits, (pid) => names.get(pid) ?? `process ${pid}`);
    if (means === "criu-plugin")
      throw new Unsupported(
        `the checkpoint's GPU state was taken by the driver; here there is only CRIU's CUDA plugin, which doesn't know of it`,
      );
    const listed = devicesOf(await askNvml(helpers, limits));
    const here = listed.length > 0 ? listed : await means.devices();
    const used = facts.processes.every(({ devices }) => devices !== undefined)
      ? [...new Set(facts.processes.flatMap(({ devices }) => devices ?? []))]
      : undefined;
    if (here.length === 0 && target.deviceMap)
      throw new Unsupported(
        `cedana.io/gpu-map can't be followed: neither NVML nor ${means.name} says which GPUs this machine has`,
      );
    const pairs = here.length > 0 ? mapDevices(facts.devices, here, { map: target.deviceMap, used }) : [];
    return {
      withoutCriuPlugins: true,
      restore: () => restoreAll(target, facts, { means, helpers, limits, pairs, names }),
      close: () => helpers[Symbol.asyncDispose](),
    };
  } catch (error) {
    await helpers[Symbol.asyncDispose]();
    throw error;
  }
}

interface Tools {
  readonly means: Means;
  readonly helpers: HelperKeeper;
  readonly limits: Deadlines;
  readonly pairs: readonly [string, string][];
  /** of processes, for messages */
  readonly names: Map<number, string>;
}

async function restoreAll(target: RestoreWithDevice, facts: GpuFacts, tools: Tools): Promise<void> {
  const { means, pairs, names } = tools;
  const found = await (await target.cgroup()).pids();
  const processes = facts.processes.map((saved) => {
    const numbered = found.filter((one) => describeProcess(one)?.pidInContainer === saved.pidInContainer);
    // In pid namespaces of its own a container has more than one process with a number.
    const pid =
      numbered.length === 1 ? numbered[0] : numbered.find((one) => describeProcess(one)?.comm === saved.comm);
    if (pid === undefined)
      throw new CedanaError(
        `process ${saved.pidInContainer} (${saved.comm}) of ${target.what}, which had a GPU, is not there after the restore`,
      );
    names.set(pid, `process ${pid} (${saved.comm}) of ${target.what}`);
    return { ...saved, pid };
  });
  const times: Record<string, Record<string, number>> = {};
  const each = async (time: string, work: (process: (typeof processes)[number]) => Promise<boolean>) => {
    const results = await Promise.allSettled(
      processes.map(async (process) => {
        const since = performance.now();
        if (!(await work(process))) return;
        times[process.pid] = { ...times[process.pid], [time]: hundredths(performance.now() - since) };
      }),
    );
    const errors = results.flatMap((result) =>
      result.status === "rejected" ? [result.reason as Error] : [],
    );
    if (errors.length > 1)
      throw new CedanaError([...new Set(errors.map(messageOf))].join("; "), { cause: errors[0] });
    if (errors[0]) throw errors[0];
  };
  await using _ = await freeRestoreThreads(target, processes, tools);
  // By their states, so that a repetition after a crash does what is left to do.
  await each("restoreMs", async ({ pid, before }) => {
    if (before === "checkpointed" || (await means.state(pid)) !== "checkpointed") return false;
    await reach(means, pid, "locked", means.restore(pid, pairs));
    return true;
  });
  await each("unlockMs", async ({ pid, before }) => {
    if (before !== "running" || (await means.state(pid)) !== "locked") return false;
    await reach(means, pid, "running", means.unlock(pid));
    return true;
  });
  target.log.info(
    { what: target.what, means: means.name, remapped: pairs.length > 0, times },
    "GPU state restored",
  );
}

/**
 * Where a container is restored at its create, CRIU leaves its processes stopped (SIGSTOP) until its start. The driver needs its thread to
 * run: all others are held, the process is continued for the moment, and stopped again at the end.
 */
async function freeRestoreThreads(
  { what }: RestoreWithDevice,
  processes: readonly { readonly pid: number; readonly restoreThread?: number }[],
  { helpers, limits }: Tools,
): Promise<AsyncDisposable> {
  const stopped = processes.filter(({ pid }) => processStat(pid)?.state === "T");
  if (stopped.length === 0) return { [Symbol.asyncDispose]: async () => {} };
  // The driver isn't asked for it: the process that would answer stands still.
  const withThreads = stopped.map(({ pid, restoreThread }) => ({
    pid,
    restoreThread: threadsOf(pid).find((tid) => pidsInNamespaces(tid).at(-1) === restoreThread),
  }));
  const without = withThreads.find(({ restoreThread }) => restoreThread === undefined);
  if (without)
    throw new CedanaError(
      `process ${without.pid} of ${what} stands still, and its thread that restores its GPU state is not to be found`,
    );
  await holdThreads(helpers, limits, withThreads);
  for (const { pid } of stopped) if (isAlive(pid)) process.kill(pid, "SIGCONT");
  await waitUntilHeld(helpers, limits, what);
  return {
    [Symbol.asyncDispose]: async () => {
      for (const { pid } of stopped) if (isAlive(pid)) process.kill(pid, "SIGSTOP");
      await releaseThreads(helpers, limits);
    },
  };
}
