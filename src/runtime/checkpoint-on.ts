import { dirname } from "node:path";
import type { DumpRequest } from "../checkpoint/dump/target.ts";
import { CheckpointStore, type StoreOwner } from "../checkpoint/store.ts";
import { allowedAnnotations, storeOwner } from "./annotated-checkpoint.ts";
import type { Configuration } from "./configuration.ts";
import { type CedanaAnnotations, containerNameOf, type OciSpec, podNameOf } from "./spec.ts";

/** Where the checkpoint goes that a container gets instead of a signal, and what it holds. */
export interface SignalCheckpoint {
  readonly store: CheckpointStore;
  readonly owner: StoreOwner;
  readonly name: string;
  readonly place: { readonly directory: string; readonly generation: string };
  readonly origin: NonNullable<DumpRequest["origin"]>;
  readonly rootfs: DumpRequest["rootfs"];
  readonly digests: DumpRequest["digests"];
  /** the next container of this key continues from it */
  readonly resumable: boolean;
  /** older ones are removed until so many are left */
  readonly keep: number;
}

/**
 * What its checkpoints are called: by its key, else by its own annotation, else as its pod and container are, else by its id.
 */
export function checkpointNameOf(
  { autoResume, checkpointName }: { autoResume?: string | undefined; checkpointName?: string | undefined },
  spec: OciSpec,
  id: string,
): string {
  const [pod, container] = [podNameOf(spec), containerNameOf(spec)];
  return autoResume ?? checkpointName ?? (pod && container ? `${pod}.${container}` : id);
}

/** Which changed files come along; undefined: none. The administrator's bounds hold for everybody. */
export function rootfsOf(
  { rootfsDiff, rootfsExclude, rootfsMaxBytes }: CedanaAnnotations,
  bounds: Configuration["checkpoints"],
): DumpRequest["rootfs"] {
  if (rootfsDiff === false) return undefined;
  return {
    exclude: [...bounds.rootfsExclude, ...(rootfsExclude ?? [])],
    maxBytes: Math.min(bounds.rootfsMaxBytes, rootfsMaxBytes ?? Number.POSITIVE_INFINITY),
  };
}

/**
 * Makes room in the store.
 * @param namespace  of the store: containerd's, or what stands for it
 * @throws InvalidRequest, PermissionDenied: what is wrong with annotations, or the store
 */
export async function placeForSignal(
  spec: OciSpec,
  namespace: string,
  id: string,
): Promise<SignalCheckpoint | undefined> {
  const asked = await allowedAnnotations(spec);
  if (!asked) return undefined;
  const { annotations, configuration } = asked;
  const { directory, keepLast } = configuration.checkpoints;
  const store = new CheckpointStore(directory);
  const owner = storeOwner(spec, namespace);
  const name = checkpointNameOf(annotations, spec, id);
  const place = await store.placeFor(owner, name);
  return {
    store,
    owner,
    name,
    place: { directory: dirname(place), generation: place.slice(dirname(place).length + 1) },
    origin: { name, trigger: "signal" },
    rootfs: rootfsOf(annotations, configuration.checkpoints),
    digests: "afterwards",
    resumable: annotations.autoResume !== undefined,
    keep: annotations.keepLast ?? keepLast,
  };
}
