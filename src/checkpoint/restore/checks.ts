import { stat } from "node:fs/promises";
import { isAbsolute } from "node:path";
import type { Logger } from "pino";
import { InvalidRequest, NotFound, Unsupported } from "../../errors/index.ts";
import { expectAnswer } from "../../linux/apart.ts";
import { isDirectory, isEncryptedArchive } from "../archive/index.ts";
import { type ChainContext, runChain, type Step } from "../chain.ts";
import {
  compareToContainer,
  compareToNode,
  type ExternalMount,
  type NodeFacts,
  nodeFacts,
  type RestoredContainer,
} from "../compare.ts";
import { type Finding, refusalOfRestore } from "../finding.ts";
import { type ImageFacts, readImageFacts } from "../image-facts.ts";
import type { CheckpointManifest } from "../manifest.ts";
import { compareSizes, verifyFiles } from "../manifest-files.ts";
import { findFaultsOfFiles, findingsOf, type OpenCheckpoint, openDirectoryOf, openStored } from "../open.ts";
import type { CriuPolicy } from "../policy.ts";
import { UnpackedCheckpoint } from "../unpack.ts";

/*
 * What can be said of a restore before anything of the container is made: whether the checkpoint is whole, and what differs between it and
 * the container or the node. A container's create runs these steps alone; its restore begins with them.
 */

/** What is looked at, and how closely. */
export interface RestoreLook {
  /** a checkpoint's directory, or an archive of one: absolute */
  readonly path: string;
  /** of the restore of what lies in an archive */
  readonly unpack?: UnpackRequest | undefined;
  /** a CPU with fewer instructions than at the dump is only worth a warning */
  readonly ignoreCpu?: boolean | undefined;
  /** every file is hashed before anything is made */
  readonly verifyDigests?: boolean | undefined;
}

export interface UnpackRequest {
  /** where archives are unpacked to: absolute, made when missing */
  readonly root: string;
  /** The key of encrypted archives; undefined: there is none. */
  secret(): Promise<Uint8Array | undefined>;
}

/** A container that may be restored, as its configuration has it. */
export interface RestoreCandidate {
  /** for messages: "task c1" */
  readonly what: string;
  /** directory of the owner's for small files that outlive a crash: the bundle */
  readonly directory: string;
  readonly container: RestoredContainer;
  readonly log: Pick<Logger, "info" | "warn" | "error">;
  /** What the images were taken with, changed by what the new container asks for. */
  policy(manifest: CheckpointManifest | undefined): CriuPolicy;
}

export interface CheckContext extends ChainContext {
  readonly target: RestoreCandidate;
  readonly request: RestoreLook & { readonly workPath?: string | undefined };
  /** from `openCheckpoint` on */
  checkpoint: OpenCheckpoint;
  policy: CriuPolicy;
  externalMounts: readonly ExternalMount[];
  /** undefined: the images are broken, or a cedanad before us has read them */
  facts: ImageFacts | undefined;
  /** of this node, from `checkFilesOfCheckpoint` on */
  node: NodeFacts | undefined;
  /** what is wrong, and what differs: all of it, judged by `refuseDifferences` */
  readonly findings: Finding[];
}

export const openingChecks = [
  validateRestoreRequest,
  openCheckpoint, // from here on it is a directory
] as const satisfies readonly Step<CheckContext>[];

export const comparingChecks = [
  checkFilesOfCheckpoint,
  compareWithContainer,
  compareWithNode,
  refuseDifferences, // one list of everything
] as const satisfies readonly Step<CheckContext>[];

/** In order: they only look, and the last one refuses. */
export const restoreChecks = [
  ...openingChecks,
  ...comparingChecks,
] as const satisfies readonly Step<CheckContext>[];

export interface ChainOptions {
  signal?: AbortSignal;
  onBoundary?: ChainContext["onBoundary"];
}

/**
 * Looks whether a restore can work, before anything of the container is made.
 * @throws what is wrong, as `restore` would
 */
export async function checkRestore(
  target: RestoreCandidate,
  request: RestoreLook,
  options: ChainOptions = {},
): Promise<void> {
  await runChain("checkRestore", restoreChecks, checkContext(target, request, options));
}

