import { constants } from "node:fs";
import { open, readdir, rename, rm, stat } from "node:fs/promises";
import { join, relative } from "node:path";
import { BrokenImage, Unsupported } from "../errors/index.ts";
import schema from "./manifest.schema.json" with { type: "json" };
import { findFault, type Schema } from "./schema.ts";

/** `cedana.json`, beside CRIU's images: how a checkpoint was taken, so that it can be restored in the same way. */
export const MANIFEST_NAME = "cedana.json";
const VERSION = 1;

/** A manifest lists some hundred files. More than this is not one, and would only fill our memory. */
const MAX_MANIFEST_BYTES = 16 * 1024 * 1024;

/** Described, and checked when read, by manifest.schema.json. */
export interface CheckpointManifest {
  version: 1;
  /** ISO 8601, UTC */
  createdAt: string;
  containerId: string;
  namespace: string;
  /** the container had a terminal */
  terminal: boolean;
  /** release */
  kernel: string;
  criuVersion?: string;
  cedanaVersion?: string;
  engine: { name: string; version: string; path: string };
  /** options as used; a restore uses them again */
  options: {
    tcp?: "keep" | "close" | "skip-in-flight";
    fileLocks: boolean;
    extUnix: boolean;
    shellJob: boolean;
    emptyNamespaces: string[];
    cgroupsMode?: string;
    /** how packets were kept away meanwhile; absent: CRIU's default */
    networkLock?: "skip" | "nftables";
    leaveRunning: boolean;
    parentPath?: string;
  };
  /** SHA-256 of the container's config.json as parsed, hexadecimal */
  specDigest: string;
  /** every regular file below the image path, sorted; the manifest itself is not among them */
  files: { path: string; size: number }[];
  /** milliseconds by step */
  timings: { totalMs: number } & Record<string, number>;
}

/**
 * Writes the manifest, which makes the images a checkpoint: last of all, to a temporary file that is synced and renamed. Fills
 * in `files` from what lies in the image path. Syncing the images is up to
 * whoever commits the checkpoint.
 * @param imagePath  directory of CRIU's images
 */
export async function writeManifest(
  imagePath: string,
  manifest: Omit<CheckpointManifest, "version" | "files">,
): Promise<void> {
  const whole: CheckpointManifest = { version: VERSION, ...manifest, files: await listFiles(imagePath) };
  const fault = findFault(JSON.parse(JSON.stringify(whole)), schema as Schema);
  if (fault !== undefined) throw new TypeError(`manifest of ${imagePath}: ${fault}`); // no later reader would take it
  const path = join(imagePath, MANIFEST_NAME);
  const temporary = `${path}.new`;
  try {
    await rm(temporary, { force: true }); // of a writer that was killed; "wx" below doesn't follow a link
    {
      await using file = await open(temporary, "wx", 0o600);
      await file.writeFile(`${JSON.stringify(whole, undefined, 2)}\n`);
      await file.sync();
    }
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true });
    throw error;
  }
  await using directory = await open(imagePath, constants.O_RDONLY | constants.O_DIRECTORY);
  await directory.sync(); // the rename itself
}

/** Regular files only: CRIU's `parent` is a link to another checkpoint. */
async function listFiles(imagePath: string): Promise<CheckpointManifest["files"]> {
  const entries = await readdir(imagePath, { withFileTypes: true, recursive: true });
  const paths = entries
    .filter((entry) => entry.isFile())
    .map((entry) => relative(imagePath, join(entry.parentPath, entry.name)))
    .filter((path) => path !== MANIFEST_NAME && path !== `${MANIFEST_NAME}.new`)
    .sort();
  return await Promise.all(
    paths.map(async (path) => ({ path, size: (await stat(join(imagePath, path))).size })),
  );
}

/**
 * @returns undefined when there is none: a checkpoint of somebody else
 * @throws BrokenImage when it isn't a manifest, Unsupported when it is of a newer version
 */
export async function readManifest(imagePath: string): Promise<CheckpointManifest | undefined> {
  const path = join(imagePath, MANIFEST_NAME);
  let text: string;
  try {
    text = await readBounded(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw new BrokenImage(`manifest ${path} can't be read`, { cause: error });
  }
  let manifest: unknown;
  try {
    manifest = JSON.parse(text);
  } catch {
    throw new BrokenImage(`manifest ${path} is not JSON`); // without the parser's words: they quote the file
  }
  const version = (manifest as { version?: unknown } | null)?.version;
  if (typeof version === "number" && Number.isInteger(version) && version > VERSION)
    throw new Unsupported(`manifest ${path} is of version ${version}; this cedana knows up to ${VERSION}`);
  const fault = findFault(manifest, schema as Schema);
  if (fault !== undefined) throw new BrokenImage(`manifest ${path} is malformed: ${fault}`);
  return manifest as CheckpointManifest;
}

/** Images may come from anybody: a link is not followed, and a FIFO or device is not waited for. */
async function readBounded(path: string): Promise<string> {
  await using file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  const info = await file.stat();
  if (!info.isFile()) throw new Error("it is not a regular file");
  if (info.size > MAX_MANIFEST_BYTES) throw new Error(`its ${info.size} bytes are too many`);
  return await file.readFile("utf8");
}

/**
 * Whether the images are still what the manifest says. Logs and statistics don't count: whoever copies or archives images
 * may leave them out.
 * @throws BrokenImage naming what is missing or has another size
 */
export async function checkFiles(imagePath: string, manifest: CheckpointManifest): Promise<void> {
  const faults = await Promise.all(
    manifest.files.map(async ({ path, size }) => {
      if (!/\.img$|^descriptors\.json$/.test(path)) return undefined;
      const found = await stat(join(imagePath, path)).catch((error: NodeJS.ErrnoException) => error);
      if (found instanceof Error)
        return found.code === "ENOENT" ? `${path} is missing` : `${path}: ${found.message}`;
      return found.size === size ? undefined : `${path} has ${found.size} bytes instead of ${size}`;
    }),
  );
  const wrong = faults.filter((fault) => fault !== undefined);
  if (wrong.length === 0) return;
  const rest = wrong.length > 5 ? ` and ${wrong.length - 5} more` : "";
  throw new BrokenImage(
    `checkpoint ${imagePath} is not as its manifest says: ${wrong.slice(0, 5).join(", ")}${rest}`,
  );
}
