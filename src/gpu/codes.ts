import {
  type CedanaError,
  ResourceExhausted,
  TimedOut,
  Unavailable,
  Unsupported,
  WrongState,
} from "../errors/index.ts";

/** CUresult, as far as the checkpoint calls give it. Source: CUDA driver API reference. */
export const code = {
  success: 0,
  invalidValue: 1,
  outOfMemory: 2,
  notInitialized: 3,
  deviceUnavailable: 46,
  noDevice: 100,
  illegalState: 401,
  notReady: 600,
  notSupported: 801,
} as const;

/** CUprocessState. Newer drivers know more of them, which mean "busy". */
const processState = { running: 0, locked: 1, checkpointed: 2, failed: 3 } as const;

export type ProcessStateName = keyof typeof processState | "busy";

export function stateName(value: number): ProcessStateName {
  const found = Object.entries(processState).find(([, number]) => number === value);
  return (found?.[0] as ProcessStateName | undefined) ?? "busy";
}

type Verb = "lock" | "checkpoint" | "restore" | "unlock";

/** What a code of one of the calls means for the one who asked, and what to do. */
const meanings: readonly (readonly [
  code: number,
  verb: Verb | undefined,
  type: new (message: string) => CedanaError,
  text: string,
])[] = [
  [
    code.notReady,
    "lock",
    TimedOut,
    "its GPU work did not come to an end in time; give it more by CEDANA_GPU_DEADLINES, or ask at a quieter moment",
  ],
  [
    code.notSupported,
    "checkpoint",
    Unsupported,
    "it has managed (UVM) memory or memory shared by IPC, which this driver does not checkpoint; the driver has marked the process as failed, and it can only be ended. With the annotation cedana.io/gpu: intercept such memory is found before anything is touched",
  ],
  [code.outOfMemory, "checkpoint", ResourceExhausted, "there is not enough host memory for its GPU memory"],
  [code.outOfMemory, "restore", ResourceExhausted, "the GPU has not enough free memory"],
  [
    code.invalidValue,
    "restore",
    Unsupported,
    "the GPUs here don't fit those of the checkpoint: each needs one of the same model, all must be named",
  ],
  [
    code.deviceUnavailable,
    undefined,
    Unavailable,
    "the GPU is not available: is it there, is nobody using it exclusively, is persistence mode on (nvidia-smi -pm 1)?",
  ],
  [code.noDevice, undefined, Unavailable, "the driver sees no GPU"],
  [code.illegalState, undefined, WrongState, "the process is in another state than this needs"],
  [code.notInitialized, undefined, WrongState, "the process uses no GPU"],
  [code.notSupported, undefined, Unsupported, "the driver does not support it"],
];

/**
 * @param who   "process 12 (python)"
 * @param name  the driver's, of the code
 */
export function failureOf(verb: Verb, who: string, result: number, name = "of no name"): CedanaError {
  const found = meanings.find(([number, only]) => number === result && (only === undefined || only === verb));
  const [, , type, text] = found ?? [0, undefined, Unavailable, "the driver says no more"];
  return new type(`${verb} of the GPU state of ${who} failed (${name}, ${result}): ${text}`);
}
