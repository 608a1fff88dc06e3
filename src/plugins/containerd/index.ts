import { interceptionFeatures } from "../gpu-interception.ts";
import type { Plugin } from "../plugin.ts";
import { containerdChecks } from "./health.ts";

const taskService = async () => (await import("../../shim/task-service.ts")).taskService;

/** containerd's Task API, which the shim serves. */
export const plugin: Plugin = {
  name: "containerd",
  features: {
    dumpCommand: "dump:containerd",
    restoreCommand: "restore:containerd",
    queryCommand: "query:containerd",
    freezeCommand: "freeze:containerd",
    unfreezeCommand: "unfreeze:containerd",
    helperCommand: "setup",
    dumpHandler: async () => (await import("../../shim/checkpoint.ts")).dump,
    restoreHandler: async () => (await import("../../shim/restore.ts")).restore,
    runHandler: async () => (await taskService()).Create!,
    freezeHandler: async () => (await taskService()).Pause!,
    unfreezeHandler: async () => (await taskService()).Resume!,
    queryHandler: async () => (await taskService()).State!,
    killSignal: async () => (await import("../../runtime/kill-policy.ts")).killPolicy,
    cleanup: async () => (await taskService()).Delete!,
    reaper: async () => (await import("../../shim/pod.ts")).Pod.prototype.exited,
    ...interceptionFeatures,
    healthChecks: containerdChecks,
  },
};
