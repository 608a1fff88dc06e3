import { setImmediate as nextTurn } from "node:timers/promises";

/** How long the event loop may be kept at one time. */
const sliceMs = 3;

/** Gives the event loop its turn when a slice is over. */
export class Slices {
  #since = performance.now();

  /** undefined when there is time left: then there is nothing to await. */
  readonly breathe = (): Promise<void> | undefined => {
    if (performance.now() - this.#since < sliceMs) return undefined;
    return this.#pause();
  };

  async #pause(): Promise<void> {
    await nextTurn();
    this.#since = performance.now();
  }
}
