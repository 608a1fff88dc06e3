import { randomUUID } from "node:crypto";
import { mkdir, rm } from "node:fs/promises";
import { basename, join } from "node:path";
import { type ImageReport, verifyImagesInWorker } from "../criu/image/index.ts";
import { BrokenImage, CedanaError, messageOf, PermissionDenied, Unsupported } from "../errors/index.ts";
import { extractArchive, isDirectory, isEncryptedArchive, verifyArchive } from "./archive/index.ts";
import { compareToNode, type NodeFacts, nodeFacts } from "./compare.ts";
import { type Finding, Found } from "./finding.ts";
import type { CheckpointManifest } from "./manifest.ts";
import { compareSizes, verifyFiles } from "./manifest-files.ts";
import { findingsOf, findMissingParts, type OpenCheckpoint, openDirectoryOf, openStored } from "./open.ts";

/** What is known of a checkpoint that was not restored. */
export interface CheckpointReport {
  path: string;
  /** no errors */
  ok: boolean;
  findings: Finding[];
  /** undefined: of somebody else, or unreadable */
  manifest: CheckpointManifest | undefined;
  /** how many files were hashed and are as the manifest says */
  digests: number;
  /** of CRIU's images; undefined where they could not be looked at */
  images: ImageReport | undefined;
  archive: { encrypted: boolean; compression: string } | undefined;
}

export interface VerifyCheckpointOptions {
  /** what the checkpoint is to be restored on; default: this node; false: it isn't asked */
  node?: NodeFacts | false;
  /** false: sizes alone, without reading the memory pages; default: every digest of the manifest */
  digests?: boolean;
  ignoreCpu?: boolean;
  /** opens an encrypted archive */
  secret?: Uint8Array | undefined;
  /**
   * Directory in which an archive is unpacked for the time of this, so that its images can be looked at; without one they aren't, and the
   * archive's own checksums and the manifest's digests have to do.
   */
  scratch?: string | undefined;
  signal?: AbortSignal | undefined;
}

/**
 * Looks at everything that can be known of a checkpoint without restoring it: its files against the manifest (presence, sizes, digests),
 * CRIU's images (magic words, messages, references, page counts), what must be beside them, and this node (CPU, kernel, CRIU and its
 * plugins). All that is wrong is in the report; reading and hashing happens in threads.
 * @param path  directory or archive
 * @throws NotFound, and InvalidRequest for what is neither; what is wrong with a checkpoint is never thrown
 */
export async function verifyCheckpoint(
  path: string,
  options: VerifyCheckpointOptions = {},
): Promise<CheckpointReport> {
  if (!(await isDirectory(path))) return await verifyOneFile(path, options);
  try {
    const stored = await openStored(path);
    if (!("archive" in stored)) return await verifyOpen(stored, options);
    const faults = await compareSizes(path, stored.manifest);
    if (faults.length > 0) return report(path, findingsOf(faults), { manifest: stored.manifest });
    return { ...(await verifyOneFile(stored.archive, options)), path };
  } catch (error) {
    if (!(error instanceof BrokenImage || error instanceof Unsupported)) throw error;
    const found = new Found("checkpoint");
    found.error(/^manifest /.test(error.message) ? "manifest" : "missing", messageOf(error));
    return report(path, found.list);
  }
}

function report(
  path: string,
  findings: Finding[],
  more: Partial<Omit<CheckpointReport, "path" | "ok" | "findings">> = {},
): CheckpointReport {
  return {
    path,
    ok: !findings.some(({ severity }) => severity === "error"),
    findings,
    manifest: undefined,
    digests: 0,
    images: undefined,
    archive: undefined,
    ...more,
  };
}

async function verifyOpen(
  checkpoint: OpenCheckpoint,
  options: VerifyCheckpointOptions,
): Promise<CheckpointReport> {
  const { imagePath, manifest, manifestPath, path } = checkpoint;
  const { digests: wanted = true, node = await nodeFacts(), signal } = options;
  const notes = new Found("checkpoint");
  if (!manifest)
    notes.warning("manifest", "it has no manifest: whether files are as they were can't be told");
  const faults =
    manifest && manifestPath
      ? await (wanted ? verifyFiles(manifest, manifestPath, signal) : compareSizes(manifestPath, manifest))
      : [];
  const images = await verifyImagesInWorker(imagePath, { signal });
  for (const { severity, kind, file, offset, what } of images.findings) {
    // What is known to be missing or cut short is said once.
    if (faults.some((fault) => basename(fault.path) === file && fault.kind !== "digest")) continue;
    notes[severity](kind, `${file}${offset === undefined ? "" : ` at ${offset}`}: ${what}`, file);
  }
  const findings = [...findingsOf(faults), ...(await findMissingParts(checkpoint, faults)), ...notes.list];
  const broken = findings.some(({ severity }) => severity === "error");
  // Of broken images nothing more can be told.
  if (node && !broken)
    findings.push(...(await compareToNode(checkpoint, node, { ignoreCpu: options.ignoreCpu ?? false })));
  const hashed = wanted ? (manifest?.files.filter(({ digest }) => digest !== undefined).length ?? 0) : 0;
  const wrong = new Set(faults.map(({ path: file }) => file));
  return report(path, findings, {
    manifest,
    digests: Math.max(0, hashed - wrong.size),
    images,
  });
}

async function verifyOneFile(path: string, options: VerifyCheckpointOptions): Promise<CheckpointReport> {
  const { scratch, signal } = options;
  const secret = (await isEncryptedArchive(path)) ? options.secret : undefined;
  const reading = { ...(secret && { secret }), ...(signal && { signal }) };
  try {
    if (scratch === undefined) {
      const { compression, description, encrypted, verified } = await verifyArchive(path, reading);
      const notes = new Found("checkpoint");
      if (!description.manifest)
        notes.warning("manifest", "it has no manifest: whether files are as they were can't be told");
      const { manifest } = description;
      return report(path, notes.list, { manifest, digests: verified, archive: { compression, encrypted } });
    }
    const directory = join(scratch, `verify-${randomUUID()}`);
    await mkdir(scratch, { recursive: true, mode: 0o700 });
    try {
      const { compression, encrypted, verified } = await extractArchive(path, directory, reading);
      // The digests were compared on the way.
      const found = await verifyOpen(await openDirectoryOf(directory), { ...options, digests: false });
      return { ...found, path, digests: verified, archive: { compression, encrypted } };
    } finally {
      await rm(directory, { recursive: true, force: true });
    }
  } catch (error) {
    const isItsFault = error instanceof BrokenImage || error instanceof PermissionDenied;
    if (!isItsFault && !(error instanceof CedanaError && error instanceof Unsupported)) throw error;
    const found = new Found("checkpoint");
    found.error("archive", messageOf(error));
    return report(path, found.list);
  }
}
