import { readFile, realpath } from "node:fs/promises";
import { join } from "node:path";
import { FileHash } from "./file-hash.ts";

// Earlier images that CRIU's images leave pages to, by their link `parent`, and those again to others.

/** More than anybody makes; and no circle is followed for ever. */
const MOST = 1000;

/** @returns the images' own directory, and those that they build on, the nearest first, as far as they are there */
export async function earlierImages(images: string): Promise<string[]> {
  const found: string[] = [];
  for (let at = images; found.length < MOST; at = join(at, "parent")) {
    const path = await realpath(at).catch(() => undefined); // ENOENT: the last one, or what it builds on is missing
    if (path === undefined || found.includes(path)) break;
    found.push(path);
    at = path;
  }
  return found;
}

/** Tells a set of images from every other one of the same container: CRIU writes into it when and by which run they were made. */
export function inventoryDigest(inventory: Buffer): string {
  const hash = new FileHash("xxh128");
  hash.update(inventory);
  return hash.digest();
}

/** Of images that others build on, and those that they build on, the nearest first. */
export async function inventoryDigests(images: string): Promise<string[]> {
  const inventories = (await earlierImages(images)).map((path) => readFile(join(path, "inventory.img")));
  return (await Promise.all(inventories)).map(inventoryDigest);
}
