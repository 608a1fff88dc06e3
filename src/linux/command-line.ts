import { readApart } from "./apart.ts";
import { namespaceInode, ownMountNamespace } from "./proc.ts";

/** As many bytes as the kernel lets a program have, and more. */
const MAX_BYTES = 8 * 2 ** 20;

/**
 * The arguments that a process was started with, each followed by a NUL; empty when it has ended. They lie in its memory, which may be a file's
 * on a server that doesn't answer: empty then, too, after the time that `readApart` has.
 */
export async function commandLineOf(pid: number): Promise<string> {
  try {
    return (await readApart(`/proc/${pid}/cmdline`, MAX_BYTES)).toString("utf8");
  } catch {
    return "";
  }
}

/** Whether a process has our mount namespace, as engines have. A container's has its own: nothing of its memory need be read. */
export function isFromHere(pid: number): boolean {
  try {
    return namespaceInode(pid, "mnt") === ownMountNamespace();
  } catch {
    return false; // EACCES: not ours
  }
}
