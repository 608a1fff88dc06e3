import { lstat, mkdir, readFile, stat, writeFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { type MountInfo, parseMountInfoLine, readMountInfo } from "../linux/mount-options.ts";
import { pathInRoot } from "../linux/root-path.ts";

/*
 * Mounts in a container that are of its GPUs and that its engine doesn't know: NVIDIA's hooks mount the driver's files, device nodes
 * and what is below /proc/driver/nvidia into it past the engine, and a restored container has the interception library without having
 * asked for it. CRIU is told of each that it comes from outside. The name that CRIU keeps of it says from where: so a restore needs
 * nothing but the images to know what it has to bring, and says what this node lacks of it.
 *
 * A name is believed only as far as it is one of such a file: images may come from anywhere.
 */

/** Where the interception library and its traces are mounted in a container: on its /dev, so that nothing of it gets into a rootfs. */
export const LIBRARY_MOUNT = "/dev/cedana-gpu";
export const TRACE_MOUNT = "/dev/cedana-gpu-trace";

const KEY_PREFIX = "cedana-gpu:";

/** Where NVIDIA's container toolkit, its device plugin and CDI put what they bring. */
const driverFiles = [
  /^(\/run\/nvidia\/driver)?\/dev\/(nvidia[^/]*|nvidia-caps\/[^/]+|dxg|dri\/[^/]+)$/,
  /^\/proc\/driver\/nvidia(\/.+)?$/,
  /^(\/[^/]+)*\/lib(cuda|cudadebugger|nvidia-[a-z0-9-]+|nvcuvid|nvoptix|nv[a-z0-9-]*|vdpau_nvidia|[A-Za-z]+_nvidia|dxcore|d3d12[a-z]*)\.so[.0-9]*$/,
  /^\/(usr\/)?(local\/)?s?bin\/nvidia-[a-z0-9-]+$/,
  /^(\/var)?\/run\/nvidia-[^/]+(\/[^/]+)?$/,
  /^(\/usr)?\/lib\/firmware\/nvidia\/.+$/,
  /^(\/[^/]+)*\/(nvidia|10_nvidia|nvidia_icd|nvidia_layers)[a-z0-9_.-]*\.(json|conf|icd|so[.0-9]*)$/,
  /^\/tmp\/nvidia-mps(\/.+)?$/,
];

function isDriverFile(path: string): boolean {
  return !path.split("/").includes("..") && driverFiles.some((pattern) => pattern.test(path));
}

/** A mount in the container, and the name that CRIU is to give it. */
export interface GpuMount {
  readonly mountPoint: string;
  readonly key: string;
}

/**
 * @param pid         of the container, whose mounts they are
 * @param configured  where its configuration mounts something: these are the engine's to tell CRIU of
 */
export async function findGpuMounts(pid: number, configured: readonly string[]): Promise<GpuMount[]> {
  // Nearly every container has none: its mounts are not even parsed.
  const text = await readFile(`/proc/${pid}/mountinfo`, "utf8").catch(() => ""); // ESRCH: it has ended
  if (!/nvidia|cuda|cedana-gpu|dxg|\/dri\/|libnv|libdxcore|libd3d12|nvoptix/.test(text)) return [];
  const mine = (path: string) => path === LIBRARY_MOUNT || path === TRACE_MOUNT || isDriverFile(path);
  const mounts = text
    .split("\n")
    .map(parseMountInfoLine)
    .filter((mount) => mount !== undefined)
    .filter(({ mountPoint }) => mine(mountPoint) && !configured.includes(mountPoint));
  if (mounts.length === 0) return [];
  const host = await readMountInfo("self");
  const found = await Promise.all(
    mounts.map(async (mount) => {
      const source = await sourceOf(mount, host);
      return source === undefined
        ? undefined
        : { mountPoint: mount.mountPoint, key: `${KEY_PREFIX}${source}` };
    }),
  );
  // What has no source here was made in the container (a tmpfs, say), and is CRIU's to dump.
  return found.filter((mount) => mount !== undefined);
}

/** The path by which we see what is mounted there. */
async function sourceOf({ device, root, mountPoint, type }: MountInfo, host: readonly MountInfo[]) {
  for (const { device: other, root: otherRoot, mountPoint: at } of host.toReversed()) {
    if (other !== device || !isBelow(root, otherRoot)) continue;
    const path = join(at, root.slice(otherRoot === "/" ? 0 : otherRoot.length));
    if (acceptable(path, mountPoint) && (await exists(path))) return path;
  }
  // A file of ours over one of /proc/driver/nvidia, made by a hook in the container's own namespace: here it has the real one.
  const overProc = mountPoint.startsWith("/proc/driver/nvidia/") && type === "tmpfs" && root !== "/";
  return overProc && (await exists(mountPoint)) ? mountPoint : undefined;
}

function isBelow(path: string, directory: string): boolean {
  return directory === "/" || path === directory || path.startsWith(`${directory}/`);
}

function acceptable(source: string, mountPoint: string): boolean {
  if (mountPoint === LIBRARY_MOUNT) return dirname(source) === gpuLibraries();
  if (mountPoint === TRACE_MOUNT) return dirname(source) === gpuTraces();
  return isDriverFile(source);
}

// ---- at a restore ----------------------------------------------------------------------------------------------------

/**
 * From where a mount of a checkpoint comes here.
 * @param key   as CRIU has it
 * @param root  of the mounted file system, as it was mounted
 * @returns undefined when it is none of these mounts
 */
export function gpuMountSource(mountPoint: string, key: string, root: string): string | undefined {
  // Of a container that asked for it itself, the engine has told CRIU, by the place alone.
  const name = basename(root);
  if (mountPoint === LIBRARY_MOUNT && /^[0-9a-f]{64}$/.test(name)) return join(gpuLibraries(), name);
  if (mountPoint === TRACE_MOUNT && /^[A-Za-z0-9][A-Za-z0-9_.-]*$/.test(name)) return join(gpuTraces(), name);
  if (!key.startsWith(KEY_PREFIX)) return undefined;
  const source = key.slice(KEY_PREFIX.length);
  return isDriverFile(source) ? source : undefined;
}

/** Why a source isn't here, for whoever has to see to it. */
export function explainMissing(mountPoint: string, source: string): string {
  if (mountPoint === LIBRARY_MOUNT)
    return `the version of the GPU interception library that it runs with (${source}) is not on this node: copy that directory from where it was taken`;
  if (mountPoint === TRACE_MOUNT)
    return `the directory that it writes its GPU traces to (${source}) is not on this node: mkdir -m 1777 it, so that it can go on`;
  return `${source} of the GPU driver, which it has mounted at ${mountPoint}, is not on this node: it needs the same version of the driver, and the same device`;
}

/** Makes what the mount is put on, where the root file system is fresh. The toolkit's hook had made it in the old one. */
export async function makeMountPoint(rootfs: string, mountPoint: string, source: string): Promise<void> {
  const path = await pathInRoot(rootfs, mountPoint);
  if (await lstat(path).catch(() => undefined)) return;
  if ((await stat(source)).isDirectory()) {
    await mkdir(path, { recursive: true, mode: 0o755 });
    return;
  }
  await mkdir(dirname(path), { recursive: true, mode: 0o755 });
  await writeFile(path, "", { flag: "wx", mode: 0o644 });
}

// ---- places ----------------------------------------------------------------------------------------------------------

function stateDirectory(): string {
  return process.env.CEDANA_STATE_DIR || "/var/lib/cedana";
}

/** A directory for each version of the library that a container may have, by its SHA-256: what runs keeps the one it was started with. */
export function gpuLibraries(): string {
  return join(stateDirectory(), "gpu-library");
}

/** A directory for the traces of each container. */
export function gpuTraces(): string {
  return join(stateDirectory(), "gpu-traces");
}

const exists = (path: string) =>
  stat(path).then(
    () => true,
    () => false, // ENOENT: not on this node
  );
