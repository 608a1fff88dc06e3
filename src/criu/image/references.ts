import type { Findings, Place } from "./findings.ts";
import type { ImageEntry } from "./read.ts";
import type { Message } from "./value.ts";

// What images say of each other: tasks and their files, ids and what has them.

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
/** States of a TCP socket with a connection: ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING. Source: tcp_states.h. */
const CONNECTED = new Set([1, 2, 4, 5, 8, 9, 11]);
const IPPROTO_TCP = 6;
const SOCK_STREAM = 1;
const SECCOMP_FILTER = "filter";

interface Reference extends Place {
  readonly id: number;
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

/** What has been read of one directory, to be compared when all is. */
export class References {
  readonly #findings: Findings;
  #inventory: Message | undefined;
  readonly #tasks: Task[] = [];
  readonly #cores = new Map<number, Core>();
  readonly #ids = new Map<number, Message>();
  readonly #files = new Map<number, Place & { readonly type: string }>();
  readonly #fileReferences: (Reference & { readonly why: string; readonly type?: string })[] = [];
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
  #seccompFilters = 0;
  readonly #seccompReferences: Reference[] = [];
  readonly #usedFiles = new Set<string>();
  #names: ReadonlySet<string> = new Set();

  constructor(findings: Findings) {
    this.#findings = findings;
  }

  get inventory(): Message | undefined {
    return this.#inventory;
  }

  get tasks(): number {
    return this.#tasks.length;
  }

  get threads(): number {
    return this.#tasks.reduce((sum, task) => sum + (this.#isDead(task.pid) ? 1 : task.threads.length), 0);
  }

  /** Takes from an entry what other files refer to, and what it refers to. */
  add(file: string, format: string, { value, offset }: ImageEntry): void {
    const place = { file, offset };
    const number = (field: string) => Number(value[field] ?? 0);
    const pid = pidOf(file);
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
      case "MM":
        this.#collectMemory(place, value);
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
        if (value.remap_type === "LINKED")
          this.#fileReferences.push({ ...place, id: number("remap_id"), why: "another name of a file" });
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
            this.#findings.error(
              "reference",
              { file, offset },
              `seccomp filter ${at} follows filter ${filter.prev}, which is not before it`,
            );
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
      this.#findings.error("message", place, "has no registers");
    for (const part of [task, thread])
      if (part?.cg_set !== undefined) this.#cgroupReferences.push({ ...place, id: Number(part.cg_set) });
    if (thread?.seccomp_mode === SECCOMP_FILTER && thread.seccomp_filter !== undefined)
      this.#seccompReferences.push({ ...place, id: Number(thread.seccomp_filter) });
  }

  #collectMemory(place: Place, value: Message): void {
    this.#fileReferences.push({ ...place, id: Number(value.exe_file_id), why: "the program" });
    for (const vma of (value.vmas ?? []) as Message[]) {
      const status = Number(vma.status);
      const name = `the mapping at 0x${(vma.start as bigint).toString(16)}`;
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
  }

  #collectFile(place: Place, value: Message): void {
    const type = String(value.type);
    const id = Number(value.id);
    this.#addFile(place, id, type);
    const details = Object.values(value).find((member) => typeof member === "object") as Message | undefined;
    if (!details) {
      this.#findings.error("message", place, `file ${id} of type ${type} says nothing but that`);
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
          CONNECTED.has(number("state")) && number("proto") === IPPROTO_TCP && number("type") === SOCK_STREAM;
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
    if (other) this.#findings.error("reference", place, `file ${id} was there before, at ${other.offset}`);
    else this.#files.set(id, { ...place, type });
  }

  #isDead(pid: number): boolean {
    const state = this.#cores.get(pid)?.state;
    return state !== undefined && isDeadState(state);
  }

  /** @param names  of the directory's files */
  check(names: ReadonlySet<string>): void {
    this.#names = names;
    this.#checkTasks();
    this.#checkReferences();
    this.#checkStrays();
  }

  #checkTasks(): void {
    if (!this.#names.has("pstree.img")) {
      this.#findings.error("missing", "pstree.img", "is missing: no tasks");
      return;
    }
    const pids = new Map<number, Task>();
    const haveMemory = new Set<unknown>();
    for (const task of this.#tasks) {
      if (pids.has(task.pid)) this.#findings.error("reference", task, `task ${task.pid} was there before`);
      // Parents come before their children.
      if (task.parent !== 0 && !pids.has(task.parent))
        this.#findings.error(
          "reference",
          task,
          `the parent ${task.parent} of task ${task.pid} is no task before it`,
        );
      pids.set(task.pid, task);
      this.#checkTask(task, haveMemory);
    }
    const roots = this.#tasks.filter((task) => task.parent === 0);
    if (this.#tasks.length > 0 && roots.length !== 1)
      this.#findings.error(
        "reference",
        "pstree.img",
        `${roots.length} tasks have no parent; one must be the root`,
      );
    const known = new Set(
      this.#tasks.flatMap((task) => [task.pid, ...(this.#isDead(task.pid) ? [] : task.threads)]),
    );
    for (const pid of this.#cores.keys())
      if (!known.has(pid))
        this.#findings.warning("stray", `core-${pid}.img`, "belongs to no task of pstree.img");
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
    this.#findings.error("missing", name, `is missing: ${why}, of ${file} at ${offset}, needs it`);
  }

  #checkReferences(): void {
    for (const wanted of this.#wantedFiles) {
      // Connections that come back closed have no state.
      if (wanted.name.startsWith("tcp-stream-") && this.#inventory?.tcp_close === true) continue;
      this.#want(wanted, wanted.name, wanted.why);
    }
    const dangling = ({ file, offset }: Place, what: string) =>
      this.#findings.error("reference", { file, offset }, what);
    const hasFiles = this.#names.has("files.img") || this.#names.has("reg-files.img");
    if (!hasFiles && this.#fileReferences.length > 0)
      this.#findings.error(
        "missing",
        "files.img",
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
      this.#findings.warning("stray", name, "is needed by nothing in these images");
    }
  }
}

/** The number in a task's file's name. */
export function pidOf(file: string): number {
  return Number(/-(\d+)\.img$/.exec(file)?.[1] ?? Number.NaN);
}

function isDeadState(state: number): boolean {
  return state === TASK_DEAD || state === TASK_ZOMBIE;
}
