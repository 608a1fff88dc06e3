import { execFile } from "node:child_process";
import { readdir, readlink } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import type { Logger } from "pino";
import { commandLineOf, isFromHere } from "../linux/command-line.ts";
import { childrenOf, isAlive, processStat, startTime } from "../linux/proc.ts";
import { Slices } from "../linux/slices.ts";

// What is left of a CRIU whose caller was killed, or that was killed itself: it goes on alone, or its half-made processes wait for it.

const POLL_MS = 20;

/**
 * CRIU's processes that work in a directory: CRIU itself, its helpers, and processes that it is about to restore, which are still it. They
 * have gone there, and all have its log open, which counts where CRIU looks into a container's mounts and is elsewhere meanwhile.
 * @param workPath  CRIU's work directory, absolute
 * @param ancestor  only those that descend from it
 */
export async function criuProcesses(workPath: string, ancestor?: number): Promise<number[]> {
  return await processesThat(
    async (pid) => (await isCriuIn(pid, workPath)) && (ancestor === undefined || descendsFrom(pid, ancestor)),
  );
}

/**
 * Waits until no process works on images any more, neither an engine that was told to nor the CRIU that it left behind: after a crash,
 * nobody else knows of them. CRIU is never ended: it holds the container's processes.
 * @param path  directory of the images, or above it; one that nobody else has, because of the uuid in it
 */
export async function endOfWriters(path: string): Promise<void> {
  const isWriter = async (pid: number) =>
    (isFromHere(pid) && (await commandLineOf(pid)).includes(path)) || (await isCriuIn(pid, path));
  // Looked for again: an engine that has ended may have started CRIU before.
  for (let left = await processesThat(isWriter); left.length > 0; left = await processesThat(isWriter))
    for (const pid of left) {
      const started = startTime(pid);
      while (started !== undefined && isAlive(pid, started)) await pause();
    }
}

async function processesThat(is: (pid: number) => Promise<boolean>): Promise<number[]> {
  const found: number[] = [];
  const { breathe } = new Slices(); // there may be tens of thousands, and most are told by a file of /proc, at once
  for (const name of await readdir("/proc")) {
    const pid = Number(name);
    if (pid > 0 && (await is(pid))) found.push(pid);
    const pause = breathe();
    if (pause) await pause;
  }
  return found;
}

async function isCriuIn(pid: number, directory: string): Promise<boolean> {
  if (!/^criu/.test(processStat(pid)?.comm ?? "")) return false;
  const isIn = (path: string) => path === directory || path.startsWith(`${directory}/`);
  try {
    if (isIn(await readlink(`/proc/${pid}/cwd`))) return true;
    for (const fd of await readdir(`/proc/${pid}/fd`))
      if (isIn(await readlink(`/proc/${pid}/fd/${fd}`).catch(() => ""))) return true; // closed
  } catch {
    // it has ended
  }
  return false;
}

/** Whether a process is another one's child, grandchild and so on. */
export function descendsFrom(pid: number, ancestor: number): boolean {
  let at = processStat(pid)?.parentPid;
  while (at !== undefined && at > 1 && at !== ancestor) at = processStat(at)?.parentPid;
  return at === ancestor;
}

/**
 * Waits until CRIU has done with its work in a directory. Meanwhile it holds the processes that it dumps: killed, it would leave them with
 * its code in them.
 * @returns false when it is still there at the end of the time
 */
export async function waitForCriu(workPath: string, timeoutMs: number): Promise<boolean> {
  for (const until = Date.now() + timeoutMs; ; await pause()) {
    if ((await criuProcesses(workPath)).length === 0) return true;
    if (Date.now() >= until) return false;
  }
}

/** Kills CRIU in the middle of a restore, with what it has made so far. @returns what is still there after some seconds */
export async function killCriu(workPath: string, ancestor?: number): Promise<number[]> {
  for (const until = Date.now() + 5_000; ; await pause()) {
    const left = await criuProcesses(workPath, ancestor);
    if (left.length === 0 || Date.now() >= until) return left;
    for (const pid of left) kill(pid);
  }
}

const run = promisify(execFile);

/** What CRIU's unlocking does: with iptables-restore, and where that is not the lock, with nft. */
const unlocking = String.raw`
for restore in iptables-restore ip6tables-restore; do
  printf '*filter\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\n-F CRIU\n-X CRIU\nCOMMIT\n' | $restore --wait --noflush
done
nft list tables inet | sed -nE 's/^table inet (CRIU-[0-9]+)$/\1/p' | while read -r table; do nft delete table inet "$table"; done
exit 0
`;

/**
 * Lets packets into a network namespace again, where CRIU was killed while it kept them away.
 * @param pid  a process in it
 * @throws when it can't be entered. What wasn't locked is no error
 */
export async function unlockNetwork(pid: number): Promise<void> {
  await run("nsenter", ["--target", String(pid), "--net", "sh", "-c", unlocking], { timeout: 30_000 });
}

const WATCH_MS = 500;

export interface CriuWatch {
  /** of the engine, which is told by the work path in its command line */
  readonly parent: number;
  /** CRIU's work directory */
  readonly workPath: string;
  /** ends what CRIU has left; called with the engine's other children */
  readonly onDeath: (pids: number[]) => Promise<void>;
  readonly log: Pick<Logger, "warn" | "error">;
}

/**
 * Runs an engine, and notices a CRIU that has died under it. What CRIU has begun (a container's processes at a restore, a look at the
 * kernel before either) holds the connection that the engine listens on, so that the engine would wait for ever.
 */
export async function whileWatchingCriu<T>(watch: CriuWatch, work: () => Promise<T>): Promise<T> {
  const done = new AbortController();
  const watched = watchForDeadCriu(watch, done.signal);
  try {
    return await work();
  } finally {
    done.abort();
    await watched.catch((cause) => watch.log.warn({ err: cause }, "watch CRIU"));
  }
}

async function watchForDeadCriu(
  { parent, workPath, onDeath, log }: CriuWatch,
  signal: AbortSignal,
): Promise<void> {
  const isDead = (pid: number) => {
    const stat = processStat(pid);
    return stat?.state === "Z" && /^criu/.test(stat.comm);
  };
  for (let rounds = 0; await sleepUnless(signal); ) {
    const engines: number[] = [];
    for (const pid of childrenOf(parent))
      if (isFromHere(pid) && (await commandLineOf(pid)).includes(workPath)) engines.push(pid);
    const bereft = engines.filter((pid) => childrenOf(pid).some(isDead));
    // One that has just ended is about to be waited for.
    rounds = bereft.length > 0 ? rounds + 1 : 0;
    if (rounds < 2 || signal.aborted) continue;
    const pids = bereft.flatMap(childrenOf).filter((pid) => !isDead(pid));
    log.error({ pids, workPath }, "CRIU has died: ending what it has left");
    await onDeath(pids);
  }
}

/** @returns false when the time is up because of the signal */
async function sleepUnless(signal: AbortSignal): Promise<boolean> {
  await sleep(WATCH_MS, undefined, { signal }).catch(() => {}); // it was aborted
  return !signal.aborted;
}

export function kill(pid: number, signal: NodeJS.Signals = "SIGKILL"): void {
  try {
    process.kill(pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
  }
}

const pause = () => new Promise((resolve) => setTimeout(resolve, POLL_MS));
