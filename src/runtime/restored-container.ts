import type { RestoredContainer } from "../checkpoint/compare.ts";
import type { OciSpec } from "./spec.ts";

/** What a checkpoint has to fit, as the new container's configuration says. @param terminal  of its owner, who may know better */
export function restoredContainer(
  spec: OciSpec,
  terminal = spec.process?.terminal ?? false,
): RestoredContainer {
  return { terminal };
}
