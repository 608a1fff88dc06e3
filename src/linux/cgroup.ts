import {
  closeSync,
  constants,
  existsSync,
  openSync,
  readFileSync,
  readSync,
  write as writeToFd,
} from "node:fs";
import { readdir, readFile, rmdir, stat, writeFile } from "node:fs/promises";
import { posix } from "node:path";
import { setImmediate as nextTurn, setTimeout as sleep } from "node:timers/promises";
import { NotFound, SyscallFailed, TimedOut, Unsupported, WrongState } from "../errors/index.ts";
import { type MountInfo, readMountInfo } from "./mount-options.ts";
import { processStat } from "./proc.ts";
import { type CgroupStats, readStatsV1, readStatsV2 } from "./stats.ts";

// A container's cgroup as the host sees it.
//
// Three layouts exist. *Unified*: one v2 hierarchy at /sys/fs/cgroup. *Legacy* (v1): a hierarchy for each controller,
// or for several together (`cpu,cpuacct`), plus named ones without a controller (`name=systemd`). *Hybrid*: legacy, and
// a v2 mount without controllers at /sys/fs/cgroup/unified. Hybrid counts as v1, for the engines treat it so: limits,
// freezer and OOM counters live in the v1 hierarchies.
//
// A container may have a cgroup namespace in which its own cgroup is "/"; we read /proc from outside and see the real path.

/** Where a v1 hierarchy is mounted, or the v2 one. */
interface Hierarchy {
  /** "" for v2, else a controller or `name=…`; a co-mounted hierarchy appears once for each controller. */
  readonly controller: string;
  readonly mountPoint: string;
  /** Directory of the hierarchy that the mount shows; "/" nearly always. */
  readonly root: string;
}

interface Hierarchies {
  readonly version: 1 | 2;
  readonly byController: ReadonlyMap<string, Hierarchy>;
}

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

export type FreezerState = "thawed" | "freezing" | "frozen";

// A freeze takes a fraction of a millisecond unless a process waits for a disk or a CPU, so look again at once for the
// first looks (some 10 us each) and then every millisecond (the finest that Node's timers do).
const eagerLooks = 50;
const freezeTimeoutMs = 10_000;
const removeTimeoutMs = 2_000;
// v1: a process that forks while its cgroup freezes can be missed; writing FROZEN again catches the child. A short thaw
// lets processes get out of a place where they can't freeze. Source: runc, libcontainer/cgroups/fs/freezer.go.
const thawEveryLooks = 100;

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

/**
 * The freezer's files, held open.
 *
 * Looking is a read(2) of a few bytes at once, about 5 us: a detour through the thread pool takes twenty times that, and
 * ever longer on a host whose CPUs are busy, which is where frozen time hurts. Writing goes through the thread pool,
 * because it waits for the kernel's lock on all cgroups.
 */
class Freezer {
  readonly name: string;
  readonly #version: 1 | 2;
  readonly #control: number;
  /** v2 says in another file whether everybody stands. */
  readonly #events: number;
  readonly #buffer = Buffer.alloc(256);

  private constructor(name: string, version: 1 | 2, control: number, events: number) {
    this.name = name;
    this.#version = version;
    this.#control = control;
    this.#events = events;
  }

  static open(cgroup: Cgroup, flags: number = constants.O_RDWR): Freezer {
    const path = cgroup.path("freezer");
    if (path === undefined)
      throw new Unsupported("freezing: no freezer hierarchy is mounted, or it isn't used");
    let control: number | undefined;
    try {
      control = openSync(`${path}/${cgroup.version === 2 ? "cgroup.freeze" : "freezer.state"}`, flags);
      const events = cgroup.version === 2 ? openSync(`${path}/cgroup.events`, constants.O_RDONLY) : control;
      return new Freezer(path, cgroup.version, control, events);
    } catch (err) {
      if (control !== undefined) closeSync(control);
      throw notFoundOr(err, path);
    }
  }

