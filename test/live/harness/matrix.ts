// Which containerds and engines a test file runs with.

import { existsSync } from "node:fs";
import { type ContainerdVersion, containerdBinaries, type EngineName, isControl } from "./live.ts";

export interface Combination {
  containerd: ContainerdVersion;
  engine: EngineName;
}

function installed(engine: EngineName): boolean {
  return ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin"].some((path) =>
    existsSync(`${path}/${engine}`),
  );
}

/** What this machine lacks for the combination, or undefined. */
export function missingFor({ containerd, engine }: Combination): string | undefined {
  if (!containerdBinaries(containerd)) return `no containerd ${containerd} on this machine`;
  if (!installed(engine)) return `no ${engine} on this machine`;
  return undefined;
}

const named = (containerd: ContainerdVersion, engine: EngineName) => ({ containerd, engine });

/** Every version with every engine. */
export const everyCombination: Combination[] = (["1.7", "2.1", "1.6"] as const).flatMap((containerd) =>
  (["runc", "crun"] as const).map((engine) => named(containerd, engine)),
);

/** Both engines on the installed containerd. */
export const bothEngines: Combination[] = [named("1.7", "runc"), named("1.7", "crun")];

/** Both engines on a containerd that takes one checkpoint after another without a wait (see LiveTask.checkpoint). */
export const enginesForCheckpoints: Combination[] = [named("2.1", "runc"), named("2.1", "crun")];

/** Skips with the reason, in place: `skipUnless(context, !isControl, "…")`. */
export function skipUnless(
  context: { skip: (note?: string) => void },
  condition: boolean,
  reason: string,
): void {
  if (!condition) context.skip(reason);
}

/** For behaviour that the Go shim hasn't got: the control run says so. */
export function oursOnly(context: { skip: (note?: string) => void }, what: string): void {
  if (isControl) context.skip(`the Go shim: ${what}`);
}
