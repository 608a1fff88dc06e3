import { constants } from "node:fs";
import { open, stat } from "node:fs/promises";
import { isAbsolute, join, normalize } from "node:path";
import { type Compression, compressions } from "../checkpoint/archive/compressions.ts";
import { InvalidRequest, PermissionDenied, SyscallFailed } from "../errors/index.ts";
import { parseBytes, parseInterval } from "./quantities.ts";

/*
 * What the administrator allows, in one JSON file. Whoever may annotate a pod must not thereby read or run another's memory, nor run
 * commands, nor name paths of the host: what isn't said here has the careful default. The file is read again when it has changed.
 *
 *   {
 *     "annotations": { "deny": ["lazy"], "hooks": false },
 *     "restoreFromPaths": ["/srv/checkpoints"],
 *     "checkpoints": { "directory": "/var/lib/cedana/checkpoints", "keepLast": 3, "shortestInterval": "10s", "compression": "zstd" },
 *     "gpu": { "tracing": true, "traceMaxBytes": "64Mi" },
 *     "restore": { "verifyDigests": true, "keyFile": "/etc/cedana/key" },
 *     "plugins": { "load": ["cedana-plugin-audit"], "directory": "/var/lib/cedana/plugins" }
 *   }
 */
export interface Configuration {
  readonly annotations: {
    /** keys after `cedana.io/` that no container may use; using one is an error, not ignored */
    readonly deny: readonly string[];
    /** `cedana.io/hook.…` runs commands in the container */
    readonly hooks: boolean;
  };
  /** directories below which `cedana.io/restore-from` may name a path; without one it may only name checkpoints of the store */
  readonly restoreFromPaths: readonly string[];
  readonly plugins: {
    /** npm packages from outside of our tree, by name or absolute path */
    readonly named: readonly string[];
    /** where those given by name are installed: `npm install --prefix` */
    readonly directory: string;
  };
  readonly checkpoints: {
    /** root of the store */
    readonly directory: string;
    /** how many checkpoints of a name `cedana.io/checkpoint-every` keeps, where `cedana.io/keep-last` doesn't say */
    readonly keepLast: number;
    /** what `cedana.io/checkpoint-every` may not be shorter than */
    readonly shortestIntervalMs: number;
    /** how those that nobody asks for are archived; undefined: they are directories */
    readonly compression?: Compression | undefined;
    /** what those archives are encrypted with */
    readonly keyFile?: string | undefined;
    /** patterns that no rootfs diff holds, beside those of the container */
    readonly rootfsExclude: readonly string[];
    /** what no rootfs diff may exceed, whatever the container says */
    readonly rootfsMaxBytes: number;
  };
  readonly gpu: {
    /** `cedana.io/gpu-tracing` lets containers write into a directory of this node */
    readonly tracing: boolean;
    /** of one process's traces; a program that means ill can write more */
    readonly traceMaxBytes: number;
    /** of all traces on this node: beyond these, the oldest are removed */
    readonly tracesMaxBytes: number;
    readonly tracesMaxAgeMs: number;
  };
  readonly restore: {
    /** hash every file of a checkpoint before it is restored, and not only look at sizes: reads all of it once more */
    readonly verifyDigests: boolean;
    /** restore on a CPU that lacks instructions which the dumped one had: what uses them is killed by SIGILL, at any time later */
    readonly ignoreCpu: boolean;
    /** opens encrypted archives; default: `checkpoints.keyFile` */
    readonly keyFile?: string | undefined;
  };
}

const MAX_BYTES = 1024 * 1024;

export function configurationPath(): string {
  return process.env.CEDANA_CONFIG || "/etc/cedana/config.json";
}

function stateDirectory(): string {
  return process.env.CEDANA_STATE_DIR || "/var/lib/cedana";
}

/** Where archives are unpacked for restores. */
export function unpackDirectory(): string {
  return join(stateDirectory(), "unpacked");
}

function defaults(): Configuration {
  return {
    annotations: { deny: [], hooks: false },
    restoreFromPaths: [],
    plugins: { named: [], directory: join(stateDirectory(), "plugins") },
    checkpoints: {
      directory: join(stateDirectory(), "checkpoints"),
      keepLast: 3,
      shortestIntervalMs: 10_000,
      rootfsExclude: [],
      rootfsMaxBytes: 4 * 1024 ** 3,
    },
    gpu: {
      tracing: false,
      traceMaxBytes: 64 * 1024 ** 2,
      tracesMaxBytes: 8 * 1024 ** 3,
      tracesMaxAgeMs: 30 * 24 * 3_600_000,
    },
    restore: { verifyDigests: false, ignoreCpu: false },
  };
}

