import { NotFound, Unavailable } from "../errors/index.ts";
import type { EscalationStep } from "../runtime/kill-policy.ts";
import type { TaskLogger } from "./task-log.ts";

/** What is still to be sent to a process, as the record keeps it. */
export interface PendingEscalation {
  /** "" for the container's init */
  readonly execId: string;
  /** of the first step, milliseconds since 1970 */
  readonly dueAtMs: number;
  readonly steps: readonly EscalationStep[];
}

/**
 * Signals that follow a signal when its process doesn't end (src/runtime/kill-policy.ts). They are on record, so that the next
 * cedanad sends those that are due by then.
 */
export class Escalations {
  readonly #send: (execId: string, signal: number) => Promise<void>;
  readonly #changed: () => void;
  readonly #log: TaskLogger;
  readonly #pending = new Map<string, PendingEscalation & { timer: NodeJS.Timeout }>();

  /** @param changed  the record is to be written */
  constructor(options: {
    send: (execId: string, signal: number) => Promise<void>;
    changed: () => void;
    log: TaskLogger;
  }) {
    this.#send = options.send;
    this.#changed = options.changed;
    this.#log = options.log;
  }

  /** A process that is being escalated stays at that: a second TERM prolongs nothing. */
  begin(execId: string, steps: readonly EscalationStep[]): void {
    if (steps.length > 0 && !this.#pending.has(execId))
      this.#arm({ execId, steps, dueAtMs: Date.now() + steps[0]!.afterMs });
  }

  revive(records: readonly PendingEscalation[]): void {
    for (const record of records) this.#arm(record);
  }

  /** The process has ended. */
  end(execId: string): void {
    clearTimeout(this.#pending.get(execId)?.timer);
    this.#pending.delete(execId);
  }

  get pending(): boolean {
    return this.#pending.size > 0;
  }

  records(): PendingEscalation[] {
    return [...this.#pending.values()].map(({ execId, dueAtMs, steps }) => ({ execId, dueAtMs, steps }));
  }

  #arm(pending: PendingEscalation): void {
    // A time of the wall clock that has jumped must not put the step off for ever.
    const waitMs = Math.min(Math.max(pending.dueAtMs - Date.now(), 0), pending.steps[0]!.afterMs);
    const timer = setTimeout(() => void this.#step(pending), waitMs);
    this.#pending.set(pending.execId, { ...pending, timer });
  }

  async #step({ execId, steps: [step, ...rest] }: PendingEscalation): Promise<void> {
    this.#pending.delete(execId);
    if (rest.length > 0) this.#arm({ execId, steps: rest, dueAtMs: Date.now() + rest[0]!.afterMs });
    this.#changed();
    try {
      this.#log.info({ execId, signal: step!.signal }, "the grace is over: the next signal follows");
      await this.#send(execId, step!.signal);
    } catch (error) {
      this.end(execId);
      // Ended meanwhile, or its keeper has gone with it: nobody is left to be signalled.
      if (!(error instanceof NotFound || error instanceof Unavailable))
        this.#log.error({ err: error, execId, signal: step!.signal }, "send the next signal of a kill");
    }
  }
}
