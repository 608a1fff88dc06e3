import { mkdirSync, mkdtempSync, readFileSync, readlinkSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { changedImages, linkImages, withoutOtherHierarchies } from "../../src/checkpoint/changed-images.ts";
import { encodeMessage, readOne } from "../../src/criu/image/index.ts";

let directory: string;
let images: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "changed-images-"));
  images = join(directory, "images");
  mkdirSync(images);
});
afterEach(() => rmSync(directory, { recursive: true }));

const dir = (...names: string[]) => names.map((dir_name) => ({ dir_name, children: [], properties: [] }));
const own = { cnames: [""], dirs: dir("box") };
const others = { cnames: ["cpu", "cpuacct"], dirs: dir("box", "another") };

function writeCgroups(controllers: object[]): void {
  const ctls = [
    { name: "", path: "/box" },
    { name: "cpu,cpuacct", path: "/" },
  ];
  const message = encodeMessage("cgroup_entry", { sets: [{ id: 1, ctls }], controllers } as never);
  const head = Buffer.alloc(12);
  for (const [index, word] of [0x54564319, 0x59383330, message.length].entries())
    head.writeUInt32LE(word, 4 * index);
  writeFileSync(join(images, "cgroup.img"), Buffer.concat([head, message]));
}

describe("cgroups of other hierarchies", () => {
  it("are left out of a copy, beside links to the rest", async () => {
    writeCgroups([others, own]);
    writeFileSync(join(images, "pages-1.img"), "pages");
    const before = readFileSync(join(images, "cgroup.img"));
    const change = await withoutOtherHierarchies(images);
    await linkImages(images, directory, [change!]);
    const place = changedImages(directory);
    expect(readlinkSync(join(place, "pages-1.img"))).toBe("../images/pages-1.img");
    const changed = await readOne(join(place, "cgroup.img"), "CGROUP");
    expect(changed).toMatchObject({
      sets: [{ id: 1, ctls: [{ name: "", path: "/box" }] }],
      controllers: [{ cnames: [""], dirs: [{ dir_name: "box" }] }],
    });
    expect([changed.sets, changed.controllers].map((list) => (list as unknown[]).length)).toEqual([1, 1]);
    expect(readFileSync(join(images, "cgroup.img"))).toEqual(before);
  });

  it("are no reason for a copy where there are none, nothing else, or no image", async () => {
    expect(await withoutOtherHierarchies(images)).toBeUndefined();
    writeCgroups([own]);
    expect(await withoutOtherHierarchies(images)).toBeUndefined();
    writeCgroups([{ ...others, dirs: [] }, own]);
    expect(await withoutOtherHierarchies(images)).toBeUndefined();
    writeCgroups([others]);
    expect(await withoutOtherHierarchies(images)).toBeUndefined();
  });
});
