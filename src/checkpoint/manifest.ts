import { join } from "node:path";
import { BrokenImage, TimedOut, Unavailable, Unsupported } from "../errors/index.ts";
import { readApart } from "../linux/apart.ts";
import type { CpuFacts } from "./cpu.ts";
import schema from "./manifest.schema.json" with { type: "json" };
import { findFault, type Schema } from "./schema.ts";

/** `cedana.json`, beside CRIU's images: how a checkpoint was taken, so that it can be restored in the same way. */
export const MANIFEST_NAME = "cedana.json";
const VERSION = 1;

/** A manifest lists some hundred files. More than this is not one, and would only fill our memory. */
const MAX_MANIFEST_BYTES = 16 * 1024 * 1024;

/** Who a container is, for itself and for people. */
export interface ContainerIdentity {
  readonly containerId: string;
  /** containerd's; "" outside of it */
  readonly namespace: string;
  readonly hostname?: string;
  /** Kubernetes' names of its pod, and of the container in it */
  readonly pod?: { readonly namespace: string; readonly name: string; readonly container?: string };
}

/** Described, and checked when read, by manifest.schema.json. */
export interface CheckpointManifest {
  version: 1;
  /** ISO 8601, UTC */
  createdAt: string;
  containerId: string;
  namespace: string;
  hostname?: string;
  /** Kubernetes' names */
  pod?: NonNullable<ContainerIdentity["pod"]>;
  /** how many restores it had behind it; absent: none */
  generation?: number;
  /** the container had a terminal */
  terminal: boolean;
  /** release */
  kernel: string;
  criuVersion?: string;
  cedanaVersion?: string;
  /** the container's image, as the engine above names it */
  image?: { name?: string; digest?: string };
  cpu?: CpuFacts;
  /** name of the checkpoint in the node's store; absent: the caller gave the place */
  name?: string;
  /** who asked for it: containerd or an engine's caller (also when absent), the command line, `cedana.io/checkpoint-every`, or a signal */
  trigger?: "caller" | "command" | "schedule" | "signal";
  /** what the container changed in its root file system, when that was taken; absent: images alone */
  rootfsDiff?: RootfsDiffFacts;
  /**
   * All but this file is in an archive beside it, which has a manifest of its own, of the checkpoint's files. `files` names the archive.
   */
  archive?: { file: string; compression: "none" | "gzip" | "lz4" | "zstd"; encrypted: boolean };
  /** the container's GPU state, when it has any: in the memory images, put there by the driver */
  gpu?: GpuFacts;
  /** the plugins that took part */
  plugins?: { name: string; version: string }[];
  /** of the container, as its spec names them; with a path: joined, not its own */
  namespaces?: { type: string; path?: string }[];
  engine: { name: string; version: string; path: string };
  /** options as used; a restore uses them again */
  options: {
    tcp?: "keep" | "close" | "skip-in-flight";
    fileLocks: boolean;
    extUnix: boolean;
    shellJob: boolean;
    emptyNamespaces: string[];
    cgroupsMode?: string;
    /** how packets were kept away meanwhile; absent: CRIU's default */
    networkLock?: "skip" | "nftables";
    leaveRunning: boolean;
    /** of the earlier images that it builds on, relative to its own */
    parentPath?: string;
    /** of the inventories of these and of those that they build on, the nearest first */
    parentDigests?: string[];
  };
  /** SHA-256 of the container's config.json as parsed, hexadecimal */
  specDigest: string;
  /**
   * every regular file below the image path, sorted; the manifest itself is not among them. The digest is `xxh128:`
   * (older ones: `sha256:`) and hexadecimal digits; it may be absent, which makes `verifyFiles` look at sizes alone.
   */
  files: { path: string; size: number; digest?: string }[];
  /** milliseconds by step, which are the adapters' names where a chain of them took the checkpoint */
  timings: { totalMs: number } & Record<string, number>;
}

