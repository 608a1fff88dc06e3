import type { NvmlAnswer } from "../../linux/cuda.ts";

/** Not stdout: that a library of the driver's may write to. */
export const ANSWERS_FD = 3;

/** A driver's answer; the driver's own name of a code that isn't success. */
export interface Coded {
  code: number;
  name?: string;
}

/** What the helper is asked, a line of JSON each on its stdin; answers come on descriptor ANSWERS_FD, in any order. */
export interface HelperCalls {
  /** Loads the driver's library. */
  open: { input: { path: string }; output: { symbols: Record<string, boolean>; version: number } };
  init: { input: object; output: Coded };
  devices: {
    input: object;
    output: Coded & {
      devices: { uuid: string; name: string; memoryBytes: number; pciBusId: string }[];
    };
  };
  state: { input: { pid: number }; output: Coded & { value: number } };
  restoreThread: { input: { pid: number }; output: Coded & { value: number } };
  lock: { input: { pid: number; timeoutMs: number }; output: Coded };
  checkpoint: { input: { pid: number }; output: Coded };
  /** pairs: UUIDs of 32 hexadecimal digits, old and new */
  restore: { input: { pid: number; pairs: [string, string][] }; output: Coded };
  unlock: { input: { pid: number }; output: Coded };
  nvml: { input: { path: string }; output: NvmlAnswer };
  /** Holds every thread of a process but one, which may be frozen; they stand still however the cgroup is. */
  holdThreads: { input: { pid: number; except: number }; output: { held: number } };
  /** Whether all that are held have stopped. */
  heldStopped: { input: object; output: { stopped: boolean } };
  /** Lets go of all. */
  releaseThreads: { input: object; output: { released: number } };
}

export type HelperCall = keyof HelperCalls;

export interface HelperRequest<C extends HelperCall = HelperCall> {
  id: number;
  call: C;
  input: HelperCalls[C]["input"];
}

export type HelperAnswer = { id: number; output: unknown } | { id: number; error: string; code?: string };
