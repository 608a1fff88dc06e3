import { realpath } from "node:fs/promises";
import { isAbsolute } from "node:path";
import type { CheckpointManifest } from "../checkpoint/manifest.ts";
import { checkRestore } from "../checkpoint/restore.ts";
import { CheckpointStore } from "../checkpoint/store.ts";
import { InvalidRequest, NotFound, PermissionDenied, SyscallFailed } from "../errors/index.ts";
import { configurationPath, readConfiguration } from "../runtime/configuration.ts";
import { engineVersion } from "../runtime/engine.ts";
import { restoredContainer } from "../runtime/restored-container.ts";
import {
  cedanaAnnotations,
  hasOurAnnotations,
  isSandboxContainer,
  type OciSpec,
  podNamespaceOf,
} from "../runtime/spec.ts";
import { restorePolicy } from "./criu-policy.ts";
import { reachBoundary } from "./fault.ts";
import type { TaskLogger } from "./task-log.ts";

/** What a new container is to be restored from, and what to do when that fails. */
export interface RestoreSource {
  /** directory of the checkpoint, absolute */
  readonly path: string;
  readonly onFailure: "fail" | "fresh";
  /** who chose it */
  readonly why: "caller" | "annotation";
}

/**
 * Whether a new container is to be restored, and from what: what the call names, else what the container's annotation does. What can't
 * be restored is said here, before anything is made; or left, where the container may start afresh instead.
 * @param asked  a path that the call names
 * @throws what `checkRestore` and the finding of the annotation's checkpoint throw
 */
export async function chooseRestoreSource(
  spec: OciSpec,
  asked: string | undefined,
  container: {
    id: string;
    namespace: string;
    bundle: string;
    /** name or path of its engine */
    engine: string;
    terminal: boolean;
    log: TaskLogger;
  },
): Promise<RestoreSource | undefined> {
  if (asked !== undefined && !isAbsolute(asked))
    throw new InvalidRequest(`checkpoint ${asked} is not an absolute path`);
  const onFailure = asked === undefined ? (cedanaAnnotations(spec).onRestoreFailure ?? "fail") : "fail";
  try {
    const path = asked ?? (await annotatedPath(spec, container.namespace));
    if (path === undefined) return undefined;
    const candidate = {
      what: `task ${container.id}`,
      container: restoredContainer(spec, container.bundle, await engineVersion(container.engine), {
        terminal: container.terminal,
      }),
      log: container.log,
      policy: (manifest: CheckpointManifest | undefined) => restorePolicy(manifest, spec),
    };
    await checkRestore(candidate, { path }, { onBoundary: reachBoundary });
    return { path, onFailure, why: asked === undefined ? "annotation" : "caller" };
  } catch (error) {
    // Only what is wrong with the checkpoint: a forbidden or senseless annotation stays an error.
    if (onFailure === "fail" || error instanceof PermissionDenied || error instanceof InvalidRequest)
      throw error;
    container.log.warn(
      { err: error },
      "not restored, as cedana.io/on-restore-failure allows: it starts afresh",
    );
    return undefined;
  }
}

/**
 * What `cedana.io/restore-from` names, for a container that was asked for in the ordinary way: so every client can restore, with any
 * containerd. A name is looked up among the checkpoints of the container's own namespace; a path needs the administrator's consent.
 * @returns undefined for a container that is to start afresh
 * @throws NotFound, PermissionDenied, InvalidRequest
 */
async function annotatedPath(spec: OciSpec, namespace: string): Promise<string | undefined> {
  if (isSandboxContainer(spec) || !hasOurAnnotations(spec)) return undefined;
  const configuration = await readConfiguration();
  const { restoreFrom } = cedanaAnnotations(spec, { denied: configuration.annotations.deny });
  if (restoreFrom === undefined) return undefined;
  if (isAbsolute(restoreFrom)) return await allowedPath(restoreFrom, configuration.restoreFromPaths);
  const store = new CheckpointStore(configuration.checkpoints.directory);
  return (await store.find({ namespace, podNamespace: podNamespaceOf(spec) }, restoreFrom)).path;
}

/** The real path, when it is below a directory that the administrator has named. Links are followed first, and not again later. */
async function allowedPath(path: string, allowed: readonly string[]): Promise<string> {
  const denied = new PermissionDenied(
    `cedana.io/restore-from names the path ${path}: this node allows ${allowed.length > 0 ? `paths below ${allowed.join(", ")}` : "only names of checkpoints"} (restoreFromPaths in ${configurationPath()})`,
  );
  // Whether a path outside exists is nobody's business either.
  if (!allowed.some((directory) => isBelow(path, directory))) throw denied;
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
