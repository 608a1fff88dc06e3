import { addonPart } from "./addon.ts";

// The typed face of addon/binding/cuda.cc and threads.cc. A driver's call may never return, and who has loaded a driver is its client: all
// of this is called by the helper process (src/gpu/helper) and by nobody else. Codes are CUresult's: 0 is success.

export interface CudaDevice {
  /** 16 bytes */
  readonly uuid: Buffer;
  readonly name: string;
  readonly memoryBytes: number;
  readonly pciBusId: string;
}

export interface NvmlDevice {
  /** "GPU-…" */
  readonly uuid: string;
  readonly name: string;
  readonly memoryBytes?: number;
  readonly usedBytes?: number;
  /** 1: the device is divided into instances */
  readonly migMode?: number;
  readonly persistenceMode?: number;
  /** that compute on it; host pids. Not every driver says how much they use (MIG, WSL) */
  readonly processes: readonly { readonly pid: number; readonly usedBytes?: number }[];
}

export type NvmlAnswer =
  | { readonly error: string }
  | { readonly error?: undefined; readonly driver: string; readonly devices: readonly NvmlDevice[] };

export interface CudaAddon {
  /** Loads the driver's library, once. @returns whether it has each call, by name. @throws what dlopen(3) says */
  cudaOpen(path: string): Record<string, boolean>;
  cudaInit(): Promise<number>;
  /** 13000 for 13.0; a negative code when it can't be had */
  cudaDriverVersion(): Promise<number>;
  /** "CUDA_ERROR_NOT_READY"; "CUDA error 600" where the driver has no name for it. Asks nothing of a device: it returns at once */
  cudaErrorName(code: number): string;
  /** @returns a code that isn't 0, or the list */
  cudaDevices(): Promise<number | CudaDevice[]>;
  cudaState(pid: number): Promise<[code: number, state: number]>;
  cudaRestoreThread(pid: number): Promise<[code: number, tid: number]>;
  /** @param timeoutMs  0: for ever */
  cudaLock(pid: number, timeoutMs: number): Promise<number>;
  cudaCheckpoint(pid: number): Promise<number>;
  /** @param pairs  old and new UUID by turns; empty: every GPU as it was */
  cudaRestore(pid: number, pairs: Buffer): Promise<number>;
  cudaUnlock(pid: number): Promise<number>;
  /** Opens NVML, asks, and closes it again. */
  nvmlQuery(path: string): Promise<NvmlAnswer>;

  // ptrace(2), thread by thread. The tracer is the calling thread; when it ends, all are let go.
  ptraceSeize(tid: number): void;
  ptraceInterrupt(tid: number): void;
  ptraceDetach(tid: number): void;
  /** Whether a traced thread has stopped, without waiting. @throws ESRCH when it has ended */
  waitStopped(tid: number): boolean;
}

export function cuda(): CudaAddon {
  return addonPart<CudaAddon>();
}
