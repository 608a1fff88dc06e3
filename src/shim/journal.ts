import { rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Claim } from "../checkpoint/resume.ts";
import { BrokenImage, SyscallFailed } from "../errors/index.ts";
import { readRecordNow, writeRecordNow } from "../linux/record-file.ts";
import type { Mount } from "../proto/generated/types.ts";
import type { EscalationStep } from "../runtime/kill-policy.ts";
import type { PendingEscalation } from "./escalation.ts";
import type { LazyRecord } from "./lazy-memory.ts";
import type { Exit } from "./process.ts";

/**
 * A task's state as the next cedanad will find it: one small JSON file in the bundle, replaced at each transition.
 *
 * The write is synchronous on purpose: 0.1 ms on the tmpfs that bundles live in, and no other code may run between a transition and its
 * record.
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

/** For a record to spread: nothing for a process that runs. */
export function exitRecord(exit: Exit | undefined): { exit?: ExitRecord } {
  return exit ? { exit: { status: exit.status, atNs: exit.atNs.toString() } } : {};
}

export function exitOf({ status, atNs }: ExitRecord): Exit {
  return { status, atNs: BigInt(atNs) };
}

/** A process that was added to the container. */
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
  /** the OCI process, JSON: only in records of older versions, which had no file for it */
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
  writeRecordNow(join(record.bundle, FILE_NAME), record);
}

/**
 * @returns undefined when the bundle has none
 * @throws BrokenImage when it can't be read as a record of this version, SyscallFailed when it can't be read now
 */
export function readTaskRecord(bundle: string): TaskRecord | undefined {
  const path = join(bundle, FILE_NAME);
  const record = readRecordNow<TaskRecord>(path);
  if (record === undefined) return undefined;
  if (record?.version === 1 && typeof record.id === "string" && Array.isArray(record.execs)) return record;
  throw new BrokenImage(`task record ${path} is not of version 1`);
}

/**
 * What the launcher's `delete` needs when neither keeper nor cedanad are there: three lines, engine binary, its root
 * directory, container id.
 */
export function writeEngineNote(bundle: string, binary: string, root: string, id: string): void {
  const path = join(bundle, "cedana-engine");
  try {
    writeFileSync(path, `${binary}\n${root}\n${id}\n`, { mode: 0o600 });
  } catch (error) {
    rmSync(path, { force: true }); // half of it would send the launcher to another engine
    throw SyscallFailed.from(error);
  }
}
