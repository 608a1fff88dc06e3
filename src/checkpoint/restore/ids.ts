import { setTimeout as sleep } from "node:timers/promises";
import type { Logger } from "pino";
import { askPidNamespace, holdersOf, type PidNamespaceState } from "../../linux/pid-namespace.ts";
import { type Finding, Found } from "../finding.ts";

/*
 * Processes come back with the ids that they had, and in a pid namespace that a container shares (a pod's, another container's, the host's)
 * somebody else may have one. Two things help: nobody gets one from now on, for the kernel is made to go on with other ids, which CRIU's
 * own helpers and its neighbours' new processes get; and who has one for a moment, as a probe that runs in the pod or a container's init before
 * its program, is waited for. What stays is refused before anything is made.
 */

/** A pid namespace that others live in. */
export interface SharedPids {
  /** its path: /proc/PID/ns/pid, or where it is mounted */
  readonly path: string;
  /** our native program */
  readonly program: string;
}

/** How long short-lived processes may have the ids. */
const PATIENCE_MS = 3_000;
const LONGEST_PAUSE_MS = 100;
/** the kernel doesn't give lower ones in order again, and CRIU takes the next ones for helpers in a session whose first process has ended */
const RESERVED_IDS = 300;
/** how many processes may be started, by whomever, until CRIU has made its own; a quarter of all ids where there are few */
const ROOM = 4096;
const MAX_NAMED = 5;

/**
 * Sees to it that ids are free and stay so.
 * @param ids  ascending
 * @returns what keeps CRIU from making them; nothing where that can't be found out: then CRIU's try tells
 */
export async function freeIds(
  ids: readonly number[],
  shared: SharedPids,
  log: Pick<Logger, "info" | "warn">,
): Promise<Finding[]> {
  const found = new Found("container");
  const state = await waitForIds(ids, shared, log).catch((error) => {
    const what = "which process ids are taken can't be found out; restored all the same";
    log.warn({ err: error, pidNamespace: shared.path }, what);
  });
  if (!state) return [];
  const { max, taken } = state;
  const beyond = ids.filter((id) => id >= max);
  if (beyond.length > 0)
    found.error(
      "pid",
      `it has process ids up to ${beyond.at(-1)}, and the pid namespace that the container shares has none from ${max} on: raise kernel.pid_max`,
    );
  if (taken.length > 0) found.error("pid", await sayWho(shared.path, taken));
  return found.list;
}

async function waitForIds(
  ids: readonly number[],
  { path, program }: SharedPids,
  log: Pick<Logger, "info">,
): Promise<PidNamespaceState> {
  const deadline = performance.now() + PATIENCE_MS;
  for (let pause = 10; ; pause = Math.min(2 * pause, LONGEST_PAUSE_MS)) {
    let state = await askPidNamespace(program, path, ids);
    const last = lastBefore(ids, state);
    if (last !== undefined) state = await askPidNamespace(program, path, ids, last);
    if (state.taken.length === 0 || performance.now() >= deadline) return state;
    if (pause === 10)
      log.info(
        { pidNamespace: path, ids: state.taken.slice(0, MAX_NAMED) },
        "waits for process ids that are taken",
      );
    await sleep(pause);
  }
}

/**
 * After which id the kernel is to go on, so that it doesn't come to these: at the beginning of the largest gap between them. Ids come from
 * a checkpoint, whatever they are.
 * @param ids  ascending
 * @returns undefined where it has room enough as it is
 */
export function lastBefore(
  ids: readonly number[],
  { last, max }: Pick<PidNamespaceState, "last" | "max">,
): number | undefined {
  const within = ids.filter((id) => id < max);
  const next = within.find((id) => id > last) ?? max;
  if (last >= RESERVED_IDS && next - last > Math.min(ROOM, max / 4)) return undefined;
  const lowest = RESERVED_IDS + ids.length;
  const starts = [lowest, ...within.filter((id) => id > lowest)];
  const gaps = starts.map((start, index) => ({ start, size: (starts[index + 1] ?? max) - start }));
  const { start, size } = gaps.reduce((best, gap) => (gap.size > best.size ? gap : best));
  return size > 1 ? start : undefined;
}

/** @param taken  at least one */
async function sayWho(namespace: string, taken: readonly number[]): Promise<string> {
  const holders = await holdersOf(namespace, taken);
  const named = taken
    .slice(0, MAX_NAMED)
    .map((id) => `${id} by ${holders.get(id) ?? "somebody who can't be seen from here"}`);
  if (taken.length > named.length) named.push(`and ${taken.length - named.length} more`);
  return `process ids of the checkpoint are taken in the pid namespace that the container shares: ${named.join(", ")}. Restore it where they are free (another pod, or a pid namespace of its own), or end who has them`;
}
