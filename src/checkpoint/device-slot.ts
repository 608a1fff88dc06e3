import type { Logger } from "pino";
import type { Cgroup } from "../linux/cgroup.ts";
import type { CheckpointManifest, GpuFacts } from "./manifest.ts";

/*
 * The slot for devices whose state CRIU can't take: the chains of dump and restore call whoever has filled it, at the right places. Who knows
 * a device is above this folder (src/gpu), so the composition of cedanad fills the slot; empty, the chains do without.
 */

/** A container, as far as a device's part needs to know it. */
export interface DeviceOwner {
  /** for messages: "task c1" */
  readonly what: string;
  readonly initPid: number;
  readonly directory: string;
  /** its owner has paused it */
  readonly paused: boolean;
  readonly hasEnded: boolean;
  readonly log: Pick<Logger, "info" | "warn" | "error">;
  cgroup(): Promise<Cgroup>;
}

/** A dump of a container that uses the device. */
export interface DeviceDump {
  /** devices that the processes let go of before CRIU runs, `major:minor` */
  readonly devices: readonly string[];
  /** whether CRIU's own plugins must keep away: the state is in our hands */
  readonly withoutCriuPlugins: boolean;
  /** The processes run, or are made to for the moment. Idempotent. When it fails, all is as it was. */
  lock(): Promise<void>;
  /** The cgroup is frozen; only what the device's driver needs runs. Idempotent. */
  checkpoint(): Promise<void>;
  /** Gives the processes their devices back and lets them go on; for what has ended there is nothing to do. Every one is tried. */
  resume(): Promise<void>;
  /** What the manifest says; undefined when nobody has begun to use a device. @param earlier  by a cedanad before us, where it is to be added to */
  facts(earlier?: GpuFacts): GpuFacts | undefined;
  /** Whatever came: nothing of ours stays but the journal of what could not be given back, which is tried again. */
  close(): Promise<void>;
}

export interface DeviceRestore {
  readonly withoutCriuPlugins: boolean;
  /** The container runs: gives the processes their devices. Idempotent. */
  restore(): Promise<void>;
  close(): Promise<void>;
}

export interface RestoreWithDevice {
  readonly what: string;
  readonly log: Pick<Logger, "info" | "warn" | "error">;
  /** which device becomes which, as the new container asks for it */
  readonly deviceMap?: string | undefined;
  /** the restored container's; there from the engine's restore on */
  cgroup(): Promise<Cgroup>;
}

export interface DeviceSlot {
  /**
   * @returns undefined when the container doesn't use the device: then nothing has been started or loaded
   * @throws what can't be dumped, by its name
   */
  findForDump(owner: DeviceOwner): Promise<DeviceDump | undefined>;
  /** Whether it can work here. @throws why not */
  prepareRestore(
    target: RestoreWithDevice,
    facts: NonNullable<CheckpointManifest["gpu"]>,
  ): Promise<DeviceRestore>;
  /** What a dump that was cut off by a crash, and isn't repeated, has left is undone, in the background. */
  recover(owner: DeviceOwner): void;
  /** Whether anything is being undone: who can choose when to end waits for that. */
  isRecovering(): boolean;
  /** The same as `recover` of all owners whose directories begin so; at the start of a cedanad. */
  recoverAll(directories: string, log: DeviceOwner["log"]): void;
}

let filled: DeviceSlot | undefined;

export function fillDeviceSlot(slot: DeviceSlot): void {
  filled = slot;
}

export function deviceSlot(): DeviceSlot | undefined {
  return filled;
}
