import { execFile } from "node:child_process";
import { readFile, realpath, rm } from "node:fs/promises";
import { promisify } from "node:util";
import { InvalidRequest, Unsupported } from "../errors/index.ts";

// From containerd's description of a mount (type, source, options as in fstab) to the arguments of mount(2).
// The meaning of each option follows containerd's mount package, because the same snapshotter wrote them.

/** Flags of mount(2). Source: linux/mount.h. */
export const MS = {
  RDONLY: 1,
  NOSUID: 2,
  NODEV: 4,
  NOEXEC: 8,
  SYNCHRONOUS: 16,
  REMOUNT: 32,
  MANDLOCK: 64,
  DIRSYNC: 128,
  NOSYMFOLLOW: 256,
  NOATIME: 1024,
  NODIRATIME: 2048,
  BIND: 4096,
  REC: 16384,
  SILENT: 32768,
  UNBINDABLE: 1 << 17,
  PRIVATE: 1 << 18,
  SLAVE: 1 << 19,
  SHARED: 1 << 20,
  RELATIME: 1 << 21,
  STRICTATIME: 1 << 24,
  LAZYTIME: 1 << 25,
} as const;

const propagationFlags = MS.SHARED | MS.PRIVATE | MS.SLAVE | MS.UNBINDABLE;

/** Options that are flags: `+` sets, `-` clears. All others are data for the file system. */
const optionFlags: ReadonlyMap<string, readonly ["+" | "-", number]> = new Map([
  ["async", ["-", MS.SYNCHRONOUS]],
  ["atime", ["-", MS.NOATIME]],
  ["bind", ["+", MS.BIND]],
  ["defaults", ["+", 0]],
  ["dev", ["-", MS.NODEV]],
  ["diratime", ["-", MS.NODIRATIME]],
  ["dirsync", ["+", MS.DIRSYNC]],
  ["exec", ["-", MS.NOEXEC]],
  ["lazytime", ["+", MS.LAZYTIME]],
  ["mand", ["+", MS.MANDLOCK]],
  ["noatime", ["+", MS.NOATIME]],
  ["nodev", ["+", MS.NODEV]],
  ["nodiratime", ["+", MS.NODIRATIME]],
  ["noexec", ["+", MS.NOEXEC]],
  ["nolazytime", ["-", MS.LAZYTIME]],
  ["nomand", ["-", MS.MANDLOCK]],
  ["norelatime", ["-", MS.RELATIME]],
  ["nostrictatime", ["-", MS.STRICTATIME]],
  ["nosuid", ["+", MS.NOSUID]],
  ["nosymfollow", ["+", MS.NOSYMFOLLOW]],
  ["private", ["+", MS.PRIVATE]],
  ["rbind", ["+", MS.BIND | MS.REC]],
  ["relatime", ["+", MS.RELATIME]],
  ["remount", ["+", MS.REMOUNT]],
  ["ro", ["+", MS.RDONLY]],
  ["rprivate", ["+", MS.PRIVATE | MS.REC]],
  ["rshared", ["+", MS.SHARED | MS.REC]],
  ["rslave", ["+", MS.SLAVE | MS.REC]],
  ["runbindable", ["+", MS.UNBINDABLE | MS.REC]],
  ["rw", ["-", MS.RDONLY]],
  ["shared", ["+", MS.SHARED]],
  ["slave", ["+", MS.SLAVE]],
  ["strictatime", ["+", MS.STRICTATIME]],
  ["suid", ["-", MS.NOSUID]],
  ["symfollow", ["-", MS.NOSYMFOLLOW]],
  ["sync", ["+", MS.SYNCHRONOUS]],
  ["unbindable", ["+", MS.UNBINDABLE]],
]);

/** A mount as containerd sends it (containerd.types.Mount). */
export interface MountRequest {
  readonly type: string;
  readonly source: string;
  readonly options?: readonly string[];
  /** Directory below the target that is mounted on, empty for the target itself. */
  readonly target?: string;
}

/** One mount to be made: the arguments of mount(2) and what has to be done around them. */
export interface MountPlan {
  readonly mountType: string;
  readonly source: string;
  readonly target: string;
  /** MS_* of the first call, without propagation. */
  readonly flags: number;
  /** Option string for the file system, empty for none. */
  readonly data: string;
  /** Attach `source` to a loop device first and mount that. */
  readonly loop: boolean;
  /** Directory below which relative paths in `data` are; absent when there are none. */
  readonly cwd?: string;
  /** MS_SHARED, MS_PRIVATE, MS_SLAVE or MS_UNBINDABLE, perhaps with MS_REC: set by a call of its own. */
  readonly propagation?: number;
  /** Program to run instead of mount(2), for file systems in user space. */
  readonly helper?: { readonly argv: readonly string[] };
}

/** Arguments of one mount(2). */
export type MountCall = Pick<
  MountPlan,
  "mountType" | "source" | "target" | "flags" | "data" | "loop" | "cwd"
>;

// The kernel copies at most one page of option string, whose last byte is its NUL. containerd begins to shorten at
// 512 bytes less, counting the options without the commas between them; the same here, so both shorten the same mounts.
const pageBytes = 4096;
const compactAtBytes = pageBytes - 512;

