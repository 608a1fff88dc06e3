import { posix, resolve } from "node:path";
import type { RestoredContainer } from "../checkpoint/compare.ts";
import { type GpuNode, isGpuNode } from "../checkpoint/gpu-nodes.ts";
import type { EngineFeatures } from "./engine.ts";
import { imageNameOf, isBind, type OciMount, type OciSpec } from "./spec.ts";

/**
 * What a checkpoint has to fit, as the new container's configuration says.
 * @param options.terminal  of its owner, who may know better than the configuration
 * @param options.rootfs    its root file system, when that is there
 */
export function restoredContainer(
  spec: OciSpec,
  bundle: string,
  engine: Pick<EngineFeatures, "name" | "version">,
  options: { terminal?: boolean; rootfs?: string | undefined } = {},
): RestoredContainer {
  const mounts = spec.mounts ?? [];
  const binds = mounts.filter(isBind);
  return {
    terminal: options.terminal ?? spec.process?.terminal ?? false,
    engine: { name: engine.name, version: engine.version },
    image: imageNameOf(spec),
    binds: new Map(binds.map((mount) => [destinationOf(mount), resolve(bundle, mount.source ?? "")])),
    mountPoints: mounts.map(destinationOf),
    cgroupMountPoints: mounts.filter(({ type }) => type?.startsWith("cgroup")).map(destinationOf),
    maskedPaths: spec.linux?.maskedPaths ?? [],
    devices: (spec.linux?.devices ?? []).map(({ path }) => path),
    hostname: hostnameOf(spec),
    network: networkOf(spec, engine.name),
    gpuNodes: gpuNodesOf(spec),
    rootfs: options.rootfs,
  };
}

/** A container of a pod has the pod's, which CRI says in the environment: what CRIU restores must not give it the name of another pod. */
function hostnameOf(spec: OciSpec): string | undefined {
  if (spec.hostname) return spec.hostname;
  const uts = spec.linux?.namespaces?.find(({ type }) => type === "uts");
  if (!uts?.path) return undefined;
  const name = spec.process?.env?.findLast((entry) => entry.startsWith("HOSTNAME="));
  return name?.slice("HOSTNAME=".length) || undefined;
}

function networkOf(spec: OciSpec, engine: string): RestoredContainer["network"] {
  const network = spec.linux?.namespaces?.find(({ type }) => type === "network");
  if (!network) return "host";
  if (network.path) return { path: network.path };
  return engine === "crun" ? "dumped" : "empty";
}

function gpuNodesOf(spec: OciSpec): GpuNode[] {
  return (spec.linux?.devices ?? []).flatMap(({ path, type, major, minor, fileMode, uid, gid }) =>
    type === "c" && major !== undefined && minor !== undefined && isGpuNode(posix.resolve("/", path))
      ? [{ path: posix.resolve("/", path), major, minor, mode: fileMode, uid, gid }]
      : [],
  );
}

function destinationOf({ destination }: OciMount): string {
  return posix.resolve("/", destination);
}
