import { stat } from "node:fs/promises";
import { arch, release } from "node:os";
import { normalize, relative } from "node:path";
import { installedPlugins } from "../criu/plugins.ts";
import { pluginsNeeded } from "../criu/suitability.ts";
import { criuVersion } from "../criu/version.ts";
import { TimedOut, Unavailable } from "../errors/index.ts";
import { statApart } from "../linux/apart.ts";
import { pathInRoot } from "../linux/root-path.ts";
import { isOlder } from "../linux/versions.ts";
import { type CpuFacts, cpuFacts, instructionsMissing } from "./cpu.ts";
import { type Finding, Found } from "./finding.ts";
import { explainMissing, gpuMountSource } from "./gpu-mounts.ts";
import type { GpuNode } from "./gpu-nodes.ts";
import { compareAddresses, type NetworkOfRestore } from "./identity.ts";
import type { DumpedFile, DumpedMount, ImageFacts } from "./image-facts.ts";
import type { OpenCheckpoint } from "./open.ts";
import { hasRootfsDiff } from "./rootfs-diff/index.ts";

/*
 * What differs between a checkpoint and where it is to be restored. An error is what CRIU or the engine would stumble over, or what the
 * restored program would; everything else that is worth knowing is a warning. A container's id, its namespace, pod, cgroup and limits may
 * be others: they are the new container's.
 */

/** What a container is to be, as its configuration says, as far as a checkpoint has to fit it. */
export interface RestoredContainer {
  readonly terminal: boolean;
  readonly engine: { readonly name: string; readonly version: string };
  /** as the engine above names it, where it does */
  readonly image: string | undefined;
  /** what it mounts from outside: by where, absolute */
  readonly binds: ReadonlyMap<string, string>;
  /** where it mounts anything, these included */
  readonly mountPoints: readonly string[];
  /** of cgroups */
  readonly cgroupMountPoints: readonly string[];
  readonly maskedPaths: readonly string[];
  readonly devices: readonly string[];
  /** undefined: as it was */
  readonly hostname: string | undefined;
  readonly network: NetworkOfRestore;
  /** those that are GPUs', as they are to be in the container */
  readonly gpuNodes?: readonly GpuNode[];
  /** its root file system, where that is there already */
  readonly rootfs?: string | undefined;
}

/** A mount from outside that the engine doesn't tell CRIU of. */
export interface ExternalMount {
  readonly key: string;
  readonly source: string;
  /** where its mount point has to be made in the root file system, if there is none */
  readonly mountPoint?: string | undefined;
}

interface Comparison {
  readonly findings: Finding[];
  /** for CRIU, besides what the engine says */
  readonly externalMounts: ExternalMount[];
  /** established TCP connections can only come back closed */
  readonly closesTcp: boolean;
}

/** What differs between the container that was dumped and the one that is to become it. */
export async function compareToContainer(
  { manifest, path }: OpenCheckpoint,
  facts: ImageFacts | undefined,
  container: RestoredContainer,
): Promise<Comparison> {
  const found = new Found("container");
  if (manifest && manifest.terminal !== container.terminal)
    found.error(
      "terminal",
      manifest.terminal
        ? "it is of a container with a terminal: create the new one with a terminal"
        : "it is of a container without a terminal: create the new one without",
    );
  const { engine } = container;
  if (manifest && manifest.engine.name !== engine.name)
    found.warning("engine", `it was taken with ${manifest.engine.name}, this container has ${engine.name}`);
  const dumpedImage = manifest?.image?.name;
  if (dumpedImage !== undefined && container.image !== undefined && dumpedImage !== container.image)
    found.warning(
      "image",
      `it is of the image ${dumpedImage}, this container of ${container.image}: files that the program has open or mapped must be the same`,
    );
  if (!facts) return { findings: found.list, externalMounts: [], closesTcp: false };
  const { externalMounts, silent } = await compareMounts(facts.mounts, container, found);
  // What a rootfs diff brings isn't there yet: `compareFilesWithDiff`. What doesn't answer would be waited for at its files, too.
  if (container.rootfs !== undefined && !silent && !(await hasRootfsDiff(path)))
    await compareFiles(facts, container, found);
  const closesTcp = await compareAddresses(facts.sockets, container.network, found);
  return { findings: found.list, externalMounts, closesTcp };
}

/** What differs in files that were open, when a rootfs diff has been applied: it may leave out some, or be of another image. */
export async function compareFilesWithDiff(
  facts: ImageFacts,
  container: RestoredContainer,
): Promise<Finding[]> {
  const found = new Found("container");
  if (container.rootfs !== undefined) await compareFiles(facts, container, found);
  return found.list;
}

