import { setTimeout as sleep } from "node:timers/promises";
import { TimedOut } from "../errors/index.ts";
import { isAlive } from "../linux/proc.ts";
import type { Deadlines } from "./deadlines.ts";
import type { HelperKeeper } from "./means.ts";

/** For the threads that are held to come to their stop, once they may run. */
const STOP_MS = 5_000;

/**
 * Holds processes by ptrace(2), all of their threads but the driver's: whatever else keeps them standing can then be taken away. It is the
 * helper that holds them: its end lets go of all.
 * @param processes      pids; the restore thread is the one that stays free, of those that have one
 */
export async function holdThreads(
  helpers: HelperKeeper,
  limits: Deadlines,
  processes: readonly { readonly pid: number; readonly restoreThread?: number | undefined }[],
): Promise<void> {
  for (const { pid, restoreThread } of processes)
    if (isAlive(pid))
      await helpers.helper().call("holdThreads", { pid, except: restoreThread ?? 0 }, limits.ask);
}

/** Waits until all that are held stand by that alone. @throws TimedOut */
export async function waitUntilHeld(helpers: HelperKeeper, limits: Deadlines, what: string): Promise<void> {
  const until = performance.now() + STOP_MS;
  while (!(await helpers.helper().call("heldStopped", {}, limits.ask)).stopped) {
    if (performance.now() > until)
      throw new TimedOut(`threads of ${what} did not stop in ${STOP_MS} ms for the GPU driver`);
    await sleep(1);
  }
}

export async function releaseThreads(helpers: HelperKeeper, limits: Deadlines): Promise<void> {
  await helpers.helper().call("releaseThreads", {}, limits.ask);
}
