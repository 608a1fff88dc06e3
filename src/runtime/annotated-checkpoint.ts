import { realpath } from "node:fs/promises";
import { isAbsolute } from "node:path";
import { type Claim, claimCheckpoint } from "../checkpoint/resume.ts";
import { CheckpointStore, checkedName, type StoreOwner } from "../checkpoint/store.ts";
import { InvalidRequest, NotFound, PermissionDenied, SyscallFailed } from "../errors/index.ts";
import { expectAnswer } from "../linux/apart.ts";
import { type Configuration, configurationPath, readConfiguration } from "./configuration.ts";
import {
  type CedanaAnnotations,
  cedanaAnnotations,
  hasOurAnnotations,
  isSandboxContainer,
  type OciSpec,
  podNamespaceOf,
} from "./spec.ts";

/** A checkpoint that a container's annotations ask for, instead of a fresh start. */
export interface AnnotatedCheckpoint {
  /** directory of it, absolute */
  readonly path: string;
  /** by `cedana.io/auto-resume`: nobody else continues from it */
  readonly claim?: Claim | undefined;
}

/** The container that asks. */
export interface AskingContainer {
  readonly id: string;
  /** of the store: containerd's, or what stands for it */
  readonly namespace: string;
  /** its bundle, which tells it from another container of that id, before it or after */
  readonly bundle: string;
}

/**
 * What `cedana.io/auto-resume` and `cedana.io/restore-from` name, for a container that was asked for in the ordinary way: so every
 * client can restore. A key or a name is looked up among the checkpoints of the container's own namespace; a path needs the
 * administrator's consent. The key goes first: a name beside it is where the first container of that key begins.
 * @returns undefined for a container that is to start afresh
 * @throws NotFound, PermissionDenied, InvalidRequest
 */
export async function annotatedCheckpoint(
  spec: OciSpec,
  container: AskingContainer,
): Promise<AnnotatedCheckpoint | undefined> {
  const asked = await allowedAnnotations(spec);
  if (!asked) return undefined;
  const { restoreFrom, autoResume } = asked.annotations;
  const store = new CheckpointStore(asked.configuration.checkpoints.directory);
  const owner = storeOwner(spec, container.namespace);
  if (autoResume !== undefined) {
    const claimed = await claimCheckpoint(store, owner, autoResume, `${container.id} ${container.bundle}`);
    if (claimed) return claimed;
  }
  if (restoreFrom === undefined) return undefined;
  if (isAbsolute(restoreFrom))
    return { path: await allowedPath(restoreFrom, asked.configuration.restoreFromPaths) };
  return { path: (await store.find(owner, restoreFrom)).path };
}

/**
 * What a container's annotations ask for, where the administrator allows it.
 * @returns undefined for a container that asks for nothing
 * @throws PermissionDenied, InvalidRequest
 */
export async function allowedAnnotations(
  spec: OciSpec,
): Promise<{ annotations: CedanaAnnotations; configuration: Configuration } | undefined> {
  if (isSandboxContainer(spec) || !hasOurAnnotations(spec)) return undefined;
  const configuration = await readConfiguration();
  const annotations = cedanaAnnotations(spec, { denied: configuration.annotations.deny });
  if (annotations.autoResume !== undefined) checkedName(annotations.autoResume);
  return { annotations, configuration };
}

/** Whose checkpoints a container may use. */
export function storeOwner(spec: OciSpec, namespace: string): StoreOwner {
  return { namespace, podNamespace: podNamespaceOf(spec) };
}

/** The real path, when it is below a directory that the administrator has named. Links are followed first, and not again later. */
async function allowedPath(path: string, allowed: readonly string[]): Promise<string> {
  const denied = new PermissionDenied(
    `cedana.io/restore-from names the path ${path}: this node allows ${allowed.length > 0 ? `paths below ${allowed.join(", ")}` : "only names of checkpoints"} (restoreFromPaths in ${configurationPath()})`,
  );
  // Whether a path outside exists is nobody's business either.
  if (!allowed.some((directory) => isBelow(path, directory))) throw denied;
  await expectAnswer(path);
  const real = await realpath(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT" || error.code === "ENOTDIR")
      throw new NotFound(`checkpoint ${path} does not exist`, { cause: error });
    throw SyscallFailed.from(error);
  });
  const roots = await Promise.all(allowed.map((directory) => realpath(directory).catch(() => directory)));
  if (!roots.some((directory) => isBelow(real, directory))) throw denied;
  return real;
}

function isBelow(path: string, directory: string): boolean {
  return path.startsWith(directory === "/" ? "/" : `${directory}/`) && !path.split("/").includes("..");
}

/** Only what is wrong with the checkpoint lets a container start afresh: a forbidden or senseless annotation stays an error. */
export function maySetAside(error: unknown): boolean {
  return !(error instanceof PermissionDenied || error instanceof InvalidRequest);
}
