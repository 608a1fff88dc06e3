import { open, readdir, readFile, rename, stat } from "node:fs/promises";
import { join } from "node:path";
import { BrokenImage, Unsupported } from "../errors/index.ts";

/** `cedana.json`, beside CRIU's images: how a checkpoint was taken, so that it can be restored in the same way. */
export const MANIFEST_NAME = "cedana.json";
const VERSION = 1;

export interface CheckpointManifest {
  version: 1;
  /** ISO 8601 */
  createdAt: string;
  containerId: string;
  namespace: string;
  /** the container had a terminal */
  terminal: boolean;
  kernel: string;
  engine: { name: string; version: string; path: string };
  /** options as used; a restore uses them again */
  options: {
    tcp?: "keep" | "close" | "skip-in-flight";
    fileLocks: boolean;
    extUnix: boolean;
    shellJob: boolean;
    emptyNamespaces: string[];
    cgroupsMode?: string;
    leaveRunning: boolean;
    parentPath?: string;
  };
  /** sha256 of the container's config.json as parsed, hexadecimal */
  specDigest: string;
  /** bytes by name; the manifest itself is not among them */
  files: { path: string; size: number }[];
  timings: { totalMs: number };
}

/** Writes the manifest last: write, sync, rename. Fills in `files`. */
export async function writeManifest(
  imagePath: string,
  manifest: Omit<CheckpointManifest, "version" | "files">,
): Promise<void> {
  const files: CheckpointManifest["files"] = [];
  for (const entry of await readdir(imagePath, { withFileTypes: true }))
    if (entry.isFile() && entry.name !== MANIFEST_NAME)
      files.push({ path: entry.name, size: (await stat(join(imagePath, entry.name))).size });
  const path = join(imagePath, MANIFEST_NAME);
  {
    await using file = await open(`${path}.new`, "w", 0o600);
    await file.writeFile(`${JSON.stringify({ version: VERSION, ...manifest, files }, undefined, 2)}\n`);
    await file.sync();
  }
  await rename(`${path}.new`, path);
}

/**
 * @returns undefined when there is none: a checkpoint of somebody else
 * @throws BrokenImage when it isn't a manifest, Unsupported when it is of a newer version
 */
export async function readManifest(imagePath: string): Promise<CheckpointManifest | undefined> {
  const path = join(imagePath, MANIFEST_NAME);
  let text: string;
  try {
    text = await readFile(path, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw new BrokenImage(`manifest ${path} can't be read`, { cause: error });
  }
  let manifest: CheckpointManifest;
  try {
    manifest = JSON.parse(text) as CheckpointManifest;
  } catch (error) {
    throw new BrokenImage(`manifest ${path} is not JSON`, { cause: error });
  }
  if (typeof manifest?.version !== "number") throw new BrokenImage(`manifest ${path} has no version`);
  if (manifest.version > VERSION)
    throw new Unsupported(
      `manifest ${path} is of version ${manifest.version}; this cedana knows up to ${VERSION}`,
    );
  const wrong = findWrong(manifest);
  if (wrong) throw new BrokenImage(`manifest ${path} is malformed: ${wrong}`);
  return manifest;
}

function findWrong(manifest: CheckpointManifest): string | undefined {
  const { options } = manifest;
  if (typeof manifest.terminal !== "boolean") return "terminal is no boolean";
  if (typeof options !== "object" || options === null) return "options is no object";
  for (const name of ["fileLocks", "extUnix", "shellJob"] as const)
    if (typeof options[name] !== "boolean") return `options.${name} is no boolean`;
  if (options.tcp !== undefined && !["keep", "close", "skip-in-flight"].includes(options.tcp))
    return `options.tcp is ${JSON.stringify(options.tcp)}`;
  if (
    !Array.isArray(options.emptyNamespaces) ||
    options.emptyNamespaces.some((name) => typeof name !== "string")
  )
    return "options.emptyNamespaces is no list of names";
  if (options.cgroupsMode !== undefined && typeof options.cgroupsMode !== "string")
    return "options.cgroupsMode is no string";
  return undefined;
}
