import type { JobContext } from "../worker/context.ts";
import { type LayerInput, LayerWriter, type PackOutput } from "./layer.ts";
import { type Layers, OverlayWalk } from "./overlay.ts";
import { readAhead, type Snapshot, SnapshotWalk } from "./snapshot.ts";

/** Where a container's changes are. */
export type Changes = Layers | Snapshot;

export interface PackInput extends LayerInput {
  changes: Changes;
}

/** Writes a container's changes as a tar layer, with the list of what is gone. When it fails, nothing is left. */
export function packRootfsDiff({ changes, ...input }: PackInput, context: JobContext): PackOutput {
  const writer = new LayerWriter(input, context);
  let done = false;
  try {
    const walk = "upper" in changes ? new OverlayWalk(changes, writer) : new SnapshotWalk(changes, writer);
    walk.walk();
    const output = writer.finish();
    done = true;
    return output;
  } finally {
    writer.close();
    if (!done) writer.remove();
  }
}

/** With this module in the thread, and what it will look at in the kernel's caches. */
export function prepareRootfsDiff({ changes }: Pick<PackInput, "changes">, context: JobContext): void {
  if (!("upper" in changes)) readAhead(changes, context);
}