/**
 * Works out how to make a mount.
 * @param target  where: an absolute path
 * @throws InvalidRequest when the mount makes no sense, Unsupported for id-mapped mounts
 * Source: containerd core/mount (mount_linux.go), mount(2).
 */
export function planMount(mount: MountRequest, target: string): MountPlan {
  if (!target.startsWith("/")) throw new InvalidRequest(`mount target ${target} is not an absolute path`);
  const options = (mount.options ?? []).filter(
    (option) => option !== "" && !option.startsWith("X-containerd."),
  );
  const helper = fuseHelper(mount, target, options);
  if (helper) return { ...none(mount, target), helper };

  const { cwd, options: compacted } =
    mount.type === "overlay" ? compactOverlay(options) : { cwd: undefined, options };
  let flags = 0;
  let loop = false;
  const data: string[] = [];
  for (const option of compacted) {
    const known = optionFlags.get(option);
    if (known) flags = known[0] === "+" ? flags | known[1] : flags & ~known[1];
    else if (option === "loop") loop = true;
    else if (option.startsWith("uidmap=") || option.startsWith("gidmap="))
      throw new Unsupported(`id-mapped mount of ${mount.source} (${option})`);
    else data.push(option);
  }
  const propagation = flags & propagationFlags;
  // MS_REC belongs to whichever of bind and propagation is asked for, to both when both are.
  const first = flags & ~propagationFlags & (flags & MS.BIND || !propagation ? -1 : ~MS.REC);
  return {
    mountType: mount.type,
    source: mount.source,
    target,
    flags: first,
    // direct-io concerns the loop device, which the kernel uses best by itself.
    data: (loop ? data.filter((option) => option !== "direct-io") : data).join(","),
    loop,
    ...(cwd !== undefined && { cwd }),
    ...(propagation && { propagation: propagation | (flags & (MS.REC | MS.SILENT)) }),
  };
}

function none(mount: MountRequest, target: string): MountPlan {
  return { mountType: mount.type, source: mount.source, target, flags: 0, data: "", loop: false };
}

/**
 * The calls of mount(2) that a plan takes, in order:
 *  1. the mount itself; left out for a remount without data, which only changes flags of a bind;
 *  2. propagation, which the kernel takes only alone;
 *  3. a read-only bind once more as remount: MS_BIND ignores MS_RDONLY and every other flag at first.
 */
export function mountCalls(plan: MountPlan): MountCall[] {
  const { mountType, source, target, flags, data, loop, cwd, propagation } = plan;
  const bare = { mountType: "", source: "", target, data: "", loop: false };
  const calls: MountCall[] = [];
  if (!(flags & MS.REMOUNT) || data !== "")
    calls.push({ mountType, source, target, flags, data, loop, ...(cwd !== undefined && { cwd }) });
  if (propagation) calls.push({ ...bare, flags: propagation });
  const readOnlyBind = MS.BIND | MS.RDONLY;
  if ((flags & readOnlyBind) === readOnlyBind) calls.push({ ...bare, flags: flags | MS.REMOUNT });
  return calls;
}

// `fuse3.NAME` is mounted by the program mount.fuse3, as containerd does it.
function fuseHelper(mount: MountRequest, target: string, options: readonly string[]) {
  const program = ["mount.fuse3", "mount.fuse"].find((name) => mount.type.startsWith(`${name.slice(6)}.`));
  if (!program) return undefined;
  const type = mount.type.slice(program.length - 5);
  return { argv: [program, mount.source, target, ...options.flatMap((o) => ["-o", o]), "-t", type] };
}

/**
 * Shortens an overlay's options when they near a page: the directories are named relative to the deepest one that
 * is above them all, and mount(2) is called from there. Forty layers of containerd's snapshotter need that.
 *
 * In `lowerdir` a colon separates layers and `\:` is a colon; `::` begins data-only layers, which are then left as they
 * are. In every directory `\,` is a comma and `\\` a backslash; a comma that a snapshotter left bare is escaped.
 * Source: kernel filesystems/overlayfs, "Multiple lower layers".
 */
function compactOverlay(given: readonly string[]): { cwd: string | undefined; options: string[] } {
  const options = given.map(escapeCommas);
  const length = options.reduce((sum, option) => sum + option.length, 0);
  if (length < compactAtBytes) return { cwd: undefined, options };
  const split = options.map((option) => {
    const [, key, value] = /^(lowerdir|upperdir|workdir)=(.*)$/s.exec(option) ?? [];
    if (key === undefined || value === undefined) return { option };
    return { option, key, directories: key === "lowerdir" ? splitLayers(value) : [value] };
  });
  const directories = split.flatMap((part) => part.directories ?? []);
  // An empty layer is one half of `::`.
  if (directories.length === 0 || directories.includes("")) return { cwd: undefined, options };
  const cwd = commonDirectory(directories);
  if (cwd === undefined) return { cwd: undefined, options };
  const compacted = split.map((part) =>
    part.directories === undefined
      ? part.option
      : `${part.key}=${part.directories.map((directory) => directory.slice(cwd.length + 1)).join(":")}`,
  );
  // chdir(2) takes the path as it is, without the escapes of the option string.
  return { cwd: unescapeOption(cwd), options: compacted };
}

