import type { Logger } from "pino";
import { Pidfd } from "../../linux/addon.ts";
import { startTime } from "../../linux/proc.ts";
import type { EscalationStep } from "../kill-policy.ts";
import { type Marker, markersIn, readMarker, writeMarker } from "./marker.ts";

/** Sends what follows a kill, when its time has come; on record in the marker, so that the next cedanad goes on with it. */
export class Escalator {
  readonly #log: Logger;
  readonly #done: () => void;
  readonly #timers = new Map<string, NodeJS.Timeout>();

  /** @param done  called after each step */
  constructor(log: Logger, done: () => void = () => {}) {
    this.#log = log;
    this.#done = done;
  }

  /** How many containers are waited for. */
  get pending(): number {
    return this.#timers.size;
  }

  /** What an earlier cedanad has left. */
  revive(runDirectory: string): void {
    for (const path of markersIn(runDirectory)) {
      try {
        const marker = readMarker(path);
        if (marker?.escalation) this.#arm(path, marker);
      } catch (error) {
        this.#log.error({ err: error, path }, "read a marker");
      }
    }
  }

  /** A container that is being escalated stays at that: a second TERM prolongs nothing. */
  begin(path: string, marker: Marker, pid: number, steps: readonly EscalationStep[]): void {
    const started = startTime(pid);
    if (steps.length === 0 || started === undefined || this.#timers.has(path)) return;
    const next: Marker = {
      ...marker,
      escalation: { pid, startTime: started, dueAtMs: Date.now() + steps[0]!.afterMs, steps },
    };
    writeMarker(path, next);
    this.#arm(path, next);
  }

  forget(path: string): void {
    clearTimeout(this.#timers.get(path));
    this.#timers.delete(path);
  }

  #arm(path: string, marker: Marker): void {
    const { dueAtMs, steps } = marker.escalation!;
    // A wall clock that has jumped must not put the step off for ever.
    const waitMs = Math.min(Math.max(dueAtMs - Date.now(), 0), steps[0]!.afterMs);
    this.#timers.set(
      path,
      setTimeout(() => this.#step(path, marker), waitMs),
    );
  }

  #step(path: string, marker: Marker): void {
    this.#timers.delete(path);
    const { pid, startTime: started, steps } = marker.escalation!;
    const [step, ...rest] = steps;
    try {
      if (readMarker(path) === undefined) return; // deleted meanwhile
      if (rest.length > 0) {
        const next = {
          ...marker,
          escalation: { pid, startTime: started, dueAtMs: Date.now() + rest[0]!.afterMs, steps: rest },
        };
        writeMarker(path, next);
        this.#arm(path, next);
      } else writeMarker(path, { ...marker, escalation: undefined });
      // The fd first, then the look whether it is still that process: so no other one can be hit.
      using init = Pidfd.open(pid);
      if (startTime(pid) !== started) return;
      this.#log.info({ id: marker.id, signal: step!.signal }, "the grace is over: the next signal follows");
      init.signal(step!.signal);
    } catch (error) {
      this.forget(path);
      if ((error as NodeJS.ErrnoException).code === "ESRCH") return; // it has ended
      this.#log.error({ err: error, id: marker.id }, "send the next signal of a kill");
    } finally {
      this.#done();
    }
  }
}