/**
 * `rootfs-diff.tar` and `deleted.files` beside the manifest: taken while the container was frozen, so memory and files agree. A restore
 * applies them to a fresh root file system of the same image before CRIU runs (`applyRootfsDiff`), or refuses.
 */
export interface RootfsDiffFacts {
  /** an overlay's upper layer, or the root compared with the snapshot below it; with whiteouts in the tar */
  source: "overlay" | "snapshot";
  /** containerd's, of a snapshot */
  snapshotter?: string;
  /** of the tar */
  bytes: number;
  members: number;
  /** how many paths were deleted */
  deleted: number;
  /** patterns of paths that were left out (see `excluder`): the container's new ones have what the image has there */
  exclude: string[];
  /** sockets, which no tar holds; their servers make them again */
  sockets: string[];
}

/** What a restore must know of the GPUs; taken by the driver, by NVIDIA's program over it, or by CRIU's plugin, which knows the rest itself. */
export interface GpuFacts {
  means: "driver" | "cuda-checkpoint" | "criu-plugin";
  /** of the driver's interface: 13000 is 13.0 */
  driverVersion?: number;
  /** of the driver itself: "580.65.06" */
  driver?: string;
  /** all of the machine; uuid: 32 hexadecimal digits */
  devices: { uuid: string; name: string; memoryBytes: number }[];
  processes: {
    /** its own number for itself */
    pidInContainer: number;
    comm: string;
    /** what it comes back to */
    before: "running" | "locked" | "checkpointed";
    /** the thread of it that does the driver's work, by its own number: it must run for a restore */
    restoreThread?: number;
    /** UUIDs of those that it used, and its memory on them, as far as NVML tells */
    devices?: string[];
    memoryBytes?: number;
    /** milliseconds; restore and unlock where it ran on */
    times: { lockMs?: number; checkpointMs?: number; restoreMs?: number; unlockMs?: number };
  }[];
}

/**
 * @returns undefined when there is none: a checkpoint of somebody else
 * @throws BrokenImage when it isn't a manifest, Unsupported when it is of a newer version
 */
export async function readManifest(imagePath: string): Promise<CheckpointManifest | undefined> {
  const path = join(imagePath, MANIFEST_NAME);
  let text: string;
  try {
    // Images may come from anybody: a link is not followed, and a FIFO or device is not waited for.
    text = (await readApart(path, MAX_MANIFEST_BYTES, { follow: false })).toString("utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    if (error instanceof TimedOut || error instanceof Unavailable) throw error;
    throw new BrokenImage(`manifest ${path} can't be read`, { cause: error });
  }
  return parseManifest(text, path);
}

/** The manifest as it is written. @param imagePath  for messages. @throws TypeError for one that no later reader would take */
export function manifestText(manifest: Omit<CheckpointManifest, "version">, imagePath: string): string {
  const whole: CheckpointManifest = { version: VERSION, ...manifest };
  const fault = findFault(JSON.parse(JSON.stringify(whole)), schema as Schema);
  if (fault !== undefined) throw new TypeError(`manifest of ${imagePath}: ${fault}`);
  return `${JSON.stringify(whole, undefined, 2)}\n`;
}

/** @param path  for messages. @throws BrokenImage, Unsupported */
export function parseManifest(text: string, path: string): CheckpointManifest {
  let manifest: unknown;
  try {
    manifest = JSON.parse(text);
  } catch {
    throw new BrokenImage(`manifest ${path} is not JSON`); // without the parser's words: they quote the file
  }
  const version = (manifest as { version?: unknown } | null)?.version;
  if (typeof version === "number" && Number.isInteger(version) && version > VERSION)
    throw new Unsupported(`manifest ${path} is of version ${version}; this cedana knows up to ${VERSION}`);
  const fault = findFault(manifest, schema as Schema);
  if (fault !== undefined) throw new BrokenImage(`manifest ${path} is malformed: ${fault}`);
  return manifest as CheckpointManifest;
}
