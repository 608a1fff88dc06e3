import { posix } from "node:path";
import type { ContainerIdentity } from "../checkpoint/manifest.ts";
import type { TcpPolicy } from "../checkpoint/policy.ts";
import { InvalidRequest, NotFound, PermissionDenied, SyscallFailed } from "../errors/index.ts";
import { readApart } from "../linux/apart.ts";
import { parseBytes, parseInterval } from "./quantities.ts";

// The part of an OCI bundle's config.json that we act on. Everything else passes through unread: the engine judges it.

export interface OciNamespace {
  readonly type: "pid" | "network" | "mount" | "ipc" | "uts" | "user" | "cgroup" | "time";
  /** A namespace to join; absent: a new one. */
  readonly path?: string;
}

export interface OciMount {
  readonly destination: string;
  readonly type?: string;
  readonly source?: string;
  readonly options?: readonly string[];
}

export interface OciDevice {
  readonly path: string;
  readonly type: string;
  readonly major?: number;
  readonly minor?: number;
  readonly fileMode?: number;
  readonly uid?: number;
  readonly gid?: number;
}

export interface OciHook {
  readonly path: string;
  readonly args?: readonly string[];
  readonly env?: readonly string[];
  readonly timeout?: number;
}

export interface OciProcess {
  readonly terminal?: boolean;
  readonly args?: readonly string[];
  readonly env?: readonly string[];
  readonly cwd?: string;
  readonly user?: {
    readonly uid?: number;
    readonly gid?: number;
    readonly additionalGids?: readonly number[];
  };
  readonly consoleSize?: { readonly width: number; readonly height: number };
}

/** Source: opencontainers/runtime-spec, config.md and config-linux.md. */
export interface OciSpec {
  readonly ociVersion?: string;
  readonly process?: OciProcess;
  readonly root?: { readonly path?: string; readonly readonly?: boolean };
  readonly hostname?: string;
  readonly mounts?: readonly OciMount[];
  readonly hooks?: Readonly<Record<string, readonly OciHook[]>>;
  readonly annotations?: Readonly<Record<string, string>>;
  readonly linux?: {
    readonly namespaces?: readonly OciNamespace[];
    readonly cgroupsPath?: string;
    readonly devices?: readonly OciDevice[];
    readonly resources?: Readonly<Record<string, unknown>>;
    readonly uidMappings?: readonly unknown[];
    readonly gidMappings?: readonly unknown[];
    readonly rootfsPropagation?: string;
    readonly maskedPaths?: readonly string[];
  };
}

// The same bound as containerd's; a spec of a real pod has some 20 KB.
const maxSpecBytes = 10 * 1024 * 1024;

/**
 * Reads a bundle's config.json, in one trip to a thread of its own: every start of a container waits for it.
 * @throws NotFound without bundle or file, InvalidRequest when it isn't a spec, TimedOut when its file system doesn't answer
 */
export async function readSpec(bundle: string): Promise<OciSpec> {
  const path = `${bundle}/config.json`;
  let text: string;
  try {
    text = (await readApart(path, maxSpecBytes)).toString("utf8");
  } catch (err) {
    const code = (err as NodeJS.ErrnoException).code;
    if (code === "ENOENT" || code === "ENOTDIR") throw new NotFound(`bundle has no ${path}`, { cause: err });
    if (code === "EISDIR") throw new InvalidRequest(`${path} is a directory`, { cause: err });
    if (code === "EINVAL") throw new InvalidRequest(`${path} is not a file`, { cause: err });
    if (code === "EFBIG")
      throw new InvalidRequest(`${path} has more than ${maxSpecBytes} bytes`, { cause: err });
    throw SyscallFailed.from(err);
  }
  return parseSpec(text, path);
}

/** @param path  for the error message */
export function parseSpec(text: string, path: string): OciSpec {
  let spec: unknown;
  try {
    spec = JSON.parse(text);
  } catch (err) {
    throw new InvalidRequest(`${path} is not JSON: ${(err as Error).message}`, { cause: err });
  }
  const wrong = findWrong(spec);
  if (wrong) throw new InvalidRequest(`${path} is not an OCI runtime spec: ${wrong}`);
  return spec as OciSpec;
}