export function checkContext(
  target: RestoreCandidate,
  request: RestoreLook,
  options: ChainOptions,
): CheckContext {
  return {
    target,
    request,
    checkpoint: { path: request.path, imagePath: "", manifest: undefined, manifestPath: undefined },
    policy: target.policy(undefined),
    externalMounts: [],
    facts: undefined,
    node: undefined,
    findings: [],
    times: [],
    signal: options.signal ?? new AbortController().signal,
    onBoundary: options.onBoundary,
  };
}

async function validateRestoreRequest(context: CheckContext, next: () => Promise<void>): Promise<void> {
  const { path, workPath } = context.request;
  if (!isAbsolute(path)) throw new InvalidRequest(`checkpoint ${path} is not an absolute path`);
  if (workPath && !isAbsolute(workPath))
    throw new InvalidRequest(`work path ${workPath} is not an absolute path`);
  const paths = [path, workPath, context.target.container.rootfs];
  await Promise.all(paths.map((named) => named && expectAnswer(named)));
  await next();
}

// ---- the checkpoint --------------------------------------------------------------------------------------------------

async function openCheckpoint(context: CheckContext, next: () => Promise<void>): Promise<void> {
  const { request, signal, target } = context;
  const found = await checkpointAt(request.path);
  if (typeof found !== "string") context.checkpoint = found;
  else {
    if (!request.unpack)
      throw new Unsupported(
        `checkpoint ${request.path} is an archive: extract it, and restore from the directory`,
      );
    // Fails closed: nothing is there to restore from until all of it has turned out authentic, complete and as its manifest says.
    const secret = (await isEncryptedArchive(found)) ? await request.unpack.secret() : undefined;
    const unpacked = new UnpackedCheckpoint(request.unpack.root, target.directory);
    context.checkpoint = await openDirectoryOf(await unpacked.open(found, secret, signal));
  }
  context.policy = context.target.policy(context.checkpoint.manifest);
  await next();
}

/** @returns the path of an archive, for a directory that doesn't hold the checkpoint's files */
async function checkpointAt(path: string): Promise<OpenCheckpoint | string> {
  const opened = openStored(path); // meanwhile: each is many trips through the thread pool
  opened.catch(() => {}); // of what is no directory
  if (!(await isDirectory(path))) {
    const found = await stat(path).catch(() => undefined);
    if (!found) throw new NotFound(`checkpoint ${path} does not exist`);
    return path;
  }
  const stored = await opened;
  if (!("archive" in stored)) return stored;
  const faults = findingsOf(await compareSizes(path, stored.manifest));
  if (faults.length > 0) throw refusalOfRestore(path, faults);
  return stored.archive;
}

async function checkFilesOfCheckpoint(context: CheckContext, next: () => Promise<void>): Promise<void> {
  const { checkpoint, findings, request, signal } = context;
  const { manifest, manifestPath } = checkpoint;
  const verifies = request.verifyDigests && manifest && manifestPath;
  // What the next steps compare is read beside it: each is many short waits for a small file.
  const [faults, facts, node] = await Promise.all([
    verifies ? verifyFiles(manifest, manifestPath, signal).then(findingsOf) : findFaultsOfFiles(checkpoint),
    readImageFacts(checkpoint.imagePath),
    nodeFacts(),
  ]);
  findings.push(...faults);
  context.facts = facts;
  context.node = node;
  await next();
}

async function compareWithContainer(context: CheckContext, next: () => Promise<void>): Promise<void> {
  const { checkpoint, facts, findings, target } = context;
  const compared = await compareToContainer(checkpoint, facts, target.container);
  findings.push(...compared.findings);
  context.externalMounts = compared.externalMounts;
  if (compared.closesTcp && ["keep", "skip-in-flight"].includes(context.policy.tcp ?? ""))
    context.policy = { ...context.policy, tcp: "close" };
  await next();
}

async function compareWithNode(context: CheckContext, next: () => Promise<void>): Promise<void> {
  const { checkpoint, findings, node } = context;
  const { ignoreCpu = false } = context.request;
  // Of broken images nothing more can be told.
  if (!findings.some(({ kind }) => kind === "checkpoint"))
    findings.push(...(await compareToNode(checkpoint, node!, { ignoreCpu })));
  await next();
}

async function refuseDifferences(context: CheckContext, next: () => Promise<void>): Promise<void> {
  const { findings, request, target } = context;
  const refusal = refusalOfRestore(request.path, findings);
  if (refusal) throw refusal;
  for (const { kind, message } of findings)
    target.log.warn({ checkpoint: request.path, kind }, `restore all the same: ${message}`);
  await next();
}
