import { setTimeout as sleep } from "node:timers/promises";
import { NotFound, Unsupported } from "../../errors/index.ts";
import { kcmp } from "../../linux/addon.ts";
import { Cgroup } from "../../linux/cgroup.ts";
import { hostCgroupVersion } from "../../linux/cgroup-hierarchy.ts";
import type { AnyNamespaceKind, ProcessInventory } from "../../linux/inventory.ts";
import { threadState } from "../../linux/proc.ts";
import type { Context } from "./context.ts";
import { sessionFromOutside } from "./facts.ts";

export function checkTracers(context: Context): void {
  for (const process of context.tree) {
    if (process.status.tracerPid !== 0)
      context.report("process-traced", process, `traced by process ${process.status.tracerPid}`);
    for (const { tid, tracerPid } of process.otherThreads)
      if (tracerPid !== 0)
        context.report("process-traced", process, `thread ${tid} is traced by process ${tracerPid}`);
  }
}

/** A zombie that still has threads. One without waits for its parent, and CRIU dumps it. */
export function checkLeaders(context: Context): void {
  for (const process of context.tree)
    if (process.stat.state === "Z" && process.threads > 1)
      context.report("leader-ended", process, `${process.threads - 1} of its threads run on`);
}

/** Looks between which a process in D state may get on: it does in a millisecond when it reads a disk. */
const looks = 5;
const lookEveryMs = 20;

/** D state is reported only when it lasts, and not of a paused container: Linux shows processes that v1's freezer has frozen so. */
export async function checkUninterruptible(context: Context): Promise<void> {
  let stuck = context.tree.flatMap((process) => [
    ...(process.stat.state === "D" ? [{ process, tid: process.pid }] : []),
    ...process.otherThreads.flatMap(({ tid, state }) => (state === "D" ? [{ process, tid }] : [])),
  ]);
  if (stuck.length === 0 || (await isFrozen(context))) return;
  for (let look = 0; look < looks && stuck.length > 0; look++) {
    await sleep(lookEveryMs);
    stuck = stuck.filter(({ process, tid }) => threadState(process.pid, tid) === "D");
  }
  for (const { process, tid } of stuck) {
    const who = tid === process.pid ? "" : `thread ${tid} is `;
    context.report("process-uninterruptible", process, `${who}in state D for ${looks * lookEveryMs} ms`);
  }
}

/** Only where the engine has CRIU freeze a cgroup of version 1: without a freezer, and with version 2, it is dumped as it is. */
export async function checkStopped(context: Context): Promise<void> {
  const stopped = context.tree.filter((process) => process.stat.state === "T");
  if (context.input.engine !== "runc" || stopped.length === 0 || (await hostCgroupVersion()) !== 1) return;
  for (const process of stopped) context.report("process-stopped", process, "in state T");
}

async function isFrozen({ root }: Context): Promise<boolean> {
  try {
    return await (await Cgroup.of(root!.pid)).isFrozen();
  } catch (err) {
    if (err instanceof NotFound || err instanceof Unsupported) return false; // no cgroup of its own, or no freezer
    throw err;
  }
}

/**
 * Finds processes that share their memory (kcmp(2)). It orders processes, so that each is compared with log2(n) others only.
 */
export async function checkSharedMemory(context: Context): Promise<void> {
  const sorted: ProcessInventory[] = [];
  for (const process of context.tree) {
    if (process.stat.state === "Z" || process.stat.state === "X") continue;
    let [low, high] = [0, sorted.length];
    let twin: ProcessInventory | undefined;
    while (low < high && !twin) {
      const middle = (low + high) >> 1;
      const other = sorted[middle]!;
      const order = compareMemory(process.pid, other.pid);
      if (order === 0) twin = other;
      else if (order === 1) high = middle;
      else low = middle + 1;
    }
    if (twin) context.report("process-shares-memory", process, `shares its memory with process ${twin.pid}`);
    else sorted.splice(low, 0, process);
    const pause = context.breathe();
    if (pause) await pause;
  }
}

function compareMemory(pid: number, other: number): number {
  try {
    return kcmp(pid, other, "memory");
  } catch (err) {
    // ESRCH: one has ended meanwhile. ENOSYS: a kernel without kcmp, with which CRIU says no before all else.
    if (["ESRCH", "ENOSYS"].includes((err as NodeJS.ErrnoException).code ?? "")) return 2;
    throw err;
  }
}

/** Each with the namespace that a process's children will be in, where there is such a thing. */
const singleNamespaces: readonly (readonly [AnyNamespaceKind, AnyNamespaceKind])[] = [
  ["pid", "pid"],
  ["pid_for_children", "pid"],
  ["user", "user"],
  ["uts", "uts"],
  ["ipc", "ipc"],
  ["cgroup", "cgroup"],
  ["time", "time"],
  ["time_for_children", "time"],
];

export function checkNamespaces(context: Context): void {
  const { root, input } = context;
  if (!root) return;
  // runc asks CRIU to leave the network namespace empty (--empty-ns), and then CRIU takes one only.
  const kinds = input.engine === "runc" ? [...singleNamespaces, ["net", "net"] as const] : singleNamespaces;
  for (const process of context.tree) {
    const nested = new Set<AnyNamespaceKind>();
    for (const [kind, rootKind] of kinds) {
      const [inode, rootInode] = [process.namespaces[kind], root.namespaces[rootKind]];
      // A zombie has left its namespaces.
      if (inode !== undefined && rootInode !== undefined && inode !== rootInode) nested.add(rootKind);
    }
    for (const kind of nested) context.report("nested-namespace", process, `${kind} namespace of its own`);
  }
}

export function checkSession(context: Context): void {
  const { root } = context;
  if (root && sessionFromOutside(context))
    context.require(
      "no-session-leader",
      root,
      `session ${root.stat.session || "of another pid namespace"}`,
      context.policy.shellJob === true,
    );
}

export function checkOutside(context: Context): void {
  for (const process of context.outside)
    context.report("left-out", process, `child of process ${process.stat.parentPid}`, String(process.pid));
}
