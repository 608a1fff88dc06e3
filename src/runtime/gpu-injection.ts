import { createHash, randomUUID } from "node:crypto";
import { existsSync } from "node:fs";
import { chmod, link, mkdir, readFile, rename, rm, stat, utimes, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { gpuLibraries, gpuTraces, LIBRARY_MOUNT, TRACE_MOUNT } from "../checkpoint/gpu-mounts.ts";
import { PermissionDenied, Unavailable } from "../errors/index.ts";
import { configurationPath, readConfiguration } from "./configuration.ts";
import { sweepTraces } from "./gpu-sweep.ts";
import {
  annotationsOf,
  cedanaAnnotations,
  containerNameOf,
  editSpec,
  isSandboxContainer,
  type OciSpec,
  readSpec,
} from "./spec.ts";

/*
 * What a container that asks for `cedana.io/gpu: intercept` gets in its configuration, before its engine makes it:
 *
 *   a read-only mount of a directory that holds the interception library and nothing else, at /dev/cedana-gpu
 *   LD_PRELOAD, with the library before what is there
 *   with `cedana.io/gpu-tracing: true`, a directory for its traces at /dev/cedana-gpu-trace, and CEDANA_GPU_TRACE
 *
 * The library is mounted by its digest: an upgrade of ours leaves running containers, and checkpoints, the one that they have mapped.
 *
 * Every other container's configuration stays as it is, to the byte. In a pod the annotation is on the pod, and so on containers that have
 * nothing to do with a GPU: there it counts only for those that ask for GPUs otherwise, or that it names.
 */

const LIBRARY_NAME = "libcuda.so.1";
export const PRELOADED = `${LIBRARY_MOUNT}/${LIBRARY_NAME}`;

/**
 * By what a container asks for GPUs, if it does: devices of CDI, NVIDIA's environment variable, device nodes, or mounts of the
 * driver. An image may have the variable without anybody having asked; without a GPU on the node nothing comes of it.
 */
export function gpuRequests(spec: OciSpec): string[] {
  const requests: string[] = [];
  for (const [key, value] of Object.entries(annotationsOf(spec)))
    if (key.startsWith("cdi.k8s.io/") && /(^|,)[a-z0-9.-]+\/(gpu|mig|vgpu)[a-z0-9._-]*=/i.test(value))
      requests.push(`CDI devices ${value}`);
  const visible = spec.process?.env?.findLast((entry) => entry.startsWith("NVIDIA_VISIBLE_DEVICES="));
  const wanted = visible?.slice(visible.indexOf("=") + 1) ?? "";
  if (!["", "void", "none"].includes(wanted)) requests.push(`NVIDIA_VISIBLE_DEVICES=${wanted}`);
  const nodes = (spec.linux?.devices ?? []).filter(({ path }) => isNode(path));
  if (nodes.length > 0) requests.push(`device nodes ${nodes.map(({ path }) => path).join(", ")}`);
  const mounts = (spec.mounts ?? []).filter(
    ({ destination, source }) =>
      isNode(destination) || isNode(source ?? "") || /\/libcuda\.so[.0-9]*$/.test(destination),
  );
  if (mounts.length > 0)
    requests.push(`mounts at ${mounts.map(({ destination }) => destination).join(", ")}`);
  return requests;
}

function isNode(path: string): boolean {
  return /^\/dev\/(nvidia|dxg$)/.test(path);
}

/** @throws PermissionDenied, InvalidRequest for an annotation that is forbidden or means nothing */
async function wanted(spec: OciSpec): Promise<{ tracing: boolean } | undefined> {
  if (isSandboxContainer(spec)) return undefined;
  if (!Object.keys(annotationsOf(spec)).some((key) => /^cedana\.io\/gpu(-tracing)?(\.|$)/.test(key)))
    return undefined;
  const configuration = await readConfiguration();
  const { gpu, gpuTracing = false } = cedanaAnnotations(spec, { denied: configuration.annotations.deny });
  if (gpu !== "intercept") return undefined; // tracing is the library's
  const name = containerNameOf(spec);
  const named = name === undefined || annotationsOf(spec)[`cedana.io/gpu.${name}`] !== undefined;
  if (!named && gpuRequests(spec).length === 0) return undefined;
  if (gpuTracing && !configuration.gpu.tracing)
    throw new PermissionDenied(
      `cedana.io/gpu-tracing lets a container write files on this node, which its administrator has not allowed (gpu.tracing in ${configurationPath()})`,
    );
  return { tracing: gpuTracing };
}

/**
 * Changes a bundle's config.json as the container's annotations ask for. Run again, it finds its own work done.
 * @param owner  names the directory of the traces
 * @returns the configuration as it is now; undefined when there was nothing to do
 * @throws PermissionDenied, InvalidRequest, Unavailable without the library
 */
export async function injectGpu(
  bundle: string,
  spec: OciSpec,
  owner: { namespace: string; id: string },
): Promise<OciSpec | undefined> {
  if (hasInterception(spec)) return undefined;
  const wants = await wanted(spec);
  if (!wants) return undefined;
  const path = join(bundle, "config.json");
  const library = await libraryDirectory();
  const traces = wants.tracing ? await traceDirectory(owner) : undefined;
  const { traceMaxBytes } = (await readConfiguration()).gpu;
  const text = editSpec(await readFile(path, "utf8"), path, (config) => {
    config.mounts = [
      ...(config.mounts ?? []),
      bind(LIBRARY_MOUNT, library, ["ro", "nosuid", "nodev"]),
      ...(traces === undefined ? [] : [bind(TRACE_MOUNT, traces, ["rw", "nosuid", "nodev", "noexec"])]),
    ];
    const env =
      traces === undefined
        ? {}
        : { CEDANA_GPU_TRACE: TRACE_MOUNT, CEDANA_GPU_TRACE_BYTES: String(traceMaxBytes) };
    config.process = { ...config.process, env: withLibrary(config.process?.env ?? [], env) };
  });
  const { mode, uid } = await stat(path);
  const temporary = `${path}.cedana-gpu`;
  await writeFile(temporary, text, { mode: 0o600 });
  if (uid === process.getuid!()) await chmod(temporary, mode & 0o777);
  await rename(temporary, path);
  return await readSpec(bundle);
}

/**
 * A bundle's config.json changed for an engine's create. Disposed of, it is the caller's again, who may read it or give it to others; a crash in
 * between leaves the original beside it, for the next one to put back.
 */
export async function injectedConfig(
  bundle: string,
  spec: OciSpec,
  owner: { namespace: string; id: string },
): Promise<AsyncDisposable> {
  const [path, original] = [join(bundle, "config.json"), join(bundle, "config.json.before-cedana-gpu")];
  const putBack = () => rename(original, path).catch(absent);
  if (!(await wanted(spec))) return { [Symbol.asyncDispose]: async () => {} };
  if (hasInterception(spec)) await putBack();
  await rm(original, { force: true });
  await link(path, original);
  try {
    await injectGpu(bundle, await readSpec(bundle), owner);
  } catch (error) {
    await putBack();
    throw error;
  }
  return { [Symbol.asyncDispose]: putBack };
}

function absent(error: NodeJS.ErrnoException): void {
  if (error.code !== "ENOENT") throw error; // the bundle has gone with its container
}

/** Whether the container has the library in its configuration. */
export function hasInterception(spec: OciSpec): boolean {
  return (spec.mounts ?? []).some(({ destination }) => destination === LIBRARY_MOUNT);
}

/**
 * A process that is started in the container later gets the library, too: its caller took the environment from the configuration as it
 * was before us.
 * @param process  an OCI process, JSON; one that is none stays as it is, for the engine to refuse
 */
export function withInterception(process: string, spec: OciSpec): string {
  if (!hasInterception(spec)) return process;
  let parsed: { env?: unknown } | null;
  try {
    parsed = JSON.parse(process);
  } catch {
    return process;
  }
  if (typeof parsed !== "object" || parsed === null) return process;
  const { env = [] } = parsed;
  if (!Array.isArray(env) || !env.every((entry) => typeof entry === "string")) return process;
  const ours = (spec.process?.env ?? []).filter((entry) => /^CEDANA_GPU_TRACE(_BYTES)?=/.test(entry));
  const variables = Object.fromEntries(
    ours.map((entry) => [entry.slice(0, entry.indexOf("=")), entry.slice(entry.indexOf("=") + 1)]),
  );
  return JSON.stringify({ ...parsed, env: withLibrary(env, variables) });
}

function bind(destination: string, source: string, options: string[]) {
  return { destination, type: "bind", source, options: ["bind", "rprivate", ...options] };
}

/** Before what the program preloads itself. One that names a variable twice gets the last, as the engines have it. */
function withLibrary(env: readonly string[], variables: Readonly<Record<string, string>> = {}): string[] {
  const names = ["LD_PRELOAD", ...Object.keys(variables)];
  const preloaded = env.findLast((entry) => entry.startsWith("LD_PRELOAD="))?.slice("LD_PRELOAD=".length);
  const others = preloaded?.split(/[ :]/).filter((part) => part !== "" && part !== PRELOADED) ?? [];
  return [
    ...env.filter((entry) => !names.some((name) => entry.startsWith(`${name}=`))),
    `LD_PRELOAD=${[PRELOADED, ...others].join(":")}`,
    ...Object.entries(variables).map(([name, value]) => `${name}=${value}`),
  ];
}

// ---- files -----------------------------------------------------------------------------------------------------------

/** A file that the build leaves in build/gpu, or an installation beside cedanad. */
export function findGpuFile(name: "libcuda.so.1" | "cedana-gpu-control"): string {
  const told = process.env.CEDANA_GPU_FILES;
  if (told) {
    if (existsSync(join(told, name))) return join(told, name);
    throw new Unavailable(`${told} (CEDANA_GPU_FILES) has no ${name}`);
  }
  for (let directory = import.meta.dirname; ; directory = dirname(directory)) {
    for (const path of [join(directory, "gpu", name), join(directory, "build/gpu", name)])
      if (existsSync(path)) return path;
    if (directory === dirname(directory)) break;
  }
  throw new Unavailable(
    `${name} of the GPU interception is neither beside ${import.meta.dirname} nor above it; run \`npm run build\` or set CEDANA_GPU_FILES`,
  );
}

/** A copy of the library as it is now, in a directory of its own by its digest, readable for any user of a container. */
async function libraryDirectory(): Promise<string> {
  const contents = await readFile(findGpuFile(LIBRARY_NAME));
  const directory = join(gpuLibraries(), createHash("sha256").update(contents).digest("hex"));
  const file = join(directory, LIBRARY_NAME);
  if ((await stat(file).catch(() => undefined))?.size === contents.length) {
    await touch(directory);
    return directory;
  }
  await mkdir(directory, { recursive: true, mode: 0o755 });
  const temporary = `${directory}.${randomUUID()}.new`; // beside it: nothing else is ever in the directory
  await writeFile(temporary, contents, { mode: 0o555 });
  await chmod(temporary, 0o555);
  await chmod(directory, 0o755);
  await rename(temporary, file);
  return directory;
}

/** Writable for whatever user the container has; nobody else gets there. */
async function traceDirectory({ namespace, id }: { namespace: string; id: string }): Promise<string> {
  await mkdir(gpuTraces(), { recursive: true, mode: 0o700 });
  const directory = join(gpuTraces(), namespace === "" ? id : `${namespace}.${id}`);
  await mkdir(directory, { recursive: true });
  await chmod(directory, 0o1777);
  await touch(directory);
  await sweepTraces((await readConfiguration()).gpu);
  return directory;
}

/** The sweep (gpu-sweep.ts) goes by when it was used. */
async function touch(path: string): Promise<void> {
  const now = new Date();
  await utimes(path, now, now);
}
