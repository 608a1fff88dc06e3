/** Names of what can be wrong, for programs. */
export type FaultKind =
  /** not the words of this type of image */
  | "magic"
  /** cut short, or longer than its entries */
  | "length"
  /** bytes that are no message of this type */
  | "message"
  /** a file that must be there */
  | "missing"
  /** a file that nothing asks for */
  | "stray"
  /** pagemap and pages don't fit together */
  | "pages"
  /** an id that nothing has, or two have */
  | "reference"
  /** the link to earlier images leads nowhere, or they lack pages */
  | "parent"
  /** of a CRIU that we don't know */
  | "version";

export interface ImageFinding {
  /** an error keeps a restore from working, or makes it wrong; a warning is odd */
  readonly severity: "error" | "warning";
  readonly kind: FaultKind;
  /** in the directory; of earlier images with "parent/" before it */
  readonly file: string;
  /** of the entry, in bytes; undefined: it is about the file as a whole */
  readonly offset: number | undefined;
  readonly what: string;
}

/** Where an id was found, or a fault. */
export interface Place {
  readonly file: string;
  readonly offset: number;
}

const MAX_FINDINGS = 1000;

/** What has been found so far: counted all, kept up to a limit. */
export class Findings {
  readonly list: ImageFinding[] = [];
  #count = 0;
  #errors = 0;

  get hasErrors(): boolean {
    return this.#errors > 0;
  }

  get isTruncated(): boolean {
    return this.#count > this.list.length;
  }

  error(kind: FaultKind, where: string | Place, what: string): void {
    this.#errors++;
    this.#add("error", kind, where, what);
  }

  warning(kind: FaultKind, where: string | Place, what: string): void {
    this.#add("warning", kind, where, what);
  }

  #add(severity: ImageFinding["severity"], kind: FaultKind, where: string | Place, what: string): void {
    this.#count++;
    const { file, offset } = typeof where === "string" ? { file: where, offset: undefined } : where;
    if (this.list.length < MAX_FINDINGS) this.list.push({ severity, kind, file, offset, what });
  }
}
