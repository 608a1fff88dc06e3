import type { Logger } from "pino";
import type { Cgroup } from "../linux/cgroup.ts";
import type { Engine } from "../runtime/engine.ts";
import type { RuntimeOptions } from "../runtime/options.ts";
import type { OciSpec } from "../runtime/spec.ts";
import type { Event } from "./events.ts";
import type { AdoptedExit, Keeper } from "./keeper.ts";
import type { LazyMemory } from "./lazy-memory.ts";
import type { Process } from "./process.ts";
import type { TaskLogger } from "./task-log.ts";

/**
 * A container as the parts of its task see it: what stays the same from Create to Delete, and what each part needs done of the whole.
 * A `Task` is one, and is made of the parts.
 */
export interface Container {
  readonly id: string;
  /** absolute path of its bundle */
  readonly bundle: string;
  readonly namespace: string;
  readonly options: RuntimeOptions;
  readonly engine: Engine;
  readonly init: Process;
  readonly log: TaskLogger;
  readonly pod: TaskPod;
  readonly memory: LazyMemory;
  /** how many restores it has behind it */
  generation: number;
  /** its config.json; undefined: not read yet */
  readonly knownSpec: OciSpec | undefined;
  /** its config.json, read with the first call. @throws what `readSpec` throws */
  spec(): Promise<OciSpec>;
  /** @throws NotFound once it has no cgroup */
  cgroup(): Promise<Cgroup>;
  /** Queues an event for containerd. One whose key was taken before is dropped. */
  publish(key: string, event: Event): void;
  /**
   * Writes the task's record, and tells the keeper which pids it may answer with alone.
   * @returns false when it can't be written (a full disk), or the keeper has gone, which nothing is written without. What has happened has
   *   happened, so the call goes on; only a cedanad that ends before the next record is written makes a difference.
   */
  record(): boolean;
  /** Waits for an action that no call depends on: its failure is logged. @returns whether it succeeded */
  logFailure(what: string, action: Promise<unknown>): Promise<boolean>;
}

/** What a task knows of its pod. */
export interface TaskPod {
  readonly keeper: Keeper;
  readonly namespace: string;
  readonly log: Logger;
  /** containerd's own API; empty: unknown */
  readonly containerdAddress: string;
  /** A path short enough for a unix socket. @param io  key of the io object that gets the pty master */
  consoleSocketPath(io: string): string;
  publish(containerId: string, key: string, event: Event): void;
  /** The exit of a process that ended before its pid was known; one from before `sinceNs` was another process. */
  takeUnclaimedExit(pid: number, sinceNs: bigint): AdoptedExit | undefined;
  /** Runs the action when the response to the request is on its way; at once where it has gone out. */
  afterResponse(request: number, action: () => void): void;
}
