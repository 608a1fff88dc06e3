import { existsSync, readdirSync, readFileSync, readlinkSync } from "node:fs";

// One process as /proc shows it. Everything here reads one or two tiny procfs files synchronously: that takes
// about 20 us, which is less than a round trip through the thread pool, and procfs never waits for a disk.
//
// A pid alone names nothing: it is reused. (pid, start time) names a process within one boot, and
// (boot id, pid, start time) for ever; that is what goes into a journal.

/** The kinds of namespaces under /proc/PID/ns. */
export type NamespaceKind = "mnt" | "pid" | "net" | "ipc" | "uts" | "user" | "cgroup" | "time";

/** What /proc/PID/stat says, the fields that we use. */
export interface ProcessStat {
  readonly pid: number;
  /** Name of the executable, cut to 15 bytes; it may hold spaces and parentheses. */
  readonly comm: string;
  /** R running, S sleeping, D waiting for a device, T stopped, t traced, Z zombie, X dead, I idle, P parked. */
  readonly state: string;
  readonly parentPid: number;
  readonly processGroup: number;
  readonly session: number;
  /** Device number of the controlling terminal, 0 for none. */
  readonly terminal: number;
  /** Clock ticks since boot (100 a second on every Linux that we know). */
  readonly startTime: number;
}

/** Reads a procfs file; undefined when the process has ended. */
function readProc(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch (err) {
    if (hasEnded(err)) return undefined;
    throw err;
  }
}

// ENOENT: no such process when we opened. ESRCH: it ended between open and read.
function hasEnded(err: unknown): boolean {
  const code = (err as NodeJS.ErrnoException).code;
  return code === "ENOENT" || code === "ESRCH";
}

/**
 * Parses /proc/PID/stat.
 *
 * The second field is the command in parentheses, unescaped, so a process may call itself `a) R 1 (b`: the
 * fields that follow begin after the *last* closing parenthesis.
 * Source: proc_pid_stat(5).
 */
export function parseStat(text: string): ProcessStat {
  const open = text.indexOf("(");
  const close = text.lastIndexOf(")");
  // Fields from the third on; rest[0] is field 3.
  const rest = text.slice(close + 2).split(" ");
  return {
    pid: Number(text.slice(0, open)),
    comm: text.slice(open + 1, close),
    state: rest[0] ?? "?",
    parentPid: Number(rest[1]),
    processGroup: Number(rest[2]),
    session: Number(rest[3]),
    terminal: Number(rest[4]),
    startTime: Number(rest[19]),
  };
}

/** /proc/PID/stat, or undefined when there is no such process. */
export function processStat(pid: number): ProcessStat | undefined {
  const text = readProc(`/proc/${pid}/stat`);
  return text === undefined ? undefined : parseStat(text);
}

/** State of one thread, a letter as in `ProcessStat`; undefined when it has ended. */
export function threadState(pid: number, tid: number): string | undefined {
  const text = readProc(`/proc/${pid}/task/${tid}/stat`);
  return text === undefined ? undefined : parseStat(text).state;
}

/** When the process started, in clock ticks since boot (field 22 of stat); undefined when it has ended. */
export function startTime(pid: number): number | undefined {
  return processStat(pid)?.startTime;
}

/**
 * Whether the process is still the one that started then, and still runs. A zombie has ended: what is left
 * of it is an exit status that its parent has not read.
 * @param started  from `startTime`; undefined accepts any process with this pid
 */
export function isAlive(pid: number, started?: number): boolean {
  const stat = processStat(pid);
  if (stat === undefined || stat.state === "Z" || stat.state === "X") return false;
  return started === undefined || stat.startTime === started;
}

/** Identifies this boot: pids and start times of another one mean nothing here. */
export function bootId(): string {
  cachedBootId ??= readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
  return cachedBootId;
}
let cachedBootId: string | undefined;

