import { posix } from "node:path";

/**
 * Whether a link in a checkpoint is one that we take: CRIU's `parent`, relative, to a directory of the same checkpoint, as Podman's
 * `checkpoint/parent -> ../pre-checkpoint`.
 */
export function staysInside(path: string, target: string): boolean {
  if (posix.basename(path) !== "parent" || target === "" || target.startsWith("/")) return false;
  const leadsTo = posix.normalize(posix.join(posix.dirname(path), target));
  return leadsTo !== "." && leadsTo !== ".." && !leadsTo.startsWith("../");
}
