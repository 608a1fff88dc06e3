import { statSync } from "node:fs";

/**
 * Which file lies at a path, and in which state: an upgrade puts another one there. As the keeper has it (PROTOCOL.md, sealedOf).
 * @returns undefined when there is none, or nobody can get there
 */
export function fileIdentity(path: string): string | undefined {
  try {
    const found = statSync(path, { bigint: true, throwIfNoEntry: false });
    return found && [found.dev, found.ino, found.size, found.mtimeNs, found.ctimeNs].join(":");
  } catch {
    return undefined; // EACCES, ELOOP on the way
  }
}
