import { closeSync, constants, openSync, readFileSync, readlinkSync, type Stats } from "node:fs";
import { readdir, readFile, stat } from "node:fs/promises";
import { SyscallFailed } from "../errors/index.ts";
import { type NumbersOfStat, type SocketOfProcess, socketOf } from "./addon.ts";
import { O_PATH } from "./apart.ts";
import { type FdInfo, parseFdInfo } from "./fdinfo.ts";
import { FileServers, PATIENCE_MS } from "./file-servers.ts";
import { type FileMapping, parseFileMapping } from "./maps.ts";
import { type MountInfo, parseMountInfoLine } from "./mount-options.ts";
import { inodeInBrackets, type ProcessStat, parseStat } from "./proc.ts";
import { Slices } from "./slices.ts";
import { readSockets, type SocketTable } from "./sock-diag.ts";

/**
 * What a set of processes has and holds: memory, namespaces, open files, mappings, mounts, sockets. Everything is read once.
 *
 * Small procfs files are read synchronously, because that is quicker than a trip through the thread pool, in slices of a few
 * milliseconds between which others have the event loop. What can wait for a lock, a disk or a network is read in the
 * thread pool: maps and mountinfo (the kernel takes locks for them), and stat(2) of the files that processes have open.
 *
 * Processes run meanwhile: one that ends is left out, a descriptor that is closed too.
 */

export interface OpenFile {
  readonly what: "fd" | "cwd" | "root" | "exe";
  /** -1 unless `what` is fd */
  readonly fd: number;
  /** as readlink(2) of /proc/PID/fd/FD gives it */
  readonly link: string;
  readonly info: FdInfo;
  /** Of a file with a path. Absent when it could not be had: then `statFailed` says why. */
  readonly stat?: FileStat;
  readonly statFailed?: string;
  /** Of a socket that socket diagnostics don't know, and of a unix one with something to read. */
  readonly socket?: SocketOfProcess;
}

export interface FileStat {
  /** file, directory, fifo, char, block, socket, other */
  readonly type: string;
  /** of a device: as splitDevice takes it */
  readonly device: number;
  readonly links: number;
  readonly bytes: number;
  /** what it takes on the disk */
  readonly allocatedBytes: number;
}

/** All kinds under /proc/PID/ns, the two that a process's children will get included. */
const namespaceKinds = [
  "mnt",
  "pid",
  "pid_for_children",
  "net",
  "ipc",
  "uts",
  "user",
  "cgroup",
  "time",
  "time_for_children",
] as const;
export type AnyNamespaceKind = (typeof namespaceKinds)[number];

export interface ProcessInventory {
  readonly pid: number;
  /** in its own pid namespace */
  readonly pidInContainer: number;
  readonly stat: ProcessStat;
  readonly status: ProcessStatus;
  /** The leader is one of them. */
  readonly threads: number;
  /** Its other threads. */
  readonly otherThreads: readonly ThreadInventory[];
  /** inodes */
  readonly namespaces: Readonly<Partial<Record<AnyNamespaceKind, number>>>;
  readonly files: readonly OpenFile[];
  readonly mappings: readonly FileMapping[];
  /** The files behind the mappings, each once. */
  readonly mappedFiles: readonly MappedFile[];
}

export interface ThreadInventory {
  readonly tid: number;
  readonly state: string;
  readonly tracerPid: number;
}

export interface MappedFile {
  readonly mapping: FileMapping;
  readonly mountId: number;
  /** Of a deleted file, and of what lies in /dev. */
  readonly stat?: FileStat;
}

/** Lines of /proc/PID/status. Source: proc_pid_status(5). */
export interface ProcessStatus {
  readonly tracerPid: number;
  readonly pidsInNamespaces: readonly number[];
  readonly anonymousBytes: number;
  readonly sharedBytes: number;
  readonly swapBytes: number;
  readonly hugetlbBytes: number;
  /** 0 none, 1 strict, 2 filter */
  readonly seccomp: number;
}

export interface Inventory {
  readonly processes: readonly ProcessInventory[];
  /** by inode of the mount namespace */
  readonly mounts: ReadonlyMap<number, readonly MountInfo[]>;
  /** by inode of the network namespace */
  readonly sockets: ReadonlyMap<number, SocketTable>;
  /** Namespaces of our own process. */
  readonly own: Readonly<Partial<Record<AnyNamespaceKind, number>>>;
  readonly tookMs: number;
}

const concurrency = 8;

