import { posix, resolve } from "node:path";
import type { RestoredContainer } from "../checkpoint/compare.ts";
import type { EngineFeatures } from "./engine.ts";
import { annotationsOf, isBind, type OciMount, type OciSpec } from "./spec.ts";

/** Where containerd's CRI, CRI-O and Podman name a container's image. */
const imageAnnotations = [
  "io.kubernetes.cri.image-name",
  "io.kubernetes.cri-o.ImageName",
  "io.kubernetes.cri-o.Image",
] as const;

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
  const annotations = annotationsOf(spec);
  return {
    terminal: options.terminal ?? spec.process?.terminal ?? false,
    engine: { name: engine.name, version: engine.version },
    image: imageAnnotations.map((name) => annotations[name]).find(Boolean),
    binds: new Map(binds.map((mount) => [destinationOf(mount), resolve(bundle, mount.source ?? "")])),
    mountPoints: mounts.map(destinationOf),
    cgroupMountPoints: mounts.filter(({ type }) => type?.startsWith("cgroup")).map(destinationOf),
    maskedPaths: spec.linux?.maskedPaths ?? [],
    devices: (spec.linux?.devices ?? []).map(({ path }) => path),
    rootfs: options.rootfs,
  };
}

function destinationOf({ destination }: OciMount): string {
  return posix.resolve("/", destination);
}
