import { spawn } from "node:child_process";
import { once } from "node:events";
import { stat } from "node:fs/promises";
import { text } from "node:stream/consumers";
import { RuntimeFailed, SyscallFailed, TimedOut } from "../errors/index.ts";
import { hostCgroupVersion, readMembership } from "./cgroup-hierarchy.ts";
import { allPids, idsInNamespaces, namespaceInode, processStat, threadsOf } from "./proc.ts";
import { Slices } from "./slices.ts";

/*
 * Ids in a pid namespace that isn't ours. Whether one is taken, and which the kernel gives next, is found out from within, by a process of
 * ours that is there for a moment (addon/keeper/pids.c).
 */

export interface PidNamespaceState {
  /** the last id that the kernel gave in order */
  readonly last: number;
  /** all ids are below it */
  readonly max: number;
  /** those of the ids asked for that a process, a thread or a process group has */
  readonly taken: readonly number[];
}

const ANSWER_MS = 10_000;

/**
 * @param program    path of our native program
 * @param namespace  path of the namespace: /proc/PID/ns/pid, or where that is mounted
 * @param ids        asked for
 * @param last       the kernel shall go on after it: set before anything is looked at
 * @throws RuntimeFailed in the helper's words, TimedOut, SyscallFailed when it can't be started
 */
export async function askPidNamespace(
  program: string,
  namespace: string,
  ids: readonly number[],
  last?: number,
): Promise<PidNamespaceState> {
  const child = spawn(program, [namespace, ...(last === undefined ? [] : [String(last)])], {
    argv0: "cedana-pids",
    stdio: "pipe",
    timeout: ANSWER_MS,
    killSignal: "SIGKILL",
  });
  child.stdin.on("error", () => {}); // EPIPE: it has ended, and its end says why
  child.stdin.end(ids.map((id) => `${id}\n`).join(""));
  const [answer, words, [status, signal]] = await Promise.all([
    text(child.stdout),
    text(child.stderr),
    once(child, "close"),
  ]).catch((error) => {
    throw SyscallFailed.from(error); // it couldn't be started
  });
  if (signal !== null) throw new TimedOut(`pid namespace ${namespace} doesn't let itself be looked at`);
  if (status !== 0)
    throw new RuntimeFailed(`look at pid namespace ${namespace}: ${words.trim()}`, { exitStatus: status });
  const numbers = (word: string) =>
    [...answer.matchAll(new RegExp(`^${word} (\\d+)$`, "gm"))].map(([, number]) => Number(number));
  return { last: numbers("last")[0]!, max: numbers("max")[0]!, taken: numbers("taken") };
}

/**
 * Who has ids in a namespace, in words for people, by the id. One that lives in a namespace further below is not found.
 * @param namespace  as above
 */
export async function holdersOf(namespace: string, ids: readonly number[]): Promise<Map<number, string>> {
  const { ino } = await stat(namespace);
  const isOurs = namespaceInode("self", "pid") === ino;
  const wanted = new Set(ids);
  const holders = new Map<number, string>();
  const { breathe } = new Slices();
  for (const pid of allPids()) {
    const pause = breathe();
    if (pause) await pause;
    if (!isOurs && !isIn(pid, ino)) continue;
    const idHere = (field: "NSpid" | "NSpgid", thread: number) =>
      idsInNamespaces(pid, field, thread).at(isOurs ? 0 : -1)!;
    const note = async (id: number, what: string) => {
      if (wanted.has(id) && !holders.has(id)) holders.set(id, `${what} ${await describe(pid)}`);
    };
    for (const thread of threadsOf(pid))
      await note(idHere("NSpid", thread), thread === pid ? "process" : "a thread of process");
    await note(idHere("NSpgid", pid), "the process group of");
  }
  return holders;
}

/** Whether a process is in a pid namespace; false where we may not look, as at a first process that is better protected than we are. */
function isIn(pid: number, namespace: number): boolean {
  try {
    return namespaceInode(pid, "pid") === namespace;
  } catch {
    return false;
  }
}

/** "4711 (sleep) in cgroup /kubepods/c1" */
async function describe(pid: number): Promise<string> {
  const membership = await readMembership(pid).catch(() => new Map<string, string>()); // it has ended
  const version2 = (await hostCgroupVersion()) === 2; // there, hierarchies of version 1 don't tell
  const paths = version2 ? [membership.get("") ?? ""] : [...membership.values()];
  const [cgroup] = paths.sort((a, b) => b.length - a.length);
  const found = processStat(pid);
  const zombie = found?.state === "Z" ? `, which has ended and waits for its parent ${found.parentPid}` : "";
  const where = cgroup && cgroup !== "/" ? ` in cgroup ${cgroup}` : "";
  return `${pid} (${found?.comm ?? "it has just ended"})${where}${zombie}`;
}
