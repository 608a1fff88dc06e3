// CRIU: what the rest of the project uses of this folder. Knows nothing of containers.
//
//   await using worker = await CriuWorker.start({ signal });
//   await worker.dump({ pid, imagesDir, leaveRunning: true }, { notifications: { "post-dump": takeFiles } });
//   const { frozenUs } = await readDumpStats(imagesDir);
//
// Images by themselves are in image/index.ts: they are more code, and few need them.

export { type CpuDescription, checkCpu, missingFromCpu, readCpu, thisCpu } from "./cpu.ts";
export { type CriuLogSummary, explainCriuLog, type KnownCause, knownCause, summarizeCriuLog } from "./log.ts";
export type { AnyOptions, CommonOptions, DumpOptions, RestoreOptions } from "./options.ts";
export { installedPlugins } from "./plugins.ts";
export {
  type CriuCheck,
  type CriuFeature,
  type CriuProbe,
  type CriuVersion,
  checkCriu,
  criuFeatures,
  hasCriuFeature,
  probeCriu,
  unsupportedOptions,
} from "./probe.ts";
export { type DumpStats, type RestoreStats, readDumpStats, readRestoreStats } from "./stats.ts";
export { findUnsuitable } from "./suitability.ts";
export {
  type CallOptions,
  CriuWorker,
  type Notification,
  type NotificationCallback,
  type NotificationName,
  type Notifications,
} from "./worker.ts";
