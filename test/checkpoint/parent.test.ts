import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  beginTracking,
  checkParent,
  isTrackedSince,
  type TrackedSince,
  type Tracking,
  trackedSince,
} from "../../src/checkpoint/dump/parent.ts";
import { earlierImages, inventoryDigests } from "../../src/checkpoint/parents.ts";

// Which images a dump may build on. That CRIU and the kernel do what is said of them here: test/live/oci-flags.test.ts.

let place: string;
const at = (name: string) => join(place, name);
/** Images without memory, that build on others. */
function images(name: string, parent?: string): string {
  mkdirSync(at(name));
  writeFileSync(join(at(name), "inventory.img"), name);
  if (parent) symlinkSync(parent, join(at(name), "parent"));
  return at(name);
}
beforeEach(() => {
  place = mkdtempSync(join(tmpdir(), "parent-"));
});
afterEach(() => rmSync(place, { recursive: true }));

describe("images that a dump builds on", () => {
  it("are the latest, or nothing has been noted", () => {
    let noted: TrackedSince | undefined;
    const tracking: Tracking = {
      since: () => noted,
      note: (since) => {
        noted = since;
      },
    };
    const [first, second] = [images("first"), images("second")];
    expect(isTrackedSince(tracking, first)).toBe(true);
    beginTracking(tracking);
    expect(isTrackedSince(tracking, first)).toBe(false);
    trackedSince(tracking, first);
    expect(isTrackedSince(tracking, first)).toBe(true);
    expect(isTrackedSince(tracking, second)).toBe(false);
    beginTracking(tracking); // a dump that fails
    expect(isTrackedSince(tracking, first)).toBe(false);
  });

  it("are followed to what they build on, and never in a circle", async () => {
    const first = images("first");
    const second = images("second", "../first");
    const third = images("third", "../second");
    expect(await earlierImages(third)).toEqual([third, second, first]);
    expect(new Set(await inventoryDigests(third)).size).toBe(3);
    expect((await inventoryDigests(third)).slice(1)).toEqual(await inventoryDigests(second));
    rmSync(second, { recursive: true });
    expect(await earlierImages(third)).toEqual([third]);
    symlinkSync(".", join(first, "parent"));
    expect(await earlierImages(first)).toEqual([first]);
  });

  it("hold images, are whole, and stay where they are", async () => {
    const first = images("first");
    const second = images("second", "../first");
    const check = (parent: string, into: string) =>
      checkParent("box", { parent, images: into, shown: "SHOWN" });
    await check(second, at("new"));
    await expect(check(at("none"), at("new"))).rejects.toThrow(/parent SHOWN .* holds no images/);
    for (const into of [first, second])
      await expect(check(second, into)).rejects.toThrow(/would take the place of images in .*SHOWN/);
    writeFileSync(join(first, "pagemap-1.img"), "no image");
    await expect(check(second, at("new"))).rejects.toThrow(/SHOWN .* not whole: parent\/pagemap-1.img /);
  });
});
