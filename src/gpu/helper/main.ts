import { readdirSync } from "node:fs";
import { createInterface } from "node:readline";
import { type CudaDevice, cuda } from "../../linux/cuda.ts";
import type { HelperAnswer, HelperCall, HelperCalls, HelperRequest } from "./messages.ts";

/*
 * The helper process: the only one of ours that loads a GPU driver. It does what it is told, a line of JSON on stdin for each call and one
 * on stdout for each answer, and ends when its stdin does, that is with cedanad. A call of the driver that never returns holds a thread of
 * the pool, not the others' calls; who asked ends the process.
 *
 * Threads that it holds by ptrace(2) are let go by the kernel when it ends, however it ends.
 */

const addon = cuda();
const held = new Set<number>();

const calls: { [C in HelperCall]: (input: HelperCalls[C]["input"]) => Promise<HelperCalls[C]["output"]> } = {
  open: async ({ path }) => {
    const symbols = addon.cudaOpen(path);
    return { symbols, version: symbols.cuDriverGetVersion ? await addon.cudaDriverVersion() : 0 };
  },
  init: async () => ({ code: await addon.cudaInit() }),
  devices: async () => {
    const found = await addon.cudaDevices();
    if (typeof found === "number") return { code: found, devices: [] };
    return { code: 0, devices: found.map(describe) };
  },
  state: async ({ pid }) => pair(await addon.cudaState(pid)),
  restoreThread: async ({ pid }) => pair(await addon.cudaRestoreThread(pid)),
  lock: async ({ pid, timeoutMs }) => ({ code: await addon.cudaLock(pid, timeoutMs) }),
  checkpoint: async ({ pid }) => ({ code: await addon.cudaCheckpoint(pid) }),
  restore: async ({ pid, pairs }) => ({
    code: await addon.cudaRestore(pid, Buffer.from(pairs.flat().join(""), "hex")),
  }),
  unlock: async ({ pid }) => ({ code: await addon.cudaUnlock(pid) }),
  nvml: ({ path }) => addon.nvmlQuery(path),
  holdThreads: async ({ pid, except }) => {
    const before = held.size;
    // A frozen process makes no threads; one that isn't may, until the list has nothing new.
    for (let found = true; found; ) {
      found = false;
      for (const name of readdirSync(`/proc/${pid}/task`)) {
        const tid = Number(name);
        if (tid === except || held.has(tid)) continue;
        addon.ptraceSeize(tid);
        held.add(tid);
        addon.ptraceInterrupt(tid);
        found = true;
      }
    }
    return { held: held.size - before };
  },
  heldStopped: async () => ({ stopped: [...held].every(hasStopped) }),
  releaseThreads: async () => {
    const released = held.size;
    for (const tid of held) {
      try {
        addon.ptraceDetach(tid);
      } catch (error) {
        // It has ended; or it never came to its stop, and only our own end lets it go.
        if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
      }
      held.delete(tid);
      stoppedThreads.delete(tid);
    }
    return { released };
  },
};

const stoppedThreads = new Set<number>();

/** A stop is told once. */
function hasStopped(tid: number): boolean {
  if (stoppedThreads.has(tid)) return true;
  try {
    if (!addon.waitStopped(tid)) return false;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
    held.delete(tid); // it has ended
    return true;
  }
  stoppedThreads.add(tid);
  return true;
}

function describe({ uuid, name, memoryBytes, pciBusId }: CudaDevice) {
  return { uuid: uuid.toString("hex"), name, memoryBytes, pciBusId };
}

function pair([code, value]: [number, number]) {
  return { code, value };
}

function answer(message: HelperAnswer): void {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}

const lines = createInterface({ input: process.stdin });
lines.on("line", (line) => {
  const { id, call, input } = JSON.parse(line) as HelperRequest;
  const handler = calls[call] as (input: unknown) => Promise<unknown>;
  void (async () => {
    try {
      answer({ id, output: await handler(input) });
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      answer({ id, error: (error as Error).message, ...(code !== undefined && { code }) });
    }
  })();
});
// With a call in the driver that doesn't return, an orderly end would wait for it.
lines.on("close", () => process.kill(process.pid, "SIGKILL"));
