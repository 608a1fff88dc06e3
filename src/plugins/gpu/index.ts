import type { HealthCheck } from "../health.ts";
import type { Plugin } from "../plugin.ts";

/** `full`: it starts the helper process, which loads the driver. */
const gpuChecks: readonly HealthCheck[] = [
  { name: "GPU", full: true, run: async () => await (await import("../../gpu/health.ts")).gpuHealth() },
  {
    name: "GPU interception",
    full: true,
    run: async () => await (await import("../../gpu/interception-health.ts")).interceptionHealth(),
  },
];

/** NVIDIA's GPUs. Their part of dumps and restores is a slot of the chains (src/checkpoint/device-slot.ts). */
export const plugin: Plugin = { name: "gpu", features: { healthChecks: gpuChecks } };
