import { release } from "node:os";
import { relative } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { timesByStep } from "../chain.ts";
import { cpuFacts } from "../cpu.ts";
import { digestTree } from "../follow.ts";
import type { CheckpointManifest } from "../manifest.ts";
import { writeManifest } from "../manifest-files.ts";
import { absoluteParent, type DumpContext, type Facts, finalImagePath, inHundredths } from "./context.ts";
import type { DumpTarget } from "./target.ts";

// What a dump says of itself in its manifest.

export async function recordDump(context: DumpContext, next: () => Promise<void>): Promise<void> {
  try {
    await next();
  } catch (error) {
    context.follower?.abandon(); // CRIU had done its part, and what came after it failed: nobody asks for the digests any more
    throw error;
  }
  const { target, request, startedAt, staging } = context;
  const [cpu, image] = await context.facts!;
  const files = await (context.follower?.finish() ?? digestTree(staging.path, { signal: context.signal }));
  await writeManifest(
    staging.path,
    {
      createdAt: new Date(startedAt).toISOString(),
      ...target.facts,
      ...(context.adapters.length > 0 && { plugins: [...(target.facts.plugins ?? []), ...context.adapters] }),
      ...request.origin,
      ...(image && { image }),
      ...(context.attempt.rootfsDiff && { rootfsDiff: context.attempt.rootfsDiff }),
      ...(context.attempt.gpu && { gpu: context.attempt.gpu }),
      cpu,
      kernel: release(),
      ...(process.env.CEDANA_BUILD && { cedanaVersion: process.env.CEDANA_BUILD }),
      ...(context.criu !== undefined && { criuVersion: context.criu }),
      options: optionsOf(context),
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
function optionsOf({ request, networkLock }: DumpContext): CheckpointManifest["options"] {
  const { policy, leaveRunning, parentPath } = request;
  return {
    ...(policy.tcp && { tcp: policy.tcp }),
    fileLocks: policy.fileLocks,
    extUnix: policy.extUnix,
    shellJob: policy.shellJob,
    emptyNamespaces: policy.emptyNamespaces,
    ...(policy.cgroupsMode && { cgroupsMode: policy.cgroupsMode }),
    ...(networkLock !== "default" && { networkLock }),
    leaveRunning,
    ...(parentPath && { parentPath: relative(finalImagePath(request), absoluteParent(request)) }),
  };
}
