import { stat } from "node:fs/promises";
import { join } from "node:path";
import { verifyImagesInWorker } from "../criu/image/verify-in-worker.ts";
import { BrokenImage, InvalidRequest, NotFound } from "../errors/index.ts";
import { type Finding, Found } from "./finding.ts";
import { type CheckpointManifest, readManifest } from "./manifest.ts";
import { compareSizes, type FileFault } from "./manifest-files.ts";
import { inventoryDigests } from "./parents.ts";

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

/** A checkpoint of the store whose files are in an archive beside its manifest. */
export interface ArchivedCheckpoint {
  /** path of the archive */
  readonly archive: string;
  readonly manifest: CheckpointManifest;
}

/**
 * Finds what is in a checkpoint's directory: images and manifest, or an archive; looks at nothing else.
 * @throws NotFound, InvalidRequest, BrokenImage when it is no checkpoint, Unsupported when it is of a newer version
 */
export async function openStored(path: string): Promise<OpenCheckpoint | ArchivedCheckpoint> {
  const images = findImages(path); // looked for meanwhile
  images.catch(() => {}); // an archive's directory has none
  const above = await readManifest(path);
  if (above?.archive) return { archive: join(path, above.archive.file), manifest: above };
  return await withManifest(path, await images, above);
}

/** As `openStored`, of a directory that is no archive's. */
export async function openDirectoryOf(path: string): Promise<OpenCheckpoint> {
  const imagePath = await findImages(path);
  return await withManifest(path, imagePath, await readManifest(path));
}

/** @param above  the manifest in `path`, which is that of all of it; one beside the images goes before */
async function withManifest(
  path: string,
  imagePath: string,
  above: CheckpointManifest | undefined,
): Promise<OpenCheckpoint> {
  const beside = imagePath === path ? undefined : await readManifest(imagePath);
  if (beside) return { path, imagePath, manifest: beside, manifestPath: imagePath };
  return { path, imagePath, manifest: above, manifestPath: above && path };
}

/** The directory with CRIU's images: the path itself, or `checkpoint/` in it. */
async function findImages(path: string): Promise<string> {
  for (const directory of [path, join(path, "checkpoint")])
    if (await isThere(join(directory, "inventory.img"))) return directory;
  const found = await stat(path).catch(() => undefined);
  if (!found) throw new NotFound(`checkpoint ${path} does not exist`);
  if (!found.isDirectory()) throw new InvalidRequest(`checkpoint ${path} is not a directory`);
  throw new BrokenImage(`${path} is not a checkpoint: it holds no inventory.img`);
}

/** Whether everything is there that a restore reads, in its size. What is in the files takes longer to know, and isn't looked at. */
export async function findFaultsOfFiles(checkpoint: OpenCheckpoint): Promise<Finding[]> {
  const { manifest, manifestPath } = checkpoint;
  const faults = manifest && manifestPath ? await compareSizes(manifestPath, manifest) : [];
  const missing = await findMissingParts(checkpoint, faults);
  return [
    ...findingsOf(faults),
    ...missing,
    ...(missing.length > 0 ? [] : await findFaultsOfParents(checkpoint)),
  ];
}

/** Memory that CRIU reads from earlier images: it would notice in the middle of the restore. */
async function findFaultsOfParents({ imagePath, manifest }: OpenCheckpoint): Promise<Finding[]> {
  const builds = manifest ? manifest.options.parentPath : await isThere(join(imagePath, "parent"));
  if (!builds) return [];
  const found = new Found("checkpoint");
  const { findings } = await verifyImagesInWorker(imagePath, { memoryOnly: true });
  for (const { severity, kind, file, what } of findings)
    if (severity === "error") found.error(kind, `${file} ${what}`, file);
  return found.list;
}

export function findingsOf(faults: readonly FileFault[]): Finding[] {
  const found = new Found("checkpoint");
  for (const { kind, path, message } of faults) found.error(kind, message, path);
  return found.list;
}

/** What must be beside CRIU's images, whoever took them. @param known  faults that are said already */
export async function findMissingParts(
  { imagePath, manifest }: OpenCheckpoint,
  known: readonly FileFault[],
): Promise<Finding[]> {
  const found = new Found("checkpoint");
  const saysDescriptors = known.some(({ path }) => path.endsWith("descriptors.json"));
  if (!saysDescriptors && !(await isThere(join(imagePath, "descriptors.json"))))
    found.error(
      "descriptors",
      "it has no descriptors.json, which engines write beside CRIU's images: it is incomplete, or a dump of processes rather than of a container",
    );
  const { parentPath, parentDigests } = manifest?.options ?? {};
  if (parentPath && !(await isThere(join(imagePath, "parent", "inventory.img"))))
    found.error("parent", `it builds on the pre-dump ${parentPath} (from its directory), which is missing`);
  else if (parentPath && parentDigests) {
    const there = await inventoryDigests(join(imagePath, "parent"));
    const wrong = parentDigests.findIndex((digest, at) => digest !== there[at]);
    if (wrong >= 0)
      found.error(
        "parent",
        `it builds on the pre-dump ${parentPath} (from its directory), ${
          wrong === 0
            ? "where another one is now"
            : `and this one on others, of which number ${wrong} is ${there[wrong] === undefined ? "missing" : "another one now"}`
        }`,
      );
  }
  return found.list;
}

/** Whether there is something of that name; whatever else is wrong with it shows when it is read. */
export const isThere = (path: string): Promise<boolean> =>
  stat(path).then(
    () => true,
    () => false,
  );
