import { existsSync } from "node:fs";

/** Whether this machine has a GPU driver at all: where not, no process is looked at. */
export function mayHaveGpu(): boolean {
  return (
    process.env.CEDANA_GPU_DRIVER !== undefined ||
    process.env.CEDANA_GPU_PROGRAM !== undefined ||
    existsSync("/dev/nvidiactl") ||
    existsSync("/proc/driver/nvidia/version") ||
    existsSync("/dev/dxg") // WSL
  );
}
