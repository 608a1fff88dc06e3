import type { JobContext } from "./context.ts";

/**
 * What worker threads do for the event loop: everything that reads, hashes, packs or compresses whole checkpoints. A job's
 * module is loaded in the thread, when it is first asked for. Input and output are copied between threads (structured clone).
 */
export const jobs = {
  listFiles: async () => (await import("../digest-job.ts")).listFilesHere,
  hashFiles: async () => (await import("../digest-job.ts")).hashFilesHere,
  createArchive: async () => (await import("../archive/create.ts")).createArchive,
  extractArchive: async () => (await import("../archive/extract.ts")).extractArchive,
  packRootfsDiff: async () => (await import("../rootfs-diff/pack.ts")).packRootfsDiff,
  prepareRootfsDiff: async () => (await import("../rootfs-diff/pack.ts")).prepareRootfsDiff,
  applyRootfsDiff: async () => (await import("../rootfs-diff/apply.ts")).applyRootfsDiff,
} as const satisfies Record<string, () => Promise<Job>>;

// biome-ignore lint/suspicious/noExplicitAny: the table's own types say what each job takes
type Job = (input: any, context: JobContext) => unknown;

type Loaded<N extends JobName> = Awaited<ReturnType<(typeof jobs)[N]>>;
export type JobName = keyof typeof jobs;
export type JobInput<N extends JobName> = Parameters<Loaded<N>>[0];
export type JobOutput<N extends JobName> = Awaited<ReturnType<Loaded<N>>>;
