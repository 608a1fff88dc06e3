import { readFile } from "node:fs/promises";
import { posix } from "node:path";
import { NotFound, Unsupported } from "../errors/index.ts";
import { readIfThere } from "./cgroup-files.ts";
import { type MountInfo, readMountInfo } from "./mount-options.ts";

// Where a process's cgroups are in the host's file system.
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

export interface Hierarchies {
  readonly version: 1 | 2;
  readonly byController: ReadonlyMap<string, Hierarchy>;
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

/** @throws NotFound when the process has ended */
export async function readMembership(pid: number): Promise<Map<string, string>> {
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

export function hierarchies(options?: { fresh: boolean }): Promise<Hierarchies> {
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

/**
 * The directory in which a host has mounted every hierarchy that a process is in, each by the name by which CRIU looks for it: its controllers
 * as /proc lists them (`cpu,cpuacct`), a named one's name, that of version 2 as `unified`. Nearly every host of version 1 has them so. CRIU needs to
 * mount none itself then (`--cgroup-yard`), for which the kernel makes it wait until every cgroup that is being removed has gone.
 * @returns undefined where one is missing, mounted elsewhere or in part, and on a host of version 2, whose one hierarchy costs nothing to mount
 */
export async function cgroupYard(pid: number): Promise<string | undefined> {
  const { version, byController } = await hierarchies();
  const text = readIfThere(`/proc/${pid}/cgroup`);
  return version === 2 || text === undefined ? undefined : findYard(text, byController);
}

/** @param membership  /proc/PID/cgroup */
export function findYard(membership: string, byController: Hierarchies["byController"]): string | undefined {
  const yard = "/sys/fs/cgroup";
  for (const line of membership.split("\n").filter(Boolean)) {
    const controllers = line.split(":", 2)[1]!;
    const name = controllers === "" ? "unified" : controllers.replace(/^name=/, "");
    const hierarchy = byController.get(controllers.split(",", 1)[0]!);
    if (hierarchy?.mountPoint !== `${yard}/${name}` || hierarchy.root !== "/") return undefined;
  }
  return yard;
}