  [Symbol.dispose](): void {
    closeSync(this.#control);
    if (this.#events !== this.#control) closeSync(this.#events);
  }

  async want(state: "FROZEN" | "THAWED"): Promise<void> {
    const text = this.#version === 1 ? state : state === "FROZEN" ? "1" : "0";
    try {
      await write(this.#control, text);
    } catch (err) {
      throw notFoundOr(err, this.name);
    }
  }

  /** Whether freezing has been asked for, here or above (v2: here). */
  wanted(): boolean {
    if (this.#version === 1) return this.state() !== "thawed";
    return this.#read(this.#control).startsWith("1");
  }

  state(): FreezerState {
    if (this.#version === 1) {
      const text = this.#read(this.#control).trim();
      return text === "FROZEN" ? "frozen" : text === "FREEZING" ? "freezing" : "thawed";
    }
    if (/^frozen 1$/m.test(this.#read(this.#events))) return "frozen";
    return this.wanted() ? "freezing" : "thawed";
  }

  /** Looks until it is in that state. @returns false when the time is over */
  async settled(goal: FreezerState, timeoutMs: number, signal?: AbortSignal): Promise<boolean> {
    const deadline = performance.now() + timeoutMs;
    for (let look = 1; ; look++) {
      signal?.throwIfAborted();
      if (this.state() === goal) return true;
      if (performance.now() >= deadline) return false;
      // Between looks others have their turn on the event loop.
      if (look <= eagerLooks) await nextTurn();
      else await sleep(1, undefined, signal && { signal });
      if (this.#version === 1 && goal === "frozen" && look > eagerLooks) {
        if (look % thawEveryLooks === 0) {
          await this.want("THAWED");
          await sleep(10, undefined, signal && { signal });
        }
        await this.want("FROZEN");
      }
    }
  }

  #read(fd: number): string {
    try {
      return this.#buffer.toString("latin1", 0, readSync(fd, this.#buffer, 0, this.#buffer.length, 0));
    } catch (err) {
      throw notFoundOr(err, this.name);
    }
  }
}

function write(fd: number, text: string): Promise<void> {
  return new Promise((resolve, reject) => {
    writeToFd(fd, text, 0, "latin1", (err) => (err ? reject(err) : resolve()));
  });
}

function notFoundOr(err: unknown, path: string): Error {
  return removed(err)
    ? new NotFound(`cgroup ${path} has been removed`, { cause: err })
    : SyscallFailed.from(err);
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
 * Parses /proc/PID/cgroup: the path by controller, v2's under "".
 *
 * A line is `ID:CONTROLLERS:PATH`; the path may hold colons, and ends with " (deleted)" when the cgroup of a zombie
 * has been removed. Source: cgroups(7).
 */
export function parseMembership(text: string): Map<string, string> {
  const membership = new Map<string, string>();
  for (const line of text.split("\n")) {
    const [, id, controllers, path] = /^(\d+):([^:]*):(.*)$/.exec(line) ?? [];
    if (path === undefined || path.endsWith(" (deleted)")) continue;
    if (id === "0" && controllers === "") membership.set("", path);
    else for (const controller of controllers!.split(",")) membership.set(controller, path);
  }
  return membership;
}

/**
 * The path's beginning that ends with this directory, the innermost; the whole path when it isn't in it.
 * @param name  may be `a/b`: where there is no b in a, the path to a
 */
export function upTo(path: string, name: string): string {
  for (let wanted = name; wanted !== "."; wanted = posix.dirname(wanted)) {
    const at = `${path}/`.lastIndexOf(`/${wanted}/`);
    if (at >= 0) return path.slice(0, at + 1 + wanted.length);
  }
  return path;
}

async function readMembership(pid: number): Promise<Map<string, string>> {
  const text = readIfThere(`/proc/${pid}/cgroup`);
  if (text === undefined) throw new NotFound(`process ${pid} has ended`);
  return parseMembership(text);
}

/**
 * Finds the mounted hierarchies among a process's mounts.
 *
 * What is mounted *last* at /sys/fs/cgroup decides between v1 and v2; whatever else lies below it may be a remnant that
 * a v2 mount covers. Of several mounts of a hierarchy, one that shows all of it wins.
 */
export function findHierarchies(mounts: readonly MountInfo[]): Hierarchies {
  const byController = new Map<string, Hierarchy>();
  const top = mounts.findLast((mount) => mount.mountPoint === "/sys/fs/cgroup");
  const unified = top?.type === "cgroup2" ? top : undefined;
  if (!unified) {
    for (const mount of mounts.filter((m) => m.type === "cgroup"))
      for (const controller of mount.superOptions) addHierarchy(byController, controller, mount);
  }
  const v2 = unified ?? mounts.find((mount) => mount.type === "cgroup2");
  if (v2) addHierarchy(byController, "", v2);
  const controllers = [...byController.keys()].filter((name) => name !== "" && !name.startsWith("name="));
  return { version: controllers.length > 0 ? 1 : 2, byController };
}

function addHierarchy(all: Map<string, Hierarchy>, controller: string, mount: MountInfo): void {
  // The other super options of v1 mounts.
  if (/^(rw|ro|all|none|xattr|noprefix|clone_children|release_agent=.*|cpuset_v2_mode)$/.test(controller))
    return;
  const known = all.get(controller);
  if (known && (known.root === "/" || mount.root !== "/")) return;
  all.set(controller, { controller, mountPoint: mount.mountPoint, root: mount.root });
}

// Cgroup mounts are made at boot, so they are looked up once; the rest of mountinfo grows with every container.
let cachedHierarchies: Promise<Hierarchies> | undefined;

function hierarchies(options?: { fresh: boolean }): Promise<Hierarchies> {
  if (options?.fresh) cachedHierarchies = undefined;
  cachedHierarchies ??= readMountInfo("self", "cgroup").then(findHierarchies);
  cachedHierarchies.catch(() => {
    cachedHierarchies = undefined;
  });
  return cachedHierarchies;
}

/** The directories of a process's cgroups. Roots of hierarchies are left out: everybody is in those. */
export function resolve(
  membership: ReadonlyMap<string, string>,
  { version, byController }: Hierarchies,
): { version: 1 | 2; paths: Map<string, string> } {
  const paths = new Map<string, string>();
  for (const [controller, path] of membership) {
    const hierarchy = byController.get(controller);
    if (!hierarchy || path === "/") continue;
    if (version === 2 && controller !== "") continue;
    // `/..` begins paths outside of our own cgroup namespace, which no mount of ours shows.
    if (path.startsWith("/..")) continue;
    const { root, mountPoint } = hierarchy;
    if (root === "/") paths.set(controller, `${mountPoint}${path}`);
    else if (path.startsWith(`${root}/`)) paths.set(controller, `${mountPoint}${path.slice(root.length)}`);
  }
  return { version, paths };
}

// ENOENT: no such file. ENODEV, ESRCH: the cgroup went between open and read.
function removed(err: unknown): boolean {
  return ["ENOENT", "ENODEV", "ESRCH"].includes((err as NodeJS.ErrnoException).code ?? "");
}

/** A small file of the kernel's, read at once: 10 us, where a detour through the thread pool takes some hundred. */
function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch (err) {
    return ignoreGone(err);
  }
}

function ignoreGone(err: unknown): undefined {
  if (removed(err)) return undefined;
  throw SyscallFailed.from(err);
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

/** A cgroup's directory in the hierarchy of version 2. @throws Unsupported on a host of version 1 */
export async function unifiedPath(path: string): Promise<string> {
  const { version, byController } = await hierarchies();
  const hierarchy = byController.get("");
  if (version !== 2 || !hierarchy)
    throw new Unsupported(`cgroup ${path}: this host has no unified hierarchy`);
  return `${hierarchy.mountPoint}${path}`;
}

/** For setup and preflight: which version this host has. */
export async function hostCgroupVersion(): Promise<1 | 2> {
  return (await hierarchies()).version;
}

/**
 * Version 1 hierarchies of a host whose containers have cgroups of version 2 (a hybrid host seen without them). The container
 * is in somebody else's cgroup there, and CRIU would take that with everything below it into the images, make what is missing
 * at the restore, and give it the limits of then. Told that a file is where to look, it finds no cgroup.
 */
export async function foreignHierarchies(pid: number): Promise<[controller: string, path: string][]> {
  if (pid === 0 || (await hostCgroupVersion()) !== 2) return [];
  const text = await readFile(`/proc/${pid}/cgroup`, "utf8").catch(() => ""); // it has ended: the engine says so
  const controllers = [...parseMembership(text).keys()].filter((controller) => controller !== "");
  return controllers.map((controller) => [controller, "/cgroup.procs"]);
}
