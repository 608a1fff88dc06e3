import { open, readdir, readlink, realpath, stat } from "node:fs/promises";
import { join } from "node:path";
import { messageOf, NotFound } from "../../errors/index.ts";
import { formatOfFile, rawKindOf } from "./format.ts";
import type { Message } from "./message.ts";
import { type ImageEntry, ImageFault, ImageReader } from "./read.ts";

/*
 * Whether a directory of images is whole, without restoring it. Two passes: every file by itself (words, messages, sizes), then
 * what the files say of each other. Nothing of the memory pages is read but their files' sizes, and of every other file one entry at a
 * time is in memory, so a checkpoint of any size takes a few MB; the time is that of reading all but the pages.
 *
 * What is found is what a restore would stumble over; that a file differs from what was dumped where it still makes sense, only
 * digests can tell, and those are the manifest's.
 */

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

export interface ImageReport {
  /** no errors */
  readonly ok: boolean;
  readonly findings: readonly ImageFinding[];
  /** more were found than are listed */
  readonly truncated: boolean;
  /** only memory, to be completed by a dump */
  readonly isPreDump: boolean;
  /** files that are images */
  readonly images: number;
  readonly tasks: number;
  readonly threads: number;
  /** memory in these images, and in those of parents */
  readonly pages: bigint;
  readonly parentPages: bigint;
  /** CRIU plugins that the restore needs */
  readonly plugins: readonly string[];
}

interface VerifyOptions {
  /** files that aren't CRIU's and aren't looked at, besides logs, descriptors.json and our manifest */
  ignore?: (name: string) => boolean;
  signal?: AbortSignal | undefined;
}

const MAX_FINDINGS = 1000;
/** Chains of pre-dumps have a handful. */
const MAX_PARENTS = 1000;
const IMG_VERSIONS = [1, 2];

/** Flags of pagemap entries. Source: crit, CRIU pagemap.h. */
const PE_PARENT = 1;
const PE_LAZY = 2;
const PE_PRESENT = 4;
/** Namespaces that can't be external, and what is dumped of them. */
const namespaceImages: Readonly<Record<string, string>> = {
  mnt_ns_id: "mountpoints",
  uts_ns_id: "utsns",
  ipc_ns_id: "ipcns-var",
  user_ns_id: "userns",
};
/** Bits of a VMA's status. */
const VMA = { FILE: 64 | 128, ANON_SHARED: 256, SYSVIPC: 1024, SOCKET: 2048, MEMFD: 1 << 14 } as const;
const TASK_DEAD = 2;
const TASK_ZOMBIE = 6;
const TCP_ESTABLISHED = 1;
const IPPROTO_TCP = 6;
const SOCK_STREAM = 1;
const SECCOMP_FILTER = "filter";

/** Files beside the images that aren't CRIU's. */
const notImages =
  /\.(?:log|json|lock|pid|sock|conf)$|^(?:parent|cedana\..*|dump\.log.*|.*\.log\..*|\.criu.*)$/;

/** First words of what iproute2 saves. */
const ipWords: Readonly<Record<string, number>> = {
  ifaddr: 0x4736_1222,
  route: 0x4531_1224,
  route6: 0x4531_1224,
  rule: 0x7170_6986,
};

/**
 * @throws NotFound when there is no such directory; the error of read(2); an abort
 */
export async function verifyImages(directory: string, options: VerifyOptions = {}): Promise<ImageReport> {
  const check = new Check(directory, options);
  await check.run();
  return check.report();
}

/** Where an id was found. */
interface Place {
  readonly file: string;
  readonly offset: number;
}
interface Range {
  readonly start: bigint;
  readonly end: bigint;
}
interface Reference extends Place {
  readonly id: number;
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
interface Task extends Place {
  readonly pid: number;
  readonly parent: number;
  readonly threads: readonly number[];
}
interface Core {
  readonly state: number | undefined;
  readonly ids: Message | undefined;
}

/** Ids that data images refer to. */
type IdKind = "pipes" | "fifos" | "sockets" | "ttys" | "memfds" | "mounts";

class Check {
  readonly #directory: string;
  readonly #options: VerifyOptions;
  readonly #findings: ImageFinding[] = [];
  #found = 0;
  #errors = 0;
  #names = new Set<string>();
  #images = 0;
  #inventory: Message | undefined;
  #pages = 0n;
  #parentPages = 0n;

