import { CheckpointStore } from "../checkpoint/store.ts";
import { messageOf } from "../errors/index.ts";
import { readConfiguration } from "../runtime/configuration.ts";
import { cedanaAnnotations, podNamespaceOf } from "../runtime/spec.ts";
import type { Container } from "./container.ts";
import { checkpointNameOf, secretOf, takeCheckpoint } from "./triggered.ts";

/*
 * `cedana.io/checkpoint-every`: a checkpoint of a container again and again, as long as it runs. When the next one is due is reckoned from
 * the last one in the store, so a cedanad that is started anew goes on in the same rhythm. One at a time on the node: each takes a CPU
 * and the disk, and containers that were started together would otherwise all stand still together.
 */

/** A timer of Node's can't wait longer. */
const MAX_WAIT_MS = 2 ** 31 - 1;
/** So much of the interval, and no more than a minute, is left to chance. */
const JITTER = 0.1;
const MAX_JITTER_MS = 60_000;

/** When it became known that a task wants them, milliseconds since 1970; 0: it ran before us, and the last one in the store counts. */
const sinceMs = new WeakMap<Container, number>();
let lastInLine: Promise<void> = Promise.resolve();

/**
 * For a task that has begun to run, or was found running. Does nothing without the annotation; what is wrong is in the task's log.
 * @param revived  it has begun under a cedanad before us
 */
export async function scheduleCheckpoints(task: Container, revived: boolean): Promise<void> {
  if (sinceMs.has(task)) return;
  sinceMs.set(task, revived ? 0 : Date.now());
  try {
    await waitForNext(task);
  } catch (error) {
    task.log.error({ err: error }, "cedana.io/checkpoint-every can't be followed");
  }
}

async function waitForNext(task: Container): Promise<void> {
  const plan = await planOf(task);
  if (!plan) return;
  const { everyMs, wait } = plan;
  const jitterMs = Math.random() * Math.min(everyMs * JITTER, MAX_JITTER_MS);
  setTimeout(() => void tick(task), Math.min(wait + jitterMs, MAX_WAIT_MS)).unref();
}

async function planOf(task: Container): Promise<{ everyMs: number; wait: number } | undefined> {
  const spec = await task.spec();
  const { checkpoints, annotations } = await readConfiguration();
  const { checkpointEveryMs } = cedanaAnnotations(spec, { denied: annotations.deny });
  if (checkpointEveryMs === undefined) return undefined;
  const everyMs = Math.max(checkpointEveryMs, checkpoints.shortestIntervalMs);
  const owner = { namespace: task.namespace, podNamespace: podNamespaceOf(spec) };
  const [last] = (
    await new CheckpointStore(checkpoints.directory).generations(owner, checkpointNameOf(task, spec))
  ).slice(-1);
  const lastMs = Math.max(last ? timeOf(last.generation) : 0, sinceMs.get(task) ?? 0) || Date.now();
  sinceMs.set(task, lastMs);
  return { everyMs, wait: Math.min(everyMs, Math.max(0, lastMs + everyMs - Date.now())) };
}

/** Of a generation's name: 20261125T191500123Z. */
function timeOf(generation: string): number {
  const [, date, hour, minute, second, ms] = /^(\d{8})T(\d\d)(\d\d)(\d\d)(\d{3})Z/.exec(generation) ?? [];
  const day = date?.replace(/(....)(..)(..)/, "$1-$2-$3");
  return Date.parse(`${day}T${hour}:${minute}:${second}.${ms}Z`);
}

async function tick(task: Container): Promise<void> {
  if (hasGone(task)) return;
  const turn = lastInLine;
  const done = Promise.withResolvers<void>();
  lastInLine = done.promise;
  let failed = false;
  try {
    await turn;
    // Long waits come in pieces; and the line may have been long.
    const plan = await planOf(task);
    if (plan && plan.wait <= plan.everyMs * JITTER && task.init.state === "running") await take(task);
  } catch (error) {
    if (hasGone(task)) return; // in the middle of it
    failed = true;
    task.log.error(
      { err: error },
      `a checkpoint by cedana.io/checkpoint-every failed; the container runs on, and it is tried again: ${messageOf(error)}`,
    );
  } finally {
    done.resolve();
  }
  if (hasGone(task)) return;
  if (failed) {
    const everyMs = (await planOf(task).catch(() => undefined))?.everyMs ?? RETRY_MS;
    setTimeout(() => void tick(task), Math.min(everyMs, MAX_WAIT_MS)).unref();
    return;
  }
  await waitForNext(task).catch((error) =>
    task.log.error({ err: error }, "cedana.io/checkpoint-every can't be followed any more"),
  );
}

/** Where not even the interval can be read. */
const RETRY_MS = 60_000;

function hasGone(task: Container): boolean {
  return task.init.exit !== undefined || task.init.state === "deleted" || !task.pod.keeper.connected;
}

async function take(task: Container): Promise<void> {
  const { checkpoints, annotations } = await readConfiguration();
  const { keepLast } = cedanaAnnotations(await task.spec(), { denied: annotations.deny });
  await takeCheckpoint(task, {
    trigger: "schedule",
    keep: keepLast ?? checkpoints.keepLast,
    compression: checkpoints.compression,
    secret: await secretOf(checkpoints),
  });
}
