import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import type { Logger } from "pino";
import { TimedOut, Unavailable, Unsupported, WrongState } from "../errors/index.ts";
import { findGpuFile, PRELOADED } from "../runtime/gpu-injection.ts";

/*
 * The interception library in a process, spoken to by cedana-gpu-control (addon/gpu/PROTOCOL.md): what the process has on its GPUs, and
 * keeping it from calling the driver. What it says comes out of a container: it is good for messages and for a look ahead, and nothing
 * that must be true for the host's sake may hang on it.
 */

interface Amount {
  count: number;
  bytes: number;
}

/** What a process has, as its library has counted. */
export interface InterceptionReport {
  state: "running" | "quiescing" | "quiesced";
  /** in the process's own namespace */
  pid: number;
  /** as the driver has it: 13000 is 13.0 */
  driverVersion: number;
  callsInFlight: number;
  /** things that found no place in its tables: then the amounts are too small */
  untracked: number;
  traceDropped: number;
  devices: {
    index: number;
    uuid: string;
    memory: Partial<Record<"device" | "pool" | "managed" | "virtual" | "array", Amount>>;
  }[];
  host: Partial<Record<"pinned" | "registered", Amount>>;
  objects: Record<"contexts" | "streams" | "events" | "modules" | "graphs", number>;
  /** what the driver's checkpoint takes not at all, or not in every version */
  blockers: { kind: string; what: string; count: number }[];
}

/** Exit statuses of the program: see its first comment. */
const exits = { refused: 1, noMailbox: 3, silent: 4 } as const;
/** Beyond what the program itself waits: it must have gone by then. */
const PATIENCE_MS = 5_000;

/** @returns undefined for a process without the library, or that hasn't called the driver yet */
export async function interceptionReport(
  pid: number,
  options: { deadlineMs?: number; signal?: AbortSignal } = {},
): Promise<InterceptionReport | undefined> {
  return await control(["report", String(pid)], { deadlineMs: 1_000, ...options });
}

/**
 * Holds the process at the boundary of the driver's API: calls that are under way have ended, its GPUs' work is done, and who calls now
 * waits. It goes on by itself after the lease, so that a crash of ours leaves nobody waiting for ever; a frozen process's lease runs on.
 * @returns undefined for a process without the library
 * @throws WrongState when it isn't quiet by the deadline: then it runs on; TimedOut when it doesn't answer
 */
export async function quiesce(
  pid: number,
  options: { deadlineMs: number; leaseMs: number; signal?: AbortSignal },
): Promise<InterceptionReport | undefined> {
  return await control(["quiesce", String(pid), "--lease", String(Math.ceil(options.leaseMs))], options);
}

/** Lets a quiesced process call the driver again; one that isn't quiesced is left as it is. */
export async function resume(pid: number): Promise<InterceptionReport | undefined> {
  return await control(["resume", String(pid)], { deadlineMs: 1_000 });
}

async function control(
  argv: string[],
  { deadlineMs, signal }: { deadlineMs: number; signal?: AbortSignal },
): Promise<InterceptionReport | undefined> {
  const program = findGpuFile("cedana-gpu-control");
  const { status, stdout, stderr } = await new Promise<{
    status: number | null;
    stdout: string;
    stderr: string;
  }>((resolve, reject) => {
    const child = execFile(
      program,
      [...argv, "--deadline", String(Math.ceil(deadlineMs))],
      {
        timeout: deadlineMs + PATIENCE_MS,
        killSignal: "SIGKILL",
        encoding: "utf8",
        ...(signal && { signal }),
      },
      (error, out, err) => {
        if (error && child.exitCode === null && child.signalCode === null && error.code !== "ABORT_ERR")
          reject(new Unavailable(`run ${program}: ${error.message}`, { cause: error }));
        else if (error?.code === "ABORT_ERR") reject(error);
        else resolve({ status: child.exitCode, stdout: out, stderr: err });
      },
    );
  });
  if (status === 0) return JSON.parse(stdout) as InterceptionReport;
  if (status === exits.noMailbox) return undefined;
  const words = stderr.trim().replace(/^cedana-gpu-control: /, "");
  if (status === exits.refused) throw new WrongState(words);
  if (status === exits.silent) throw new TimedOut(words);
  throw new Unavailable(`${program} ${argv.join(" ")} ended with status ${status}: ${words}`);
}

