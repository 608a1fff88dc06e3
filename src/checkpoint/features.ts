import type { Logger } from "pino";
import { Feature, isListOf } from "../features/registry.ts";

/*
 * The places in the chains where plugins take part. An adapter is a step like ours: it checks, prepares, calls `next` for all that
 * follows, and undoes its own work when that fails. It gets a view of the dump instead of the chain's context, so that the chain can
 * change without them.
 */

/** What an adapter knows of the dump. */
export interface PluginDump {
  readonly containerId: string;
  /** containerd's; "" for a container of cedana-runtime */
  readonly namespace: string;
  readonly engine: { readonly name: string; readonly version: string; readonly path: string };
  /** of the container's first process, on the host */
  readonly initPid: number;
  readonly leaveRunning: boolean;
  /** the checkpoint as it is being made: a file that an adapter writes here is part of it. Name it after the plugin */
  readonly directory: string;
  /** where CRIU's images come, in the same directory or below it */
  readonly imagePath: string;
  /** a cedanad before us began this dump, and may have called the adapter */
  readonly repeated: boolean;
  /** aborted when nobody waits for the dump any more */
  readonly signal: AbortSignal;
  readonly log: Pick<Logger, "info" | "warn" | "error">;
  /** every process of the container, on the host */
  pids(): Promise<number[]>;
}

export interface DumpAdapter {
  /** for times, errors and logs, after the plugin's name */
  readonly name: string;
  /** whether it has to do with this container; default: yes */
  when?(dump: PluginDump): boolean;
  /** An error refuses the dump, and the container goes on as it was. `next` is called once, and what it throws is thrown on. */
  run(dump: PluginDump, next: () => Promise<void>): Promise<void>;
}

const isAdapters = isListOf({ name: "string", run: "function" });

export const dumpFeatures = {
  /** while the container runs, before anything is looked at */
  dumpMiddleware: new Feature<readonly DumpAdapter[]>("Dump middleware", isAdapters),
  /** right before CRIU: the container stands still, and every moment counts */
  dumpMiddlewareLate: new Feature<readonly DumpAdapter[]>("Dump middleware (late)", isAdapters),
} as const;

/** What an adapter knows of a restore. */
export interface PluginRestore {
  /** for messages: "task c1" */
  readonly what: string;
  /** the new container's */
  readonly bundle: string;
  /** the checkpoint, as asked for; of an archive, where it is unpacked */
  readonly directory: string;
  readonly imagePath: string;
  /** of the container that was dumped; undefined where another program took the checkpoint */
  readonly dumped: { readonly containerId: string; readonly namespace: string } | undefined;
  /** a cedanad before us began this restore, and may have called the adapter */
  readonly repeated: boolean;
  readonly signal: AbortSignal;
  readonly log: Pick<Logger, "info" | "warn" | "error">;
}

export interface RestoreAdapter {
  readonly name: string;
  when?(restore: PluginRestore): boolean;
  /** An error refuses the restore, and nothing of the new container is left. */
  run(restore: PluginRestore, next: () => Promise<void>): Promise<void>;
}

export const restoreFeatures = {
  /** the checkpoint is known to fit; nothing of the container is made yet */
  restoreMiddleware: new Feature<readonly RestoreAdapter[]>("Restore middleware", isAdapters),
  /** right before CRIU; on the way back the container runs */
  restoreMiddlewareLate: new Feature<readonly RestoreAdapter[]>("Restore middleware (late)", isAdapters),
} as const;
