import { parentPort } from "node:worker_threads";
import { Cancelled } from "../../errors/index.ts";
import type { JobContext } from "./context.ts";
import { jobs } from "./jobs.ts";
import { type JobAnswer, type JobRequest, sendError } from "./messages.ts";

// A worker thread of the pool: one job after another, until the pool ends it.

if (!parentPort) throw new Error("this file is for worker threads");
const port = parentPort;

port.on("message", async ({ name, input, cancelled }: JobRequest) => {
  const flag = new Int32Array(cancelled);
  const context: JobContext = {
    checkCancelled: () => {
      if (Atomics.load(flag, 0) !== 0) throw new Cancelled(`${name} was cancelled`);
    },
  };
  let answer: JobAnswer;
  try {
    const job = (await jobs[name]()) as (input: unknown, context: JobContext) => unknown;
    answer = { output: await job(input, context) };
  } catch (error) {
    answer = { error: sendError(error) };
  }
  port.postMessage(answer);
});