  readonly #tasks: Task[] = [];
  readonly #cores = new Map<number, Core>();
  readonly #ids = new Map<number, Message>();
  readonly #files = new Map<number, Place & { readonly type: string }>();
  readonly #fileReferences: (Reference & { readonly why: string; readonly type?: string })[] = [];
  readonly #pagemaps = new Map<string, Pagemap>();
  readonly #memory = new Map<number, Range[]>();
  readonly #pagesUsers = new Map<number, string>();
  readonly #wantedFiles: (Place & { readonly name: string; readonly why: string })[] = [];
  readonly #cgroupSets = new Set<number>();
  readonly #cgroupReferences: Reference[] = [];
  readonly #sets: Readonly<Record<IdKind, Set<number>>> = {
    pipes: new Set(),
    fifos: new Set(),
    sockets: new Set(),
    ttys: new Set(),
    memfds: new Set(),
    mounts: new Set(),
  };
  readonly #setReferences: (Reference & { readonly set: IdKind; readonly why: string })[] = [];
  #pageSize = 4096;
  #seccompFilters = 0;
  readonly #seccompReferences: Reference[] = [];
  readonly #usedFiles = new Set<string>();

  constructor(directory: string, options: VerifyOptions) {
    this.#directory = directory;
    this.#options = options;
  }

