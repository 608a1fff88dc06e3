import { once } from "node:events";
import { join } from "node:path";
import { Worker } from "node:worker_threads";
import { CedanaError, NotFound } from "../../errors/index.ts";
import type { ImageReport } from "./verify.ts";

type Answer = { readonly report: ImageReport } | { readonly isMissing: boolean; readonly message: string };

/**
 * verifyImages in a thread of its own: for whoever has an event loop to keep free.
 * @param options.memoryOnly  see VerifyOptions
 * @param options.signal  ends the thread
 * @throws as verifyImages
 */
export async function verifyImagesInWorker(
  directory: string,
  options: { memoryOnly?: boolean; signal?: AbortSignal | undefined } = {},
): Promise<ImageReport> {
  options.signal?.throwIfAborted();
  const { memoryOnly = false } = options;
  const worker = new Worker(workerFile(), { workerData: { directory, memoryOnly }, execArgv: [] });
  try {
    const [answer] = (await once(worker, "message", { signal: options.signal })) as [Answer];
    if ("report" in answer) return answer.report;
    throw answer.isMissing ? new NotFound(answer.message) : new CedanaError(answer.message);
  } finally {
    await worker.terminate();
  }
}

/** Beside us: as source, or as the bundle that scripts/build.mjs makes of it. */
function workerFile(): string {
  const isSource = import.meta.filename.endsWith(".ts");
  return join(import.meta.dirname, isSource ? "worker.ts" : "image-worker.cjs");
}
