import type { Logger } from "pino";
import type { GateOptions } from "../../criu/gate.ts";
import type { Cgroup } from "../../linux/cgroup.ts";
import type { CheckpointManifest } from "../manifest.ts";
import type { CriuPolicy, NetworkLock } from "../policy.ts";
import type { RootfsBase } from "../rootfs-diff/index.ts";
import type { Tracking } from "./parent.ts";

// What is asked of a dump, and what is dumped.

export interface DumpRequest {
  /** tells this request from others of the same owner: a repetition after a crash has the same */
  readonly key: string;
  /** the request was begun by a cedanad before us */
  readonly repeated: boolean;
  readonly place: DumpPlace;
  /** CRIU's log and scratch; default: one that is removed */
  readonly workPath?: string | undefined;
  /** images to build on, a pre-dump's as a rule: absolute, or relative to the image path */
  readonly parentPath?: string | undefined;
  /** the container runs on; else it has ended when the dump is whole */
  readonly leaveRunning: boolean;
  readonly policy: CriuPolicy;
  /** what the container has changed in its root file system comes along */
  readonly rootfs?: { readonly exclude: readonly string[]; readonly maxBytes: number } | undefined;
  /** hash the images while CRIU writes them, or when the container runs again */
  readonly digests: "alongside" | "afterwards";
  /** what the manifest says of the request */
  readonly origin?: Pick<CheckpointManifest, "name" | "trigger"> | undefined;
}

/** Where the checkpoint is put. */
type DumpPlace =
  /** A directory of the caller's, absolute, made when missing: CRIU's images lie in it. `temporary`: the caller reads and removes it. */
  | { readonly imagePath: string; readonly temporary?: boolean }
  /** A directory of our store: the checkpoint becomes a directory in it, with CRIU's images in `checkpoint/`. `temporary`: for now. */
  | { readonly directory: string; readonly generation: string; readonly temporary?: boolean };

/** What the engine is told. */
export interface EngineDump extends Pick<DumpRequest, "parentPath" | "leaveRunning" | "policy"> {
  /** directory of CRIU's images */
  readonly imagePath: string;
  readonly workPath: string;
  /** its CRIU waits at a gate; such an engine is another one than that without, also for a repetition */
  readonly atGate: boolean;
  /** for its environment; CRIU_CONFIG_FILE is always there */
  readonly env: Readonly<Record<string, string>>;
}

/** What CRIU is told past the engine, by its configuration file: only the frozen container shows all of it. */
export interface CriuSettings extends Pick<DumpRequest, "policy"> {
  /** CRIU's own plugins keep away: what they would do is done */
  readonly withoutPlugins: boolean;
  readonly workPath: string;
  readonly networkLock: NetworkLock;
  /** mounts that the engine doesn't know to come from outside, and what CRIU is to call them */
  readonly externalMounts: readonly { readonly key: string; readonly source: string }[];
  /** where all hierarchies of cgroups are mounted, so that CRIU needs to mount none */
  readonly cgroupYard: string | undefined;
}

/** What is dumped, as its owner has it: the shim a task, the OCI runtime a container. */
export interface DumpTarget {
  /** for messages: "task c1" */
  readonly what: string;
  readonly initPid: number;
  /** its owner has paused it, and it stays paused */
  readonly paused: boolean;
  /** it ends when its processes do; then there is nothing to thaw */
  readonly hasEnded: boolean;
  /** directory of the owner's for small files that outlive a crash: the bundle */
  readonly directory: string;
  /** it has a network namespace that isn't the host's */
  readonly ownNetwork: boolean;
  /** where its configuration mounts something: that comes back with it */
  readonly mountPoints: readonly string[];
  /** where its root file system is mounted */
  readonly rootfs?: string | undefined;
  /** What its root file system was made of, where no overlay keeps its changes apart; default: nobody knows. */
  readonly rootfsBase?: {
    /** @throws Unsupported, Unavailable */
    open(signal: AbortSignal): Promise<RootfsBase>;
    /** Removes what a crash has left of `open`. */
    forget(): Promise<void>;
  };
  /** what the manifest says of it */
  readonly facts: Pick<
    CheckpointManifest,
    | "containerId"
    | "namespace"
    | "hostname"
    | "pod"
    | "generation"
    | "terminal"
    | "engine"
    | "specDigest"
    | "namespaces"
    | "plugins"
  >;
  /** The image that it was made of, as far as that can be found out. */
  image?(): Promise<CheckpointManifest["image"]>;
  /** Does something that other calls for the container wait for; default: nobody else calls. */
  inTurn?<T>(work: () => Promise<T>): Promise<T>;
  readonly tracking: Tracking;
  readonly log: Pick<Logger, "info" | "warn" | "error">;
  /**
   * What the container wants to do itself before it is dumped, in it, while it runs; undefined: nothing.
   * @throws when the administrator doesn't allow it; what is returned, when the dump is not to be
   */
  preDumpHook?(): Promise<(() => Promise<void>) | undefined>;
  cgroup(): Promise<Cgroup>;
  /**
   * Waits until all memory of a container that was restored lazily is there; default: it is.
   * @throws WrongState when it will never be
   */
  wholeMemory?(signal: AbortSignal): Promise<void>;
  /** How the engine's CRIU can be stopped at a gate; undefined where the engine gets CRIU from elsewhere than PATH. */
  gate?(): Promise<GateOptions | undefined>;
  /** Lines of CRIU's configuration file. */
  criuConfig(settings: CriuSettings): Promise<string>;
  /** The engine's `checkpoint`, to its end. @throws WrongState, RuntimeFailed */
  engineCheckpoint(options: EngineDump): Promise<void>;
}
