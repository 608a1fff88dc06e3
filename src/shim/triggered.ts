import { randomUUID } from "node:crypto";
import { existsSync } from "node:fs";
import { copyFile, mkdir, readFile, rm, stat } from "node:fs/promises";
import { dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import type { Compression } from "../checkpoint/archive/compressions.ts";
import type { EngineDump } from "../checkpoint/dump/target.ts";
import { abandonAttempt, type DumpOutcome, dump } from "../checkpoint/dump.ts";
import { thawNoted } from "../checkpoint/freeze-marker.ts";
import { MANIFEST_NAME, readManifest } from "../checkpoint/manifest.ts";
import { offerCheckpoint } from "../checkpoint/resume.ts";
import { CheckpointStore, type StoredCheckpoint, type StoreOwner } from "../checkpoint/store.ts";
import { endOfWriters } from "../criu/leftovers.ts";
import { InvalidRequest, NotFound, RuntimeFailed, WrongState } from "../errors/index.ts";
import { startTime } from "../linux/proc.ts";
import { readRecord, writeRecord } from "../linux/record-file.ts";
import { allowedAnnotations } from "../runtime/annotated-checkpoint.ts";
import { checkpointNameOf as nameOf, rootfsOf } from "../runtime/checkpoint-on.ts";
import { type Configuration, readConfiguration } from "../runtime/configuration.ts";
import type { Engine } from "../runtime/engine.ts";
import { cedanaAnnotations, type OciSpec, podNamespaceOf } from "../runtime/spec.ts";
import { dumpTarget, engineCheckpoint, withFeatures } from "./checkpoint.ts";
import type { Container } from "./container.ts";
import { dumpPolicy } from "./criu-policy.ts";
import * as events from "./events.ts";
import { crashIfTold, reachBoundary } from "./fault.ts";
import { TRIGGERED_DIRECTORY } from "./journal.ts";

/*
 * Checkpoints that we take by ourselves, into the store: for `cedana dump` and for `cedana.io/checkpoint-every`. The container stands
 * still for the freezer, the changed files and CRIU; what comes after (digests, syncing, archiving) it doesn't notice.
 *
 * What was asked for lies in the bundle (`cedana-dump/`) until it is done. The next cedanad after a crash goes on with it: the engine may
 * have come to its end meanwhile, without anybody who heard how; CRIU's own files say that.
 */

export interface TriggerRequest {
  trigger: "command" | "schedule" | "signal";
  /** default: what the container's annotation says, else its id, or under Kubernetes POD.CONTAINER */
  name?: string | undefined;
  /** the container ends with the dump */
  exit?: boolean;
  /** the next container of its name may continue from it (src/checkpoint/resume.ts) */
  resumable?: boolean;
  /** one file of what; undefined: a directory */
  compression?: Compression | undefined;
  /** encrypts that file */
  secret?: Uint8Array | undefined;
  /** older checkpoints of the name are removed until so many are left; undefined: none is */
  keep?: number | undefined;
  signal?: AbortSignal;
  onStep?: (step: string) => void;
}

export interface TriggeredCheckpoint extends StoredCheckpoint, Pick<DumpOutcome, "frozenMs" | "times"> {
  owner: StoreOwner;
  /** of the files that its manifest names */
  bytes: number;
  totalMs: number;
  /** older ones, which are gone now */
  pruned: StoredCheckpoint[];
}

/** What is to be done, on disk, for whoever goes on after a crash. */
interface DumpRecord {
  key: string;
  trigger: TriggerRequest["trigger"];
  owner: StoreOwner;
  name: string;
  /** of the store, and of the name in it */
  root: string;
  directory: string;
  generation: string;
  exit: boolean;
  /** the process that has to end before anybody continues from it */
  offer?: { pid: number; startTime: number } | undefined;
  compression?: Compression | undefined;
  /** with a secret that nobody but the caller knows */
  encrypted: boolean;
  keep?: number | undefined;
  /** cedanads that have begun it */
  attempts: number;
}

/** One that takes cedanad along each time is given up. */
const MAX_ATTEMPTS = 3;
const EXIT_AFTER_DUMP_MS = 10_000;
const BUSY_LOOK_MS = 10;

/** Bundles of tasks of which a checkpoint is being taken: a keeper that has come back has another task for the same one. */
const busy = new Set<string>();

/** @throws WrongState for a task that doesn't run, or of which one is being taken; what `dump` throws */
export async function takeCheckpoint(task: Container, request: TriggerRequest): Promise<TriggeredCheckpoint> {
  task.init.check("checkpoint");
  if (request.secret && request.compression === undefined)
    throw new InvalidRequest("only an archive can be encrypted: name a compression, or none for a plain tar");
  return await alone(task, async () => {
    const spec = await task.spec();
    const { checkpoints } = await readConfiguration();
    const owner: StoreOwner = { namespace: task.namespace, podNamespace: podNamespaceOf(spec) };
    const name = request.name || checkpointNameOf(task, spec);
    const store = new CheckpointStore(checkpoints.directory);
    const place = await store.placeFor(owner, name);
    const record: DumpRecord = {
      key: randomUUID(),
      trigger: request.trigger,
      owner,
      name,
      root: store.root,
      directory: dirname(place),
      generation: place.slice(dirname(place).length + 1),
      exit: request.exit ?? false,
      offer: request.resumable ? { pid: task.init.pid, startTime: startTime(task.init.pid) ?? 0 } : undefined,
      compression: request.compression,
      encrypted: request.secret !== undefined,
      keep: request.keep,
      attempts: 1,
    };
    return await finish(task, record, request);
  });
}

/** Instead of a signal that would have ended it: the dump ends it. */
export async function checkpointAtEnd(task: Container, signal: AbortSignal): Promise<void> {
  const spec = await task.spec();
  const asked = await allowedAnnotations(spec);
  const { autoResume, keepLast } = asked?.annotations ?? {};
  while (busy.has(task.bundle)) await sleep(BUSY_LOOK_MS, undefined, { signal }); // it is in the middle of a scheduled one
  await takeCheckpoint(task, {
    trigger: "signal",
    name: autoResume,
    exit: true,
    resumable: autoResume !== undefined,
    keep: keepLast ?? asked?.configuration.checkpoints.keepLast,
    signal,
  });
}

/** What its checkpoints are called, but those of a key. */
export function checkpointNameOf(task: Container, spec: OciSpec): string {
  return nameOf({ ...cedanaAnnotations(spec), autoResume: undefined }, spec, task.id);
}

/** What encrypts the checkpoints that the node takes by itself. */
export async function secretOf({ keyFile }: Configuration["checkpoints"]): Promise<Uint8Array | undefined> {
  return keyFile === undefined ? undefined : await readFile(keyFile);
}

async function alone<T>(task: Container, work: () => Promise<T>): Promise<T> {
  if (busy.has(task.bundle)) throw new WrongState(`a checkpoint of task ${task.id} is being taken already`);
  busy.add(task.bundle);
  try {
    return await work();
  } finally {
    busy.delete(task.bundle);
  }
}

const scratchOf = (task: Container) => join(task.bundle, TRIGGERED_DIRECTORY);
const recordFile = (task: Container) => join(scratchOf(task), "request.json");

/**
 * After a crash: goes on with what the cedanad before us was at. Logs how it ended.
 * @param onDumped  the container is no longer needed: from here on other calls may change it
 */
export async function resumeCheckpoint(task: Container, onDumped: () => void): Promise<void> {
  while (busy.has(task.bundle)) await sleep(BUSY_LOOK_MS); // whose keeper had gone: it undoes what it can
  await alone(task, async () => {
    try {
      const record = await readRecord<DumpRecord>(recordFile(task));
      if (!record) {
        await rm(scratchOf(task), { recursive: true, force: true }); // half made: nothing was begun
        return;
      }
      record.attempts += 1;
      if (record.attempts > MAX_ATTEMPTS) {
        await giveUp(task, record);
        return;
      }
      // The node's own key is there still; a caller's went with the cedanad that was told it.
      const secret =
        record.encrypted && record.trigger === "schedule"
          ? await secretOf((await readConfiguration()).checkpoints)
          : undefined;
      const done = await finish(task, record, { trigger: record.trigger, secret }, onDumped);
      task.log.info({ path: done.path }, "finished a checkpoint that a crash of cedanad had cut off");
    } catch (error) {
      task.log.error({ err: error }, "a checkpoint that a crash of cedanad had cut off came to nothing");
    }
  });
}

/**
 * From wherever it stands to its end. What ends the container keeps everybody else waiting until it is whole.
 * @param resumed  after a crash, where the caller has the turn: called when it isn't needed any more
 */
async function finish(
  task: Container,
  record: DumpRecord,
  request: TriggerRequest,
  resumed?: () => void,
): Promise<TriggeredCheckpoint> {
  const startedAt = performance.now();
  const scratch = scratchOf(task);
  await mkdir(scratch, { recursive: true, mode: 0o700 });
  await writeRecord(recordFile(task), record);
  const path = join(record.directory, record.generation);
  try {
    let outcome: DumpOutcome = { path, times: {}, frozenMs: 0 };
    if (!(resumed && existsSync(join(path, MANIFEST_NAME)))) {
      const take = () => dumpInto(task, record, request, resumed !== undefined);
      outcome = await (record.exit && !resumed ? task.init.inTurn(take) : take());
    }
    resumed?.();
    if (record.offer) await offerCheckpoint(path, record.offer);
    boundary("archive", request);
    try {
      await archive(path, record, request, task);
    } catch (error) {
      // What wasn't asked for isn't left; the container runs on.
      if (!record.exit) await new CheckpointStore(record.root).remove({ ...record, path });
      throw error;
    }
    boundary("prune", request);
    const pruned = record.keep === undefined ? [] : await prune(record, record.keep);
    boundary("done", request);
    const manifest = await readManifest(path);
    return {
      owner: record.owner,
      name: record.name,
      generation: record.generation,
      path,
      bytes: manifest?.files.reduce((sum, { size }) => sum + size, 0) ?? 0,
      frozenMs: outcome.frozenMs,
      times: outcome.times,
      totalMs: performance.now() - startedAt,
      pruned,
    };
  } catch (error) {
    // The bundle may have gone meanwhile; the error has CRIU's reason.
    await copyFile(join(scratch, "criu-dump.log"), join(task.bundle, "criu-dump.log")).catch(() => undefined);
    throw error;
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
}

function boundary(name: string, { onStep }: TriggerRequest): void {
  onStep?.(name);
  if (reachBoundary) crashIfTold(`triggered.${name}.before`);
}

async function dumpInto(
  task: Container,
  record: DumpRecord,
  request: TriggerRequest,
  repeated: boolean,
): Promise<DumpOutcome> {
  const spec = await task.spec();
  const { checkpoints, annotations } = await readConfiguration();
  const engine = await withFeatures(task);
  const target = dumpTarget(task, spec, engine, {
    directory: scratchOf(task),
    engineCheckpoint: (engineDump) => checkpointOnce(task, engine, engineDump, repeated),
    // With `exit`, and after a crash, we have the turn already.
    ...(!record.exit &&
      !repeated && {
        inTurn: <T>(work: () => Promise<T>) =>
          task.init.inTurn(async () => {
            task.init.check("checkpoint"); // it may have ended while we waited
            return await work();
          }),
      }),
  });
  if (record.exit && !repeated) task.init.check("checkpoint");
  const outcome = await dump(
    target,
    {
      key: record.key,
      repeated,
      place: {
        directory: record.directory,
        generation: record.generation,
        // An archive follows, and the container still has what is in it.
        temporary: record.compression !== undefined && !record.exit,
      },
      leaveRunning: !record.exit,
      policy: dumpPolicy(undefined, spec),
      rootfs: rootfsOf(cedanaAnnotations(spec, { denied: annotations.deny }), checkpoints),
      digests: "afterwards",
      origin: { name: record.name, trigger: record.trigger },
    },
    {
      ...(request.signal && { signal: request.signal }),
      onBoundary: (at) => {
        reachBoundary?.(at);
        const step = /^dump\.(.*)\.before$/.exec(at)?.[1];
        if (step) request.onStep?.(step);
      },
    },
  );
  // The exit of one that a signal has brought here is held until we are done.
  if (record.exit && record.trigger !== "signal")
    await Promise.race([
      task.init.waitForExit(),
      new Promise((resolve) => setTimeout(resolve, EXIT_AFTER_DUMP_MS).unref()),
    ]);
  else if (!record.exit)
    task.publish(`checkpointed:${record.key}`, events.taskCheckpointed(task.id, outcome.path));
  return outcome;
}

// ---- the engine, over crashes ----------------------------------------------------------------------------------------

/** The engine's `checkpoint`; after a crash, the outcome of the one that was started then. @throws RuntimeFailed */
async function checkpointOnce(
  task: Container,
  engine: Engine,
  engineDump: EngineDump,
  repeated: boolean,
): Promise<void> {
  if (repeated) {
    await endOfWriters(engineDump.imagePath);
    // CRIU writes its statistics when it has succeeded, and its log from the beginning on.
    const has = async (name: string) =>
      (await stat(join(engineDump.workPath, name)).catch(() => undefined)) !== undefined;
    if (await has("stats-dump")) return;
    if (await has("dump.log"))
      throw new RuntimeFailed(`checkpoint of ${task.id} failed while cedanad was away`, {});
    // Sent away from the gate with the end of the cedanad that had started it.
    if (engineDump.atGate) throw new RuntimeFailed(`checkpoint of ${task.id} had not begun`, {});
  }
  await engineCheckpoint(task, (step) => task.pod.keeper.ownTag(step), engine, engineDump);
}

/** A dump that took cedanad along again and again: what it left is undone, or finished or kept where it is the container's last. */
async function giveUp(task: Container, record: DumpRecord): Promise<void> {
  const scratch = scratchOf(task);
  const left = await abandonAttempt(scratch, async () => task.init.exit !== undefined, task.log);
  if (task.init.state !== "paused") await thawNoted(scratch);
  await rm(scratch, { recursive: true, force: true });
  task.log.error(
    { checkpoint: record.name, ...left },
    `cedanad ended ${MAX_ATTEMPTS} times while it took a checkpoint: given up`,
  );
}

// ---- archive, and older ones -----------------------------------------------------------------------------------------

/** Puts one file in the place of a checkpoint's directory. Until then, and when it fails, the directory is whole. */
async function archive(
  path: string,
  { compression, encrypted }: DumpRecord,
  { secret, signal }: TriggerRequest,
  task: Container,
): Promise<void> {
  if (compression === undefined) return;
  const manifest = await readManifest(path);
  if (!manifest || manifest.archive) return; // done before a crash
  if (encrypted && !secret) {
    // Never in clear what was to be encrypted, unless it is all that is left of the container.
    if (manifest.options.leaveRunning)
      throw new NotFound(
        "cedanad ended before the checkpoint was encrypted, and the key went with it: take another one",
      );
    task.log.error(
      { path },
      "cedanad ended before the checkpoint was encrypted, and the key went with it: it is there unencrypted",
    );
    return;
  }
  const { archiveCheckpoint } = await import("../checkpoint/archive/in-place.ts");
  await archiveCheckpoint(path, {
    compression,
    spec: await task.spec(),
    ...(secret && { secret }),
    ...(signal && { signal }),
  });
}

async function prune({ root, owner, name }: DumpRecord, keep: number): Promise<StoredCheckpoint[]> {
  return await new CheckpointStore(root).prune(owner, name, keep);
}
