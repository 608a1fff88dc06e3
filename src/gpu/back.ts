import { messageOf, WrongState } from "../errors/index.ts";
import { isAlive } from "../linux/proc.ts";
import type { ProcessStateName } from "./codes.ts";
import { StuckCall } from "./helper.ts";
import { letCallsIn } from "./interception.ts";
import type { JournalEntry } from "./journal.ts";
import type { Means } from "./means.ts";

/** What giving back took, milliseconds. */
export interface BackTimes {
  restoreMs?: number;
  unlockMs?: number;
}

/**
 * Gives processes back what they had: all are restored first, then all go on, the last one first, each to the state it had. Every one is tried,
 * whatever the others do.
 * @returns what didn't work, a sentence for each process
 */
export async function giveBack(
  means: Means,
  processes: readonly JournalEntry[],
  times: Map<number, BackTimes> = new Map(),
): Promise<string[]> {
  const failures: string[] = [];
  const reversed = [...processes].reverse();
  const failed = new Set<number>();
  const attempt = async (
    { pid, startTime, comm }: JournalEntry,
    what: keyof BackTimes | undefined,
    work: () => Promise<boolean>,
  ) => {
    if (failed.has(pid) || !isAlive(pid, startTime)) return;
    const since = performance.now();
    try {
      const did = await work();
      if (did && what) times.set(pid, { ...times.get(pid), [what]: hundredths(performance.now() - since) });
    } catch (error) {
      if (!isAlive(pid, startTime)) return; // it has ended: that is another matter
      failed.add(pid);
      failures.push(`process ${pid} (${comm}): ${messageOf(error)}`);
    }
  };
  for (const process of reversed)
    if (process.abandoned) await attempt(process, undefined, () => settle(means, process));
  for (const process of reversed)
    await attempt(process, "restoreMs", async () => {
      const { pid, before } = process;
      const state = await means.state(pid);
      if (state === "failed")
        throw new Error(
          "the driver has marked it as failed: its GPU state is lost, and it can only be ended",
        );
      if (state === "busy") throw new Error("a driver's call is still at work on it");
      if (state !== "checkpointed" || before === "checkpointed") return false;
      await reach(means, pid, "locked", means.restore(pid, []));
      return true;
    });
  for (const process of reversed)
    await attempt(process, "unlockMs", async () => {
      const { pid, before } = process;
      if (before !== "running" || (await means.state(pid)) !== "locked") return false;
      await reach(means, pid, "running", means.unlock(pid));
      return true;
    });
  await letCallsIn(processes.filter(({ abandoned }) => abandoned));
  return failures;
}

/**
 * The driver does one call after another, so that when this one has returned, an abandoned one has, too. It is one that changes nothing, or
 * what is to be changed anyway.
 */
async function settle(means: Means, { pid, before }: JournalEntry): Promise<boolean> {
  await (before === "running" ? means.unlock(pid) : means.lock(pid, 1)).catch((error) => {
    if (!(error instanceof WrongState)) throw error; // what it says of a state that needs none of it
  });
  return true;
}

/**
 * Waits for a call. One that fails because a call before it, whose caller has died, has just done the work is no failure.
 * @throws what the call throws, when the process is in another state than was wanted
 */
export async function reach(
  means: Means,
  pid: number,
  wanted: ProcessStateName,
  call: Promise<void>,
): Promise<void> {
  try {
    await call;
  } catch (error) {
    if (error instanceof StuckCall || (await means.state(pid).catch(() => undefined)) !== wanted) throw error;
  }
}

export const hundredths = (ms: number) => Math.round(ms * 100) / 100;