/**
 * @param pids  on the host
 * @throws SyscallFailed when /proc refuses what only root may see; not for processes that end meanwhile
 */
export async function takeInventory(
  pids: readonly number[],
  options: { signal?: AbortSignal } = {},
): Promise<Inventory> {
  const began = performance.now();
  const slices = new Slices();
  const shared = {
    stats: new Map<string, Promise<FileStat | string>>(),
    mountOfFile: new Map<string, number>(),
    servers: new FileServers(),
  };
  const processes: ProcessInventory[] = [];
  const mounts = new Map<number, readonly MountInfo[]>();
  const sockets = new Map<number, SocketTable>();
  const queue = [...new Set(pids)].sort((a, b) => a - b);
  const workers = Array.from({ length: Math.min(concurrency, queue.length) }, async () => {
    for (let pid = queue.shift(); pid !== undefined; pid = queue.shift()) {
      options.signal?.throwIfAborted();
      const process = await ofProcess(pid, shared, slices);
      if (process) processes.push(process);
    }
  });
  await settle(workers);
  processes.sort((a, b) => a.pid - b.pid);
  await Promise.all([
    collectMounts(processes, mounts, slices),
    collectSockets(processes, sockets, slices, options.signal),
  ]);
  const described = await describeUnknownSockets(processes, sockets, slices);
  return {
    processes: described,
    mounts,
    sockets,
    own: namespacesOf("self"),
    tookMs: performance.now() - began,
  };
}

/** Waits for all before it rejects: nothing must go on behind an error's back. */
async function settle(work: Promise<void>[]): Promise<void> {
  const failed = (await Promise.allSettled(work)).find((result) => result.status === "rejected");
  if (failed) throw failed.reason;
}

interface SharedFacts {
  readonly stats: Map<string, Promise<FileStat | string>>;
  readonly mountOfFile: Map<string, number>;
  /** of mounts that are told from others by their namespace and number */
  readonly servers: FileServers;
}

async function ofProcess(
  pid: number,
  shared: SharedFacts,
  slices: Slices,
): Promise<ProcessInventory | undefined> {
  const statText = readProc(`/proc/${pid}/stat`);
  const statusText = readProc(`/proc/${pid}/status`);
  if (statText === undefined || statusText === undefined) return undefined;
  const processStat = parseStat(statText);
  const status = parseStatus(statusText);
  const namespaces = namespacesOf(pid);
  const base = {
    pid,
    pidInContainer: status.pidsInNamespaces.at(-1) ?? pid,
    stat: processStat,
    status,
    threads: threadsOf(statText),
    otherThreads: await otherThreadsOf(pid, threadsOf(statText), slices),
    namespaces,
  };
  // A zombie has neither memory nor files.
  if (processStat.state === "Z" || processStat.state === "X")
    return { ...base, files: [], mappings: [], mappedFiles: [] };
  const maps = readFile(`/proc/${pid}/maps`, "utf8").catch(endedMeanwhile);
  maps.catch(() => undefined); // it is awaited below; the files may throw before
  const files = await filesOf(pid, namespaces.mnt ?? 0, shared, slices);
  const mappings = await parseMaps((await maps) ?? "", slices);
  const mappedFiles = await filesOfMappings(pid, namespaces.mnt ?? 0, mappings, shared, slices);
  return { ...base, files, mappings, mappedFiles };
}

function threadsOf(statText: string): number {
  return Number(statText.slice(statText.lastIndexOf(")") + 2).split(" ")[17] ?? 1);
}

async function otherThreadsOf(pid: number, count: number, slices: Slices): Promise<ThreadInventory[]> {
  const threads: ThreadInventory[] = [];
  if (count < 2) return threads;
  const names = await readdir(`/proc/${pid}/task`).catch(endedMeanwhile);
  for (const name of names ?? []) {
    if (Number(name) === pid) continue;
    const text = readProc(`/proc/${pid}/task/${name}/status`);
    if (text !== undefined)
      threads.push({
        tid: Number(name),
        state: /^State:\s*(\S)/m.exec(text)?.[1] ?? "?",
        tracerPid: Number(/^TracerPid:\s*(\d+)/m.exec(text)?.[1] ?? 0),
      });
    const pause = slices.breathe();
    if (pause) await pause;
  }
  return threads;
}