/** Inode of a namespace, as `ls -l /proc/PID/ns` shows it in brackets; undefined when the process has ended. */
export function namespaceInode(pid: number | "self", kind: NamespaceKind): number | undefined {
  try {
    return inodeInBrackets(readlinkSync(`/proc/${pid}/ns/${kind}`));
  } catch (err) {
    if (hasEnded(err)) return undefined;
    throw err;
  }
}

/** Number in a link such as `mnt:[4026531841]` or `socket:[1234]`. */
export function inodeInBrackets(link: string): number | undefined {
  const found = /\[(\d+)\]$/.exec(link);
  return found ? Number(found[1]) : undefined;
}

/** Inode of our own mount namespace. */
export function ownMountNamespace(): number {
  const inode = namespaceInode("self", "mnt");
  if (inode === undefined) throw new Error("/proc/self/ns/mnt is missing: is /proc mounted?");
  return inode;
}

/**
 * The pid in each pid namespace that the process is in, ours first, its own last (NSpid of /proc/PID/status);
 * empty when it has ended.
 */
export function pidsInNamespaces(pid: number): number[] {
  return idsInNamespaces(pid, "NSpid");
}

/** As `pidsInNamespaces`, of one of its threads, or the id of its process group. */
export function idsInNamespaces(pid: number, field: "NSpid" | "NSpgid", thread = pid): number[] {
  const status = readProc(`/proc/${pid}/task/${thread}/status`) ?? "";
  const line = new RegExp(`^${field}:\\s*(.*)$`, "m").exec(status);
  return line?.[1] ? line[1].trim().split(/\s+/).map(Number) : [];
}

/** The process that traces this one, 0 for none; undefined when it has ended. */
export function tracerPid(pid: number): number | undefined {
  const text = readProc(`/proc/${pid}/status`);
  return text === undefined ? undefined : Number(/^TracerPid:\s*(\d+)$/m.exec(text)?.[1] ?? 0);
}

/** Every process that we see. */
export function allPids(): number[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map(Number);
}

/** Ids of the process's threads; empty when it has ended. */
export function threadsOf(pid: number): number[] {
  try {
    return readdirSync(`/proc/${pid}/task`).map(Number);
  } catch (err) {
    if (hasEnded(err)) return [];
    throw err;
  }
}

/** The process's child processes; of all its threads, because each thread has its own children. */
export function childrenOf(pid: number): number[] {
  return threadsOf(pid).flatMap((thread) =>
    (readProc(`/proc/${pid}/task/${thread}/children`) ?? "").split(" ").filter(Boolean).map(Number),
  );
}

/**
 * A process and all below it, each before its children. By parentage: whoever lost his parent is somebody else's.
 * @param breathe  called between processes, of which a container may have tens of thousands
 */
export async function processTree(
  pid: number,
  breathe: () => Promise<void> | undefined,
): Promise<ProcessStat[]> {
  const found: ProcessStat[] = [];
  const left = [pid];
  for (let next = left.pop(); next !== undefined; next = left.pop()) {
    const pause = breathe();
    if (pause) await pause;
    const stat = processStat(next);
    if (!stat) continue; // it has ended meanwhile
    found.push(stat);
    for (const child of childrenOf(next).reverse()) left.push(child);
  }
  return found;
}

/** The program that a process runs, as it is installed now; where that has gone, a path to the one that runs. */
export async function programOf(pid: number): Promise<string> {
  const exe = `/proc/${pid}/exe`;
  const installed = readlinkSync(exe).replace(/ \(deleted\)$/, ""); // replaced by an upgrade
  return existsSync(installed) ? installed : exe;
}

/** The environment that a process was started with; empty when it has ended. */
export function environmentOf(pid: number): Record<string, string> {
  const entries = (readProc(`/proc/${pid}/environ`) ?? "").split("\0").filter((entry) => entry.includes("="));
  return Object.fromEntries(
    entries.map((entry) => [entry.slice(0, entry.indexOf("=")), entry.slice(entry.indexOf("=") + 1)]),
  );
}
