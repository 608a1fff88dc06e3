import { isAbsolute } from "node:path";
import type { CheckpointManifest } from "../checkpoint/manifest.ts";
import { checkRestore } from "../checkpoint/restore/checks.ts";
import { type Claim, returnClaim } from "../checkpoint/resume.ts";
import { hasCriuFeature } from "../criu/probe.ts";
import { InvalidRequest } from "../errors/index.ts";
import { annotatedCheckpoint, maySetAside } from "../runtime/annotated-checkpoint.ts";
import { engineVersion } from "../runtime/engine.ts";
import { restoreSettings } from "../runtime/restore-settings.ts";
import { restoredContainer } from "../runtime/restored-container.ts";
import { cedanaAnnotations, type OciSpec } from "../runtime/spec.ts";
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
  /** nobody else continues from it */
  readonly claim?: Claim | undefined;
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
  let claim: Claim | undefined;
  try {
    const found = asked === undefined ? await annotatedCheckpoint(spec, container) : { path: asked };
    if (found === undefined) return undefined;
    const { path } = found;
    claim = found.claim;
    // Asked now, so that the start needn't wait for the answer; whoever wants it gets the error, too.
    if (cedanaAnnotations(spec).lazy) hasCriuFeature("uffd-noncoop").catch(() => undefined);
    const candidate = {
      what: `task ${container.id}`,
      directory: container.bundle,
      container: restoredContainer(spec, container.bundle, await engineVersion(container.engine), {
        terminal: container.terminal,
      }),
      log: container.log,
      policy: (manifest: CheckpointManifest | undefined) => restorePolicy(manifest, spec),
    };
    await checkRestore(candidate, { path, ...(await restoreSettings()) }, { onBoundary: reachBoundary });
    return { path, onFailure, claim, why: asked === undefined ? "annotation" : "caller" };
  } catch (error) {
    if (claim) await returnClaim(claim);
    if (onFailure === "fail" || !maySetAside(error)) throw error;
    container.log.warn(
      { err: error },
      "not restored, as cedana.io/on-restore-failure allows: it starts afresh",
    );
    return undefined;
  }
}