/** Parses /proc/PID/status. */
export function parseStatus(text: string): ProcessStatus {
  const field = (name: string) => new RegExp(`^${name}:\\s*(.*)$`, "m").exec(text)?.[1] ?? "";
  const bytes = (name: string) => (Number.parseInt(field(name), 10) || 0) * 1024; // always in kB
  return {
    tracerPid: Number(field("TracerPid") || 0),
    pidsInNamespaces: field("NSpid").split(/\s+/).filter(Boolean).map(Number),
    anonymousBytes: bytes("RssAnon"),
    sharedBytes: bytes("RssShmem"),
    swapBytes: bytes("VmSwap"),
    hugetlbBytes: bytes("HugetlbPages"),
    seccomp: Number(field("Seccomp") || 0),
  };
}

function namespacesOf(pid: number | "self"): Partial<Record<AnyNamespaceKind, number>> {
  const found: Partial<Record<AnyNamespaceKind, number>> = {};
  for (const kind of namespaceKinds) {
    const link = readLink(`/proc/${pid}/ns/${kind}`);
    const inode = link === undefined ? undefined : inodeInBrackets(link);
    if (inode !== undefined) found[kind] = inode;
  }
  return found;
}

async function filesOf(
  pid: number,
  mountNamespace: number,
  shared: SharedFacts,
  slices: Slices,
): Promise<OpenFile[]> {
  const files: OpenFile[] = [];
  const waiting: Promise<void>[] = [];
  const add = (what: OpenFile["what"], fd: number, link: string, info: FdInfo, path: string) => {
    const file = { what, fd, link, info };
    const at = files.push(file) - 1;
    if (!link.startsWith("/") || what === "exe") return;
    // The same file by the same mount is the same for everybody.
    const key = `${mountNamespace} ${info.mountId} ${info.inode ?? path} ${link}`;
    const known = shared.stats.get(key) ?? statWithin(path, `${mountNamespace} ${info.mountId}`, shared);
    shared.stats.set(key, known);
    waiting.push(
      known.then((found) => {
        files[at] = typeof found === "string" ? { ...file, statFailed: found } : { ...file, stat: found };
      }),
    );
  };
  for (const what of ["cwd", "root", "exe"] as const) {
    const path = `/proc/${pid}/${what}`;
    const link = readLink(path);
    if (link !== undefined)
      add(what, -1, link, { flags: 0, mountId: mountOf(path) ?? -1, locks: [], watches: [] }, path);
  }
  const names = await readdir(`/proc/${pid}/fd`).catch(endedMeanwhile);
  for (const name of names ?? []) {
    const path = `/proc/${pid}/fd/${name}`;
    const link = readLink(path);
    const text = link === undefined ? undefined : readProc(`/proc/${pid}/fdinfo/${name}`);
    if (link !== undefined && text !== undefined) add("fd", Number(name), link, parseFdInfo(text), path);
    const pause = slices.breathe();
    if (pause) await pause;
  }
  await Promise.all(waiting);
  return files;
}

/**
 * Waits for a file system's answer, but not for ever: the server of a network or FUSE file system may be dead. The thread
 * of the pool that asked stays with it: for what nobody but an administrator can choose.
 * @returns undefined when there was none in time
 */
export async function answerWithin<T>(question: Promise<T>): Promise<T | undefined> {
  const { promise, resolve } = Promise.withResolvers<undefined>();
  const timer = setTimeout(resolve, PATIENCE_MS, undefined);
  try {
    return await Promise.race([promise, question]);
  } finally {
    clearTimeout(timer);
  }
}

/** Of a file of the process's. No thread of the pool is risked for what a server answers for. */
async function statWithin(path: string, mount: string, { servers }: SharedFacts): Promise<FileStat | string> {
  const silent = `no answer within ${PATIENCE_MS} ms`;
  const answering = await servers.answering(mount, path);
  if (answering === "kernel") return (await answerWithin(statOf(path))) ?? silent;
  if (answering === "nobody") return silent;
  try {
    const found = await servers.stat(mount, path);
    return found ? fileStat(statOfNumbers(found)) : silent;
  } catch (err) {
    return codeOf(err) || String(err);
  }
}

async function statOf(path: string): Promise<FileStat | string> {
  try {
    return fileStat(await stat(path));
  } catch (err) {
    return codeOf(err) || String(err);
  }
}

