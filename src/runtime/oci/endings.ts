import type { Logger } from "pino";
import { Cancelled, NotFound } from "../../errors/index.ts";
import { Pidfd } from "../../linux/addon.ts";
import { isAlive, programOf, startTime } from "../../linux/proc.ts";
import type { KillPlan } from "../kill-policy.ts";
import type { OciCall } from "./call.ts";
import type { Escalator } from "./escalator.ts";
import { isPausedByOwner, type Leftovers } from "./frozen.ts";
import { type EndingRecord, type Marker, markersIn, readMarker, writeMarker } from "./marker.ts";
import { cgroupOf, containerState } from "./state.ts";

/*
 * Containers that are checkpointed instead of being sent a signal (`cedana.io/checkpoint-on`). The kill is answered at once, as that of a
 * signal is, and what follows is cedanad's own work:
 *
 *  1. The cgroup is frozen. From here on no instruction of the container's is executed any more, unless something fails.
 *  2. The dump, into the store; it leaves the container as it is, frozen. Only when the checkpoint is whole and in its place …
 *  3. … the container ends, still frozen, with the status that the signal has by convention, 128 and its number (cedana-exit).
 *
 * Whatever fails before 3, the container is thawed and gets the signal as if there were no annotation, with what follows it. A SIGKILL
 * of the caller's, whose patience is over, ends container and dump: what is half made is removed, older checkpoints stay. That a
 * container is being ended is on record in its marker, and its cgroup stays frozen without us: after a crash of cedanad the next one, whom
 * the next command for a container of ours starts, takes a whole checkpoint to its end, and makes a new one where it isn't whole. A
 * dump that has taken two cedanads along is not begun a third time: then there is the signal.
 */

/** cedanads that may begin the end of a container. */
const TRIES = 2;

export class Endings {
  readonly #log: Logger;
  readonly #escalator: Escalator;
  readonly #done: () => void;
  readonly #jobs = new Map<string, AbortController>();
  #leftovers: Leftovers = async () => undefined;

  /** @param done  called when one is over */
  constructor(log: Logger, escalator: Escalator, done: () => void) {
    this.#log = log;
    this.#escalator = escalator;
    this.#done = done;
  }

  /** How many are under way. */
  get pending(): number {
    return this.#jobs.size;
  }

  /**
   * Takes a kill over.
   * @returns false when the container isn't one that can be checkpointed: then the signal is all there is. One that is being ended stays
   *   at that: a second signal changes nothing
   */
  async begin(call: OciCall, marker: Marker, sent: number, plan: KillPlan): Promise<boolean> {
    if (this.#jobs.has(call.marker)) return true;
    const job = new AbortController();
    this.#jobs.set(call.marker, job); // a second signal at this moment finds it
    let begun = false;
    try {
      const state = await containerState(call);
      const started = state && state.pid > 0 ? startTime(state.pid) : undefined;
      if (!state || started === undefined || !["running", "paused"].includes(state.status)) return false;
      const ending: EndingRecord = {
        pid: state.pid,
        startTime: started,
        sent,
        signal: plan.signal,
        escalation: plan.escalation,
        helper: await programOf(call.pid), // while the wrapper is there
        wasPaused: state.status === "paused" && isPausedByOwner(call.marker),
        tries: 1,
      };
      writeMarker(call.marker, { ...marker, ending });
      begun = true;
      this.#run(call, { ...marker, ending }, job);
      return true;
    } finally {
      if (!begun) this.#jobs.delete(call.marker);
    }
  }

  #run(call: OciCall, marker: Marker & { ending: EndingRecord }, job: AbortController): void {
    const path = call.marker;
    const log = this.#log.child({ container: call.id, command: "kill" });
    void this.#leftovers(path)
      // Loaded with the first: on a node without such containers it would only take memory.
      .then(() => import("./ending.ts"))
      .then(({ end }) => end({ call, marker, log, signal: job.signal }))
      .catch((error) => this.#fallBack(path, marker, error, log))
      .finally(() => {
        this.#jobs.delete(path);
        this.#done();
        const now = readMarker(path); // undefined: deleted meanwhile
        if (now?.ending) writeMarker(path, { ...now, ending: undefined });
      })
      .catch((error) => log.error({ err: error }, "note the end of a container"));
  }

  /** Nobody wants the checkpoint any more: the container is being killed, or has been deleted. */
  abort(path: string): void {
    this.#jobs.get(path)?.abort(new Cancelled("the container is killed"));
  }

  /**
   * What an earlier cedanad has left in the middle.
   * @param leftovers  of the dumps of that cedanad: none is begun before them
   */
  revive(runDirectory: string, leftovers: Leftovers): void {
    this.#leftovers = leftovers;
    for (const path of markersIn(runDirectory)) {
      try {
        const marker = readMarker(path);
        const ending = marker?.ending;
        if (!marker || !ending) continue;
        const { id, root, engine, globalArgv } = marker;
        const call = {
          command: "kill",
          argv: [],
          globalArgv,
          engine,
          root,
          id,
          marker: path,
          cwd: "/",
          pid: process.pid,
        };
        const job = new AbortController();
        this.#jobs.set(path, job);
        const next = { ...marker, ending: { ...ending, tries: (ending.tries ?? TRIES) + 1 } }; // none: of an older cedanad, which noted less
        writeMarker(path, next);
        const tooMany = new Cancelled(`cedanad ended in the middle of it ${TRIES} times`);
        if (next.ending.tries > TRIES) job.abort(tooMany);
        this.#run(call, next, job);
      } catch (error) {
        this.#log.error({ err: error, path }, "take up a container that was being checkpointed at its end");
      }
    }
  }

  async #fallBack(
    path: string,
    marker: Marker & { ending: EndingRecord },
    why: unknown,
    log: Logger,
  ): Promise<void> {
    const { pid, startTime: started, signal, escalation, wasPaused } = marker.ending;
    if (!isAlive(pid, started)) {
      log.warn({ err: why }, "not checkpointed at its end: it has ended");
      return;
    }
    log.warn({ err: why, signal }, "not checkpointed instead of being sent the signal: it gets the signal");
    try {
      using init = Pidfd.open(pid);
      if (startTime(pid) !== started) return;
      init.signal(signal);
      if (!wasPaused) await (await cgroupOf(marker, pid)).thaw();
      this.#escalator.begin(path, marker, pid, escalation);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "ESRCH" || error instanceof NotFound) return; // it has ended
      log.error({ err: error, signal }, "send the signal to a container that could not be checkpointed");
    }
  }
}
