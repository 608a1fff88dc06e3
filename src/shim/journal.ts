import { readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Claim } from "../checkpoint/resume.ts";
import { BrokenImage, SyscallFailed } from "../errors/index.ts";
import type { Mount } from "../proto/generated/types.ts";
import type { EscalationStep } from "../runtime/kill-policy.ts";
import type { PendingEscalation } from "./escalation.ts";
import type { LazyRecord } from "./lazy-memory.ts";
import type { Exit } from "./process.ts";

/**
 * A task's state as the next cedanad will find it: one small JSON file in the bundle, replaced at each transition.
 *
 * Written without fsync: a write survives the end of our process as soon as write(2) and rename(2) have returned, and no
 * container survives the end of the machine. The write is synchronous on purpose: 0.1 ms on the tmpfs that bundles live in,
 * less than the thread pool's round trips, and no other code may run between a transition and its record.
 */
export interface TaskRecord extends Partial<RestorationRecord> {
  version: 1;
  id: string;
  namespace: string;
  bundle: string;
  state: string;
  pid: number;
  terminal: boolean;
  stdin: string;
  stdout: string;
  stderr: string;
  /** what the create request asked of the engine, as `RuntimeOptions` */
  options: unknown;
  /** whether the rootfs was mounted by us */
  rootfsMounted: boolean;
  /** how many restores the container has behind it */
  generation?: number;
  /** it is being checkpointed instead of being sent a signal */
  ending?: EndingRecord;
  oomKills: number;
  exit?: ExitRecord;
  execs: ExecRecord[];
  /** of a container that was, or was to be, restored lazily */
  lazy?: LazyRecord;
  /** signals that are still to be sent after a kill */
  escalations?: PendingEscalation[];
  /** Answers given to calls with effects, so that a repeated call gets the same one; the newest last. */
  answers: { request: number; payload: string }[];
}

/** Of a task that was created from a checkpoint. */
export interface RestorationRecord {
  /** directory of the images to restore from at start */
  restoreFrom: string;
  onRestoreFailure?: "fail" | "fresh";
  restoreAsked?: "caller" | "annotation";
  /** of the checkpoint to restore from */
  claim?: Claim;
  /** what is mounted at the rootfs, where it may have to be mounted again */
  rootfs?: Mount[];
  /** a failed restore is given up: its files are (reset), or are to be (begun), as before it */
  afresh?: "begun" | "reset";
}

/** A checkpoint instead of a signal (`cedana.io/checkpoint-on`). */
export interface EndingRecord {
  /** sent when that fails, with what follows it */
  signal: number;
  escalation: readonly EscalationStep[];
  /** what the init ends with */
  status: number;
  /** somebody's patience was over: its end is that of SIGKILL */
  killed: boolean;
}

export interface ExitRecord {
  status: number;
  /** nanoseconds since 1970, decimal */
  atNs: string;
}

export function exitRecord(exit: Exit | undefined): { exit?: ExitRecord } {
  return exit ? { exit: { status: exit.status, atNs: exit.atNs.toString() } } : {};
}

export function exitOf({ status, atNs }: ExitRecord): Exit {
  return { status, atNs: BigInt(atNs) };
}

export interface ExecRecord {
  execId: string;
  /** tells execs of the same name apart */
  serial: number;
  state: string;
  pid: number;
  terminal: boolean;
  stdin: string;
  stdout: string;
  stderr: string;
  /** the process as JSON, as containerd sent it: of a cedanad that had no file for it yet */
  spec?: string;
  exit?: ExitRecord;
}

const FILE_NAME = "cedana-task.json";

/** In the bundle while a checkpoint is taken that containerd hasn't asked for (`triggered.ts`). */
export const TRIGGERED_DIRECTORY = "cedana-dump";

/** How many answers are kept: a request is repeated only after a crash, and few calls with effects are open at a time. */
export const MAX_ANSWERS = 16;

/** @throws SyscallFailed naming the file; the record before stays */
export function writeTaskRecord(record: TaskRecord): void {
  const path = join(record.bundle, FILE_NAME);
  writeWhole(`${path}.new`, JSON.stringify(record));
  renameSync(`${path}.new`, path);
}

function writeWhole(path: string, text: string): void {
  try {
    writeFileSync(path, text, { mode: 0o600 });
  } catch (error) {
    rmSync(path, { force: true }); // half of it would only take room
    const { code = "", errno = 0 } = error as NodeJS.ErrnoException;
    throw new SyscallFailed(`write ${path}: ${(error as Error).message}`, {
      cause: error,
      errno: Math.abs(errno),
      code,
      syscall: "write",
    });
  }
}

/** @returns undefined when the bundle has none. @throws BrokenImage when it can't be read as a record of this version */
export function readTaskRecord(bundle: string): TaskRecord | undefined {
  const path = join(bundle, FILE_NAME);
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
  try {
    const record = JSON.parse(text) as TaskRecord;
    if (record.version === 1 && typeof record.id === "string" && Array.isArray(record.execs)) return record;
  } catch (error) {
    throw new BrokenImage(`task record ${path} is not JSON`, { cause: error });
  }
  throw new BrokenImage(`task record ${path} is not of version 1`);
}

/**
 * What the launcher's `delete` needs when neither keeper nor cedanad are there: three lines, engine binary, its root
 * directory, container id.
 */
export function writeEngineNote(bundle: string, binary: string, root: string, id: string): void {
  writeWhole(join(bundle, "cedana-engine"), `${binary}\n${root}\n${id}\n`);
}