function statOfNumbers([mode, rdev, nlink, size, blocks]: NumbersOfStat): StatLike {
  const is = (type: number) => () => (mode & constants.S_IFMT) === type;
  return {
    rdev,
    nlink,
    size,
    blocks,
    isFile: is(constants.S_IFREG),
    isDirectory: is(constants.S_IFDIR),
    isFIFO: is(constants.S_IFIFO),
    isCharacterDevice: is(constants.S_IFCHR),
    isBlockDevice: is(constants.S_IFBLK),
    isSocket: is(constants.S_IFSOCK),
  };
}

type StatLike = Pick<
  Stats,
  | "rdev"
  | "nlink"
  | "size"
  | "blocks"
  | "isFile"
  | "isDirectory"
  | "isFIFO"
  | "isCharacterDevice"
  | "isBlockDevice"
  | "isSocket"
>;

function fileStat(found: StatLike): FileStat {
  const type = found.isFile()
    ? "file"
    : found.isDirectory()
      ? "directory"
      : found.isFIFO()
        ? "fifo"
        : found.isCharacterDevice()
          ? "char"
          : found.isBlockDevice()
            ? "block"
            : found.isSocket()
              ? "socket"
              : "other";
  return {
    type,
    device: found.rdev,
    links: found.nlink,
    bytes: found.size,
    allocatedBytes: found.blocks * 512,
  };
}

/** The mount that a magic link of procfs leads to; undefined when it can't be followed. O_PATH opens nothing, and asks no server. */
function mountOf(magicLink: string): number | undefined {
  let fd: number;
  try {
    fd = openSync(magicLink, O_PATH | constants.O_RDONLY);
  } catch (err) {
    // ENXIO: an object without a file system behind it. EACCES, EPERM: we lack CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
    if (hasEnded(err) || ["ENXIO", "EACCES", "EPERM", "ELOOP"].includes(codeOf(err))) return undefined;
    throw SyscallFailed.from(err);
  }
  try {
    return parseFdInfo(readFileSync(`/proc/self/fdinfo/${fd}`, "latin1")).mountId;
  } finally {
    closeSync(fd);
  }
}

async function parseMaps(text: string, slices: Slices): Promise<FileMapping[]> {
  const mappings: FileMapping[] = [];
  for (let at = 0; at < text.length; ) {
    const end = text.indexOf("\n", at);
    const line = text.slice(at, end < 0 ? undefined : end);
    at = end < 0 ? text.length : end + 1;
    const mapping = parseFileMapping(line);
    if (mapping) mappings.push(mapping);
    const pause = slices.breathe();
    if (pause) await pause;
  }
  return mappings;
}

/** Each mapped file once in a mount namespace: to open a magic link for each of ten thousand mappings tells nothing new. */
async function filesOfMappings(
  pid: number,
  mountNamespace: number,
  mappings: readonly FileMapping[],
  shared: SharedFacts,
  slices: Slices,
): Promise<MappedFile[]> {
  const found = new Map<string, MappedFile>();
  for (const mapping of mappings) {
    const pause = slices.breathe();
    if (pause) await pause;
    // Memory that only looks like a file lies on mounts that nobody can see.
    if (!mapping.path.startsWith("/") || isKernelMemory(mapping.path)) continue;
    const key = `${mountNamespace} ${mapping.device} ${mapping.inode} ${mapping.path}`;
    if (found.has(key)) continue;
    const link = `/proc/${pid}/map_files/${trimZeros(mapping.start)}-${trimZeros(mapping.end)}`;
    const mountId = shared.mountOfFile.get(key) ?? mountOf(link);
    if (mountId === undefined) continue;
    shared.mountOfFile.set(key, mountId);
    const stat = /^\/dev\/(?!shm\/)| \(deleted\)$/.test(mapping.path)
      ? await statWithin(link, `${mountNamespace} ${mountId}`, shared)
      : undefined;
    found.set(key, { mapping, mountId, ...(typeof stat === "object" && { stat }) });
  }
  return [...found.values()];
}

/** Mapped names that stand for memory: SysV and POSIX shared memory, memfd, AIO rings, huge pages, secret memory. */
export function isKernelMemory(path: string): boolean {
  return /^\/(?:SYSV|memfd:|\[aio\]|anon_hugepage|secretmem|dev\/zero \(deleted\)|dmabuf|i915)/.test(path);
}

// map_files names have no leading zeros; maps pads to eight digits.
function trimZeros(address: string): string {
  return address.replace(/^0+(?=.)/, "");
}

