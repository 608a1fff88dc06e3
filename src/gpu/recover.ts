import { setTimeout as sleep } from "node:timers/promises";
import type { DeviceOwner } from "../checkpoint/device-slot.ts";
import { messageOf, NotFound, WrongState } from "../errors/index.ts";
import { Cgroup } from "../linux/cgroup.ts";
import { isAlive, tracerPid } from "../linux/proc.ts";
import { giveBack } from "./back.ts";
import { deadlines } from "./deadlines.ts";
import { hasJournal, journals, readJournal, removeJournal } from "./journal.ts";
import { chooseMeans, HelperKeeper } from "./means.ts";
import { recovering } from "./recovering.ts";

/*
 * What a dump that was cut off has left locked or checkpointed is given back, as soon as nobody holds it: an engine that still works goes on
 * first. It is tried again, ever more slowly, as long as a process of the journal lives.
 */

const FIRST_PAUSE_MS = 100;
const LAST_PAUSE_MS = 30_000;
/** How long a new dump waits for it. */
const PATIENCE_MS = 10_000;

export function recoverInBackground(owner: DeviceOwner): void {
  if (recovering.has(owner.initPid) || !hasJournal(owner)) return;
  const work = recover(owner).finally(() => recovering.delete(owner.initPid));
  recovering.set(owner.initPid, work);
  work.catch((error) => owner.log.error({ err: error, what: owner.what }, "give processes their GPU back"));
}

/** @throws WrongState when what an earlier dump left can't be given back now */
export async function waitForRecovery(owner: DeviceOwner): Promise<void> {
  const work = recovering.get(owner.initPid);
  if (!work) return;
  const late = sleep(PATIENCE_MS, "late", { ref: false });
  if ((await Promise.race([work.catch(() => undefined), late])) === "late")
    throw new WrongState(
      `processes of ${owner.what} have not got their GPU back since an earlier checkpoint failed; it is being tried`,
    );
}

/** By what the journals say of their owners, whose directories begin with `directories`. */
export function recoverAll(directories: string, log: DeviceOwner["log"]): void {
  for (const { what, initPid, directory, paused, cgroup } of journals()) {
    if (!directory.startsWith(directories)) continue;
    recoverInBackground({
      what,
      initPid,
      directory,
      paused,
      log,
      get hasEnded() {
        return !isAlive(initPid);
      },
      cgroup: async () => Cgroup.fromPaths(cgroup),
    });
  }
}

async function recover(owner: DeviceOwner): Promise<void> {
  for (let pauseMs = FIRST_PAUSE_MS; ; pauseMs = Math.min(2 * pauseMs, LAST_PAUSE_MS)) {
    const journal = readJournal(owner);
    if (!journal || journal.processes.length === 0 || owner.hasEnded) break;
    const processes = journal.processes.map((entry) => ({ ...entry, abandoned: true }));
    const failures = await attempt(owner, processes);
    if (failures.length === 0) {
      const pids = journal.processes.map(({ pid }) => pid);
      owner.log.warn(
        { what: owner.what, pids },
        "gave processes their GPU back after a dump that was cut off",
      );
      break;
    }
    owner.log.error({ what: owner.what, failures }, "processes have not got their GPU back yet");
    await sleep(pauseMs, undefined, { ref: false });
  }
  removeJournal(owner);
}

async function attempt(
  owner: DeviceOwner,
  processes: NonNullable<ReturnType<typeof readJournal>>["processes"],
): Promise<string[]> {
  const held = processes.find(({ pid }) => (tracerPid(pid) ?? 0) !== 0);
  if (held) return [`process ${held.pid} (${held.comm}) is held by a dump that is still at work`];
  await using helpers = new HelperKeeper();
  try {
    const names = new Map(processes.map(({ pid, comm }) => [pid, `process ${pid} (${comm})`]));
    const means = await chooseMeans(helpers, deadlines(), (pid) => names.get(pid) ?? `process ${pid}`);
    if (means === "criu-plugin") return []; // it was not we who locked them
    const cgroup = await owner.cgroup();
    if (await cgroup.isFrozen()) await cgroup.thaw();
    try {
      return await giveBack(means, processes);
    } finally {
      if (owner.paused && !owner.hasEnded) await cgroup.freeze();
    }
  } catch (error) {
    if (error instanceof NotFound) return []; // its cgroup has gone, and with it all in it
    return [messageOf(error)];
  }
}
