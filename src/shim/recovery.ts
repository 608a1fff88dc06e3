import { existsSync } from "node:fs";
import { rm } from "node:fs/promises";
import { join } from "node:path";
import { deviceSlot } from "../checkpoint/device-slot.ts";
import { freezeMarker, hookNote, thawNoted } from "../checkpoint/freeze-marker.ts";
import { TRIGGERED_DIRECTORY } from "./journal.ts";
import type { Task } from "./task.ts";

/*
 * What a cedanad that ended in the middle of a dump has left behind. A call of containerd's that was open is repeated by the keeper, and
 * its dump goes on by itself (src/checkpoint/dump.ts). Here is the rest: checkpoints that nobody repeats, and containers that nobody would
 * let run again.
 */

/**
 * Goes on with a checkpoint that the cedanad before us took of its own will, before any call of containerd's changes the container.
 */
export function resumeCheckpoint(task: Task): void {
  let resumed: Promise<void> | undefined;
  if (existsSync(join(task.bundle, TRIGGERED_DIRECTORY))) {
    const turn = Promise.withResolvers<void>();
    void task.init.inTurn(() => turn.promise);
    resumed = import("./triggered.ts")
      .then(({ resumeCheckpoint }) => resumeCheckpoint(task, turn.resolve))
      .finally(turn.resolve);
  }
  if (!task.init.exit) task.signals.ending.resume(resumed);
}

/** A container must not stay as a dump needed it whose caller has gone: frozen, or running for a hook, or with its GPU held. */
export async function undoLeftovers(task: Task): Promise<void> {
  await pauseAfterHook(task);
  recoverDevices(task);
  await thaw(task);
}

/** A paused container ran for the hook of a dump: what its owner has paused must not go on. */
async function pauseAfterHook(task: Task): Promise<void> {
  const { bundle, init, log } = task;
  const note = hookNote(bundle);
  if (!existsSync(note)) return;
  try {
    if (init.state === "paused" && !init.exit) await (await task.cgroup()).freeze();
    await rm(note, { force: true });
  } catch (error) {
    log.error({ err: error }, "pause a container again that ran for its hook when cedanad ended");
  }
}

function recoverDevices(task: Task): void {
  const { id, bundle, init, log } = task;
  if (init.pid === 0 || init.exit) return;
  deviceSlot()?.recover({
    what: `task ${id}`,
    initPid: init.pid,
    directory: bundle,
    log,
    cgroup: () => task.cgroup(),
    get paused() {
      return init.state === "paused";
    },
    get hasEnded() {
      return init.exit !== undefined;
    },
  });
}

async function thaw(task: Task): Promise<void> {
  const { bundle, init, log } = task;
  const marker = freezeMarker(bundle);
  if (!existsSync(marker)) return;
  try {
    if (init.state === "running" && !init.exit) await (await task.cgroup()).thaw();
    else if (init.exit) await thawNoted(bundle);
    await rm(marker, { force: true });
    const { abandonAttempt } = await import("../checkpoint/dump.ts");
    const left = await abandonAttempt(bundle, async () => init.exit !== undefined, log);
    if (left) log.warn(left, "the container has ended with a dump that a crash cut off");
    log.warn("thawed: it had been frozen for a dump that a crash cut off");
  } catch (error) {
    log.error({ err: error }, "thaw a container that a dump cut off by a crash had frozen");
  }
}
