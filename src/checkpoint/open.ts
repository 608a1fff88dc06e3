import { stat } from "node:fs/promises";
import { join } from "node:path";
import { BrokenImage, InvalidRequest, NotFound } from "../errors/index.ts";
import type { Finding } from "./finding.ts";
import { type CheckpointManifest, compareSizes, readManifest } from "./manifest.ts";

/** A checkpoint that lies in a directory. */
export interface OpenCheckpoint {
  /** of the whole of it */
  readonly path: string;
  /** where CRIU's images are: the same, or `checkpoint/` in it */
  readonly imagePath: string;
  /** undefined: taken by somebody else */
  readonly manifest: CheckpointManifest | undefined;
  /** the directory whose files it lists */
  readonly manifestPath: string | undefined;
}

/**
 * Finds images and manifest; looks at nothing else.
 * @throws NotFound, InvalidRequest, BrokenImage when it is no checkpoint, Unsupported when it is of a newer version
 */
export async function openDirectoryOf(path: string): Promise<OpenCheckpoint> {
  const imagePath = await findImages(path);
  for (const manifestPath of new Set([imagePath, path])) {
    const manifest = await readManifest(manifestPath);
    if (manifest) return { path, imagePath, manifest, manifestPath };
  }
  return { path, imagePath, manifest: undefined, manifestPath: undefined };
}

/** The directory with CRIU's images: the path itself, or `checkpoint/` in it. */
async function findImages(path: string): Promise<string> {
  for (const directory of [path, join(path, "checkpoint")])
    if (await exists(join(directory, "inventory.img"))) return directory;
  const found = await stat(path).catch(() => undefined);
  if (!found) throw new NotFound(`checkpoint ${path} does not exist`);
  if (!found.isDirectory()) throw new InvalidRequest(`checkpoint ${path} is not a directory`);
  throw new BrokenImage(`${path} is not a checkpoint: it holds no inventory.img`);
}

/**
 * Whether everything is there that a restore reads, in its size. What is in the files takes longer to know, and isn't looked at.
 */
export async function findFaultsOfFiles(checkpoint: OpenCheckpoint): Promise<Finding[]> {
  const { imagePath, manifest, manifestPath } = checkpoint;
  const faults: string[] = [];
  if (manifest && manifestPath) faults.push(...(await compareSizes(manifestPath, manifest)));
  const descriptors = "descriptors.json";
  if (!faults.some((fault) => fault.includes(descriptors)) && !(await exists(join(imagePath, descriptors))))
    faults.push(
      "it has no descriptors.json, which engines write beside CRIU's images: it is incomplete, or a dump of processes rather than of a container",
    );
  if (manifest?.options.parentPath && !(await exists(join(imagePath, "parent", "inventory.img"))))
    faults.push(
      `it builds on the pre-dump ${manifest.options.parentPath} (from its directory), which is missing`,
    );
  return faults.map((message) => ({ kind: "checkpoint", severity: "error", message }));
}

const exists = (path: string) =>
  stat(path).then(
    () => true,
    () => false, // whatever else is wrong with it shows when it is read
  );
