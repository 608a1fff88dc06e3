import { constants, existsSync } from "node:fs";
import { readdir, readFile, rmdir, stat, writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { NotFound, SyscallFailed, TimedOut, Unsupported, WrongState } from "../errors/index.ts";
import { ignoreGone, readIfThere, removed } from "./cgroup-files.ts";
import { hierarchies, readMembership, resolve, unifiedPath, upTo } from "./cgroup-hierarchy.ts";
import { Freezer, type FreezerState } from "./freezer.ts";
import { processStat } from "./proc.ts";
import { type CgroupStats, readStatsV1, readStatsV2 } from "./stats.ts";

/** What a journal keeps of a cgroup. */
export interface CgroupPaths {
  readonly version: 1 | 2;
  /** Directory by controller (v1) or under "" (v2). */
  readonly paths: Readonly<Record<string, string>>;
}

/** How to be told of OOM kills: a directory, and 1 for memory.oom_control (eventfd), 2 for memory.events (inotify). */
export interface OomWatch {
  readonly path: string;
  readonly flags: 1 | 2;
}

const freezeTimeoutMs = 10_000;
const SYSTEMD_MS = 1_000;
const removeTimeoutMs = 2_000;

/** A container's cgroup as the host sees it. */
export class Cgroup {
  readonly version: 1 | 2;
  /** Directories by controller, v2's under ""; those in a hierarchy's root are left out: they aren't the container's. */
  readonly paths: ReadonlyMap<string, string>;

  private constructor(version: 1 | 2, paths: ReadonlyMap<string, string>) {
    this.version = version;
    this.paths = paths;
  }

  /**
   * The cgroup that a process is in, as seen from the host.
   * @param name  directory of the container's own cgroup (`cgroupName` of its spec): when the process has moved to one
   *   further down, as systemd in a container does, it is that one which is meant
   * @throws NotFound when the process has ended or is in no cgroup but the roots
   * Source: cgroups(7), "/proc files".
   */
  static async of(pid: number, name?: string): Promise<Cgroup> {
    const membership = await readMembership(pid);
    if (name) for (const [controller, path] of membership) membership.set(controller, upTo(path, name));
    let found = resolve(membership, await hierarchies());
    // Where nothing fits, mounts may have changed since we looked: look again, once.
    if (found.paths.size === 0) found = resolve(membership, await hierarchies({ fresh: true }));
    if (found.paths.size === 0) throw new NotFound(`process ${pid} is in no cgroup of its own`);
    return new Cgroup(found.version, found.paths);
  }

  /**
   * The cgroup of a path, in every hierarchy that has it.
   * @param path  with a leading slash, in the hierarchies
   */
  static async at(path: string): Promise<Cgroup> {
    const { version, byController } = await hierarchies();
    const everywhere = new Map([...byController.keys()].map((controller) => [controller, path]));
    const { paths } = resolve(everywhere, { version, byController });
    return new Cgroup(version, new Map([...paths].filter(([, directory]) => existsSync(directory))));
  }

  /** From what `toJSON` gave. */
  static fromPaths(json: CgroupPaths): Cgroup {
    return new Cgroup(json.version, new Map(Object.entries(json.paths)));
  }

  toJSON(): CgroupPaths {
    return { version: this.version, paths: Object.fromEntries(this.paths) };
  }

  /** Directory of a controller; undefined when that controller is not in use here. */
  path(controller: string): string | undefined {
    return this.version === 2 ? this.paths.get("") : this.paths.get(controller);
  }

  /** The directory that decides who belongs to the cgroup. v1: the freezer's, for what we list is what we freeze. */
  get #members(): string {
    for (const controller of this.version === 2 ? [""] : ["freezer", "devices", "pids", "memory"]) {
      const path = this.paths.get(controller);
      if (path !== undefined) return path;
    }
    const first = this.paths.values().next();
    if (first.done) throw new NotFound("cgroup without a directory");
    return first.value;
  }

  /**
   * Removes what an engine has left of it. Where nothing is left, this costs one access(2) for each hierarchy.
   * @returns the directories that are still busy after `timeoutMs`
   */
  async removeLeft(timeoutMs = removeTimeoutMs): Promise<string[]> {
    let left = [...new Set(this.paths.values())].filter((path) => existsSync(path));
    const deadline = Date.now() + timeoutMs;
    while (left.length > 0) {
      for (const path of left) await removeTree(path).catch(() => undefined); // EBUSY: looked at again
      left = left.filter((path) => existsSync(path));
      if (left.length === 0 || Date.now() >= deadline) break;
      await sleep(10);
    }
    return left;
  }

  /**
   * Of an engine that has failed to fill a scope: waits a moment until systemd has removed it. Where others remove the cgroup before systemd
   * has seen that it is empty, the scope stays, and no other can have its name. One that only CRIU has made is none of systemd's.
   */
  async leaveToSystemd(): Promise<void> {
    if (this.paths.size === 0) return;
    for (const until = Date.now() + SYSTEMD_MS; Date.now() < until && (await this.exists()); )
      await sleep(10);
  }

  /** Whether it is still there. */
  async exists(): Promise<boolean> {
    return (await stat(this.#members).catch(ignoreGone)) !== undefined;
  }

  /**
   * Pids of all processes in it and in the cgroups below.
   * @returns empty when it has been removed
   */
  async pids(): Promise<number[]> {
    const pids = new Set<number>();
    await collectPids(this.#members, pids);
    return [...pids];
  }

  /**
   * Freezes every process in it and below, and waits until they all stand still.
   * @param timeoutMs  default 10 000; then it is thawed again, unless it was frozen by somebody before
   * @param signal     aborting thaws before rejecting
   * @throws TimedOut naming the processes that did not freeze; NotFound when it has been removed; WrongState when we
   *   would freeze ourselves; Unsupported when there is no freezer
   * Source: kernel admin-guide cgroup-v1/freezer-subsystem, cgroup-v2 ("cgroup.freeze", "cgroup.events").
   */
  async freeze(timeoutMs = freezeTimeoutMs, signal?: AbortSignal): Promise<void> {
    await this.#refuseOwn("freeze");
    using freezer = Freezer.open(this);
    if (freezer.wanted()) {
      if (await freezer.settled("frozen", timeoutMs, signal)) return;
      throw new TimedOut(
        `${freezer.name} was being frozen by somebody else and did not settle in ${timeoutMs} ms`,
      );
    }
    try {
      await freezer.want("FROZEN");
      if (await freezer.settled("frozen", timeoutMs, signal)) return;
      throw new TimedOut(
        `${freezer.name} did not freeze in ${timeoutMs} ms${await this.#describeUnfrozen()}; thawed it again`,
      );
    } catch (err) {
      // The reason we are here matters more than a failing thaw; a removed cgroup has nothing to thaw.
      await freezer.want("THAWED").catch(() => {});
      throw err;
    }
  }

  /**
   * Lets the processes run again.
   * @throws WrongState when a cgroup above it is frozen, so that they still stand; NotFound when it has been removed
   */
  async thaw(timeoutMs = freezeTimeoutMs): Promise<void> {
    using freezer = Freezer.open(this);
    await freezer.want("THAWED");
    if (!(await freezer.settled("thawed", timeoutMs)))
      throw new WrongState(`${freezer.name} stays frozen: a cgroup above it is frozen`);
  }

  /** Whether all its processes stand still, by its own freezer or by that of a cgroup above; false when removed. */
  async isFrozen(): Promise<boolean> {
    return (await this.freezerState()) === "frozen";
  }

  /** `freezing` while it has been asked for and not every process stands yet. Thawed when removed. */
  async freezerState(): Promise<FreezerState> {
    try {
      using freezer = Freezer.open(this, constants.O_RDONLY);
      return freezer.state();
    } catch (err) {
      if (err instanceof NotFound || err instanceof Unsupported) return "thawed";
      throw err;
    }
  }

  /**
   * Counters of CPU, memory and so on.
   * @throws NotFound when it has been removed
   */
  async stats(): Promise<CgroupStats> {
    if (!(await this.exists())) throw new NotFound(`cgroup ${this.#members} has been removed`);
    return this.version === 2 ? readStatsV2(this.#members) : readStatsV1(this.paths);
  }

  /**
   * How many processes the kernel has killed because this cgroup's memory ran out.
   * @throws NotFound when it has been removed; 0 when memory is not controlled
   */
  async oomKills(): Promise<number> {
    const path = this.path("memory");
    if (path === undefined) return 0;
    const file = this.version === 2 ? "memory.events" : "memory.oom_control";
    const text = readIfThere(`${path}/${file}`);
    if (text === undefined && !(await this.exists())) throw new NotFound(`cgroup ${path} has been removed`);
    return Number(/^oom_kill (\d+)$/m.exec(text ?? "")?.[1] ?? 0);
  }

  /** What to watch for OOM kills; undefined when memory isn't controlled in v1 (v2: the file may still be missing). */
  get oomWatchPath(): OomWatch | undefined {
    const path = this.path("memory");
    return path === undefined ? undefined : { path, flags: this.version };
  }

  /**
   * Sends a signal to every process in it and below; SIGKILL also gets through to a frozen cgroup, which it thaws.
   * Does nothing when it has been removed.
   * @throws WrongState when we are in it ourselves
   * Source: cgroup-v2 "cgroup.kill" (Linux 5.14).
   */
  async kill(signal: NodeJS.Signals | number = "SIGKILL"): Promise<void> {
    await this.#refuseOwn("kill");
    const kills = signal === "SIGKILL" || signal === 9;
    if (kills && this.version === 2) {
      const done = await writeFile(`${this.#members}/cgroup.kill`, "1").then(
        () => true,
        () => false, // ENOENT: before 5.14, or removed
      );
      if (done) return;
    }
    // Frozen processes can't fork away from under the list, nor end, so that no pid in it is reused. Where freezing
    // fails, go through the list until nobody new turns up.
    const frozen = await this.freeze(500).then(
      () => true,
      () => false,
    );
    const signalled = new Set<number>();
    try {
      for (let round = 0; round < 10; round++) {
        const fresh = (await this.pids()).filter((pid) => !signalled.has(pid));
        if (fresh.length === 0) break;
        for (const pid of fresh) {
          signalled.add(pid);
          sendSignal(pid, signal);
        }
      }
    } finally {
      if (frozen || kills) await this.thaw(500).catch(() => {}); // NotFound: they ended; WrongState: not ours to thaw
    }
  }

  /** The members' list for an error message, those that wait for a device first. */
  async #describeUnfrozen(): Promise<string> {
    const stuck = (await this.pids())
      .map((pid) => processStat(pid))
      .filter((process) => process !== undefined && ["D", "R", "t"].includes(process.state))
      .map((process) => `${process!.pid} (${process!.comm}, state ${process!.state})`);
    return stuck.length ? `: ${stuck.slice(0, 5).join(", ")}` : "";
  }

  // Freezing or killing the cgroup that we run in would end here, with nobody left to undo it.
  async #refuseOwn(verb: string): Promise<void> {
    const own = await readMembership(process.pid);
    const ours = resolve(own, await hierarchies()).paths;
    for (const [controller, path] of this.paths) {
      const mine = ours.get(controller);
      if (mine !== undefined && `${mine}/`.startsWith(`${path}/`))
        throw new WrongState(`refusing to ${verb} ${path}: this process is in it`);
    }
  }
}

async function collectPids(directory: string, pids: Set<number>): Promise<void> {
  // EOPNOTSUPP: a threaded cgroup (v2) lists its processes only in the domain above it, where we have been.
  const text = await readFile(`${directory}/cgroup.procs`, "utf8").catch((err) => {
    if ((err as NodeJS.ErrnoException).code === "EOPNOTSUPP") return "";
    return ignoreGone(err);
  });
  if (text === undefined) return;
  for (const line of text.split("\n")) if (line !== "") pids.add(Number(line));
  const entries = await readdir(directory, { withFileTypes: true }).catch(ignoreGone);
  for (const entry of entries ?? [])
    if (entry.isDirectory()) await collectPids(`${directory}/${entry.name}`, pids);
}

function sendSignal(pid: number, signal: NodeJS.Signals | number): void {
  // 0: a process of a pid namespace that we can't see, which kill(2) would take for our own process group.
  if (pid <= 0) return;
  try {
    process.kill(pid, signal);
  } catch (err) {
    if ((err as NodeJS.ErrnoException).code !== "ESRCH") throw SyscallFailed.from(err); // ESRCH: it has ended, as it should
  }
}

/**
 * Removes a cgroup of version 2 and those below it. One with processes stays, after a moment in which they may end.
 * @param path  in the hierarchy, with a leading slash
 */
export async function removeCgroup(path: string): Promise<void> {
  const top = await unifiedPath(path);
  for (let attempt = 0; ; attempt++) {
    try {
      await removeTree(top);
      return;
    } catch (err) {
      if ((err as NodeJS.ErrnoException).code !== "EBUSY" || attempt === 100) throw SyscallFailed.from(err);
      await sleep(10);
    }
  }
}

/** From below. */
async function removeTree(directory: string): Promise<void> {
  const entries = await readdir(directory, { withFileTypes: true }).catch(ignoreGone);
  for (const entry of entries ?? []) if (entry.isDirectory()) await removeTree(`${directory}/${entry.name}`);
  await rmdir(directory).catch((err) => {
    if (!removed(err)) throw err;
  });
}
