import { execFile } from "node:child_process";
import { TimedOut, Unavailable, WrongState } from "../errors/index.ts";
import { findGpuFile } from "../runtime/gpu-injection.ts";

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
  return await control(["quiesce", String(pid), "--lease", String(options.leaseMs)], options);
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
      [...argv, "--deadline", String(deadlineMs)],
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

/** Bytes on all devices. */
export function deviceBytes(report: InterceptionReport): number {
  return report.devices
    .flatMap(({ memory }) => Object.values(memory))
    .reduce((sum, { bytes }) => sum + bytes, 0);
}

/** For people: "2 of memory given to other processes (IPC)". */
export function blockersOf(report: InterceptionReport): string[] {
  return report.blockers.map(({ what, count }) => (count === 1 ? what : `${what}, ${count} times`));
}
