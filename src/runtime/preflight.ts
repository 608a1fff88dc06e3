import type { CriuFacts, PreflightInput } from "../checkpoint/preflight/preflight.ts";
import { Cgroup } from "../linux/cgroup.ts";
import { cedanaAnnotations, cgroupName, readSpec } from "./spec.ts";

/**
 * What a preflight must know of a container, from its bundle and its cgroup.
 * @param task  init's pid, and the bundle that the engine made it from
 * @throws NotFound without bundle or process, InvalidRequest for a broken configuration or annotation
 */
export async function preflightInput(
  task: {
    readonly id: string;
    readonly pid: number;
    readonly bundle: string;
    readonly engine: "runc" | "crun";
  },
  options: {
    readonly destination?: string | undefined;
    readonly criu?: CriuFacts | null | undefined;
    readonly policy?: PreflightInput["policy"];
  } = {},
): Promise<PreflightInput> {
  const spec = await readSpec(task.bundle);
  const annotations = cedanaAnnotations(spec);
  const cgroup = await Cgroup.of(task.pid, cgroupName(spec, task.id, task.engine));
  return {
    pids: await cgroup.pids(),
    rootPid: task.pid,
    engine: task.engine,
    spec: {
      mountPoints: (spec.mounts ?? []).map((mount) => mount.destination),
      terminal: spec.process?.terminal,
    },
    destination: options.destination,
    criu: options.criu,
    policy: { ...annotations, ...options.policy },
  };
}
