import { readFileSync } from "node:fs";
import { realpath, stat } from "node:fs/promises";
import { join } from "node:path";
import { verifyImagesInWorker } from "../../criu/image/verify-in-worker.ts";
import { BrokenImage, InvalidRequest, NotFound } from "../../errors/index.ts";
import { earlierImages, inventoryDigest } from "../parents.ts";

/*
 * The images that a dump builds on: a pre-dump's, as a rule.
 *
 * CRIU leaves the pages to them that the kernel hasn't marked as changed since. But there is one such mark for each page, and every pre-dump
 * and every dump that builds on another takes all of them away, also one that fails. So images can be built on only as long as none of
 * these has come after them: else what was changed before it comes back as it was in them, and neither CRIU nor the engines notice.
 */

/** Since which images the kernel marks the pages that a container changes. */
export interface Tracking {
  /** undefined: nobody has ever asked for it through us */
  since(): TrackedSince | undefined;
  note(since: TrackedSince): void;
}

export interface TrackedSince {
  /** digest of the images' inventory; null: one was begun, and nothing came of it */
  readonly inventory: string | null;
}

/** Whether what isn't marked as changed is in those images. Where nobody has noted anything, the caller is believed. */
export function isTrackedSince(tracking: Tracking, parent: string): boolean {
  const since = tracking.since();
  return since === undefined || since.inventory === inventoryDigest(readFileSync(inventoryOf(parent)));
}

/** From here on nobody knows, until `trackedSince`: CRIU may take the marks away. */
export function beginTracking(tracking: Tracking): void {
  tracking.note({ inventory: null });
}

export function trackedSince(tracking: Tracking, images: string): void {
  tracking.note({ inventory: inventoryDigest(readFileSync(inventoryOf(images))) });
}

const inventoryOf = (images: string) => join(images, "inventory.img");

export const withoutParent = (what: string, parent: string) =>
  `${what} is dumped whole, without its parent ${parent}: another dump or pre-dump has come after that one, and what was changed before it would be lost`;

/**
 * Looks at the images that a dump is to build on, as far as that is cheap: not at what is in the pages.
 * @param parent  their directory
 * @param images  where those of the dump will be
 * @param shown   what the caller calls the parent
 * @throws NotFound, BrokenImage, InvalidRequest
 */
export async function checkParent(
  what: string,
  { parent, images, shown }: { parent: string; images: string; shown: string },
  signal?: AbortSignal,
): Promise<void> {
  if (!(await stat(inventoryOf(parent)).catch(() => undefined)))
    throw new NotFound(`parent ${shown} of the checkpoint of ${what} holds no images`);
  const place = await realpath(images).catch(() => images); // ENOENT: it will be made
  if ((await earlierImages(parent)).includes(place))
    throw new InvalidRequest(
      `the checkpoint of ${what} would take the place of images in ${images} that it builds on, by its parent ${shown}: give it another image path`,
    );
  const { findings } = await verifyImagesInWorker(parent, { memoryOnly: true, signal });
  const faults = findings.filter(({ severity }) => severity === "error");
  if (faults.length > 0)
    throw new BrokenImage(
      `parent ${shown} of the checkpoint of ${what} is not whole: ${faults
        .slice(0, 5)
        .map(({ file, what }) => `${file} ${what}`)
        .join("; ")}`,
    );
}
