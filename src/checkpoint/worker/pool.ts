import { availableParallelism } from "node:os";
import { Worker } from "node:worker_threads";
import { Cancelled, CedanaError } from "../../errors/index.ts";
import type { JobInput, JobName, JobOutput } from "./jobs.ts";
import { type JobAnswer, type JobRequest, receiveError } from "./messages.ts";

/** As many as the machine has cores, and few: a node has other things to do than our checkpoints. */
export const MAX_WORKERS = Math.max(1, Math.min(4, availableParallelism()));
/** A thread takes some MiB; one that had nothing to do for so long ends. */
const IDLE_MS = 5_000;
/** A job that needs more fails alone instead of taking cedanad along. */
const MAX_HEAP_MIB = 512;
/** Jobs make little garbage; by default V8 would let it grow to several times that in each thread. */
const YOUNG_MIB = 8;

/** A thread, and who is told what it answers. Its listeners stay: Node's own are among those that `removeAllListeners` removes. */
interface Thread {
  worker: Worker;
  onAnswer: (answer: JobAnswer) => void;
  onEnd: (error: Error) => void;
  idleTimer?: NodeJS.Timeout;
}

/**
 * Jobs for which a container stands still, or a caller of containerd's waits, have threads of their own: an archive takes its time, and as
 * many as there are cores may be in work.
 */
const urgentJobs: ReadonlySet<JobName> = new Set(["packRootfsDiff", "prepareRootfsDiff"] as const);

class Lane {
  running = 0;
  readonly waiting: (() => void)[] = [];
}

const idle: Thread[] = [];
const lanes = { urgent: new Lane(), usual: new Lane() };

/**
 * Does a job in a worker thread; at most `MAX_WORKERS` run at once, and as many urgent ones, the others wait for their turn.
 * @param signal  gives up: the job stops at its next look, undoes what it does, and this rejects with Cancelled
 * @throws what the job throws
 */
export async function runJob<N extends JobName>(
  name: N,
  input: JobInput<N>,
  signal?: AbortSignal,
): Promise<JobOutput<N>> {
  if (signal?.aborted) throw new Cancelled(`${name} was cancelled`, { cause: signal.reason });
  const lane = urgentJobs.has(name) ? lanes.urgent : lanes.usual;
  if (lane.running >= MAX_WORKERS) await new Promise<void>((go) => lane.waiting.push(go));
  else lane.running++;
  try {
    return (await runIn(
      takeThread(),
      { name, input, cancelled: new SharedArrayBuffer(4) },
      signal,
    )) as JobOutput<N>;
  } finally {
    const next = lane.waiting.shift();
    if (next) next();
    else lane.running--;
  }
}

async function runIn(thread: Thread, request: JobRequest, signal: AbortSignal | undefined): Promise<unknown> {
  const flag = new Int32Array(request.cancelled);
  const cancel = () => Atomics.store(flag, 0, 1);
  if (signal?.aborted) cancel(); // while it waited for its turn
  signal?.addEventListener("abort", cancel);
  try {
    const answer = await new Promise<JobAnswer>((resolve, reject) => {
      thread.onAnswer = resolve;
      thread.onEnd = (cause) => reject(new CedanaError(`${request.name}: its thread failed`, { cause }));
      thread.worker.postMessage(request);
    });
    keep(thread);
    if ("error" in answer) throw receiveError(answer.error);
    return answer.output;
  } finally {
    signal?.removeEventListener("abort", cancel);
  }
}

function takeThread(): Thread {
  const kept = idle.pop();
  if (kept) {
    clearTimeout(kept.idleTimer);
    kept.worker.ref();
    return kept;
  }
  // In the source tree beside this file; in a bundle a file of its own beside the chunk that this code is in.
  const file = import.meta.url.endsWith(".ts") ? "./main.ts" : "./checkpoint-worker.cjs";
  const worker = new Worker(new URL(file, import.meta.url), {
    name: "checkpoint",
    execArgv: [],
    trackUnmanagedFds: false, // the addon opens what Node closes; jobs close what they open
    resourceLimits: { maxOldGenerationSizeMb: MAX_HEAP_MIB, maxYoungGenerationSizeMb: YOUNG_MIB },
  });
  const thread: Thread = { worker, onAnswer: () => {}, onEnd: () => {} };
  worker.on("message", (answer) => thread.onAnswer(answer));
  worker.on("error", (error) => thread.onEnd(error));
  worker.on("exit", (code) => thread.onEnd(new Error(`it ended with ${code}`))); // "error" came before, where there was one
  return thread;
}

/** For the next job; doesn't keep the process alive. */
function keep(thread: Thread): void {
  const forget = () => {
    clearTimeout(thread.idleTimer);
    const at = idle.indexOf(thread);
    if (at >= 0) idle.splice(at, 1);
  };
  thread.worker.unref();
  thread.onEnd = forget;
  thread.idleTimer = setTimeout(() => {
    forget();
    void thread.worker.terminate();
  }, IDLE_MS).unref();
  idle.push(thread);
}
