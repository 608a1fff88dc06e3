import type { FaultKind } from "../criu/image/index.ts";
import { BrokenImage, type CedanaError, Unsupported, WrongState } from "../errors/index.ts";

/*
 * What is wrong with a checkpoint, or differs between it and where it is to run: found without restoring it, all of it, and said in one
 * list.
 */

/** Whose fault it is: the checkpoint's, the container's that it is restored as, or the node's. */
export type FindingKind = "checkpoint" | "container" | "node";

/** Names of what can be wrong, for programs. */
export type Fault =
  /** of the checkpoint's files, against its manifest */
  | "missing"
  | "extra"
  | "type"
  | "size"
  | "digest"
  /** no manifest, so that nothing can be compared with it; or one that can't be read */
  | "manifest"
  /** what engines write beside CRIU's images */
  | "descriptors"
  /** the earlier checkpoint that it builds on */
  | "parent"
  /** an archive that is cut off, changed, or can't be opened */
  | "archive"
  /** of CRIU's images themselves: see docs/images.md */
  | FaultKind
  /** between it and the container */
  | "terminal"
  | "engine"
  | "image"
  | "mount"
  | "file"
  | "address"
  | "pid"
  /** between it and the node */
  | "plugin"
  | "cpu"
  | "criu"
  | "kernel";

export interface Finding {
  kind: FindingKind;
  fault: Fault;
  /** of the checkpoint, where it is about one */
  file?: string;
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

/** Collects findings of one kind. */
export class Found {
  readonly list: Finding[] = [];
  readonly #kind: FindingKind;

  constructor(kind: FindingKind) {
    this.#kind = kind;
  }

  error(fault: Fault, message: string, file?: string): void {
    this.#add("error", fault, message, file);
  }

  warning(fault: Fault, message: string, file?: string): void {
    this.#add("warning", fault, message, file);
  }

  #add(severity: Finding["severity"], fault: Fault, message: string, file: string | undefined): void {
    this.list.push({ kind: this.#kind, severity, fault, ...(file !== undefined && { file }), message });
  }
}
