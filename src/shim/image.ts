import type { CheckpointManifest } from "../checkpoint/manifest.ts";
import { NotFound } from "../errors/index.ts";
import { Containers } from "../proto/generated/containerd_containers.ts";
import { Images } from "../proto/generated/containerd_images.ts";
import { annotatedImage } from "../runtime/manifest-facts.ts";
import type { OciSpec } from "../runtime/spec.ts";
import type { Container } from "./container.ts";
import { Containerd } from "./containerd.ts";

/** A checkpoint is as good without it. */
const PATIENCE_MS = 2_000;

/**
 * The image of a task's container: as its annotations name it, under Kubernetes; else as containerd knows it.
 * @returns undefined for a container without one, and where containerd doesn't answer, which is logged
 */
export async function imageOf(task: Container, spec: OciSpec): Promise<CheckpointManifest["image"]> {
  const annotated = annotatedImage(spec);
  if (annotated?.digest !== undefined || task.pod.containerdAddress === "") return annotated;
  try {
    using containerd = new Containerd(task.pod.containerdAddress, task.namespace);
    const options = { timeoutMs: PATIENCE_MS };
    const { container } = await containerd.call(Containers, "Get", { id: task.id }, options);
    const name = container?.image || annotated?.name;
    if (!name) return undefined;
    const digest = await containerd.call(Images, "Get", { name }, options).then(
      ({ image }) => image?.target?.digest,
      (error) => {
        if (error instanceof NotFound) return undefined; // it has been removed, or goes by another name now
        throw error;
      },
    );
    return { name: annotated?.name ?? name, ...(digest && { digest }) };
  } catch (error) {
    task.log.warn({ err: error }, "ask containerd for a container's image: its checkpoint doesn't name it");
    return annotated;
  }
}
