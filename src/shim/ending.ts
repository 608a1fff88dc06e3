import { setTimeout as sleep } from "node:timers/promises";
import { Cancelled } from "../errors/index.ts";
import { isAlive } from "../linux/proc.ts";
import type { EscalationStep } from "../runtime/kill-policy.ts";
import type { EndingRecord } from "./journal.ts";
import type { Process } from "./process.ts";
import type { TaskLogger } from "./task-log.ts";

const SIGKILL = 9;
/** The kernel needs a moment to end what CRIU has killed, and the keeper to tell. */
const END_AFTER_DUMP_MS = 5_000;
const LOOK_MS = 10;

interface Owner {
  /** for messages: "task c1" */
  readonly what: string;
  readonly log: TaskLogger;
  readonly init: Pick<Process, "pid" | "state" | "exit" | "heldExit">;
  /** who tells of the init's end */
  readonly keeper: { readonly connected: boolean };
  /** to be written down before anything else happens */
  changed(): void;
  /** takes it; the container ends with it */
  checkpoint(signal: AbortSignal): Promise<void>;
  /** what the container gets when that has failed */
  send(signal: number, escalation: readonly EscalationStep[]): Promise<void>;
  /** an exit need not be held any more */
  over(): void;
}

/**
 * A checkpoint instead of a signal (`cedana.io/checkpoint-on`). The kill is answered at once, as that of a signal is. The dump ends the
 * container, so that nothing of it runs on; its exit is told when the checkpoint is in its place, with the signal's status, so that whoever
 * starts the next container upon it finds the checkpoint. That it is being ended is on record: the next cedanad after a crash goes on. When
 * it fails, the container gets the signal, and the next one begins anew. A SIGKILL meanwhile ends container and dump.
 */
export class Ending {
  readonly #owner: Owner;
  #record: EndingRecord | undefined;
  #isOver = false;
  #givenUp = new AbortController();

  constructor(owner: Owner) {
    this.#owner = owner;
  }

  /** of one that is under way, or has ended the container */
  get record(): EndingRecord | undefined {
    return this.#record;
  }

  /** Its init's exit is to be held until it is over. */
  get isUnderWay(): boolean {
    return this.#record !== undefined && !this.#isOver;
  }

  /** What init ends with: CRIU ends what it has dumped by SIGKILL. */
  statusOf(status: number): number {
    return this.#record && !this.#record.killed && status === 128 + SIGKILL ? this.#record.status : status;
  }

  /** @returns false when it can't be checkpointed now: then the signal is all there is */
  begin(ending: Omit<EndingRecord, "killed">): boolean {
    if (this.#record) return true; // a second signal changes nothing
    const { exit, state } = this.#owner.init;
    if (exit || (state !== "running" && state !== "paused")) return false;
    this.#record = { ...ending, killed: false };
    this.#isOver = false;
    this.#givenUp = new AbortController();
    this.#owner.changed();
    void this.#end(this.#owner.checkpoint(this.#givenUp.signal));
    return true;
  }

  giveUp(): void {
    if (!this.#record || this.#isOver) return;
    this.#record = { ...this.#record, killed: true };
    this.#givenUp.abort(new Cancelled(`${this.#owner.what} is killed`));
    this.#owner.changed();
  }

  /** As the cedanad before us has written it down. */
  revive(record: EndingRecord | undefined): void {
    this.#record = record;
  }

  /** Goes on with it. @param resumed  when a checkpoint that was cut off by a crash has come to its end */
  resume(resumed: Promise<void> | undefined): void {
    if (this.#record) void this.#end(this.#awaitEnd(resumed));
  }

  async #awaitEnd(resumed: Promise<void> | undefined): Promise<void> {
    await resumed;
    const { init, keeper } = this.#owner;
    const deadline = resumed ? Date.now() + END_AFTER_DUMP_MS : 0;
    while (!init.exit && !init.heldExit && keeper.connected) {
      if (isAlive(init.pid) && Date.now() > deadline)
        throw new Cancelled("cedanad ended before the checkpoint was whole");
      await sleep(LOOK_MS);
    }
  }

  async #end(checkpoint: Promise<void>): Promise<void> {
    const { init, log } = this.#owner;
    const { signal, escalation } = this.#record!;
    try {
      await checkpoint;
    } catch (error) {
      const ended = init.exit !== undefined || init.heldExit !== undefined;
      log.warn(
        { err: error, signal },
        ended ? "not checkpointed at its end" : "not checkpointed instead of a signal: it gets the signal",
      );
      if (!ended) {
        this.#record = undefined;
        this.#owner.changed();
        await this.#owner.send(signal, escalation);
      }
    } finally {
      this.#isOver = true;
      this.#owner.over();
    }
  }
}