// Only what we read; a mistake elsewhere is the engine's to report.
function findWrong(spec: unknown): string | undefined {
  if (!isObject(spec)) return "not an object";
  const { annotations, linux, process, mounts } = spec;
  if (annotations !== undefined && annotations !== null) {
    if (!isObject(annotations)) return "annotations is not an object";
    for (const [key, value] of Object.entries(annotations))
      if (typeof value !== "string") return `annotation ${key} is not a string`;
  }
  if (process !== undefined && process !== null && !isObject(process)) return "process is not an object";
  if (mounts !== undefined && mounts !== null && !isArrayOfObjects(mounts)) return "mounts is not a list";
  if (linux === undefined || linux === null) return undefined;
  if (!isObject(linux)) return "linux is not an object";
  const { namespaces } = linux;
  if (namespaces !== undefined && namespaces !== null && !isArrayOfObjects(namespaces))
    return "linux.namespaces is not a list";
  return undefined;
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isArrayOfObjects(value: unknown): boolean {
  return Array.isArray(value) && value.every(isObject);
}

/**
 * The text of a config.json for a copy of it in another directory: paths that are relative to the bundle become absolute.
 * @throws InvalidRequest when it isn't a spec
 */
export function movedFrom(bundle: string, text: string): string {
  return editSpec(text, posix.join(bundle, "config.json"), (spec) => {
    spec.root = { ...spec.root, path: posix.resolve(bundle, spec.root?.path ?? "rootfs") };
    if (spec.mounts)
      spec.mounts = spec.mounts.map((mount) =>
        mount.source && isBind(mount) ? { ...mount, source: posix.resolve(bundle, mount.source) } : mount,
      );
  });
}

export function isBind({ type, options }: OciMount): boolean {
  return type === "bind" || (options ?? []).some((option) => option === "bind" || option === "rbind");
}

/**
 * A process to be executed in the container as its first one was: user, directory, capabilities, limits and all else that the text of
 * config.json says of that, but without a terminal.
 * @param env  added to the container's own
 * @returns JSON for the engine's `exec --process`
 * @throws InvalidRequest when it isn't a spec
 */
export function processLike(
  text: string,
  { args, env }: { args: readonly string[]; env: readonly string[] },
  path = "config.json",
): string {
  const { terminal: _, consoleSize: __, ...own } = parseExactly(text, path).process ?? {};
  return JSON.stringify({ ...own, terminal: false, args, env: [...(own.env ?? []), ...env] });
}

/**
 * The text of a config.json with a change in it; everything else means what it meant.
 * @throws InvalidRequest when it isn't a spec
 */
export function editSpec(text: string, path: string, edit: (spec: Writable<OciSpec>) => void): string {
  const spec = parseExactly(text, path);
  edit(spec);
  return JSON.stringify(spec);
}

/** Numbers beyond what JavaScript counts exactly (limits of 2^64 - 1) stay as they are written. */
function parseExactly(text: string, path: string): Writable<OciSpec> {
  parseSpec(text, path);
  const exactly = (_key: string, value: unknown, { source }: { source?: string }) =>
    typeof value === "number" && !Number.isSafeInteger(value) ? rawJson(source!) : value;
  return (JSON.parse as (text: string, reviver: typeof exactly) => Writable<OciSpec>)(text, exactly);
}

type Writable<T> = { -readonly [K in keyof T]: T[K] };
const { rawJSON: rawJson } = JSON as unknown as { rawJSON(text: string): unknown };

/** Whether its network namespace isn't the host's: a new one, or one that it joins. */
export function hasNetworkNamespace(spec: OciSpec): boolean {
  return spec.linux?.namespaces?.some(({ type }) => type === "network") ?? false;
}

/** Whether the container gets a network namespace of its own, made by the engine. */
export function ownsNetworkNamespace(spec: OciSpec): boolean {
  const namespace = spec.linux?.namespaces?.find(({ type }) => type === "network");
  return namespace !== undefined && !namespace.path;
}

/**
 * The pid namespace that the container shares with others, as a path; undefined: it has one of its own.
 * @param parent  whoever starts the engine, whose namespace is meant where none is named
 */
export function sharedPidNamespace(spec: OciSpec, parent: number): string | undefined {
  const namespace = spec.linux?.namespaces?.find(({ type }) => type === "pid");
  if (!namespace) return `/proc/${parent}/ns/pid`;
  return namespace.path || undefined;
}

/** Whether the container's processes are in a user namespace that isn't the host's. */
export function hasUserNamespace(spec: OciSpec): boolean {
  return spec.linux?.namespaces?.some(({ type }) => type === "user") ?? false;
}

/**
 * Path of the container's cgroup in the version 2 hierarchy, as both engines make it; undefined where that depends on the
 * cgroup that the engine runs in (a relative path, or none), and for a scope that is named after an engine which isn't given.
 * @param engine  absent: of a scope the whole, without crun's cgroup in it
 * Source: opencontainers/runtime-spec config-linux.md ("Cgroups Path"); systemd.slice(5) for the nesting of slices; runc and crun, tried.
 */
export function cgroupPathV2(
  spec: OciSpec,
  id: string,
  systemd: boolean,
  engine?: "runc" | "crun",
): string | undefined {
  const path = spec.linux?.cgroupsPath ?? "";
  if (!systemd)
    return path.startsWith("/") && path !== "/" ? posix.normalize(path).replace(/\/$/, "") : undefined;
  const [slice = "", , name = ""] = path.split(":");
  const named = name !== "" || (path === "" && engine !== undefined);
  if (!named || name.endsWith(".slice")) return undefined;
  const parts = (slice || "system.slice")
    .replace(/\.slice$/, "")
    .split("-")
    .filter(Boolean);
  const slices = parts.map((_part, at) => `/${parts.slice(0, at + 1).join("-")}.slice`);
  // Without a path both take their own name and the container's.
  const scope = path === "" ? { ...spec, linux: { ...spec.linux, cgroupsPath: `:${engine}:${id}` } } : spec;
  return `${slices.join("")}/${cgroupName(scope, id, engine)}`;
}

/** Whether the cgroup's path is SLICE:PREFIX:NAME, a scope's, which no caller writes who doesn't want systemd to make it. */
export function namesScope(spec: OciSpec): boolean {
  return /^[^/:]*:[^/:]*:[^/:]+$/.test(spec.linux?.cgroupsPath ?? "");
}

/** The spec's annotations; empty when it has none. */
export function annotationsOf(spec: OciSpec): Readonly<Record<string, string>> {
  return spec.annotations ?? {};
}

/** Whether any annotation is for us. */
export function hasOurAnnotations(spec: OciSpec): boolean {
  return Object.keys(annotationsOf(spec)).some((name) => name.startsWith("cedana.io/"));
}

/** Whether an annotation asks for checkpoints again and again; what exactly, `cedanaAnnotations` says. */
export function asksForCheckpoints(spec: OciSpec): boolean {
  return Object.keys(annotationsOf(spec)).some((name) => name.startsWith("cedana.io/checkpoint-every"));
}

/**
 * Whether the container has no pid namespace of its own (it has the host's, or joins one). The kernel then doesn't
 * end its other processes with its init: whoever kills init must kill the rest by cgroup.
 */
export function sharesPidNamespace(spec: OciSpec): boolean {
  const namespace = spec.linux?.namespaces?.find(({ type }) => type === "pid");
  return namespace === undefined || (namespace.path ?? "") !== "";
}

/**
 * Name of the directory that is the container's own cgroup, in whichever hierarchy.
 *
 * `cgroupsPath` is a path, or for engines with `--systemd-cgroup` SLICE:PREFIX:NAME, which becomes the scope
 * PREFIX-NAME.scope; without one the engines take the container's id. In the scope crun makes a cgroup of its own for the container
 * with version 2, and freezes that: whoever froze the scope would have CRIU wait for ever for processes that it has thawed.
 * Source: opencontainers/runtime-spec config-linux.md ("Cgroups Path"); runc docs/systemd.md; crun(1), "run.oci.systemd.subgroup".
 */
export function cgroupName(spec: OciSpec, id: string, engine?: "runc" | "crun"): string {
  const path = spec.linux?.cgroupsPath ?? "";
  const [, prefix, name] = /^[^/:]*:([^/:]*):([^/:]+)$/.exec(path) ?? [];
  if (name?.endsWith(".slice")) return name;
  if (name !== undefined) {
    const scope = `${prefix ? `${prefix}-` : ""}${name}.scope`;
    const within = engine === "crun" ? (annotationsOf(spec)["run.oci.systemd.subgroup"] ?? "container") : "";
    return within === "" ? scope : `${scope}/${within}`;
  }
  return path.split("/").findLast((part) => part !== "") ?? id;
}

/** Annotations that name the group of containers which share one shim, the first that is set wins. Source: containerd's shim for runc. */
const groupAnnotations = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"] as const;

/** The group of containers that share one shim; undefined for a container alone. */
export function groupOf(spec: OciSpec): string | undefined {
  const annotations = annotationsOf(spec);
  const key = groupAnnotations.find((name) => annotations[name] !== undefined && annotations[name] !== "");
  return key && annotations[key];
}

/** Annotations that name a container's image, the first that is set wins: containerd's CRI, CRI-O and Podman. */
const imageAnnotations = [
  "io.kubernetes.cri.image-name",
  "io.kubernetes.cri-o.ImageName",
  "io.kubernetes.cri-o.Image",
] as const;

/** undefined where no annotation names its image. */
export function imageNameOf(spec: OciSpec): string | undefined {
  const annotations = annotationsOf(spec);
  return imageAnnotations.map((key) => annotations[key]).find(Boolean);
}

/**
 * Kubernetes' namespace of the pod; undefined elsewhere. containerd's CRI and CRI-O say it in annotations of their own, which they set
 * after the pod's, so a pod can't choose it; with both, one of them is the pod's.
 * @throws PermissionDenied for two that differ
 */
export function podNamespaceOf(spec: OciSpec): string | undefined {
  const byContainerd = annotationsOf(spec)["io.kubernetes.cri.sandbox-namespace"] || undefined;
  const byCrio = crioSandbox(spec)?.namespace;
  if (byContainerd !== undefined && byCrio !== undefined && byContainerd !== byCrio)
    throw new PermissionDenied(
      `annotations name two namespaces of the pod, ${byContainerd} and ${byCrio}: containerd sets the one, CRI-O the other`,
    );
  return byContainerd ?? byCrio;
}

/** Kubernetes' name of the pod; undefined elsewhere. */
export function podNameOf(spec: OciSpec): string | undefined {
  return annotationsOf(spec)["io.kubernetes.cri.sandbox-name"] || crioSandbox(spec)?.name;
}

/** CRI-O's name of the sandbox: k8s_NAME_NAMESPACE_UID_ATTEMPT, of which no part has an underscore. Source: cri-o, internal/lib/sandbox. */
function crioSandbox(spec: OciSpec): { name: string; namespace: string } | undefined {
  const text = annotationsOf(spec)["io.kubernetes.cri-o.SandboxName"] ?? "";
  const [, name, namespace] = /^k8s_([^_]+)_([^_]+)_[^_]+_\d+$/.exec(text) ?? [];
  return name !== undefined && namespace !== undefined ? { name, namespace } : undefined;
}

/** Who the container is, as far as its configuration knows. @param namespace  containerd's, "" outside of it */
export function identityOf(spec: OciSpec, containerId: string, namespace: string): ContainerIdentity {
  const annotations = annotationsOf(spec);
  const pod = podNameOf(spec) ?? (annotations["io.kubernetes.pod.name"] || undefined);
  const podNamespace = podNamespaceOf(spec) ?? (annotations["io.kubernetes.pod.namespace"] || undefined);
  const container = containerNameOf(spec);
  // A container that joins its pod's UTS namespace has no hostname of its own; Kubernetes' runtimes tell it the pod's.
  const hostname =
    spec.hostname || spec.process?.env?.findLast((one) => one.startsWith("HOSTNAME="))?.slice(9) || undefined;
  return {
    containerId,
    namespace,
    ...(hostname !== undefined && { hostname }),
    ...(pod !== undefined &&
      podNamespace !== undefined && {
        pod: { namespace: podNamespace, name: pod, ...(container && { container }) },
      }),
  };
}

/** Whether it is a pod's sandbox ("pause") container. CRI-O names the type like this too, with its own prefix. */
export function isSandboxContainer(spec: OciSpec): boolean {
  const annotations = annotationsOf(spec);
  return (
    annotations["io.kubernetes.cri.container-type"] === "sandbox" ||
    annotations["io.kubernetes.cri-o.ContainerType"] === "sandbox"
  );
}

/** Kubernetes' name of the container within its pod; undefined elsewhere. */
export function containerNameOf(spec: OciSpec): string | undefined {
  const annotations = annotationsOf(spec);
  return (
    annotations["io.kubernetes.cri.container-name"] ||
    annotations["io.kubernetes.container.name"] ||
    undefined
  );
}

/** Something that a container says, and where: "annotation cedana.io/…". */
export interface Setting {
  readonly name: string;
  readonly value: string;
}

/**
 * What `cedana.io/KEY` says of this container. Kubernetes annotates pods: `cedana.io/KEY.CONTAINER` is for one container of the pod and
 * goes before. The sandbox container ignores both.
 */
export function ownAnnotation(spec: OciSpec, key: string): Setting | undefined {
  if (isSandboxContainer(spec)) return undefined;
  const annotations = annotationsOf(spec);
  const container = containerNameOf(spec);
  const names = [...(container ? [`cedana.io/${key}.${container}`] : []), `cedana.io/${key}`];
  const name = names.find((candidate) => annotations[candidate] !== undefined);
  return name === undefined ? undefined : { name: `annotation ${name}`, value: annotations[name]! };
}

/** How a container wants to be checkpointed, as far as it says so. */
export interface CedanaAnnotations {
  readonly tcp?: TcpPolicy;
  readonly fileLocks?: boolean;
  readonly extUnix?: boolean;
  readonly shellJob?: boolean;
  /** restored, it starts at once, and its memory is filled behind it */
  readonly lazy?: boolean;
  /** what to restore instead of starting afresh: a name in the store, NAME@GENERATION, or a path */
  readonly restoreFrom?: string;
  /** which GPU of the checkpoint becomes which here: OLD=NEW,… of UUIDs or indexes */
  readonly gpuMap?: string;
  /** what becomes of a container whose restore fails; default: it fails */
  readonly onRestoreFailure?: "fail" | "fresh";
  /** continue from the last container of this key that was checkpointed instead of being ended */
  readonly autoResume?: string;
  /** signals upon which the container is checkpointed instead of dying: kill-policy.ts reads them */
  readonly checkpointOn?: string;
  /** it ends with a checkpoint whose caller says nothing of that: Docker can't tell a runtime like ours */
  readonly checkpointExit?: boolean;
  /** a checkpoint is taken again and again, in the store */
  readonly checkpointEveryMs?: number;
  /** how many of those are kept */
  readonly keepLast?: number;
  /** name of its checkpoints in the store */
  readonly checkpointName?: string;
  /** whether checkpoints in the store hold what it has changed in its root file system; default: yes */
  readonly rootfsDiff?: boolean;
  /** patterns of paths that are left out of that */
  readonly rootfsExclude?: readonly string[];
  readonly rootfsMaxBytes?: number;
  /** how GPU state is taken: by the driver alone (also when absent), or with the interception library in front of it */
  readonly gpu?: "driver" | "intercept";
  /** that library writes traces */
  readonly gpuTracing?: boolean;
}

// Key after `cedana.io/`, field, and what each allowed value means.
const flag = { true: true, false: false } as const;
const policies = [
  ["tcp", "tcp", { keep: "keep", close: "close", "skip-in-flight": "skip-in-flight" }],
  ["file-locks", "fileLocks", flag],
  ["ext-unix", "extUnix", flag],
  ["shell-job", "shellJob", flag],
  ["lazy", "lazy", flag],
  ["restore-from", "restoreFrom", "text"],
  ["gpu-map", "gpuMap", "text"],
  ["on-restore-failure", "onRestoreFailure", { fail: "fail", fresh: "fresh" }],
  ["auto-resume", "autoResume", "text"],
  ["checkpoint-on", "checkpointOn", "text"],
  ["checkpoint-exit", "checkpointExit", flag],
  [
    "checkpoint-every",
    "checkpointEveryMs",
    { parse: parseInterval, words: 'a time such as "90s" or "1h30m"' },
  ],
  ["keep-last", "keepLast", { parse: parseCount, words: "a number from 1 to 1000" }],
  ["checkpoint-name", "checkpointName", "text"],
  ["rootfs-diff", "rootfsDiff", flag],
  ["rootfs-exclude", "rootfsExclude", { parse: parseList, words: "patterns, with commas between them" }],
  ["gpu", "gpu", { driver: "driver", intercept: "intercept" }],
  ["gpu-tracing", "gpuTracing", flag],
  ["rootfs-max-bytes", "rootfsMaxBytes", { parse: parseBytes, words: 'a size such as "512Mi"' }],
] as const satisfies readonly (readonly [
  string,
  keyof CedanaAnnotations,
  Record<string, unknown> | Parsed | "text",
])[];

/** A value that isn't one of a few. `parse` gives undefined for what means nothing. */
interface Parsed {
  parse: (value: string) => unknown;
  words: string;
}

function parseCount(text: string): number | undefined {
  return /^[1-9]\d{0,3}$/.test(text) && Number(text) <= 1000 ? Number(text) : undefined;
}

function parseList(text: string): string[] {
  return text
    .split(",")
    .map((part) => part.trim())
    .filter(Boolean);
}

/**
 * Whatever the key says, also those that `policies` hasn't (kill-…, hook.…).
 * @param containerName  as for `cedanaAnnotations`: what is for another container of the pod is that one's affair
 * @throws PermissionDenied
 */
export function refuseDenied(
  spec: OciSpec,
  denied: readonly string[],
  containerName = containerNameOf(spec),
): void {
  if (isSandboxContainer(spec)) return;
  for (const name of Object.keys(annotationsOf(spec)))
    if (denied.some((key) => [`cedana.io/${key}`, `cedana.io/${key}.${containerName}`].includes(name)))
      throw new PermissionDenied(
        `annotation ${name} is denied by this node's configuration (annotations.deny)`,
      );
}

/**
 * The checkpoint policy that a container's annotations ask for.
 *
 * Kubernetes annotates pods, not containers: `cedana.io/KEY.CONTAINER` is for one container of the pod and goes before
 * `cedana.io/KEY`, which is for all of them. The sandbox container ignores both.
 * @param denied         keys that the administrator forbids
 * @param containerName  Kubernetes' name of the container; default: what the spec's own annotations say
 * @throws InvalidRequest naming the annotation and what it may say, PermissionDenied
 */
export function cedanaAnnotations(
  spec: OciSpec,
  {
    denied = [],
    containerName = containerNameOf(spec),
  }: { denied?: readonly string[]; containerName?: string | undefined } = {},
): CedanaAnnotations {
  if (isSandboxContainer(spec)) return {};
  refuseDenied(spec, denied, containerName);
  const annotations = annotationsOf(spec);
  const policy: Record<string, unknown> = {};
  for (const [key, field, allowed] of policies) {
    const names = [...(containerName ? [`cedana.io/${key}.${containerName}`] : []), `cedana.io/${key}`];
    const name = names.find((candidate) => annotations[candidate] !== undefined);
    if (name === undefined) continue;
    const value = annotations[name]!;
    if (allowed === "text") {
      if (value !== "") policy[field] = value;
      continue;
    }
    if ("parse" in allowed) {
      const parsed = allowed.parse(value);
      if (parsed === undefined)
        throw new InvalidRequest(
          `annotation ${name} is ${JSON.stringify(value)}; it may be ${allowed.words}`,
        );
      policy[field] = parsed;
      continue;
    }
    if (!Object.hasOwn(allowed, value))
      throw new InvalidRequest(
        `annotation ${name} is ${JSON.stringify(value)}; it may be ${Object.keys(allowed).join(", ")}`,
      );
    policy[field] = (allowed as Record<string, unknown>)[value];
  }
  return policy as CedanaAnnotations;
}