let known: { key: string; configuration: Configuration } | undefined;

/**
 * @throws PermissionDenied when somebody else than root could have written it, InvalidRequest naming what is wrong in it. A file that
 *   can't be trusted or read allows nothing: there is no falling back to defaults
 */
export async function readConfiguration(path = configurationPath()): Promise<Configuration> {
  const info = await stat(path, { bigint: true }).catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return undefined;
    throw SyscallFailed.from(error);
  });
  if (!info) return defaults();
  const key = [path, info.dev, info.ino, info.size, info.mtimeNs, info.ctimeNs].join(" ");
  if (known?.key !== key) known = { key, configuration: parseConfiguration(await readTrusted(path), path) };
  return known.configuration;
}

async function readTrusted(path: string): Promise<string> {
  await using file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK);
  const info = await file.stat();
  if (!info.isFile()) throw new InvalidRequest(`configuration ${path} is not a file`);
  if (info.uid !== 0 && info.uid !== process.getuid!())
    throw new PermissionDenied(`configuration ${path} belongs to user ${info.uid}: it must be root's`);
  if (info.mode & 0o022)
    throw new PermissionDenied(
      `configuration ${path} can be written by others (mode ${(info.mode & 0o777).toString(8)}): chmod go-w`,
    );
  if (info.size > MAX_BYTES) throw new InvalidRequest(`configuration ${path} has ${info.size} bytes`);
  return await file.readFile("utf8");
}

