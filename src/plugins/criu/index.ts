import type { Plugin } from "../plugin.ts";
import { criuChecks } from "./health.ts";

/** CRIU and its images. */
export const plugin: Plugin = {
  name: "criu",
  features: {
    checkpointInspect: async () => (await import("../../checkpoint/inspect.ts")).listProcesses,
    checkpointDecode: async () => (await import("../../criu/image/decode.ts")).decodeImage,
    checkpointEncode: async () => (await import("../../criu/image/encode.ts")).encodeImage,
    healthChecks: criuChecks,
  },
};