async function collectMounts(
  processes: readonly ProcessInventory[],
  mounts: Map<number, readonly MountInfo[]>,
  slices: Slices,
): Promise<void> {
  // A process shows the mounts below its own root, so each root is asked once.
  const asked = new Set<string>();
  for (const process of processes) {
    const namespace = process.namespaces.mnt;
    const root = process.files.find((file) => file.what === "root")?.link;
    if (namespace === undefined || root === undefined || asked.has(`${namespace} ${root}`)) continue;
    const text = await readFile(`/proc/${process.pid}/mountinfo`, "utf8").catch(endedMeanwhile);
    if (text === undefined) continue;
    asked.add(`${namespace} ${root}`);
    const known = new Map((mounts.get(namespace) ?? []).map((mount) => [mount.mountId, mount]));
    for (const line of text.split("\n")) {
      const mount = parseMountInfoLine(line);
      if (mount && !known.has(mount.mountId)) known.set(mount.mountId, mount);
      const pause = slices.breathe();
      if (pause) await pause;
    }
    mounts.set(namespace, [...known.values()]);
  }
}

async function collectSockets(
  processes: readonly ProcessInventory[],
  sockets: Map<number, SocketTable>,
  slices: Slices,
  signal: AbortSignal | undefined,
): Promise<void> {
  for (const process of processes) {
    const namespace = process.namespaces.net;
    if (namespace === undefined || sockets.has(namespace)) continue;
    if (!process.files.some((file) => file.link.startsWith("socket:["))) continue;
    signal?.throwIfAborted();
    try {
      sockets.set(namespace, await readSockets(process.pid, slices.breathe));
    } catch (err) {
      if (!(err instanceof SyscallFailed && err.code === "ENOENT")) throw err; // it has ended: another one may be asked
    }
  }
}

async function describeUnknownSockets(
  processes: readonly ProcessInventory[],
  sockets: ReadonlyMap<number, SocketTable>,
  slices: Slices,
): Promise<ProcessInventory[]> {
  // SO_PASSCRED makes a difference only to what is queued, and diagnostics don't tell it.
  const isKnown = (inode: number) => {
    for (const { byInode } of sockets.values()) {
      const socket = byInode.get(inode);
      if (socket) return socket.family !== "unix" || socket.receiveQueue === 0 || socket.state === "LISTEN";
    }
    return false;
  };
  const described = new Map<number, SocketOfProcess>();
  const result: ProcessInventory[] = [];
  for (const process of processes) {
    const files: OpenFile[] = [];
    for (const file of process.files) {
      const inode = file.link.startsWith("socket:[") ? inodeInBrackets(file.link) : undefined;
      if (inode === undefined || isKnown(inode)) {
        files.push(file);
        continue;
      }
      const socket = described.get(inode) ?? describe(process.pid, file.fd);
      if (socket) {
        described.set(inode, socket);
        files.push({ ...file, socket });
      } // else it was closed meanwhile
      const pause = slices.breathe();
      if (pause) await pause;
    }
    result.push({ ...process, files });
  }
  return result;
}

function describe(pid: number, fd: number): SocketOfProcess | undefined {
  try {
    return socketOf(pid, fd);
  } catch (err) {
    // ENOTSOCK: the number is another file's by now.
    if (hasEnded(err) || ["EBADF", "ENOTSOCK"].includes(codeOf(err))) return undefined;
    const failure = SyscallFailed.from(err);
    if (!(failure instanceof SyscallFailed)) throw failure;
    throw new SyscallFailed(
      `look at the socket that is fd ${fd} of process ${pid}: ${failure.message} (it takes root, or CAP_SYS_PTRACE)`,
      { cause: err, errno: failure.errno, code: failure.code, syscall: failure.syscall },
    );
  }
}

function readProc(path: string): string | undefined {
  return unlessEnded(() => readFileSync(path, "utf8"));
}

function readLink(path: string): string | undefined {
  return unlessEnded(() => readlinkSync(path));
}

function unlessEnded<T>(read: () => T): T | undefined {
  try {
    return read();
  } catch (err) {
    if (hasEnded(err)) return undefined;
    throw SyscallFailed.from(err);
  }
}

function endedMeanwhile(err: unknown): undefined {
  // EINVAL: mountinfo of a process that is just ending.
  if (hasEnded(err) || codeOf(err) === "EINVAL") return undefined;
  throw SyscallFailed.from(err);
}

function hasEnded(err: unknown): boolean {
  return codeOf(err) === "ENOENT" || codeOf(err) === "ESRCH";
}

function codeOf(err: unknown): string {
  return (err as NodeJS.ErrnoException).code ?? "";
}