// ---- mounts ----------------------------------------------------------------------------------------------------------

/** A volume's server may be gone. */
async function look(source: string): Promise<"there" | "missing" | "silent"> {
  try {
    await statApart(source);
    return "there";
  } catch (error) {
    return error instanceof TimedOut || error instanceof Unavailable ? "silent" : "missing";
  }
}

/**
 * CRIU makes the mounts that the images have, and no others. Those from outside it knows by the engine's key, which for a bind mount is
 * where it is mounted.
 * @returns what is hidden from the container in the way of another engine; and whether a mount's source doesn't answer
 */
async function compareMounts(
  mounts: readonly DumpedMount[],
  container: RestoredContainer,
  found: Found,
): Promise<{ externalMounts: ExternalMount[]; silent: boolean }> {
  const external: ExternalMount[] = [];
  const rootMount = mounts.find(({ mountPoint }) => mountPoint === "/")?.id;
  // All sources are asked at once, each in a thread of its own: one after another, they would be most of what is done here.
  const sources = mounts.map(({ externalKey: key }) => key !== undefined && container.binds.get(key));
  const looks = new Map(
    [...new Set(sources)].filter((one) => typeof one === "string").map((one) => [one, look(one)]),
  );
  for (const { externalKey: key, root, mountPoint, parentId } of mounts) {
    if (key === undefined) continue;
    const gpuSource = container.binds.has(key) ? undefined : gpuMountSource(mountPoint, key, root);
    if (gpuSource !== undefined) {
      const source = container.binds.get(mountPoint) ?? gpuSource;
      const there = await look(source);
      if (there === "silent") found.error("mount", `${source}, mounted at ${mountPoint}, does not answer`);
      else if (there === "missing")
        found.list.push({
          kind: "node",
          fault: "mount",
          severity: "error",
          message: explainMissing(mountPoint, source),
        });
      external.push({ key, source, ...(parentId === rootMount && { mountPoint }) });
      continue;
    }
    const source = container.binds.get(key);
    if (source !== undefined) {
      const there = await looks.get(source);
      if (there !== "there")
        found.error(
          "mount",
          `the source of the bind mount ${key}, ${source}, does not ${there === "missing" ? "exist" : "answer: the server of its file system (NFS, FUSE) may be gone"}`,
        );
    } else if (isMask(key, root)) {
      if (!isMaskOfEngine(key, container)) external.push({ key, source: "/dev/null" });
    } else if (!container.devices.includes(key) && !isBelowAny(key, container.cgroupMountPoints))
      found.error(
        "mount",
        `it has a mount from outside at ${key} (${root} of its file system), which the new container lacks: give it the same mount`,
      );
  }
  const silent = (await Promise.all(looks.values())).includes("silent");
  if (mounts.length === 0) return { externalMounts: external, silent };
  const dumped = new Set(mounts.map(({ mountPoint }) => mountPoint));
  for (const mountPoint of container.mountPoints)
    if (!dumped.has(mountPoint) && !isBelowAny(mountPoint, container.cgroupMountPoints))
      found.warning(
        "mount",
        `the container's mount at ${mountPoint} will not be there: the checkpoint has none`,
      );
  return { externalMounts: external, silent };
}

