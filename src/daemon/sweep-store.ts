import { existsSync } from "node:fs";
import type { Logger } from "pino";
import { gpuLibraries, gpuTraces } from "../checkpoint/gpu-mounts.ts";
import { CheckpointStore } from "../checkpoint/store.ts";
import { readConfiguration } from "../runtime/configuration.ts";

/**
 * What crashes have left in the store of checkpoints: dumps whose containers are gone, too, so that nobody went on with them. And what GPU
 * containers have left that nobody needs.
 */
export async function sweepStore(log: Logger): Promise<void> {
  try {
    const { directory } = (await readConfiguration()).checkpoints;
    if (!existsSync(directory)) return;
    const removed = await new CheckpointStore(directory).sweep();
    if (removed > 0) log.info({ directory, removed }, "swept what crashes had left in the store");
  } catch (error) {
    log.warn({ err: error }, "sweep the store of checkpoints");
  }
  if (existsSync(gpuLibraries()) || existsSync(gpuTraces()))
    await (await import("../runtime/gpu-sweep.ts")).sweepGpuFiles(log);
}
