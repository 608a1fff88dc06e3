import { AsyncLocalStorage } from "node:async_hooks";

/*
 * For whom work is done. An error that nobody catches, in a promise, a timer or a callback, is a mistake of ours; it must not end the work
 * for everybody else on the node, again and again with each repetition. So it costs the connection for which it was done: that one's keeper
 * comes back, and is taken up from its records, as after a crash.
 */

export interface Culprit {
  /** for the log: "the pod of keeper 123" */
  readonly what: string;
  /** gives up its connection */
  fail(): void;
}

const culprits = new AsyncLocalStorage<Culprit>();

/** Does work, and all that follows from it, in somebody's name. */
export function inNameOf<T>(culprit: Culprit, work: () => T): T {
  return culprits.run(culprit, work);
}

/** In whose name the present work is done. */
export function culprit(): Culprit | undefined {
  return culprits.getStore();
}
