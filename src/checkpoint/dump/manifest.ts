import { rm } from "node:fs/promises";
import { release } from "node:os";
import { join, relative } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { timesByStep } from "../chain.ts";
import { cpuFacts } from "../cpu.ts";
import { digestTree } from "../follow.ts";
import { type CheckpointManifest, MANIFEST_NAME, readManifest } from "../manifest.ts";
import { writeManifest } from "../manifest-files.ts";
import type { Staging } from "../staging.ts";
import {
  type Attempt,
  absoluteParent,
  type DumpContext,
  type Facts,
  finalImagePath,
  inHundredths,
  type ManifestDraft,
} from "./context.ts";
import { lastWord } from "./last-word.ts";
import type { DumpTarget } from "./target.ts";

// What a dump says of itself in its manifest.

export async function recordDump(context: DumpContext, next: () => Promise<void>): Promise<void> {
  try {
    await next();
  } catch (error) {
    context.follower?.abandon(); // CRIU had done its part, and what came after it failed: nobody asks for the digests any more
    throw error;
  }
  const { startedAt, staging } = context;
  const [cpu, image] = await context.facts!;
  // A container that is in its images alone gets its checkpoint, though nobody waits for it any more.
  const signal = context.ended ? undefined : context.signal;
  const files = await (context.follower?.finish(signal) ?? digestTree(staging.path, { signal }));
  await writeManifest(
    staging.path,
    {
      ...manifestDraft(context),
      ...(image && { image }),
      ...(context.attempt.rootfsDiff && { rootfsDiff: context.attempt.rootfsDiff }),
      ...(context.attempt.gpu && { gpu: context.attempt.gpu }),
      cpu,
      timings: {
        ...timesByStep(context.times),
        frozenMs: inHundredths(context.frozenMs),
        ...(context.criuFrozenMs !== undefined && { criuFrozenMs: context.criuFrozenMs }),
        totalMs: Date.now() - startedAt,
      },
    },
    { files, synced: false }, // by the commit, with all the rest
  );
}

export function manifestDraft(context: DumpContext): ManifestDraft {
  const { target, request, startedAt, adapters, criu } = context;
  return {
    createdAt: new Date(startedAt).toISOString(),
    ...target.facts,
    ...(adapters.length > 0 && { plugins: [...(target.facts.plugins ?? []), ...adapters] }),
    ...request.origin,
    kernel: release(),
    ...(process.env.CEDANA_BUILD && { cedanaVersion: process.env.CEDANA_BUILD }),
    ...(criu !== undefined && { criuVersion: criu }),
    options: optionsOf(context),
  };
}

/**
 * After a crash, for a container that has ended: puts a whole checkpoint in its place, with the manifest that it was to have.
 * @returns whether it was whole
 */
export async function finishAttempt(
  staging: Staging,
  { whole, phase, rootfsDiff, gpu }: Attempt,
): Promise<boolean> {
  if (!whole || (whole.withFiles && !rootfsDiff)) return false;
  if (phase === "begun" && (await lastWord(whole.workPath)) !== "finished") return false;
  await rm(join(staging.path, MANIFEST_NAME), { force: true }); // of a commit that was cut off
  await writeManifest(
    staging.path,
    {
      ...whole.draft,
      ...(rootfsDiff && { rootfsDiff }),
      ...(gpu && { gpu }),
      cpu: await cpuFacts(),
      timings: { totalMs: Date.now() - Date.parse(whole.draft.createdAt) },
    },
    { files: await digestTree(staging.path), synced: false },
  );
  await staging.commit();
  return true;
}

/** Whether a checkpoint was in its place already when the crash came: the one there is of this moment, and no older one. */
export async function isInPlace({ whole, staging: { finalPath } }: Attempt): Promise<boolean> {
  const manifest = await readManifest(finalPath).catch(() => undefined); // broken: none of ours
  return whole !== undefined && manifest?.createdAt === whole.draft.createdAt;
}

async function factsOf(target: DumpTarget): Promise<Facts> {
  return await Promise.all([cpuFacts(), target.image?.()]);
}

/** The engine is on its way then, and the event loop has nothing else to do until CRIU is done. */
const FACTS_AFTER_MS = 10;

/** What is asked of others for the manifest. Asking containerd takes some ms of the event loop, and here the container may stand still. */
export async function askForFacts(context: DumpContext, next: () => Promise<void>): Promise<void> {
  context.facts = sleep(FACTS_AFTER_MS).then(() => factsOf(context.target));
  context.facts.catch(() => {}); // looked at by recordDump
  await next();
}

/** As used: a restore uses them again. */
function optionsOf(context: DumpContext): CheckpointManifest["options"] {
  const { request, networkLock, parentPath, parentDigests } = context;
  const { policy, leaveRunning } = request;
  return {
    ...(policy.tcp && { tcp: policy.tcp }),
    fileLocks: policy.fileLocks,
    extUnix: policy.extUnix,
    shellJob: policy.shellJob,
    emptyNamespaces: policy.emptyNamespaces,
    ...(policy.cgroupsMode && { cgroupsMode: policy.cgroupsMode }),
    ...(networkLock !== "default" && { networkLock }),
    leaveRunning,
    ...(parentPath && {
      parentPath: relative(finalImagePath(request), absoluteParent(request)),
      parentDigests,
    }),
  };
}
