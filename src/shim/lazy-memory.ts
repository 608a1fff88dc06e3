import type { LazyTarget } from "../checkpoint/lazy/begin.ts";
import type { PageDaemon, PageDaemonHost, PageDaemonRecord } from "../checkpoint/lazy/page-daemon.ts";
import { messageOf, WrongState } from "../errors/index.ts";
import type { TaskLogger } from "./task-log.ts";

/**
 * filling: the container runs, and a page daemon puts memory behind it. filled: it did, and has ended. eager: it should have, but was
 * restored in the ordinary way. lost: the daemon ended before it was done, so the container is killed.
 */
export type LazyState = "filling" | "filled" | "eager" | "lost";

export interface LazyRecord {
  state: LazyState;
  /** why it is eager, or lost */
  reason?: string;
  /** while it is there */
  daemon?: PageDaemonRecord;
}

interface Owner {
  readonly signal: PageDaemonHost["signal"];
  readonly log: TaskLogger;
  /** to be written down before anything else happens */
  changed(): void;
  /** All of it is there, and the start on record: what the restore was made from isn't needed any more. */
  filled(): Promise<void>;
  /** Its memory can't be had any more: it must not live on. Called again by the next cedanad, if we end meanwhile. */
  kill(): Promise<void>;
}

/**
 * The memory of a task that was restored lazily: who waits for it, and what happens when it doesn't come. The page daemon is a child of
 * the keeper and outlives us; what becomes of it while no cedanad is there, the next one reads in the files of the daemon's guard.
 */
export class LazyMemory {
  readonly #owner: Owner;
  #record: LazyRecord | undefined;
  #daemon: PageDaemon | undefined;
  /** resolved when the daemon's end has been dealt with */
  #settled: Promise<void> = Promise.resolve();
  #ended = false;
  #ending: Promise<void> | undefined;
  /** the start is on record: it won't be repeated, and a repetition needs nothing of the daemon's any more */
  #started = false;

  constructor(owner: Owner) {
    this.#owner = owner;
  }

  /** undefined for a container that isn't, and wasn't to be, restored lazily */
  get record(): LazyRecord | undefined {
    return this.#record;
  }

  /** For the chain of the restore, which starts the daemon. */
  target(userNamespace: boolean, spawn: PageDaemonHost["spawn"]): LazyTarget {
    return {
      userNamespace,
      spawn,
      signal: this.#owner.signal,
      begun: (daemon) => {
        this.#settled = this.#begun(daemon);
      },
      undone: () => {
        this.#daemon = undefined;
        this.#set(undefined);
      },
      refused: (reason) => this.#set({ state: "eager", reason }),
    };
  }

  /** What the cedanad before us has written down. @param started  the start of the container is on record */
  async revive(record: LazyRecord, started: boolean): Promise<void> {
    this.#record = record;
    this.#started = started;
    if (!record.daemon) return;
    const daemon = import("../checkpoint/lazy/page-daemon.ts").then(({ PageDaemon }) =>
      PageDaemon.revive({ signal: this.#owner.signal }, record.daemon!),
    );
    // Set at once: whoever asks whether memory is whole must wait for this.
    if (record.state === "filled") this.#settled = this.#reviveFilled(daemon);
    else
      this.#settled = daemon.then(async (revived) => {
        if (this.#record === record) await this.#begun(revived); // else the repeated start was quicker
      });
    await this.#settled;
  }

  /** What it has left may be gone already, and says nothing of how it ended. */
  async #reviveFilled(daemon: Promise<PageDaemon>): Promise<void> {
    this.#daemon ??= await daemon;
    if (this.#started) await this.#discard();
  }

  /**
   * Waits until all memory is there: before that a dump would be incomplete, without a word of CRIU's.
   * @throws WrongState when it will never be
   */
  async whole(signal?: AbortSignal): Promise<void> {
    if (this.#record?.state === "filling") this.#owner.log.info("waits until the memory has been filled");
    const aborted = Promise.withResolvers<never>();
    aborted.promise.catch(() => undefined);
    const onAbort = () => aborted.reject(signal?.reason);
    signal?.addEventListener("abort", onAbort, { once: true });
    try {
      signal?.throwIfAborted();
      await Promise.race([this.#settled, aborted.promise]);
    } finally {
      signal?.removeEventListener("abort", onAbort);
    }
    if (this.#record?.state === "lost")
      throw new WrongState(`its memory was not filled after a lazy restore: ${this.#record.reason}`);
  }

  /** The start is on record. */
  started(): void {
    if (this.#started) return;
    this.#started = true;
    if (this.#record?.state === "filled") void this.#discard();
  }

  /** The container has ended: nobody needs the daemon any more. */
  async end(): Promise<void> {
    this.#ended = true;
    this.#ending ??= this.#stop();
    await this.#ending;
  }

  async #stop(): Promise<void> {
    if (!this.#daemon || !this.#record) return;
    await this.#daemon.stop();
    this.#daemon = undefined;
    const { state, reason } = this.#record;
    this.#set(state === "filling" ? undefined : { state, ...(reason !== undefined && { reason }) });
  }

  /** @returns when its end has been dealt with */
  #begun(daemon: PageDaemon): Promise<void> {
    const since = performance.now();
    this.#daemon = daemon;
    this.#set({ state: "filling", daemon: daemon.record });
    return daemon.ended.then(async (end) => {
      if (this.#daemon !== daemon || this.#ended) return; // a failed restore's, or the container has ended
      if (end.filled) {
        this.#owner.log.info({ ms: Math.round(performance.now() - since) }, "memory filled");
        this.#set({ state: "filled", daemon: daemon.record });
        if (this.#started) await this.#discard();
        return;
      }
      const reason = `the page daemon ${end.why}`;
      this.#owner.log.error({ reason }, "memory can't be filled: the container is killed; its images stay");
      this.#set({ state: "lost", reason, daemon: daemon.record });
      await this.#owner
        .kill()
        .catch((error: unknown) =>
          this.#owner.log.error({ err: messageOf(error) }, "kill a container whose memory can't be filled"),
        );
    });
  }

  /** What the daemon of a filled memory leaves is removed. */
  async #discard(): Promise<void> {
    try {
      await this.end();
      await this.#owner.filled();
    } catch (error) {
      this.#owner.log.warn({ err: error }, "remove what a page daemon has left");
    }
  }

  #set(record: LazyRecord | undefined): void {
    this.#record = record;
    this.#owner.changed();
  }
}
