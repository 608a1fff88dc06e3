import { mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { BrokenImage } from "../../errors/index.ts";
import type { EscalationStep, KillPolicy } from "../kill-policy.ts";

/*
 * The file that makes a container of cedana-runtime ours: the wrapper looks only whether it is there, cedanad writes and reads
 * it. Written without fsync: it must survive us, not the machine (no container survives that, and the directory is on a tmpfs).
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
  /** signals that are still to be sent, to the init with this pid and start time */
  escalation?:
    | { pid: number; startTime: number; dueAtMs: number; steps: readonly EscalationStep[] }
    | undefined;
}

export function writeMarker(path: string, marker: Marker): void {
  mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
  writeFileSync(`${path}.new`, JSON.stringify(marker), { mode: 0o600 });
  renameSync(`${path}.new`, path);
}

/** @returns undefined when the container isn't ours. @throws BrokenImage */
export function readMarker(path: string): Marker | undefined {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
  try {
    const marker = JSON.parse(text) as Marker;
    if (marker.version === 1 && typeof marker.id === "string") return marker;
  } catch (error) {
    throw new BrokenImage(`marker ${path} is not JSON`, { cause: error });
  }
  throw new BrokenImage(`marker ${path} is not of version 1`);
}

export function removeMarker(path: string): void {
  rmSync(path, { force: true });
}

/** Paths of all markers below a run directory. */
export function markersIn(runDirectory: string): string[] {
  const directory = join(runDirectory, "oci");
  try {
    return readdirSync(directory)
      .filter((name) => /^[0-9a-f]{16}-/.test(name) && !name.endsWith(".new"))
      .map((name) => join(directory, name));
  } catch {
    return []; // ENOENT: no container was ever ours
  }
}
