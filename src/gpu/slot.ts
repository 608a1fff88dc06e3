import type { DeviceSlot } from "../checkpoint/device-slot.ts";
import { hasJournal, journals } from "./journal.ts";
import { mayHaveGpu } from "./present.ts";
import { recovering } from "./recovering.ts";

/** The GPU's part of dump and restore. What it needs is loaded with the first container that may use a GPU. */
export const gpuSlot: DeviceSlot = {
  findForDump: async (owner) => {
    if (!mayHaveGpu() && !hasJournal(owner)) return undefined;
    const { waitForRecovery } = await import("./recover.ts");
    await waitForRecovery(owner);
    const { findForDump } = await import("./dump.ts");
    return await findForDump(owner);
  },
  prepareRestore: async (target, facts) => {
    const { prepareRestore } = await import("./restore.ts");
    return await prepareRestore(target, facts);
  },
  recover: (owner) => {
    if (!hasJournal(owner)) return;
    void import("./recover.ts")
      .then(({ recoverInBackground }) => recoverInBackground(owner))
      .catch((error) => owner.log.error({ err: error, what: owner.what }, "give processes their GPU back"));
  },
  isRecovering: () => recovering.size > 0,
  recoverAll: (directories, log) => {
    if (journals().length === 0) return;
    void import("./recover.ts")
      .then(({ recoverAll }) => recoverAll(directories, log))
      .catch((error) => log.error({ err: error }, "give processes their GPUs back"));
  },
};