  async run(): Promise<void> {
    this.#names = new Set(await list(this.#directory));
    for (const name of [...this.#names].sort()) {
      this.#options.signal?.throwIfAborted();
      if (this.#options.ignore?.(name) || notImages.test(name)) continue;
      await this.#checkFile(name);
    }
    if (!this.#names.has("inventory.img")) {
      this.#add(
        "error",
        "missing",
        "inventory.img",
        undefined,
        "is missing: this is no dump, or one that failed",
      );
      return;
    }
    this.#checkInventory();
    await this.#checkPages(this.#directory, "", this.#pagemaps);
    if (!this.#isPreDump) {
      this.#checkTasks();
      this.#checkReferences();
      this.#checkStrays();
    }
    await this.#checkParents();
  }

  report(): ImageReport {
    return {
      ok: this.#errors === 0,
      findings: this.#findings,
      truncated: this.#found > this.#findings.length,
      isPreDump: this.#isPreDump,
      images: this.#images,
      tasks: this.#tasks.length,
      threads: this.#tasks.reduce((sum, task) => sum + (this.#isDead(task.pid) ? 1 : task.threads.length), 0),
      pages: this.#pages,
      parentPages: this.#parentPages,
      plugins:
        ((this.#inventory?.plugins_entry as Message | undefined)?.plugins as string[] | undefined) ?? [],
    };
  }

  #add(
    severity: ImageFinding["severity"],
    kind: FaultKind,
    file: string,
    offset: number | undefined,
    what: string,
  ): void {
    this.#found++;
    if (severity === "error") this.#errors++;
    if (this.#findings.length < MAX_FINDINGS) this.#findings.push({ severity, kind, file, offset, what });
  }

  // --- each file by itself

  async #checkFile(name: string): Promise<void> {
    const raw = rawKindOf(name);
    if (raw === "pages") return; // with the pagemaps
    if (raw === "opaque") {
      this.#images++;
      await this.#checkOpaque(name);
      return;
    }
    const format = formatOfFile(name);
    if (!format) {
      if (name.endsWith(".img"))
        this.#add(
          "warning",
          "stray",
          name,
          undefined,
          "is no image that CRIU 4.2 has: nothing in it was checked",
        );
      return;
    }
    this.#images++;
    try {
      await using image = await ImageReader.open(join(this.#directory, name), { exact: false });
      if (image.format !== format) {
        this.#add("error", "magic", name, 0, `holds ${image.format.name}, and is called like ${format.name}`);
        return;
      }
      let at = 0;
      for await (const entry of image.entries()) this.#collect(name, format.name, entry, at++);
      const single = /^(?:INVENTORY|CORE|IDS|MM|FS|CGROUP|SECCOMP|STATS|UTSNS|TIMENS|GHOST_FILE|TCP_STREAM)$/;
      if (at === 0 && single.test(format.name))
        this.#add("error", "length", name, image.size, "ends where its entry should begin");
    } catch (error) {
      if (!(error instanceof ImageFault)) throw error;
      this.#add("error", kindOf(error), name, error.offset, error.what);
    }
  }

  async #checkOpaque(name: string): Promise<void> {
    await using file = await open(join(this.#directory, name));
    const head = Buffer.alloc(4);
    const { bytesRead } = await file.read(head, 0, 4, 0);
    if (name.includes(".tar.gz")) {
      if (bytesRead < 2 || head.readUInt16BE(0) !== 0x1f8b)
        this.#add("error", "magic", name, 0, "is not compressed by gzip");
      return;
    }
    const word = ipWords[name.split("-")[0]!];
    if (word === undefined || bytesRead === 0) return; // text, or nothing to restore
    if (bytesRead < 4 || head.readUInt32LE(0) !== word)
      this.#add("error", "magic", name, 0, `doesn't begin with 0x${word.toString(16)}, as ip(8) saves it`);
  }

  /** Takes from an entry what other files refer to, and what it refers to. */
  #collect(file: string, format: string, { value, offset, message }: ImageEntry, index: number): void {
    const place = { file, offset };
    const number = (field: string) => Number(value[field] ?? 0);
    const pid = Number(/-(\d+)\.img$/.exec(file)?.[1] ?? Number.NaN);
    switch (format) {
      case "INVENTORY":
        this.#inventory = value;
        // Its root_cg_set is CRIU's own, which cgroup.img doesn't have.
        return;
      case "PSTREE":
        this.#tasks.push({
          ...place,
          pid: number("pid"),
          parent: number("ppid"),
          threads: (value.threads ?? []) as number[],
        });
        return;
      case "CORE":
        this.#collectCore(place, pid, value);
        return;
      case "IDS":
        this.#ids.set(pid, value);
        return;
      case "PAGEMAP":
        this.#collectPagemap(this.#pagemaps, place, value, message);
        return;
      case "MM":
        this.#collectMemory(place, pid, value);
        return;
      case "FS":
        this.#fileReferences.push({ ...place, id: number("cwd_id"), why: "the working directory" });
        this.#fileReferences.push({ ...place, id: number("root_id"), why: "the root" });
        return;
      case "FDINFO":
        this.#fileReferences.push({
          ...place,
          id: number("id"),
          why: `descriptor ${number("fd")}`,
          type: String(value.type),
        });
        return;
      case "FILES":
        this.#collectFile(place, value);
        return;
      case "REG_FILES":
        this.#addFile(place, number("id"), "REG");
        return;
      case "MNTS":
        this.#sets.mounts.add(number("mnt_id"));
        return;
      case "REMAP_FPATH": {
        this.#fileReferences.push({ ...place, id: number("orig_id"), why: "a deleted file" });
        if (value.remap_type !== "GHOST" && value.remap_type !== undefined) return;
        const name = `ghost-file-${number("remap_id").toString(16)}.img`;
        this.#wantedFiles.push({ ...place, name, why: `content of deleted file ${number("orig_id")}` });
        return;
      }
      case "PIPES_DATA":
        this.#setReferences.push({
          ...place,
          id: number("pipe_id"),
          set: "pipes",
          why: "content is of pipe",
        });
        return;
      case "FIFO_DATA":
        this.#setReferences.push({
          ...place,
          id: number("pipe_id"),
          set: "fifos",
          why: "content is of FIFO",
        });
        return;
      case "SK_QUEUES":
        this.#setReferences.push({
          ...place,
          id: number("id_for"),
          set: "sockets",
          why: "content is of socket",
        });
        return;
      case "TTY_INFO":
        this.#sets.ttys.add(number("id"));
        return;
      case "TTY_DATA":
        this.#setReferences.push({
          ...place,
          id: number("tty_id"),
          set: "ttys",
          why: "content is of terminal",
        });
        return;
      case "MEMFD_INODE": {
        this.#sets.memfds.add(number("inode_id"));
        const name = `pagemap-shmem-${number("shmid")}.img`;
        if (number("size") > 0)
          this.#wantedFiles.push({ ...place, name, why: `content of memfd ${number("inode_id")}` });
        return;
      }
      case "CGROUP":
        for (const set of (value.sets ?? []) as Message[]) this.#cgroupSets.add(Number(set.id));
        return;
      case "SECCOMP":
        this.#seccompFilters = ((value.seccomp_filters ?? []) as Message[]).length;
        for (const [at, filter] of ((value.seccomp_filters ?? []) as Message[]).entries())
          if (filter.prev !== undefined && Number(filter.prev) >= at)
            this.#add(
              "error",
              "reference",
              file,
              offset,
              `seccomp filter ${at} follows filter ${filter.prev}, which is not before it`,
            );
        return;
      case "GHOST_FILE":
        if (index === 0) this.#usedFiles.add(file);
        return;
    }
  }

  #collectCore(place: Place, pid: number, value: Message): void {
    const task = value.tc as Message | undefined;
    const thread = value.thread_core as Message | undefined;
    this.#cores.set(pid, {
      state: task === undefined ? undefined : Number(task.task_state),
      ids: value.ids as Message | undefined,
    });
    if (
      value.mtype === "X86_64" &&
      task &&
      !isDeadState(Number(task.task_state)) &&
      value.thread_info === undefined
    )
      this.#add("error", "message", place.file, place.offset, "has no registers");
    for (const part of [task, thread])
      if (part?.cg_set !== undefined) this.#cgroupReferences.push({ ...place, id: Number(part.cg_set) });
    if (thread?.seccomp_mode === SECCOMP_FILTER && thread.seccomp_filter !== undefined)
      this.#seccompReferences.push({ ...place, id: Number(thread.seccomp_filter) });
  }

  #collectMemory(place: Place, pid: number, value: Message): void {
    this.#fileReferences.push({ ...place, id: Number(value.exe_file_id), why: "the program" });
    this.#pageSize = pageSizeOf(value) ?? this.#pageSize; // mm-* comes before pagemap-*, by name
    const ranges: Range[] = [];
    let last = 0n;
    for (const vma of (value.vmas ?? []) as Message[]) {
      const [start, end] = [BigInt(vma.start as bigint), BigInt(vma.end as bigint)];
      const status = Number(vma.status);
      const name = `the mapping at 0x${start.toString(16)}`;
      if (end <= start || start < last)
        this.#add(
          "error",
          "pages",
          place.file,
          place.offset,
          `${name} ends before it begins, or overlaps the one before`,
        );
      last = end;
      ranges.push({ start, end });
      const id = Number(vma.shmid);
      if (status & VMA.SOCKET) continue;
      if (status & (VMA.FILE | VMA.MEMFD)) this.#fileReferences.push({ ...place, id, why: name });
      else if (status & VMA.ANON_SHARED && !(status & VMA.SYSVIPC))
        this.#wantedFiles.push({
          ...place,
          name: `pagemap-shmem-${id}.img`,
          why: `shared memory of ${name}`,
        });
    }
    this.#memory.set(pid, ranges);
  }

  #collectFile(place: Place, value: Message): void {
    const type = String(value.type);
    const id = Number(value.id);
    this.#addFile(place, id, type);
    const details = Object.values(value).find((member) => typeof member === "object") as Message | undefined;
    if (!details) {
      this.#add(
        "error",
        "message",
        place.file,
        place.offset,
        `file ${id} of type ${type} says nothing but that`,
      );
      return;
    }
    const number = (field: string) => Number(details[field] ?? 0);
    switch (type) {
      case "REG":
        if (number("mnt_id") >= 0 && details.mnt_id !== undefined)
          this.#setReferences.push({
            ...place,
            id: number("mnt_id"),
            set: "mounts",
            why: `file ${id} is on mount`,
          });
        return;
      case "PIPE":
        this.#sets.pipes.add(number("pipe_id"));
        return;
      case "FIFO":
        this.#sets.fifos.add(number("pipe_id"));
        if (details.regf_id) this.#fileReferences.push({ ...place, id: number("regf_id"), why: "a FIFO" });
        return;
      case "TTY":
        this.#setReferences.push({
          ...place,
          id: number("tty_info_id"),
          set: "ttys",
          why: `file ${id} is terminal`,
        });
        if (details.regf_id)
          this.#fileReferences.push({ ...place, id: number("regf_id"), why: "a terminal" });
        return;
      case "MEMFD":
        this.#setReferences.push({
          ...place,
          id: number("inode_id"),
          set: "memfds",
          why: `file ${id} is memfd`,
        });
        return;
      case "INETSK": {
        this.#sets.sockets.add(id);
        const isConnected =
          number("state") === TCP_ESTABLISHED &&
          number("proto") === IPPROTO_TCP &&
          number("type") === SOCK_STREAM;
        const name = `tcp-stream-${number("ino").toString(16)}.img`;
        if (isConnected) this.#wantedFiles.push({ ...place, name, why: `TCP connection of socket ${id}` });
        return;
      }
      case "UNIXSK":
      case "NETLINKSK":
      case "PACKETSK":
        this.#sets.sockets.add(id);
    }
  }

  #addFile(place: Place, id: number, type: string): void {
    const other = this.#files.get(id);
    if (other)
      this.#add(
        "error",
        "reference",
        place.file,
        place.offset,
        `file ${id} was there before, at ${other.offset}`,
      );
    else this.#files.set(id, { ...place, type });
  }

  #collectPagemap(
    into: Map<string, Pagemap>,
    { file, offset }: Place,
    value: Message,
    message: string,
  ): void {
    if (message === "pagemap_head") {
      into.set(file, { pagesId: Number(value.pages_id), present: 0n, inParent: [], covered: [] });
      return;
    }
    const map = into.get(file)!;
    const count = BigInt((value.nr_pages as bigint | undefined) ?? (value.compat_nr_pages as number));
    const flags =
      value.flags === undefined ? (value.in_parent === true ? PE_PARENT : PE_PRESENT) : Number(value.flags);
    const start = BigInt(value.vaddr as bigint);
    const end = start + count * BigInt(this.#pageSize);
    const last = map.covered.at(-1);
    const fault = (what: string) =>
      this.#add("error", "pages", file, offset, `pages from 0x${start.toString(16)} on ${what}`);
    if (count === 0n) fault("are none");
    if (start % 4096n !== 0n) fault("don't begin with a page");
    if (last && start < last.end) {
      fault("overlap those before, or come after them in the wrong order");
      return;
    }
    if (flags & ~(PE_PARENT | PE_LAZY | PE_PRESENT))
      this.#add("warning", "version", file, offset, `the pages' flags 0x${flags.toString(16)} are unknown`);
    if (flags & PE_PARENT) map.inParent.push({ start, end, offset });
    else if (flags & PE_PRESENT) map.present += count;
    if (last && last.end === start) map.covered[map.covered.length - 1] = { start: last.start, end };
    else map.covered.push({ start, end });
  }

  // --- what they say of each other

  get #isPreDump(): boolean {
    return this.#inventory?.pre_dump_mode !== undefined && !this.#names.has("pstree.img");
  }

  #isDead(pid: number): boolean {
    const state = this.#cores.get(pid)?.state;
    return state !== undefined && isDeadState(state);
  }

  #checkInventory(): void {
    const version = Number(this.#inventory?.img_version);
    if (this.#inventory && !IMG_VERSIONS.includes(version))
      this.#add(
        "error",
        "version",
        "inventory.img",
        undefined,
        `images of version ${version}: of a newer CRIU than we know`,
      );
  }

  /** Of one directory: each pagemap has its pages file, of the size that its entries add up to. */
  async #checkPages(directory: string, prefix: string, pagemaps: Map<string, Pagemap>): Promise<void> {
    const users = prefix === "" ? this.#pagesUsers : new Map<number, string>();
    const sums = new Map<number, bigint>();
    for (const [file, { pagesId, present }] of pagemaps) {
      if (pagesId === undefined) continue;
      users.set(pagesId, file);
      sums.set(pagesId, (sums.get(pagesId) ?? 0n) + present);
    }
    for (const [id, pages] of sums) {
      if (prefix === "") this.#pages += pages;
      else this.#parentPages += pages;
      const name = `pages-${id}.img`;
      const size = await sizeOf(join(directory, name));
      const file = `${prefix}${name}`;
      const wanted = pages * BigInt(this.#pageSize);
      if (size === undefined) {
        if (pages > 0n)
          this.#add(
            "error",
            "missing",
            file,
            undefined,
            `is missing: ${users.get(id)} has ${pages} pages in it`,
          );
      } else if (size !== wanted)
        this.#add(
          "error",
          "pages",
          file,
          undefined,
          `has ${size} bytes, where ${users.get(id)} has ${pages} pages, ${wanted} bytes`,
        );
    }
    for (const name of prefix === "" ? this.#names : []) {
      const id = /^pages-(\d+)\.img$/.exec(name)?.[1];
      if (id !== undefined && !sums.has(Number(id)))
        this.#add("warning", "stray", name, undefined, "belongs to no pagemap");
    }
    if (prefix === "") this.#checkMappings(pagemaps);
  }

  /** Pages lie within mappings. */
  #checkMappings(pagemaps: Map<string, Pagemap>): void {
    for (const [file, { covered }] of pagemaps) {
      const pid = /^pagemap-(\d+)\.img$/.exec(file)?.[1];
      const mappings = pid === undefined ? undefined : this.#memory.get(Number(pid));
      const outside = mappings && covered.find((range) => !isCovered(range, mergeRanges(mappings)));
      if (outside)
        this.#add(
          "error",
          "pages",
          file,
          undefined,
          `pages from 0x${outside.start.toString(16)} on are in no mapping of mm-${pid}.img`,
        );
    }
  }

  #checkTasks(): void {
    if (!this.#names.has("pstree.img")) {
      this.#add("error", "missing", "pstree.img", undefined, "is missing: no tasks");
      return;
    }
    const pids = new Map<number, Task>();
    const haveMemory = new Set<unknown>();
    for (const task of this.#tasks) {
      if (pids.has(task.pid))
        this.#add("error", "reference", task.file, task.offset, `task ${task.pid} was there before`);
      // Parents come before their children.
      if (task.parent !== 0 && !pids.has(task.parent))
        this.#add(
          "error",
          "reference",
          task.file,
          task.offset,
          `the parent ${task.parent} of task ${task.pid} is no task before it`,
        );
      pids.set(task.pid, task);
      this.#checkTask(task, haveMemory);
    }
    const roots = this.#tasks.filter((task) => task.parent === 0);
    if (this.#tasks.length > 0 && roots.length !== 1)
      this.#add(
        "error",
        "reference",
        "pstree.img",
        undefined,
        `${roots.length} tasks have no parent; one must be the root`,
      );
    const known = new Set(
      this.#tasks.flatMap((task) => [task.pid, ...(this.#isDead(task.pid) ? [] : task.threads)]),
    );
    for (const pid of this.#cores.keys())
      if (!known.has(pid))
        this.#add("warning", "stray", `core-${pid}.img`, undefined, "belongs to no task of pstree.img");
  }

  #checkTask(task: Task, haveMemory: Set<unknown>): void {
    const { pid } = task;
    const want = (name: string, why: string) => this.#want(task, name, why);
    want(`core-${pid}.img`, `task ${pid}`);
    if (this.#isDead(pid) || !this.#cores.has(pid)) return; // nothing else is kept of a zombie
    for (const thread of task.threads) want(`core-${thread}.img`, `thread ${thread} of task ${pid}`);
    const ids = this.#ids.get(pid) ?? this.#cores.get(pid)!.ids;
    this.#usedFiles.add(`ids-${pid}.img`);
    if (!ids) {
      want(`ids-${pid}.img`, `task ${pid}`);
      return;
    }
    // Tasks that share memory have it once.
    if (!haveMemory.has(ids.vm_id)) {
      want(`mm-${pid}.img`, `memory of task ${pid}`);
      want(`pagemap-${pid}.img`, `memory of task ${pid}`);
    }
    haveMemory.add(ids.vm_id);
    want(`fs-${pid}.img`, `directories of task ${pid}`);
    const fdinfo = this.#inventory?.fdinfo_per_id === true ? ids.files_id : pid;
    want(`fdinfo-${fdinfo}.img`, `descriptors of task ${pid}`);
    const outer = this.#inventory?.root_ids as Message | undefined;
    for (const [field, image] of Object.entries(namespaceImages))
      if (ids[field] !== undefined && outer?.[field] !== undefined && ids[field] !== outer[field])
        want(`${image}-${ids[field]}.img`, `namespace of task ${pid}`);
  }

  #want({ file, offset }: Place, name: string, why: string): void {
    this.#usedFiles.add(name);
    if (this.#names.has(name)) return;
    this.#add("error", "missing", name, undefined, `is missing: ${why}, of ${file} at ${offset}, needs it`);
  }

  #checkReferences(): void {
    for (const wanted of this.#wantedFiles) {
      // Connections that come back closed have no state.
      if (wanted.name.startsWith("tcp-stream-") && this.#inventory?.tcp_close === true) continue;
      this.#want(wanted, wanted.name, wanted.why);
    }
    const dangling = ({ file, offset }: Place, what: string) =>
      this.#add("error", "reference", file, offset, what);
    const hasFiles = this.#names.has("files.img") || this.#names.has("reg-files.img");
    if (!hasFiles && this.#fileReferences.length > 0)
      this.#add(
        "error",
        "missing",
        "files.img",
        undefined,
        `is missing: ${this.#fileReferences.length} references to its files`,
      );
    for (const reference of hasFiles ? this.#fileReferences : []) {
      const file = this.#files.get(reference.id);
      // In images of CRIU before 3.4 each type has a file of its own, and only regular files are known here.
      if (
        !file &&
        !(reference.type !== undefined && reference.type !== "REG" && !this.#names.has("files.img"))
      )
        dangling(reference, `${reference.why} is file ${reference.id}, which is not in files.img`);
      else if (
        file &&
        reference.type !== undefined &&
        file.type !== reference.type &&
        reference.type !== "CTL_TTY"
      )
        dangling(
          reference,
          `${reference.why} is file ${reference.id} of type ${reference.type}, which files.img has as ${file.type}`,
        );
    }
    for (const { set, why, id, ...place } of this.#names.has("files.img") ? this.#setReferences : []) {
      // Without a mount namespace of their own, mounts are the machine's.
      if (set === "mounts" && this.#sets.mounts.size === 0) continue;
      if (!this.#sets[set].has(id)) dangling(place, `${why} ${id}, which is not in these images`);
    }
    for (const { id, ...place } of this.#names.has("cgroup.img") ? this.#cgroupReferences : [])
      if (!this.#cgroupSets.has(id)) dangling(place, `cgroup set ${id} is not in cgroup.img`);
    for (const { id, ...place } of this.#seccompReferences)
      if (id >= this.#seccompFilters)
        dangling(place, `seccomp filter ${id} is not in seccomp.img, which has ${this.#seccompFilters}`);
  }

  #checkStrays(): void {
    const perTask = /^(?:core|ids|mm|fs|pagemap|fdinfo)-\d+\.img$|^(?:ghost-file|tcp-stream)-[0-9a-f]+\.img$/;
    for (const name of this.#names) {
      if (!perTask.test(name) || name.startsWith("core-") || this.#usedFiles.has(name)) continue;
      this.#add("warning", "stray", name, undefined, "is needed by nothing in these images");
    }
    for (const { name } of this.#wantedFiles) this.#usedFiles.add(name);
  }

  // --- earlier images

  /** Follows the chain; each parent's pages must be whole, and have what the one after it leaves to it. */
  async #checkParents(): Promise<void> {
    let [directory, pagemaps, prefix] = [this.#directory, this.#pagemaps, ""];
    const visited = new Set([await realpath(directory)]);
    for (let depth = 0; depth < MAX_PARENTS; depth++) {
      this.#options.signal?.throwIfAborted();
      const link = join(directory, "parent");
      const target = await readlink(link).catch(() => undefined);
      const wanted = [...pagemaps].filter(([, map]) => map.inParent.length > 0);
      if (target === undefined) {
        for (const [file, { inParent }] of wanted)
          this.#add(
            "error",
            "parent",
            `${prefix}${file}`,
            inParent[0]!.offset,
            "leaves pages to earlier images, and there is no link to them",
          );
        return;
      }
      const path = await realpath(link).catch(() => undefined);
      if (path === undefined || visited.has(path)) {
        const why = path === undefined ? "leads nowhere" : "leads back to where it came from";
        this.#add(
          "error",
          "parent",
          `${prefix}parent`,
          undefined,
          `the link to earlier images, ${target}, ${why}`,
        );
        return;
      }
      visited.add(path);
      const earlier = await this.#readPagemaps(path, `${prefix}parent/`);
      await this.#checkPages(path, `${prefix}parent/`, earlier);
      for (const [file, { inParent }] of wanted) {
        const covered = earlier.get(file)?.covered ?? [];
        for (const range of inParent)
          if (!isCovered(range, covered))
            this.#add(
              "error",
              "parent",
              `${prefix}${file}`,
              range.offset,
              `leaves pages from 0x${range.start.toString(16)} on to earlier images, which lack them`,
            );
      }
      [directory, pagemaps, prefix] = [path, earlier, `${prefix}parent/`];
    }
  }

  async #readPagemaps(directory: string, prefix: string): Promise<Map<string, Pagemap>> {
    const pagemaps = new Map<string, Pagemap>();
    for (const name of (await list(directory)).sort()) {
      if (formatOfFile(name)?.name !== "PAGEMAP") continue;
      const before = this.#found;
      try {
        await using image = await ImageReader.open(join(directory, name), { exact: false });
        for await (const { value, offset, message } of image.entries())
          this.#collectPagemap(pagemaps, { file: name, offset }, value, message);
      } catch (error) {
        if (!(error instanceof ImageFault)) throw error;
        this.#add("error", kindOf(error), name, error.offset, error.what);
      }
      // Findings are of this directory's file, not ours.
      for (let at = before; at < this.#findings.length; at++) {
        const finding = this.#findings[at]!;
        if (finding.file === name) this.#findings[at] = { ...finding, file: `${prefix}${name}` };
      }
    }
    return pagemaps;
  }
}

/** Only the auxiliary vector says it: pages of 16 or 64 KiB exist on other machines than x86. Source: getauxval(3). */
function pageSizeOf(memory: Message): number | undefined {
  const vector = (memory.mm_saved_auxv ?? []) as bigint[];
  const AT_PAGESZ = 6n;
  for (let i = 0; i + 1 < vector.length; i += 2) if (vector[i] === AT_PAGESZ) return Number(vector[i + 1]);
  return undefined;
}

function isDeadState(state: number): boolean {
  return state === TASK_DEAD || state === TASK_ZOMBIE;
}

function kindOf({ what }: ImageFault): FaultKind {
  if (/^(?:not a|is nested)/.test(what)) return "message";
  if (/words?\b|begins with|^holds/.test(what)) return "magic";
  return "length";
}

/** Neighbours joined; they are in order. */
function mergeRanges(ranges: readonly Range[]): Range[] {
  const merged: Range[] = [];
  for (const range of ranges) {
    const last = merged.at(-1);
    if (last && last.end === range.start) merged[merged.length - 1] = { start: last.start, end: range.end };
    else merged.push(range);
  }
  return merged;
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

async function list(directory: string): Promise<string[]> {
  try {
    return await readdir(directory);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== "ENOENT" && code !== "ENOTDIR") throw error;
    throw new NotFound(`the images ${directory}: ${messageOf(error)}`, { cause: error });
  }
}

async function sizeOf(path: string): Promise<bigint | undefined> {
  try {
    return (await stat(path, { bigint: true })).size;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}
