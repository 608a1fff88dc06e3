import { BrokenImage, type CedanaError, Unsupported, WrongState } from "../errors/index.ts";

/*
 * What is wrong with a checkpoint, or differs between it and where it is to run: found without restoring it, all of it, and said in one
 * list.
 */

/** Whose fault it is: the checkpoint's, the container's that it is restored as, or the node's. */
export type FindingKind = "checkpoint" | "container" | "node";

export interface Finding {
  kind: FindingKind;
  /** an error keeps a restore from working, or makes it wrong; a warning is said, and the restore tried */
  severity: "error" | "warning";
  /** for people; says what to do where something can be done */
  message: string;
}

/** A checkpoint may have hundreds of files, all missing. */
const MAX_LISTED = 20;

/**
 * All errors in one, of the class of the first kind that there is: a broken checkpoint can't be restored anywhere, one for another node
 * not as any container here.
 * @returns undefined when there are only warnings
 */
export function refusalOfRestore(path: string, findings: readonly Finding[]): CedanaError | undefined {
  const errors = findings.filter(({ severity }) => severity === "error");
  if (errors.length === 0) return undefined;
  const has = (kind: FindingKind) => errors.some((finding) => finding.kind === kind);
  const listed = errors.slice(0, MAX_LISTED).map(({ message }) => message);
  if (errors.length > listed.length) listed.push(`and ${errors.length - listed.length} more`);
  const text = listed.join("; ");
  if (has("checkpoint")) return new BrokenImage(`checkpoint ${path} is broken: ${text}`);
  if (has("node")) return new Unsupported(`checkpoint ${path} can't be restored on this node: ${text}`);
  return new WrongState(`checkpoint ${path} can't be restored as this container: ${text}`);
}
