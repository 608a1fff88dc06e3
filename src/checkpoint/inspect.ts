import { stat } from "node:fs/promises";
import { join } from "node:path";
import { type Message, readImage, verifyImagesInWorker } from "../criu/image/index.ts";
import { findUnsuitable } from "../criu/index.ts";
import { BrokenImage, InvalidRequest, NotFound } from "../errors/index.ts";
import { type CheckpointManifest, readManifest, verifyFiles } from "./manifest.ts";

/*
 * What a checkpoint's directory holds, and whether it is whole: for people who ask before they restore. Nothing is changed, and what is
 * read in full (digests, images) is read in threads.
 */

export interface CheckpointContents {
  /** as asked for */
  readonly path: string;
  /** directory of CRIU's images: the same, or `checkpoint/` in it */
  readonly imagePath: string;
  /** undefined: taken by somebody else */
  readonly manifest: CheckpointManifest | undefined;
  /** the directory whose files it lists */
  readonly manifestPath: string;
}

export interface CheckpointProcess {
  /** in the container */
  readonly pid: number;
  /** 0 for the first */
  readonly parentPid: number;
  readonly threads: number;
  /** the kernel's short name of the program */
  readonly command: string;
  /** pages in these images; what earlier images hold is not counted */
  readonly memoryBytes: number;
}

export interface CheckpointFinding {
  readonly severity: "error" | "warning";
  /** what of: the manifest's (missing, extra, type, size, digest), the images' (see `FaultKind`), this node's ("unsuitable") */
  readonly kind: string;
  readonly file: string;
  readonly message: string;
}

/** @throws NotFound, InvalidRequest, BrokenImage when it is no checkpoint, Unsupported when it is of a newer version */
export async function openContents(path: string): Promise<CheckpointContents> {
  const imagePath = await findImages(path);
  for (const manifestPath of new Set([imagePath, path])) {
    const manifest = await readManifest(manifestPath);
    if (manifest) return { path, imagePath, manifest, manifestPath };
  }
  return { path, imagePath, manifest: undefined, manifestPath: path };
}

async function findImages(path: string): Promise<string> {
  for (const directory of [path, join(path, "checkpoint")])
    if (await sizeOf(join(directory, "inventory.img"))) return directory;
  const found = await stat(path).catch(() => undefined);
  if (!found) throw new NotFound(`checkpoint ${path} does not exist`);
  if (!found.isDirectory()) throw new InvalidRequest(`checkpoint ${path} is not a directory`);
  throw new BrokenImage(`${path} is not a checkpoint: it holds no inventory.img`);
}

/** The processes in a checkpoint, parents first. @throws BrokenImage */
export async function listProcesses({ imagePath }: CheckpointContents): Promise<CheckpointProcess[]> {
  const tree = await readImage(join(imagePath, "pstree.img"));
  const processes: CheckpointProcess[] = [];
  for (const entry of tree) {
    const pid = Number(entry.pid);
    processes.push({
      pid,
      parentPid: Number(entry.ppid),
      threads: Array.isArray(entry.threads) ? entry.threads.length : 1,
      command: await commandOf(imagePath, pid),
      memoryBytes: await memoryOf(imagePath, pid),
    });
  }
  return processes;
}

/** A zombie has a core, too; what the checkpoint lacks is for `verify` to say. */
async function commandOf(imagePath: string, pid: number): Promise<string> {
  const [core] = await readOptional(join(imagePath, `core-${pid}.img`));
  return String((core?.tc as Message | undefined)?.comm ?? "?");
}

async function memoryOf(imagePath: string, pid: number): Promise<number> {
  const [head] = await readOptional(join(imagePath, `pagemap-${pid}.img`));
  return head ? ((await sizeOf(join(imagePath, `pages-${Number(head.pages_id)}.img`))) ?? 0) : 0;
}

async function readOptional(path: string): Promise<Message[]> {
  return (await sizeOf(path)) === undefined ? [] : await readImage(path);
}

async function sizeOf(path: string): Promise<number | undefined> {
  return await stat(path).then(
    ({ size }) => size,
    () => undefined, // what is wrong with a file that is there shows when it is read
  );
}

/**
 * Looks for everything that would keep a checkpoint from being restored, or make the restore wrong, without restoring it: files against
 * the manifest with their digests, CRIU's images by themselves and against each other, and, where asked for, this node.
 * @param options.onStep  told what is done now
 */
export async function findFaults(
  contents: CheckpointContents,
  options: { here?: boolean; signal?: AbortSignal; onStep?: (step: string) => void | Promise<void> } = {},
): Promise<{ findings: CheckpointFinding[]; digests: number; bytes: number }> {
  const { imagePath, manifest, manifestPath } = contents;
  const findings: CheckpointFinding[] = [];
  const error = (kind: string, file: string, message: string) =>
    findings.push({ severity: "error", kind, file, message });
  if (manifest) {
    await options.onStep?.("comparing files with the manifest");
    for (const { kind, path, message } of await verifyFiles(manifest, manifestPath, options.signal))
      error(kind, path, message);
  } else
    findings.push({
      severity: "warning",
      kind: "manifest",
      file: "cedana.json",
      message: "there is none: whether the memory is as it was dumped can't be known",
    });
  await options.onStep?.("reading CRIU's images");
  const report = await verifyImagesInWorker(imagePath, { signal: options.signal });
  const prefix = imagePath === contents.path ? "" : "checkpoint/";
  for (const { severity, kind, file, offset, what } of report.findings)
    findings.push({
      severity,
      kind,
      file: prefix + file,
      message: offset === undefined ? what : `at ${offset}: ${what}`,
    });
  if (report.truncated)
    findings.push({ severity: "warning", kind: "more", file: "", message: "more was found than is listed" });
  if (options.here && report.ok) {
    await options.onStep?.("comparing with this node");
    for (const problem of await findUnsuitable(imagePath)) error("unsuitable", "", problem);
  }
  const files = manifest?.files ?? [];
  return {
    findings,
    digests: files.filter(({ digest }) => digest !== undefined).length,
    bytes: files.reduce((sum, { size }) => sum + size, 0),
  };
}
