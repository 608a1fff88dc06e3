import type { Plugin } from "../plugin.ts";
import { hostChecks } from "./health.ts";

/** The node itself. */
export const plugin: Plugin = {
  name: "host",
  features: {
    checkpointStorage: async () =>
      (await import("../../checkpoint/store.ts")).CheckpointStore.prototype.placeFor,
    healthChecks: hostChecks,
  },
};