function escapeCommas(option: string): string {
  if (!/^(lowerdir|upperdir|workdir)=/.test(option)) return option;
  return option.replace(/\\.|,/gs, (found) => (found === "," ? "\\," : found));
}

function unescapeOption(text: string): string {
  return text.replace(/\\(.)/gs, "$1");
}

/** Splits at colons that no backslash precedes. */
function splitLayers(value: string): string[] {
  const layers: string[] = [""];
  for (const piece of value.match(/\\.|[^\\]/gs) ?? []) {
    if (piece === ":") layers.push("");
    else layers[layers.length - 1] += piece;
  }
  return layers;
}

/** Deepest directory strictly above all of these absolute paths; undefined when that is only the root. */
function commonDirectory(paths: readonly string[]): string | undefined {
  let common = parentOf(paths[0]!);
  for (const path of paths) {
    if (!path.startsWith("/")) return undefined;
    while (common !== "" && !path.startsWith(`${common}/`)) common = parentOf(common);
  }
  return common === "" ? undefined : common;
}

function parentOf(path: string): string {
  return path.slice(0, Math.max(path.lastIndexOf("/"), 0));
}

/** One line of mountinfo. Source: proc_pid_mountinfo(5). */
export interface MountInfo {
  readonly mountId: number;
  readonly parentId: number;
  /** `major:minor` */
  readonly device: string;
  /** Directory of the file system that is the root of this mount. */
  readonly root: string;
  readonly mountPoint: string;
  readonly options: readonly string[];
  /** `shared:N`, `master:N`, `propagate_from:N`, `unbindable` */
  readonly propagation: readonly string[];
  readonly type: string;
  readonly source: string;
  readonly superOptions: readonly string[];
}

/** Parses one line of mountinfo; undefined for an empty or broken one. */
export function parseMountInfoLine(line: string): MountInfo | undefined {
  const fields = line.split(" ");
  // Optional fields end with a single dash: type, source and options of the super block follow.
  const dash = fields.indexOf("-", 6);
  if (dash < 0 || fields.length < dash + 3) return undefined;
  const [mountId, parentId, device, root, mountPoint, options] = fields;
  return {
    mountId: Number(mountId),
    parentId: Number(parentId),
    device: device!,
    root: unescapeOctal(root!),
    mountPoint: unescapeOctal(mountPoint!),
    options: options!.split(","),
    propagation: fields.slice(6, dash),
    type: fields[dash + 1]!,
    source: unescapeOctal(fields[dash + 2]!),
    superOptions: (fields[dash + 3] ?? "").split(","),
  };
}

/** mountinfo writes space, tab, newline and backslash as three octal digits; of their UTF-8 bytes nothing else. */
export function unescapeOctal(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, digits: string) =>
    String.fromCharCode(Number.parseInt(digits, 8)),
  );
}

function escapeOctal(text: string): string {
  return text.replace(/[ \t\n\\]/g, (c) => `\\${c.charCodeAt(0).toString(8).padStart(3, "0")}`);
}

/**
 * Reads the mounts of a process, in the order in which they were made.
 * @param containing  only lines that contain this text, checked before parsing: a node has thousands of mounts
 */
export async function readMountInfo(pid: number | "self", containing?: string): Promise<MountInfo[]> {
  return parseMountInfo(await readFile(`/proc/${pid}/mountinfo`, "utf8"), containing);
}

/** @param text  of /proc/PID/mountinfo. @param containing  as `readMountInfo` */
export function parseMountInfo(text: string, containing?: string): MountInfo[] {
  const mounts: MountInfo[] = [];
  for (const line of text.split("\n")) {
    if (containing !== undefined && !line.includes(containing)) continue;
    const mount = parseMountInfoLine(line);
    if (mount) mounts.push(mount);
  }
  return mounts;
}

/**
 * The mounts at a path and below it, the last made first, which is the order to unmount them in. The same mount
 * point comes as often as it is mounted on.
 * @param path  absolute, without symbolic links and trailing slash
 */
export async function mountsBelow(path: string, pid: number | "self" = "self"): Promise<MountInfo[]> {
  const prefix = path === "/" ? "/" : `${path}/`;
  const mounts = await readMountInfo(pid, escapeOctal(path));
  return mounts.filter((m) => m.mountPoint === path || m.mountPoint.startsWith(prefix)).reverse();
}

/** Takes a mount away now, and lets go of it when nobody uses it any more. @throws when it can't be unmounted, or isn't mounted */
export async function unmountLazily(mountPoint: string): Promise<void> {
  await promisify(execFile)("umount", ["--lazy", mountPoint]);
}

/** Removes a directory, and nothing of what is mounted in it. */
export async function removeWithoutMounts(directory: string): Promise<void> {
  const place = await realpath(directory).catch(() => directory); // ENOENT: nothing is there
  for (const { mountPoint } of await mountsBelow(place)) await unmountLazily(mountPoint);
  await rm(directory, { recursive: true, force: true });
}
