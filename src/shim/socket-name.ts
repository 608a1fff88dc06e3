import { namespaceInode, ownMountNamespace } from "../linux/proc.ts";

/**
 * Name of cedanad's socket in the run directory: one cedanad for each mount namespace, the plain name for that of pid 1. The
 * launcher decides by the same rule (addon/keeper/PROTOCOL.md).
 */
export function daemonSocketName(): string {
  return `cedanad${namespaceSuffix()}.sock`;
}

/** … of the socket of the management API, beside it. */
export function apiSocketName(): string {
  return `api${namespaceSuffix()}.sock`;
}

function namespaceSuffix(): string {
  const own = ownMountNamespace();
  return own === initMountNamespace() ? "" : `-${own}`;
}

/** undefined where we may not look: it takes ptrace access to pid 1 */
function initMountNamespace(): number | undefined {
  try {
    return namespaceInode(1, "mnt");
  } catch (error) {
    if (
      (error as NodeJS.ErrnoException).code === "EACCES" ||
      (error as NodeJS.ErrnoException).code === "EPERM"
    )
      return undefined;
    throw error;
  }
}
