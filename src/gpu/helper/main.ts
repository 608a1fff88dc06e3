import { Socket } from "node:net";
import { createInterface } from "node:readline";
import { type CudaDevice, cuda } from "../../linux/cuda.ts";
import { threadsOf } from "../../linux/proc.ts";
import {
  ANSWERS_FD,
  type Coded,
  type HelperAnswer,
  type HelperCall,
  type HelperCalls,
  type HelperRequest,
} from "./messages.ts";

/*
 * The helper process: the only one of ours that loads a GPU driver. It does what it is told, a line of JSON on stdin for each call and one
 * on a descriptor of its own for each answer, and ends when its stdin does, that is with cedanad. A call of the driver that never returns holds a thread of
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
  init: async () => coded(await addon.cudaInit()),
  devices: async () => {
    const found = await addon.cudaDevices();
    if (typeof found === "number") return { ...coded(found), devices: [] };
    return { code: 0, devices: found.map(describe) };
  },
  state: async ({ pid }) => pair(await addon.cudaState(pid)),
  restoreThread: async ({ pid }) => pair(await addon.cudaRestoreThread(pid)),
  lock: async ({ pid, timeoutMs }) => coded(await addon.cudaLock(pid, timeoutMs)),
  checkpoint: async ({ pid }) => coded(await addon.cudaCheckpoint(pid)),
  restore: async ({ pid, pairs }) =>
    coded(await addon.cudaRestore(pid, Buffer.from(pairs.flat().join(""), "hex"))),
  unlock: async ({ pid }) => coded(await addon.cudaUnlock(pid)),
  nvml: ({ path }) => addon.nvmlQuery(path),
  holdThreads: async ({ pid, except }) => {
    const before = held.size;
    // A frozen process makes no threads; one that isn't may, until the list has nothing new.
    for (let found = true; found; ) {
      found = false;
      for (const tid of threadsOf(pid)) {
        if (tid === except || held.has(tid)) continue;
        try {
          addon.ptraceSeize(tid);
          held.add(tid);
          addon.ptraceInterrupt(tid);
        } catch (error) {
          if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
          held.delete(tid); // it has ended
          continue;
        }
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

function coded(code: number): Coded {
  return code === 0 ? { code } : { code, name: addon.cudaErrorName(code) };
}

function pair([code, value]: [number, number]) {
  return { ...coded(code), value };
}

const answers = new Socket({ fd: ANSWERS_FD });
answers.on("error", () => {}); // EPIPE: cedanad has ended, which stdin tells, too

function answer(message: HelperAnswer): void {
  answers.write(`${JSON.stringify(message)}\n`);
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
