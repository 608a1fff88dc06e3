import { createHash } from "node:crypto";
import type { CheckpointManifest } from "../checkpoint/manifest.ts";
import { annotationsOf, imageNameOf, type OciSpec } from "./spec.ts";

// What a checkpoint's manifest says of a container, out of its spec.

export function specFacts(spec: OciSpec): Pick<CheckpointManifest, "specDigest" | "namespaces"> {
  return {
    specDigest: createHash("sha256").update(JSON.stringify(spec)).digest("hex"),
    namespaces: (spec.linux?.namespaces ?? []).map(({ type, path }) => ({ type, ...(path && { path }) })),
  };
}

/** The plugins that take part in a dump: of whoever called us, and of the engine. They are of our own version. */
export function pluginsOf(...names: string[]): NonNullable<CheckpointManifest["plugins"]> {
  return names.map((name) => ({ name, version: process.env.CEDANA_BUILD ?? "" }));
}

/** The container's image, where its annotations name it. */
export function annotatedImage(spec: OciSpec): CheckpointManifest["image"] {
  const annotations = annotationsOf(spec);
  const name = imageNameOf(spec);
  const digest = /sha256:[0-9a-f]{64}/.exec(annotations["io.kubernetes.cri-o.ImageRef"] ?? name ?? "")?.[0];
  return name === undefined ? undefined : { name, ...(digest && { digest }) };
}