/** @throws InvalidRequest naming what is wrong */
export function parseConfiguration(text: string, path: string): Configuration {
  const wrong = (what: string): never => {
    throw new InvalidRequest(`configuration ${path}: ${what}`);
  };
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    return wrong(`it is not JSON: ${(error as Error).message}`);
  }
  const object = (value: unknown, name: string, keys: readonly string[]): Record<string, unknown> => {
    if (value === undefined) return {};
    if (typeof value !== "object" || value === null || Array.isArray(value))
      return wrong(`${name} is not an object`);
    for (const key of Object.keys(value))
      if (!keys.includes(key)) wrong(`${name} has ${JSON.stringify(key)}; it may have ${keys.join(", ")}`);
    return value as Record<string, unknown>;
  };
  const strings = (value: unknown, name: string): string[] | undefined => {
    if (value === undefined) return undefined;
    if (!Array.isArray(value) || !value.every((one) => typeof one === "string"))
      return wrong(`${name} is not a list of strings`);
    return value as string[];
  };
  const directory = (value: string, name: string): string => {
    if (!isAbsolute(value) || value.includes("\0"))
      wrong(`${name}: ${JSON.stringify(value)} is not an absolute path`);
    return normalize(value).replace(/(?<=.)\/$/, "");
  };
  const top = object(json, "the file", [
    "annotations",
    "restoreFromPaths",
    "checkpoints",
    "gpu",
    "restore",
    "plugins",
  ]);
  const annotations = object(top.annotations, "annotations", ["deny", "hooks"]);
  const checkpoints = object(top.checkpoints, "checkpoints", [
    "directory",
    "keepLast",
    "shortestInterval",
    "compression",
    "keyFile",
    "rootfsExclude",
    "rootfsMaxBytes",
  ]);
  const restore = object(top.restore, "restore", ["verifyDigests", "ignoreCpu", "keyFile"]);
  const plugins = object(top.plugins, "plugins", ["load", "directory"]);
  const otherwise = defaults();
  const { hooks = otherwise.annotations.hooks } = annotations;
  if (typeof hooks !== "boolean") return wrong("annotations.hooks is neither true nor false");
  const { verifyDigests = otherwise.restore.verifyDigests, ignoreCpu = otherwise.restore.ignoreCpu } =
    restore;
  if (typeof verifyDigests !== "boolean") return wrong("restore.verifyDigests is neither true nor false");
  if (typeof ignoreCpu !== "boolean") return wrong("restore.ignoreCpu is neither true nor false");
  const { keepLast = otherwise.checkpoints.keepLast, directory: root = otherwise.checkpoints.directory } =
    checkpoints;
  if (typeof keepLast !== "number" || !Number.isInteger(keepLast) || keepLast < 1 || keepLast > 1000)
    return wrong("checkpoints.keepLast is not a number from 1 to 1000");
  if (typeof root !== "string") return wrong("checkpoints.directory is not a string");
  const asText = (value: unknown, name: string): string | undefined =>
    value === undefined || typeof value === "string" ? value : wrong(`${name} is not a string`);
  const interval = asText(checkpoints.shortestInterval, "checkpoints.shortestInterval");
  const shortestIntervalMs =
    interval === undefined ? otherwise.checkpoints.shortestIntervalMs : parseInterval(interval);
  if (shortestIntervalMs === undefined)
    return wrong('checkpoints.shortestInterval is not a time such as "10s"');
  const compression = asText(checkpoints.compression, "checkpoints.compression") as Compression | undefined;
  if (compression !== undefined && !compressions.includes(compression))
    return wrong(`checkpoints.compression is not one of ${compressions.join(", ")}`);
  const keyFile = asText(checkpoints.keyFile, "checkpoints.keyFile");
  if (keyFile !== undefined && compression === undefined)
    return wrong("checkpoints.keyFile encrypts archives: checkpoints.compression must say which");
  const restoreKeyFile = asText(restore.keyFile, "restore.keyFile");
  const size = asText(checkpoints.rootfsMaxBytes, "checkpoints.rootfsMaxBytes");
  const rootfsMaxBytes = size === undefined ? otherwise.checkpoints.rootfsMaxBytes : parseBytes(size);
  if (rootfsMaxBytes === undefined) return wrong('checkpoints.rootfsMaxBytes is not a size such as "512Mi"');
  const gpu = object(top.gpu, "gpu", ["tracing", "traceMaxBytes", "tracesMaxBytes", "tracesMaxAge"]);
  const { tracing = otherwise.gpu.tracing } = gpu;
  if (typeof tracing !== "boolean") return wrong("gpu.tracing is neither true nor false");
  const traceSize = asText(gpu.traceMaxBytes, "gpu.traceMaxBytes");
  const traceMaxBytes = traceSize === undefined ? otherwise.gpu.traceMaxBytes : parseBytes(traceSize);
  if (traceMaxBytes === undefined) return wrong('gpu.traceMaxBytes is not a size such as "64Mi"');
  const tracesSize = asText(gpu.tracesMaxBytes, "gpu.tracesMaxBytes");
  const tracesMaxBytes = tracesSize === undefined ? otherwise.gpu.tracesMaxBytes : parseBytes(tracesSize);
  if (tracesMaxBytes === undefined) return wrong('gpu.tracesMaxBytes is not a size such as "8Gi"');
  const age = asText(gpu.tracesMaxAge, "gpu.tracesMaxAge");
  const tracesMaxAgeMs = age === undefined ? otherwise.gpu.tracesMaxAgeMs : parseInterval(age);
  if (tracesMaxAgeMs === undefined) return wrong('gpu.tracesMaxAge is not a time such as "30d"');
  return {
    annotations: { deny: strings(annotations.deny, "annotations.deny") ?? otherwise.annotations.deny, hooks },
    restoreFromPaths: (strings(top.restoreFromPaths, "restoreFromPaths") ?? []).map((one) =>
      directory(one, "restoreFromPaths"),
    ),
    plugins: {
      named: strings(plugins.load, "plugins.load") ?? [],
      directory: directory(
        asText(plugins.directory, "plugins.directory") ?? otherwise.plugins.directory,
        "plugins.directory",
      ),
    },
    checkpoints: {
      directory: directory(root, "checkpoints.directory"),
      keepLast,
      shortestIntervalMs,
      ...(compression && { compression }),
      ...(keyFile !== undefined && { keyFile: directory(keyFile, "checkpoints.keyFile") }),
      rootfsExclude: strings(checkpoints.rootfsExclude, "checkpoints.rootfsExclude") ?? [],
      rootfsMaxBytes,
    },
    gpu: { tracing, traceMaxBytes, tracesMaxBytes, tracesMaxAgeMs },
    restore: {
      verifyDigests,
      ignoreCpu,
      ...(restoreKeyFile !== undefined && { keyFile: directory(restoreKeyFile, "restore.keyFile") }),
    },
  };
}
