import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { stat } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import type { Claim } from "../../checkpoint/resume.ts";
import { BrokenImage } from "../../errors/index.ts";
import { isAlive } from "../../linux/proc.ts";
import { readRecordNow, writeRecordNow } from "../../linux/record-file.ts";
import type { EscalationStep, KillPolicy } from "../kill-policy.ts";

/*
 * The record that makes a container of cedana-runtime ours: the wrapper looks only whether it is there, cedanad writes and reads it. Its
 * directory is on a tmpfs.
 */

export interface Marker {
  version: 1;
  id: string;
  /** directory of the engine's state */
  root: string;
  /** path of the engine's binary */
  engine: string;
  globalArgv: readonly string[];
  kill?: KillPolicy | undefined;
  /** the caller's; absent where an older cedanad wrote it */
  bundle?: string | undefined;
  /** the engine has a copy of the bundle's configuration, which goes with the container */
  copied?: boolean | undefined;
  /** when the engine forgot the container, because its checkpoint has ended it: nothing of it is left but this, for its delete */
  endedAtMs?: number | undefined;
  /** restored at create, and standing still until start: the init, and who was stopped when the images were taken, by his own pid */
  restored?: { pid: number; startTime: number; stopped: readonly number[] } | undefined;
  /** of the checkpoint that it is restored from, until its processes may run */
  claim?: Claim | undefined;
  /** it is being checkpointed instead of being sent this signal */
  ending?: EndingRecord | undefined;
  /** signals that are still to be sent, to the init with this pid and start time */
  escalation?:
    | { pid: number; startTime: number; dueAtMs: number; steps: readonly EscalationStep[] }
    | undefined;
}

/** Of a container that is checkpointed instead of being signalled: for whoever goes on after a crash. */
export interface EndingRecord {
  readonly pid: number;
  readonly startTime: number;
  /** the caller's, which the status is to tell of */
  readonly sent: number;
  /** what it gets where it can't be checkpointed, and what follows */
  readonly signal: number;
  readonly escalation: readonly EscalationStep[];
  /** path of our native program */
  readonly helper: string;
  /** its cgroup's owner had paused it */
  readonly wasPaused: boolean;
  /** how many cedanads have begun it */
  readonly tries: number;
  /** the checkpoint, once it is whole: the container stands still since then, and only its end is missing */
  readonly whole?: string | undefined;
}

export function writeMarker(path: string, marker: Marker): void {
  mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
  writeRecordNow(path, marker);
}

/** @returns undefined when the container isn't ours. @throws BrokenImage */
export function readMarker(path: string): Marker | undefined {
  const marker = readRecordNow<Marker>(path);
  if (marker === undefined) return undefined;
  if (marker?.version === 1 && typeof marker.id === "string") return marker;
  throw new BrokenImage(`marker ${path} is not of version 1`);
}

/** With what else is kept for the container. */
export function removeMarker(path: string): void {
  rmSync(bundleCopyOf(path), { recursive: true, force: true });
  rmSync(path, { force: true });
}

/** Nobody who was to delete it comes so late. */
const KEPT_AFTER_END_MS = 60 * 60 * 1000;

/**
 * After a checkpoint that has ended the container. crun forgets such a one, as runc does, but then says of it at `delete` what no
 * caller takes for "it is gone", containerd's shim above all, whose task could never be deleted.
 */
export function noteEnd(path: string, marker: Marker): void {
  writeMarker(path, { ...marker, endedAtMs: Date.now() });
}

/** Removes such notes that nobody has come for. */
export async function forgetEnds(runDirectory: string): Promise<void> {
  const since = Date.now() - KEPT_AFTER_END_MS;
  for (const path of markersIn(runDirectory)) {
    try {
      if ((await stat(path)).mtimeMs >= since) continue;
      // Read at once: it may be the next container's by now, and stays then.
      if ((readMarker(path)?.endedAtMs ?? since) < since) removeMarker(path);
    } catch {
      // ENOENT: its container was deleted meanwhile. One that is broken is said to be so to whoever asks for that container
    }
  }
}

/** Where a copy of a container's bundle is kept. */
export function bundleCopyOf(path: string): string {
  return join(dirname(dirname(path)), "oci-bundles", basename(path));
}

/** Paths of all markers below a run directory. */
export function markersIn(runDirectory: string): string[] {
  const directory = join(runDirectory, "oci");
  try {
    return readdirSync(directory)
      .filter((name) => /^[0-9a-f]{16}-[^~]*$/.test(name))
      .map((name) => join(directory, name));
  } catch {
    return []; // ENOENT: no container was ever ours
  }
}

/** Whether it was restored and stands still until it is started. */
export function isUnstarted(marker: Marker | undefined): boolean {
  return marker?.restored !== undefined && isAlive(marker.restored.pid, marker.restored.startTime);
}
