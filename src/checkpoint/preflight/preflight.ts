import { setImmediate as nextTurn } from "node:timers/promises";
import { NotFound } from "../../errors/index.ts";
import { takeInventory } from "../../linux/inventory.ts";
import type { Finding, Requirement } from "./catalogue.ts";
import { Context, type PreflightInput } from "./context.ts";
import {
  establishedTcp,
  externalMounts,
  listeningSockets,
  memoryToDump,
  outsideTerminals,
  outsideUnixPeers,
} from "./facts.ts";
import { checkFiles, checkMappings, checkTerminals } from "./files.ts";
import { checkMounts, checkWatches } from "./mounts.ts";
import {
  checkLeaders,
  checkNamespaces,
  checkOutside,
  checkSession,
  checkSharedMemory,
  checkStopped,
  checkTracers,
  checkUninterruptible,
} from "./processes.ts";
import { checkCriu, checkSpace } from "./resources.ts";
import { checkSockets } from "./sockets.ts";

export type { CriuFacts, PreflightInput, PreflightPolicy } from "./context.ts";

/**
 * What will a dump of these processes trip over, and which options will it need? Asked before anything is frozen, of
 * processes that run: what they do meanwhile may be missed, so CRIU's own refusals must still be handled.
 *
 * Names everything, not the first. What CRIU can dump is not reported; what can't be seen from outside stays unknown (see
 * docs/preflight.md).
 */
export interface PreflightReport {
  /** no blocker, and every option that is needed is set */
  readonly ok: boolean;
  readonly blockers: readonly Finding[];
  readonly requirements: readonly Requirement[];
  readonly notes: readonly Finding[];
  readonly facts: PreflightFacts;
}

export interface PreflightFacts {
  readonly rootPid: number;
  readonly processes: number;
  readonly threads: number;
  /** of processes that the dump leaves out */
  readonly leftOut: number;
  readonly openFiles: number;
  readonly memoryBytes: number;
  /** at the destination */
  readonly freeBytes?: number;
  readonly listening: readonly string[];
  readonly established: readonly {
    readonly local: string;
    readonly remote: string;
    readonly state: string;
  }[];
  readonly inFlight: readonly string[];
  readonly outsideUnixPeers: readonly { readonly pid: number; readonly fd: number; readonly type: string }[];
  readonly externalMounts: readonly { readonly mountPoint: string; readonly type: string }[];
  readonly outsideTerminals: readonly { readonly pid: number; readonly fd: number; readonly path: string }[];
  readonly inventoryMs: number;
  readonly totalMs: number;
}

/** All of them, in the order in which they report. */
const checks = [
  checkCriu,
  checkTracers,
  checkLeaders,
  checkUninterruptible,
  checkStopped,
  checkSharedMemory,
  checkNamespaces,
  checkSession,
  checkOutside,
  checkFiles,
  checkMappings,
  checkTerminals,
  checkWatches,
  checkSockets,
  checkMounts,
] as const satisfies readonly ((context: Context) => void | Promise<void>)[];

/**
 * @throws NotFound when no process of the container is left
 */
export async function preflight(
  input: PreflightInput,
  options: { signal?: AbortSignal } = {},
): Promise<PreflightReport> {
  const began = performance.now();
  const context = await inspect(input, options);
  for (const check of checks) {
    options.signal?.throwIfAborted();
    await check(context);
    await context.breathe();
  }
  const freeBytes = await checkSpace(context);
  const findings = context.all();
  const requirements = findings.filter(isRequirement);
  const blockers = findings.filter((finding) => finding.severity === "blocker");
  return {
    ok: blockers.length === 0 && requirements.every((requirement) => requirement.met),
    blockers,
    requirements,
    notes: findings.filter((finding) => finding.severity === "note"),
    facts: await factsOf(context, freeBytes, began),
  };
}

/** The inventory with the questions that can be asked of it, for a dump that only wants to choose its options. */
export async function inspect(
  input: PreflightInput,
  options: { signal?: AbortSignal } = {},
): Promise<Context> {
  const inventory = await takeInventory(input.pids, options);
  await nextTurn();
  const context = new Context(input, inventory);
  if (!context.root)
    throw new NotFound(
      input.rootPid === undefined
        ? `none of ${input.pids.length} processes is there any more`
        : `process ${input.rootPid} has ended`,
    );
  return context;
}

function isRequirement(finding: Finding): finding is Requirement {
  return finding.severity === "needs-option";
}

async function factsOf(
  context: Context,
  freeBytes: number | undefined,
  began: number,
): Promise<PreflightFacts> {
  const { tree, outside, root } = context;
  const listening = listeningSockets(context);
  await context.breathe();
  const established = establishedTcp(context);
  await context.breathe();
  const peers = outsideUnixPeers(context);
  await context.breathe();
  return {
    rootPid: root!.pid,
    processes: tree.length,
    threads: tree.reduce((sum, process) => sum + process.threads, 0),
    leftOut: outside.length,
    openFiles: tree.reduce(
      (sum, process) => sum + process.files.filter(({ what }) => what === "fd").length,
      0,
    ),
    memoryBytes: memoryToDump(context),
    ...(freeBytes !== undefined && { freeBytes }),
    listening: listening.map(({ socket }) => socket.local),
    established: established.map(({ socket: { local, remote, state } }) => ({ local, remote, state })),
    inFlight: listening.filter(({ socket }) => socket.receiveQueue > 0).map(({ socket }) => socket.local),
    outsideUnixPeers: peers.map(({ process, fd, socket }) => ({ pid: process.pid, fd, type: socket.type })),
    externalMounts: externalMounts(context).map(({ mountPoint, type }) => ({ mountPoint, type })),
    outsideTerminals: outsideTerminals(context).map(({ process, file }) => ({
      pid: process.pid,
      fd: file.fd,
      path: file.link,
    })),
    inventoryMs: tenths(context.inventory.tookMs),
    totalMs: tenths(performance.now() - began),
  };
}

const tenths = (ms: number) => Math.round(ms * 10) / 10;
