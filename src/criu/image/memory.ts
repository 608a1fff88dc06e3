import { readlink, realpath, stat } from "node:fs/promises";
import { join } from "node:path";
import type { Findings, Place } from "./findings.ts";
import type { Message } from "./value.ts";

// Memory in images: pagemaps say which pages a pages file has, and which ones earlier images have.

/** Flags of pagemap entries. Source: crit, CRIU pagemap.h. */
const PE_PARENT = 1;
const PE_LAZY = 2;
const PE_PRESENT = 4;
/** Chains of pre-dumps have a handful. */
const MAX_PARENTS = 1000;

interface Range {
  readonly start: bigint;
  readonly end: bigint;
}
interface Pagemap {
  readonly pagesId: number | undefined;
  /** pages that are in this directory's pages file */
  present: bigint;
  /** where the parent must have pages */
  readonly inParent: (Range & { readonly offset: number })[];
  /** all that is described, merged */
  readonly covered: Range[];
}

/** The pagemaps of one directory. */
export class Memory {
  readonly #findings: Findings;
  readonly #directory: string;
  /** "" of the images themselves, "parent/" of those before them … */
  readonly #prefix: string;
  readonly #pagemaps = new Map<string, Pagemap>();
  readonly #mappings = new Map<number, Range[]>();
  #pageSize = 4096;

  constructor(findings: Findings, directory: string, prefix = "") {
    this.#findings = findings;
    this.#directory = directory;
    this.#prefix = prefix;
  }

  /** Pages in this directory. */
  get pages(): bigint {
    let sum = 0n;
    for (const { present } of this.#pagemaps.values()) sum += present;
    return sum;
  }

  /** An mm_entry: where a task's mappings are. Before pagemaps, because only this says how big a page is. */
  addMappings(place: Place, pid: number, value: Message): void {
    this.#pageSize = pageSizeOf(value) ?? this.#pageSize;
    const ranges: Range[] = [];
    for (const vma of (value.vmas ?? []) as Message[]) {
      const [start, end] = [BigInt(vma.start as bigint), BigInt(vma.end as bigint)];
      const last = ranges.at(-1);
      if (end <= start || (last && start < last.end))
        this.#findings.error(
          "pages",
          place,
          `the mapping at 0x${start.toString(16)} ends before it begins, or overlaps the one before`,
        );
      appendRange(ranges, { start, end });
    }
    this.#mappings.set(pid, ranges);
  }

