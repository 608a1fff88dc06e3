import { rmSync } from "node:fs";
import type { Cgroup } from "../../linux/cgroup.ts";
import { hasNetworkSockets } from "../../linux/net.ts";
import { isOlder } from "../../linux/versions.ts";
import { deviceSlot } from "../device-slot.ts";
import { freezeMarker, readFreezeNote, thawNoted, thawWherever, writeFreezeNote } from "../freeze-marker.ts";
import { type DumpContext, noteAttempt } from "./context.ts";

// How a container comes to stand still for its dump, and runs again: its devices, and the freezer.

export async function takeTurn({ target }: DumpContext, next: () => Promise<void>): Promise<void> {
  await (target.inTurn ? target.inTurn(next) : next());
}

// ---- devices ---------------------------------------------------------------------------------------------------------

export async function findDevices(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target } = context;
  if (!target.hasEnded) context.devices = await deviceSlot()?.findForDump(target);
  await using _ = { [Symbol.asyncDispose]: async () => await context.devices?.close() };
  await next();
}

export async function lockDevices(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { devices, attempt, target } = context;
  if (!devices) {
    await next();
    return;
  }
  try {
    if (attempt.gpu === undefined) await devices.lock();
    await next();
  } catch (error) {
    if (!context.ended) {
      const also = await devices.resume().then(
        () => undefined,
        (failure: Error) => failure,
      );
      if (also) {
        target.log.error({ err: also }, "give devices back after a failed dump");
        if (error instanceof Error) error.message += `; ${also.message}`;
      }
    }
    throw error;
  }
  if (context.ended) return; // nobody is left to get them
  await devices.resume();
  if (attempt.gpu) Object.assign(attempt.gpu, devices.facts(attempt.gpu));
}

export async function checkpointDevices(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { devices, attempt } = context;
  if (devices && attempt.gpu === undefined) {
    await devices.checkpoint();
    await noteAttempt(context, { gpu: devices.facts() ?? null });
  }
  await next();
}

// ---- freezer ---------------------------------------------------------------------------------------------------------

export async function freeze(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target } = context;
  if (target.hasEnded) {
    await thawNoted(target.directory); // frozen before a crash, and ended while it was
    await next(); // ended by this dump, before a crash: its end is only to be looked at again
    return;
  }
  const cgroup = await target.cgroup();
  const frozen = !target.paused && context.attempt.phase === "begun" && !(await isDumping(context));
  const since = performance.now();
  if (frozen) {
    noteFreeze(context, cgroup, false);
    await cgroup.freeze(undefined, context.signal);
  }
  context.cgroup = cgroup;
  try {
    await next();
  } finally {
    // CRIU and the engine meddle with the freezer, too: paused if it was, running if it was. What has ended is thawed, too.
    await putFreezerBack(cgroup, target.paused && !context.ended && !target.hasEnded).catch((error) =>
      target.log.warn({ err: error }, "put the freezer back after a dump"),
    );
    if (frozen) context.frozenMs = performance.now() - since;
    rmSync(freezeMarker(target.directory), { force: true });
  }
}

export function noteFreeze({ target, request }: DumpContext, cgroup: Cgroup, dumping: boolean): void {
  writeFreezeNote(target.directory, { key: request.key, dumping, cgroup: cgroup.toJSON() });
}

/**
 * Whether the engine was at work for this request when cedanad ended: it goes on, and the freezer is CRIU's until it is done. CRIU thaws a
 * version 1 cgroup when it holds its processes by ptrace; frozen again, they could not run CRIU's parasite, which then waits for ever.
 */
export async function isDumping({ target, request }: DumpContext): Promise<boolean> {
  if (!request.repeated) return false;
  const note = await readFreezeNote(target.directory); // the crash came before it, or after all
  return note?.key === request.key && note.dumping;
}

async function putFreezerBack(cgroup: Cgroup, paused: boolean): Promise<void> {
  if (!paused) await thawWherever(cgroup);
  else if (!(await cgroup.isFrozen())) await cgroup.freeze();
}

// ---- network ---------------------------------------------------------------------------------------------------------

const NETWORK_LOCK_SKIP_SINCE = "3.18";

export async function detectNetwork(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target } = context;
  const canSkip =
    !target.hasEnded && context.criu !== undefined && !isOlder(context.criu, NETWORK_LOCK_SKIP_SINCE);
  if (canSkip && target.ownNetwork && !hasNetworkSockets(target.initPid)) context.networkLock = "skip";
  await next();
}
