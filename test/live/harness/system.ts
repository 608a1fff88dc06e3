// What the kernel says about the processes, mounts, cgroups and directories of one private containerd.

import {
  existsSync,
  lstatSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmdirSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";

/** Names one private instance: everything of it carries one of these two. */
export interface Instance {
  /** directory below which all of its files are; it is in the environment of every process of it */
  dir: string;
  /** containerd namespace, and the name of the cgroup above its containers */
  namespace: string;
}

export type ProcessKind = "containerd" | "cedanad" | "shim" | "container" | "other";
export interface ProcessInfo {
  pid: number;
  ppid: number;
  state: string;
  startTime: string;
  kind: ProcessKind;
  argv: string[];
}

function read(path: string): string {
  try {
    return readFileSync(path, "latin1");
  } catch {
    return ""; // the process has gone meanwhile
  }
}

function numbers(path: string): number[] {
  return readdirSync(path)
    .filter((name) => /^\d+$/.test(name))
    .map(Number);
}

/** ppid, state and start time, from /proc/PID/stat; undefined when there is no such process. */
export function processStat(pid: number): { ppid: number; state: string; startTime: string } | undefined {
  const stat = read(`/proc/${pid}/stat`);
  if (!stat) return undefined;
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return { state: fields[0]!, ppid: Number(fields[1]), startTime: fields[19]! };
}

export function isAlive(pid: number): boolean {
  const stat = processStat(pid);
  return stat !== undefined && stat.state !== "Z" && stat.state !== "X";
}

/** All processes of the instance, zombies of them too; not the caller. */
export function processesOf(instance: Instance): ProcessInfo[] {
  const found: ProcessInfo[] = [];
  const zombies: ProcessInfo[] = [];
  for (const pid of numbers("/proc")) {
    if (pid === process.pid) continue;
    const stat = processStat(pid);
    if (!stat || stat.ppid === 2 || pid === 2) continue;
    const argv = read(`/proc/${pid}/cmdline`).split("\0").filter(Boolean);
    const info: ProcessInfo = { pid, ...stat, kind: "other", argv };
    const inCgroup = new RegExp(`:/(.*/)?${instance.namespace}(/|$)`, "m").test(read(`/proc/${pid}/cgroup`));
    if (stat.state === "Z") {
      zombies.push(inCgroup ? { ...info, kind: "container" } : info);
      continue;
    }
    // The reaper and whoever else only names the directory are not part of the instance.
    const environment = read(`/proc/${pid}/environ`).split("\0");
    const ours =
      environment.includes(`CEDANA_RUN_DIR=${instance.dir}/run`) ||
      argv.some((argument) => argument === `${instance.dir}/c.sock` && argv.includes("-address"));
    if (!ours && !inCgroup) continue;
    const name = (argv[0] ?? "").split("/").at(-1)!;
    if (argv.some((argument) => /(^|\/)cedanad(\.[a-z]+)?$/.test(argument))) info.kind = "cedanad";
    else if (name.startsWith("containerd-shim")) info.kind = "shim";
    else if (name === "containerd") info.kind = "containerd";
    else if (inCgroup) info.kind = "container";
    found.push(info);
  }
  const pids = new Set(found.map((info) => info.pid));
  for (const zombie of zombies) if (zombie.kind === "container" || pids.has(zombie.ppid)) found.push(zombie);
  return found;
}

/** Mount points below `below` in the mount namespace of `pid`, deepest last. */
export function mountsBelow(below: string, pid: number | "self"): string[] {
  return read(`/proc/${pid}/mountinfo`)
    .split("\n")
    .map((line) => (line.split(" ")[4] ?? "").replaceAll("\\040", " "))
    .filter((path) => path.startsWith(`${below}/`));
}

export function cgroupRoots(): string[] {
  const base = "/sys/fs/cgroup";
  if (existsSync(join(base, "cgroup.controllers"))) return [base];
  return readdirSync(base)
    .map((name) => join(base, name))
    .filter((path) => existsSync(join(path, "cgroup.procs")));
}

function directories(path: string): string[] {
  try {
    return readdirSync(path, { withFileTypes: true })
      .filter((entry) => entry.isDirectory())
      .map((entry) => join(path, entry.name));
  } catch {
    return [];
  }
}

/** systemd is process 1, and makes the cgroups; all of them are of version 2 (scripts/with-systemd.sh, or a Debian that was booted). */
export const systemdRuns =
  existsSync("/run/systemd/system") && existsSync("/sys/fs/cgroup/cgroup.controllers");

/** Whether containers' cgroups here can have a controller. */
export function hasController(name: string): boolean {
  const v2 = read("/sys/fs/cgroup/cgroup.controllers");
  return v2 === "" ? existsSync(join("/sys/fs/cgroup", name)) : v2.trim().split(" ").includes(name);
}

/** Cgroups below the instance's own one, in every hierarchy. */
export function cgroupsOf(namespace: string): string[] {
  const walk = (path: string): string[] => directories(path).flatMap((child) => [child, ...walk(child)]);
  return cgroupRoots().flatMap((root) => walk(join(root, namespace)));
}

export function removeCgroups(name: string): void {
  for (const root of cgroupRoots()) {
    const top = join(root, name);
    const walk = (path: string): string[] => [...directories(path).flatMap(walk), path];
    if (!existsSync(top)) continue;
    for (const path of walk(top)) {
      try {
        rmdirSync(path);
      } catch {
        // busy or gone: the caller looks again
      }
    }
  }
}

export function pidsInCgroups(name: string): number[] {
  const walk = (path: string): string[] => [path, ...directories(path).flatMap(walk)];
  const pids = cgroupRoots()
    .flatMap((root) => walk(join(root, name)))
    .flatMap((path) => read(join(path, "cgroup.procs")).split("\n").filter(Boolean).map(Number));
  return [...new Set(pids)];
}

/** Frozen processes don't die: thaws whatever is frozen below this cgroup. */
export function thaw(name: string): void {
  for (const path of [...cgroupRoots().map((root) => join(root, name)), ...cgroupsOf(name)]) {
    for (const [file, text] of [
      ["freezer.state", "THAWED"],
      ["cgroup.freeze", "0"],
    ] as const)
      try {
        if (existsSync(join(path, file))) writeFileSync(join(path, file), text);
      } catch {
        // gone meanwhile
      }
  }
}

/** fd number → what it points at. */
export function fdsOf(pid: number): Map<number, string> {
  const fds = new Map<number, string>();
  try {
    for (const fd of numbers(`/proc/${pid}/fd`)) {
      try {
        fds.set(fd, readlinkSync(`/proc/${pid}/fd/${fd}`));
      } catch {
        // closed meanwhile
      }
    }
  } catch {
    // the process has gone
  }
  return fds;
}

export function entries(path: string): string[] {
  try {
    return readdirSync(path);
  } catch {
    return [];
  }
}

export function mountNamespace(pid: number | "self"): number {
  return statSync(`/proc/${pid}/ns/mnt`).ino;
}

/** proportional set size, private memory and RSS, in KiB */
export function memoryOf(pid: number): { pss: number; private: number; rss: number } {
  const text = read(`/proc/${pid}/smaps_rollup`);
  const field = (name: string) => Number(text.match(new RegExp(`^${name}:\\s+(\\d+)`, "m"))?.[1] ?? 0);
  return { pss: field("Pss"), private: field("Private_Clean") + field("Private_Dirty"), rss: field("Rss") };
}

/** user and system CPU time in milliseconds, of the process and the children it has waited for */
export function cpuOf(pid: number): { own: number; withChildren: number } {
  const stat = read(`/proc/${pid}/stat`);
  const fields = stat
    .slice(stat.lastIndexOf(")") + 2)
    .split(" ")
    .map(Number);
  const ticks = (...at: number[]) => at.reduce((sum, index) => sum + (fields[index] ?? 0), 0) * 10;
  return { own: ticks(11, 12), withChildren: ticks(11, 12, 13, 14) };
}

/**
 * CRIU's kernel answers are the machine's, not a test's: what is there at the end, and wasn't at the beginning, goes. Nobody depends on it.
 * @returns removes it
 */
export function forgetKernelCacheLater(): () => void {
  const link = "/run/criu.kdat";
  const isThere = () => lstatSync(link, { throwIfNoEntry: false })?.isSymbolicLink() ?? false;
  if (isThere()) return () => {};
  return () => {
    if (!isThere()) return;
    rmSync(readlinkSync(link), { force: true });
    rmSync(link, { force: true });
  };
}