  /** An entry of a pagemap. */
  addPagemap({ file, offset }: Place, value: Message, message: string): void {
    if (message === "pagemap_head") {
      this.#pagemaps.set(file, { pagesId: Number(value.pages_id), present: 0n, inParent: [], covered: [] });
      return;
    }
    const map = this.#pagemaps.get(file)!;
    const count = BigInt((value.nr_pages as bigint | undefined) ?? (value.compat_nr_pages as number));
    const flags =
      value.flags === undefined ? (value.in_parent === true ? PE_PARENT : PE_PRESENT) : Number(value.flags);
    const start = BigInt(value.vaddr as bigint);
    const end = start + count * BigInt(this.#pageSize);
    const last = map.covered.at(-1);
    const where = { file: `${this.#prefix}${file}`, offset };
    const fault = (what: string) =>
      this.#findings.error("pages", where, `pages from 0x${start.toString(16)} on ${what}`);
    if (count === 0n) fault("are none");
    if (start % 4096n !== 0n) fault("don't begin with a page");
    if (last && start < last.end) {
      fault("overlap those before, or come after them in the wrong order");
      return;
    }
    if (flags & ~(PE_PARENT | PE_LAZY | PE_PRESENT))
      this.#findings.warning("version", where, `the pages' flags 0x${flags.toString(16)} are unknown`);
    if (flags & PE_PARENT) map.inParent.push({ start, end, offset });
    else if (flags & PE_PRESENT) map.present += count;
    appendRange(map.covered, { start, end });
  }

  /**
   * Each pagemap has its pages file, of the size that its entries add up to; pages lie within mappings.
   * @param names  of the directory's files; pages files that nobody mentions are reported
   */
  async checkPages(names: Iterable<string>): Promise<void> {
    const sums = new Map<number, { pages: bigint; user: string }>();
    for (const [file, { pagesId, present }] of this.#pagemaps) {
      if (pagesId === undefined) continue;
      sums.set(pagesId, { pages: (sums.get(pagesId)?.pages ?? 0n) + present, user: file });
    }
    for (const [id, { pages, user }] of sums) {
      const name = `pages-${id}.img`;
      const size = await sizeOf(join(this.#directory, name));
      const file = `${this.#prefix}${name}`;
      const wanted = pages * BigInt(this.#pageSize);
      if (size === undefined) {
        if (pages > 0n) this.#findings.error("missing", file, `is missing: ${user} has ${pages} pages in it`);
      } else if (size !== wanted)
        this.#findings.error(
          "pages",
          file,
          `has ${size} bytes, where ${user} has ${pages} pages, ${wanted} bytes`,
        );
    }
    for (const name of names) {
      const id = /^pages-(\d+)\.img$/.exec(name)?.[1];
      if (id !== undefined && !sums.has(Number(id)))
        this.#findings.warning("stray", `${this.#prefix}${name}`, "belongs to no pagemap");
    }
    for (const [file, { covered }] of this.#pagemaps) {
      const pid = /^pagemap-(\d+)\.img$/.exec(file)?.[1];
      const mappings = pid === undefined ? undefined : this.#mappings.get(Number(pid));
      const outside = mappings && covered.find((range) => !isCovered(range, mappings));
      if (outside)
        this.#findings.error(
          "pages",
          `${this.#prefix}${file}`,
          `pages from 0x${outside.start.toString(16)} on are in no mapping of mm-${pid}.img`,
        );
    }
  }

  /**
   * Follows the links to earlier images; each one's pages must be whole, and have what the one after it leaves to it.
   * @param read  reads a directory's pagemaps into a Memory
   * @returns pages in earlier images
   */
  async checkParents(
    read: (into: Memory, directory: string, prefix: string) => Promise<void>,
  ): Promise<bigint> {
    let pages = 0n;
    let at: Memory = this;
    const visited = new Set([await realpath(this.#directory)]);
    for (let depth = 0; depth < MAX_PARENTS; depth++) {
      const path = await at.#followParent(visited);
      if (path === undefined) return pages;
      const prefix = `${at.#prefix}parent/`;
      const earlier = new Memory(this.#findings, path, prefix);
      earlier.#pageSize = this.#pageSize;
      await read(earlier, path, prefix);
      await earlier.checkPages([]); // a pre-dump's directory may serve others, too
      at.#checkLeft(earlier);
      pages += earlier.pages;
      at = earlier;
    }
    return pages;
  }

  /** Where the link leads to; undefined: there is none, or nothing more to follow. */
  async #followParent(visited: Set<string>): Promise<string | undefined> {
    const link = join(this.#directory, "parent");
    const target = await readlink(link).catch(() => undefined);
    if (target === undefined) {
      for (const [file, { inParent }] of this.#pagemaps)
        if (inParent.length > 0)
          this.#findings.error(
            "parent",
            { file: `${this.#prefix}${file}`, offset: inParent[0]!.offset },
            "leaves pages to earlier images, and there is no link to them",
          );
      return undefined;
    }
    const path = await realpath(link).catch(() => undefined);
    if (path !== undefined && !visited.has(path)) {
      visited.add(path);
      return path;
    }
    const what = `the link to earlier images, ${target}, leads`;
    const [file, isNeeded] = [
      `${this.#prefix}parent`,
      [...this.#pagemaps.values()].some(({ inParent }) => inParent.length > 0),
    ];
    if (path !== undefined) this.#findings.error("parent", file, `${what} back to where it came from`);
    else if (isNeeded) this.#findings.error("parent", file, `${what} nowhere`);
    else this.#findings.warning("parent", file, `${what} nowhere; nothing was left to them`); // Podman makes it all the same
    return undefined;
  }

  #checkLeft(earlier: Memory): void {
    for (const [file, { inParent }] of this.#pagemaps) {
      const covered = earlier.#pagemaps.get(file)?.covered ?? [];
      for (const range of inParent)
        if (!isCovered(range, covered))
          this.#findings.error(
            "parent",
            { file: `${this.#prefix}${file}`, offset: range.offset },
            `leaves pages from 0x${range.start.toString(16)} on to earlier images, which lack them`,
          );
    }
  }
}

/** Only the auxiliary vector says it: pages of 16 or 64 KiB exist on other machines than x86. Source: getauxval(3). */
function pageSizeOf(memory: Message): number | undefined {
  const vector = (memory.mm_saved_auxv ?? []) as bigint[];
  const AT_PAGESZ = 6n;
  for (let i = 0; i + 1 < vector.length; i += 2) if (vector[i] === AT_PAGESZ) return Number(vector[i + 1]);
  return undefined;
}

/** Joins neighbours. */
function appendRange(ranges: Range[], range: Range): void {
  const last = ranges.at(-1);
  if (last && last.end === range.start) ranges[ranges.length - 1] = { start: last.start, end: range.end };
  else ranges.push(range);
}

/** @param merged  in order, neighbours joined */
function isCovered(range: Range, merged: readonly Range[]): boolean {
  let [low, high] = [0, merged.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (merged[middle]!.end <= range.start) low = middle + 1;
    else high = middle;
  }
  const found = merged[low];
  return found !== undefined && found.start <= range.start && range.end <= found.end;
}

async function sizeOf(path: string): Promise<bigint | undefined> {
  try {
    return (await stat(path, { bigint: true })).size;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}
