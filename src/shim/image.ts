import type { CheckpointManifest } from "../checkpoint/manifest.ts";
import { annotatedImage } from "../runtime/manifest-facts.ts";
import type { OciSpec } from "../runtime/spec.ts";
import type { Task } from "./task.ts";

/** The image of a task's container: as its annotations name it, under Kubernetes; else unknown to a shim. */
export async function imageOf(_task: Task, spec: OciSpec): Promise<CheckpointManifest["image"]> {
  return annotatedImage(spec);
}