/** For people: "2 of memory given to other processes (IPC)". */
export function blockersOf(report: InterceptionReport): string[] {
  return report.blockers.map(({ what, count }) => (count === 1 ? what : `${what}, ${count} times`));
}

// ---- around the driver's lock ----------------------------------------------------------------------------------------

/** Since r610 the driver takes memory that processes share by IPC. */
const IPC_SINCE = 13020;
const ipc = ["ipcMemory", "ipcEvent", "exportedMemory", "exportedEvent", "importedPool"];

interface NamedProcess {
  readonly pid: number;
  readonly comm: string;
}

function isIntercepted(pid: number): boolean {
  try {
    return readFileSync(`/proc/${pid}/maps`, "utf8").includes(` ${PRELOADED}\n`);
  } catch {
    return false; // it has ended
  }
}

/**
 * Refuses what the driver is known not to checkpoint, by what the processes' libraries have counted: the driver would say so only when
 * asked for it, and leave the process broken.
 * @throws Unsupported naming the process and what it has
 */
export async function refuseUncheckpointable(
  processes: readonly NamedProcess[],
  what: string,
  log: Pick<Logger, "warn">,
): Promise<void> {
  await Promise.all(
    processes.map(async ({ pid, comm }) => {
      if (!isIntercepted(pid)) return;
      const report = await interceptionReport(pid).catch((error: Error) => {
        // It was to help. The driver says the same, only later.
        log.warn({ err: error, pid }, "the GPU interception library of a process can't be asked");
        return undefined;
      });
      const found = (report?.blockers ?? []).filter(
        ({ kind }) => kind === "managed" || (ipc.includes(kind) && report!.driverVersion < IPC_SINCE),
      );
      if (!report || found.length === 0) return;
      throw new Unsupported(
        `process ${pid} (${comm}) of ${what} has on its GPUs what the driver can't checkpoint: ${blockersOf({ ...report, blockers: found }).join("; ")}`,
      );
    }),
  );
}

/**
 * Brings those that have the library to the boundary of the driver's API and holds them there until disposed of: while the driver locks
 * them, none is in the middle of cuInit or of a long call. All at once: they may wait for each other's work. Where that can't be had in time, all run
 * on, and the driver's lock has to do without.
 */
export async function holdAtBoundary(
  processes: readonly NamedProcess[],
  deadlineMs: number,
  log: Pick<Logger, "warn">,
): Promise<AsyncDisposable> {
  const intercepted = processes.filter(({ pid }) => isIntercepted(pid));
  // One that doesn't answer has ended, or goes on when its lease is over.
  const release = async () => await letCallsIn(intercepted);
  const held = await Promise.allSettled(
    intercepted.map(({ pid }) => quiesce(pid, { deadlineMs, leaseMs: deadlineMs + LEASE_MARGIN_MS })),
  );
  const failures = held.filter((result) => result.status === "rejected");
  if (failures.length === 0) return { [Symbol.asyncDispose]: release };
  log.warn(
    { failures: failures.map(({ reason }) => (reason as Error).message) },
    "processes could not be held at the boundary of the GPU driver's API: the driver locks them as they are",
  );
  await release();
  return { [Symbol.asyncDispose]: async () => {} };
}

/** After a dump that was cut off: its hold may still be on. One that doesn't answer goes on when its lease is over. */
export async function letCallsIn(processes: readonly { readonly pid: number }[]): Promise<void> {
  await Promise.all(
    processes.map(async ({ pid }) => {
      if (isIntercepted(pid)) await resume(pid).catch(() => undefined);
    }),
  );
}

/** Beside the driver's lock, for us to say that it is over. */
const LEASE_MARGIN_MS = 10_000;
