import type { NvmlAnswer } from "../linux/cuda.ts";
import type { Deadlines } from "./deadlines.ts";
import { type GpuDevice, type HelperKeeper, parseUuid } from "./means.ts";

function nvmlLibrary(): string {
  return process.env.CEDANA_GPU_NVML || "libnvidia-ml.so.1";
}

/** What NVML says; an `error` where it can't be asked, which is no reason not to go on. */
export async function askNvml(helpers: HelperKeeper, limits: Deadlines): Promise<NvmlAnswer> {
  try {
    return await helpers.helper().call("nvml", { path: nvmlLibrary() }, limits.ask);
  } catch (error) {
    return { error: (error as Error).message };
  }
}

export function devicesOf(answer: NvmlAnswer): GpuDevice[] {
  if (answer.error !== undefined) return [];
  return answer.devices.flatMap(({ uuid, name, memoryBytes = 0 }) => {
    const digits = parseUuid(uuid);
    return digits === undefined ? [] : [{ uuid: digits, name, memoryBytes }];
  });
}
