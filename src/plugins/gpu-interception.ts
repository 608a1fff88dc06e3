import type { FeatureValues } from "./features.ts";

const injection = async () => (await import("../runtime/gpu-injection.ts")).injectGpu;
/** A restore brings what the images have: the library in its version, and the directory of the traces. */
const restore = async () => (await import("../checkpoint/gpu-mounts.ts")).gpuMountSource;

/** For everybody whose containers get the interception library when they ask for it. */
export const interceptionFeatures: FeatureValues = {
  gpuInterception: injection,
  gpuInterceptionRestore: restore,
  gpuTracing: injection,
  gpuTracingRestore: restore,
};
