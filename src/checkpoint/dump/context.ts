import { join, resolve } from "node:path";
import type { Gate } from "../../criu/gate.ts";
import type { Cgroup } from "../../linux/cgroup.ts";
import { writeRecordNow } from "../../linux/record-file.ts";
import { IMAGES_DIRECTORY } from "../archive/layout.ts";
import type { ChainContext, Step } from "../chain.ts";
import type { cpuFacts } from "../cpu.ts";
import type { DeviceDump } from "../device-slot.ts";
import type { Follower } from "../follow.ts";
import type { CheckpointManifest, GpuFacts, RootfsDiffFacts } from "../manifest.ts";
import type { NetworkLock } from "../policy.ts";
import type { Changes, RootfsBase } from "../rootfs-diff/index.ts";
import type { Staging, StagingRecord } from "../staging.ts";
import type { DumpRequest, DumpTarget } from "./target.ts";

// What the steps of a dump find and hand on, in memory and, for whoever goes on after a crash, on disk.

export interface DumpContext extends ChainContext {
  readonly target: DumpTarget;
  readonly request: DumpRequest;
  readonly startedAt: number;
  attempt: Attempt;
  staging: Staging;
  workPath: string;
  /** relative to the images where they are made */
  parentPath: string | undefined;
  /** of the inventories of the images that it builds on */
  parentDigests: string[];
  /** plugins whose adapters were run */
  readonly adapters: NonNullable<CheckpointManifest["plugins"]>;
  networkLock: NetworkLock;
  criu: string | undefined;
  changes: Changes | undefined;
  base: RootfsBase | undefined;
  cgroup: Cgroup | undefined;
  follower: Follower | undefined;
  engine: StartedEngine | undefined;
  /** PATH of the engine */
  enginePath: string | undefined;
  facts: Promise<Facts> | undefined;
  devices: DeviceDump | undefined;
  frozenMs: number;
  criuFrozenMs: number | undefined;
  /** the processes are in the images alone now */
  ended: boolean;
}

export type DumpStep = Step<DumpContext>;

/** In the owner's directory, as long as the dump is under way. */
export const ATTEMPT_NAME = "checkpoint-attempt.json";

/** What has been done, on disk, for whoever goes on after a crash. */
export interface Attempt {
  key: string;
  staging: StagingRecord;
  /** `dumped`: the images are whole; `committing`: the manifest, too, and they are being put in their place */
  phase: "begun" | "dumped" | "committing";
  leaveRunning: boolean;
  /** the request's parent is not built on */
  withoutParent?: boolean;
  rootfsDiff?: RootfsDiffFacts;
  /** the devices' state is in the processes' memory; null: it turned out that nobody has any */
  gpu?: GpuFacts | null;
  /** directory of the gate of the engine that was started early */
  gate?: string | undefined;
  /** an engine has gone past the gate and ended the container: the images are whole, what else belongs to the checkpoint isn't there */
  pastGate?: boolean;
  /** of a dump that ends the container, from the moment on in which it may: what its manifest will say, for whoever finds the images whole */
  whole?: { draft: ManifestDraft; workPath: string; withFiles: boolean };
}

/** What is known of a checkpoint's manifest while it is made. */
export type ManifestDraft = Omit<CheckpointManifest, "version" | "files" | "timings" | "rootfsDiff" | "gpu">;

/** Writes down what has been done. */
export function noteAttempt(context: DumpContext, news: Partial<Attempt> = {}): void {
  Object.assign(context.attempt, news);
  // At once, some 100 us: the container stands still, and a trip through a busy thread pool may take milliseconds.
  writeRecordNow(attemptFile(context.target), context.attempt);
}

export function attemptFile(target: DumpTarget): string {
  return join(target.directory, ATTEMPT_NAME);
}

/** An engine that was started before the container was frozen. */
interface StartedEngine {
  /** here and open, or gone through by a cedanad before us */
  readonly gate: Gate | undefined;
  readonly end: Promise<void>;
}

/** What is asked of others for the manifest, while CRIU is at work. */
export type Facts = [cpu: Awaited<ReturnType<typeof cpuFacts>>, image: CheckpointManifest["image"]];

/** Where CRIU's images are made. */
export function imagesIn({ request: { place }, staging }: DumpContext): string {
  return "imagePath" in place ? staging.path : join(staging.path, IMAGES_DIRECTORY);
}

/** Where the images are in the end. */
export function finalImagePath({ place }: DumpRequest): string {
  return "imagePath" in place ? place.imagePath : join(place.directory, place.generation, IMAGES_DIRECTORY);
}

/** Of the images that the request names to build on. */
export function absoluteParent(request: DumpRequest): string {
  return resolve(finalImagePath(request), request.parentPath!);
}

/**
 * Whether the files are written to the disk before they are put in their place: always in our store, and in an image path where an
 * older checkpoint gives way, which `commit` sees. Otherwise a machine that fails loses nothing that was there, and the caller doesn't
 * wait for the disk.
 */
export function mustSync({ request: { place } }: DumpContext): boolean {
  return !place.temporary && !("imagePath" in place);
}

/**
 * Whether somebody waits until the disk has the files: we ourselves, or who unmounts an overlay of a container that ends with its dump, for
 * which the kernel writes all that is dirty on that disk (12 ms for 16 MiB, where it hadn't begun before).
 */
export function isSyncedSoon(context: DumpContext): boolean {
  const { place, leaveRunning } = context.request;
  return mustSync(context) || (!leaveRunning && !place.temporary);
}

/** Milliseconds, for people. */
export const inHundredths = (ms: number) => Math.round(ms * 100) / 100;