/** How engines hide a file: by /dev/null in its place. */
function isMask(key: string, root: string): boolean {
  return root === "/null" && (key === "/dev/null" || /^\/(?:proc|sys)\//.test(key));
}

/** runc has one key for all of them, crun each path. */
function isMaskOfEngine(key: string, { engine, maskedPaths }: RestoredContainer): boolean {
  return engine.name === "crun" ? maskedPaths.includes(key) : key === "/dev/null" && maskedPaths.length > 0;
}

function isBelowAny(path: string, directories: readonly string[]): boolean {
  return directories.some((directory) => path === directory || path.startsWith(`${directory}/`));
}

// ---- files -----------------------------------------------------------------------------------------------------------

/** Bits of a mode that CRIU compares: type and permissions. */
const COMPARED_MODE = 0o177777;

/** CRIU opens again by their paths the files that were open or mapped, and takes no file of another size or mode. */
async function compareFiles(facts: ImageFacts, container: RestoredContainer, found: Found): Promise<void> {
  const rootfs = container.rootfs!;
  const byId = new Map(facts.mounts.map((mount) => [mount.id, mount]));
  const root = facts.mounts.find(({ mountPoint }) => mountPoint === "/");
  for (const { mountPoint, parentId, externalKey } of facts.mounts) {
    if (parentId !== root?.id || externalKey !== undefined || container.mountPoints.includes(mountPoint))
      continue;
    if (!(await statIn(rootfs, mountPoint)))
      found.error("file", `the container's image has no ${mountPoint}, where the checkpoint has a mount`);
  }
  const seen = new Set<string>();
  for (const file of facts.files) {
    const mount = byId.get(file.mountId);
    if (!mount || seen.has(file.path)) continue;
    seen.add(file.path);
    const bind = mount.externalKey === undefined ? undefined : container.binds.get(mount.externalKey);
    const base = mount === root ? rootfs : bind;
    if (base === undefined) continue; // of a mount that CRIU makes, with what is in it
    const fault = await faultOf(file, base, relative(mount.mountPoint, file.path));
    if (fault)
      found.error(
        "file",
        `${file.path} ${fault}${mount === root ? ": it needs the same image" : ": it needs the same versions of mounted files"}`,
      );
  }
}

async function faultOf(file: DumpedFile, base: string, path: string): Promise<string | undefined> {
  const info = await statIn(base, path);
  if (!info) return "is missing";
  if (file.size !== undefined && info.size !== file.size)
    return `has ${info.size} bytes instead of ${file.size}`;
  const mode = Number(info.mode) & COMPARED_MODE;
  if (file.mode !== undefined && mode !== (file.mode & COMPARED_MODE))
    return `has the mode ${mode.toString(8)} instead of ${(file.mode & COMPARED_MODE).toString(8)}`;
  return undefined;
}

async function statIn(root: string, path: string) {
  const at = normalize(`/${path}`) === "/" ? root : await pathInRoot(root, path);
  return await stat(at, { bigint: true }).catch(() => undefined); // missing, or below what is no directory
}

// ---- node ------------------------------------------------------------------------------------------------------------

/** What a checkpoint finds where it is to be restored. */
export interface NodeFacts {
  readonly cpu: CpuFacts;
  readonly kernel: string;
  /** undefined: there is none where we look */
  readonly criu: string | undefined;
  /** CRIU's */
  readonly plugins: ReadonlySet<string>;
}

let knownCpu: Promise<CpuFacts> | undefined;

export async function nodeFacts(): Promise<NodeFacts> {
  knownCpu ??= cpuFacts();
  const [cpu, criu] = await Promise.all([knownCpu, criuVersion()]);
  return { cpu, criu, plugins: new Set(installedPlugins().keys()), kernel: release() };
}

/**
 * What this node lacks that the checkpoint needs.
 * @param options.ignoreCpu  a CPU with fewer instructions is only worth a warning
 */
export async function compareToNode(
  { imagePath, manifest }: OpenCheckpoint,
  node: NodeFacts,
  options: { ignoreCpu?: boolean } = {},
): Promise<Finding[]> {
  const found = new Found("node");
  for (const plugin of await pluginsNeeded(imagePath))
    if (!node.plugins.has(plugin))
      found.error("plugin", `CRIU's plugin ${plugin}, which it needs, is not installed`);
  if (!manifest) return found.list;
  const { cpu, criuVersion: dumpedBy, kernel } = manifest;
  if (cpu && cpu.architecture !== node.cpu.architecture)
    found.error(
      "cpu",
      `it is of a ${cpu.architecture} machine, this one is ${node.cpu.architecture || arch()}`,
    );
  else if (cpu) {
    const missing = instructionsMissing(cpu, node.cpu);
    const what = `this CPU lacks ${missing.join(", ")}, which the program may use since it was started`;
    if (missing.length > 0 && options.ignoreCpu) found.warning("cpu", what);
    else if (missing.length > 0)
      found.error("cpu", `${what} (an administrator may allow it: restore.ignoreCpu)`);
  }
  if (dumpedBy !== undefined && node.criu !== undefined && isOlder(node.criu, dumpedBy)) {
    const what = `it was taken by CRIU ${dumpedBy}, this node has ${node.criu}`;
    // Within a major version images gain fields that an older CRIU passes over.
    if (majorOf(node.criu) < majorOf(dumpedBy)) found.error("criu", `${what}: install ${dumpedBy} or newer`);
    else found.warning("criu", what);
  }
  if (isOlder(node.kernel.replace(/-.*$/, ""), kernel.replace(/-.*$/, "")))
    found.warning("kernel", `it was taken on kernel ${kernel}, this node has ${node.kernel}`);
  return found.list;
}

function majorOf(version: string): number {
  return Number.parseInt(version, 10);
}
