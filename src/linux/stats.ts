import { readdirSync, readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { SyscallFailed } from "../errors/index.ts";
import type * as v1 from "../proto/generated/cgroups_v1.ts";
import type * as v2 from "../proto/generated/cgroups_v2.ts";
import { pack } from "../proto/index.ts";

// What a cgroup has used, read from its files and put into the messages that containerd's clients expect
// (io.containerd.cgroups.v1.Metrics, …v2.Metrics), with the same numbers from the same files as containerd's own
// library takes them: what `ctr task metrics` and the kubelet show must not depend on the shim.
//
// Numbers are bigint: a memory limit of "none" is 2^63-4096 in v1 and "max", sent as 2^64-1, in v2, and neither fits in
// a double. A file that is missing counts as 0: not every kernel has all.

/** v1: parts are absent where the cgroup has no such controller; CPU times are nanoseconds. */
export interface CgroupStatsV1 {
  readonly version: 1;
  readonly metrics: v1.MetricsInit;
}

/** v2: CPU times are microseconds. */
export interface CgroupStatsV2 {
  readonly version: 2;
  readonly metrics: v2.MetricsInit;
}

export type CgroupStats = CgroupStatsV1 | CgroupStatsV2;

/**
 * A cgroup's counters as containerd's task service answers Stats: an Any whose type URL has no prefix.
 * @throws NotFound when the cgroup has been removed
 */
export async function encodeMetrics(cgroup: {
  stats(): Promise<CgroupStats>;
}): Promise<{ typeUrl: string; value: Uint8Array }> {
  const stats = await cgroup.stats();
  // The codecs are big and only this answer needs them.
  if (stats.version === 1)
    return pack((await import("../proto/generated/cgroups_v1.ts")).Metrics, stats.metrics);
  return pack((await import("../proto/generated/cgroups_v2.ts")).Metrics, stats.metrics);
}

const maxUint64 = 2n ** 64n - 1n;
const maxUint32 = 2 ** 32 - 1;
// What the kernel calls USER_HZ is 100 on every architecture that Node runs on.
const nanosecondsPerTick = 10_000_000n;

// Two ways to read, measured with 40 files: at once, 0.3 ms in all; through the thread pool, 2 ms of CPU. So what the kernel
// has ready (a counter, a limit) is read at once; what it first has to collect from all CPUs and cgroups below
// (memory.stat, cpu.stat, io.stat, pressure) may take it milliseconds on a big host, and is read through the thread pool.

async function read(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, "utf8");
  } catch (err) {
    return undefinedIfMissing(err);
  }
}

function readNow(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch (err) {
    return undefinedIfMissing(err);
  }
}

// Missing controller or file (ENOENT), removed meanwhile (ENODEV), pressure accounting off (EOPNOTSUPP).
function undefinedIfMissing(err: unknown): undefined {
  if (["ENOENT", "ENODEV", "EOPNOTSUPP"].includes((err as NodeJS.ErrnoException).code ?? ""))
    return undefined;
  throw SyscallFailed.from(err);
}

/** A single number; "max" is the greatest one, negative ones and nonsense are 0 as in containerd's library. */
export function parseNumber(text: string | undefined): bigint {
  const trimmed = text?.trim() ?? "";
  if (trimmed === "max") return maxUint64;
  return /^\d+$/.test(trimmed) ? BigInt(trimmed) : 0n;
}

/** Lines of `KEY NUMBER`. */
export function parseKeyValues(text: string | undefined): Map<string, bigint> {
  const values = new Map<string, bigint>();
  for (const line of (text ?? "").split("\n")) {
    const space = line.indexOf(" ");
    if (space > 0) values.set(line.slice(0, space), parseNumber(line.slice(space + 1)));
  }
  return values;
}

/** Reads `prefix + name` for each name, a number each. */
function readNumbers<const Name extends string>(
  prefix: string,
  names: readonly Name[],
): Record<Name, bigint> {
  const values = names.map((name) => [name, parseNumber(readNow(prefix + name))]);
  return Object.fromEntries(values) as Record<Name, bigint>;
}

/** Sizes of huge pages as the hugetlb controller's file names spell them; they never change while a kernel runs. */
function hugePageSizes(): string[] {
  if (!cachedHugePageSizes) {
    let names: string[] = [];
    try {
      names = readdirSync("/sys/kernel/mm/hugepages");
    } catch (err) {
      undefinedIfMissing(err); // a kernel without huge pages
    }
    cachedHugePageSizes = names.map(hugePageSize).filter((size) => size !== undefined);
  }
  return cachedHugePageSizes;
}
let cachedHugePageSizes: string[] | undefined;

/** `hugepages-2048kB` → `2MB` */
export function hugePageSize(directory: string): string | undefined {
  const kilobytes = Number(/^hugepages-(\d+)kB$/.exec(directory)?.[1]);
  if (Number.isNaN(kilobytes)) return undefined;
  if (kilobytes >= 1 << 20) return `${kilobytes >> 20}GB`;
  return kilobytes >= 1 << 10 ? `${kilobytes >> 10}MB` : `${kilobytes}KB`;
}

/** Fields of v1's memory.stat: those of the message that aren't simply the file's key in camel case come first. */
const memoryStatV1: ReadonlyMap<string, string> = new Map([
  ["hierarchicalSwapLimit", "hierarchical_memsw_limit"],
  ...["pgPgIn:pgpgin", "pgPgOut:pgpgout", "pgFault:pgfault", "pgMajFault:pgmajfault"].flatMap((pair) => {
    const [field, key] = pair.split(":") as [string, string];
    return [
      [field, key],
      [`total${field[0]!.toUpperCase()}${field.slice(1)}`, `total_${key}`],
    ] as [string, string][];
  }),
  ["hierarchicalMemoryLimit", "hierarchical_memory_limit"],
  ...[
    "cache",
    "rss",
    "rss_huge",
    "mapped_file",
    "dirty",
    "writeback",
    "inactive_anon",
    "active_anon",
    "inactive_file",
    "active_file",
    "unevictable",
  ].flatMap((key) => [key, `total_${key}`].map((k) => [camelCase(k), k] as [string, string])),
]);

const memoryStatV2: ReadonlyMap<string, string> = new Map(
  [
    "anon",
    "file",
    "kernel_stack",
    "slab",
    "sock",
    "shmem",
    "file_mapped",
    "file_dirty",
    "file_writeback",
    "anon_thp",
    "inactive_anon",
    "active_anon",
    "inactive_file",
    "active_file",
    "unevictable",
    "slab_reclaimable",
    "slab_unreclaimable",
    "pgfault",
    "pgmajfault",
    "workingset_refault",
    "workingset_activate",
    "workingset_nodereclaim",
    "pgrefill",
    "pgscan",
    "pgsteal",
    "pgactivate",
    "pgdeactivate",
    "pglazyfree",
    "pglazyfreed",
    "thp_fault_alloc",
    "thp_collapse_alloc",
  ].map((key) => [camelCase(key), key]),
);

function camelCase(key: string): string {
  return key.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase());
}

function pickCounters(
  fields: ReadonlyMap<string, string>,
  values: ReadonlyMap<string, bigint>,
): Record<string, bigint> {
  return Object.fromEntries([...fields].map(([field, key]) => [field, values.get(key) ?? 0n]));
}

/** Reads the counters of v1 hierarchies, each in its directory. */
export async function readStatsV1(paths: ReadonlyMap<string, string>): Promise<CgroupStatsV1> {
  // First of all, so that the rest is read while the kernel collects it.
  const memoryStat = whenSet(paths.get("memory"), (path) => read(`${path}/memory.stat`));
  const usage = whenSet(paths.get("cpuacct"), readCpuUsage);
  const throttling = whenSet(paths.get("cpu"), readThrottling);
  const stats = {
    hugetlb: whenSet(paths.get("hugetlb"), readHugetlbV1),
    pids: whenSet(paths.get("pids"), readPidsV1),
    cpu: { usage: usage ?? {}, throttling: throttling ?? {} },
    blkio: whenSet(paths.get("blkio"), readBlkio),
    rdma: whenSet(paths.get("rdma"), readRdma),
    memoryOomControl: whenSet(paths.get("memory"), readOomControl),
  };
  const entries = whenSet(paths.get("memory"), readMemoryEntries);
  const counters = pickCounters(memoryStatV1, parseKeyValues(await memoryStat));
  return { version: 1, metrics: { ...stats, memory: entries && { ...counters, ...entries } } };
}

function whenSet<T>(path: string | undefined, readIt: (path: string) => T): T | undefined {
  return path === undefined ? undefined : readIt(path);
}

function readHugetlbV1(path: string): v1.HugetlbStatInit[] {
  return hugePageSizes().map((pagesize) => {
    const names = ["usage_in_bytes", "max_usage_in_bytes", "failcnt"] as const;
    const n = readNumbers(`${path}/hugetlb.${pagesize}.`, names);
    return { pagesize, usage: n.usage_in_bytes, max: n.max_usage_in_bytes, failcnt: n.failcnt };
  });
}

// "max" is 0 in v1's answer and 2^64-1 in v2's: so containerd's library has it, and so its clients expect it.
function readPidsV1(path: string): v1.PidsStatInit {
  const { current, max } = readNumbers(`${path}/pids.`, ["current", "max"]);
  return { current, limit: max === maxUint64 ? 0n : max };
}

function readCpuUsage(path: string): v1.CPUUsageInit {
  const ticks = parseKeyValues(readNow(`${path}/cpuacct.stat`));
  const perCpu = readNow(`${path}/cpuacct.usage_percpu`) ?? "";
  return {
    total: parseNumber(readNow(`${path}/cpuacct.usage`)),
    kernel: (ticks.get("system") ?? 0n) * nanosecondsPerTick,
    user: (ticks.get("user") ?? 0n) * nanosecondsPerTick,
    perCpu: perCpu.split(/\s+/).filter(Boolean).map(parseNumber),
  };
}

function readThrottling(path: string): v1.ThrottleInit {
  const values = parseKeyValues(readNow(`${path}/cpu.stat`));
  return {
    periods: values.get("nr_periods"),
    throttledPeriods: values.get("nr_throttled"),
    throttledTime: values.get("throttled_time"),
  };
}

function readMemoryEntries(path: string): Pick<v1.MemoryStatInit, "usage" | "swap" | "kernel" | "kernelTcp"> {
  const entry = (prefix: string): v1.MemoryEntryInit => {
    const names = ["limit_in_bytes", "usage_in_bytes", "max_usage_in_bytes", "failcnt"] as const;
    const n = readNumbers(`${path}/${prefix}.`, names);
    return {
      limit: n.limit_in_bytes,
      usage: n.usage_in_bytes,
      max: n.max_usage_in_bytes,
      failcnt: n.failcnt,
    };
  };
  return {
    usage: entry("memory"),
    swap: entry("memory.memsw"),
    kernel: entry("memory.kmem"),
    kernelTcp: entry("memory.kmem.tcp"),
  };
}

function readOomControl(path: string): v1.MemoryOomControlInit {
  const values = parseKeyValues(readNow(`${path}/memory.oom_control`));
  return {
    oomKillDisable: values.get("oom_kill_disable"),
    underOom: values.get("under_oom"),
    oomKill: values.get("oom_kill"),
  };
}

const blkioFiles = {
  ioServiceBytesRecursive: "io_service_bytes_recursive",
  ioServicedRecursive: "io_serviced_recursive",
  ioQueuedRecursive: "io_queued_recursive",
  ioServiceTimeRecursive: "io_service_time_recursive",
  ioWaitTimeRecursive: "io_wait_time_recursive",
  ioMergedRecursive: "io_merged_recursive",
  ioTimeRecursive: "time_recursive",
  sectorsRecursive: "sectors_recursive",
} as const;

/** The CFQ scheduler's counters where a kernel still has them (before 5.0) and they count something, else the throttler's. */
function readBlkio(path: string): v1.BlkIOStatInit {
  const devices = parsePartitions(readNow("/proc/partitions") ?? "");
  const readAll = (files: Readonly<Record<string, string>>): Record<string, v1.BlkIOEntryInit[]> =>
    Object.fromEntries(
      Object.entries(files).map(([field, file]) => {
        return [field, parseBlkio(readNow(`${path}/blkio.${file}`) ?? "", devices)];
      }),
    );
  if (readNow(`${path}/blkio.io_serviced_recursive`) !== undefined) {
    const cfq = readAll(blkioFiles);
    if (Object.values(cfq).some((entries) => entries.length > 0)) return cfq;
  }
  return readAll({
    ioServicedRecursive: "throttle.io_serviced",
    ioServiceBytesRecursive: "throttle.io_service_bytes",
  });
}

/** Lines of `MAJOR:MINOR [OPERATION] NUMBER`, and a `Total NUMBER` that is left out. */
export function parseBlkio(text: string, devices: ReadonlyMap<string, string>): v1.BlkIOEntryInit[] {
  const entries: v1.BlkIOEntryInit[] = [];
  for (const line of text.split("\n")) {
    const [, major, minor, op, value] = /^(\d+):(\d+) (?:(\S+) )?(\d+)$/.exec(line) ?? [];
    if (value === undefined) continue;
    entries.push({
      op: op ?? "",
      device: devices.get(`${major}:${minor}`) ?? "",
      major: BigInt(major!),
      minor: BigInt(minor!),
      value: BigInt(value),
    });
  }
  return entries;
}

/** /proc/partitions: the device node of each `major:minor`. */
export function parsePartitions(text: string): Map<string, string> {
  const devices = new Map<string, string>();
  for (const line of text.split("\n").slice(2)) {
    const [major, minor, , name] = line.trim().split(/\s+/);
    const key = `${major}:${minor}`;
    if (name !== undefined && !devices.has(key)) devices.set(key, `/dev/${name}`);
  }
  return devices;
}

function readRdma(path: string): v1.RdmaStatInit {
  return {
    current: parseRdma(readNow(`${path}/rdma.current`) ?? ""),
    limit: parseRdma(readNow(`${path}/rdma.max`) ?? ""),
  };
}

/** Lines of `DEVICE hca_handle=NUMBER hca_object=NUMBER`. */
export function parseRdma(text: string): v1.RdmaEntryInit[] {
  const number = (value: string | undefined) => (value === "max" ? maxUint32 : Number(value ?? 0) || 0);
  return text
    .split("\n")
    .map((line) => line.trim().split(/\s+/))
    .filter((fields) => fields.length === 3)
    .map(([device, ...pairs]) => {
      const values = new Map(pairs.map((pair) => pair.split("=") as [string, string]));
      return {
        device: device!,
        hcaHandles: number(values.get("hca_handle")),
        hcaObjects: number(values.get("hca_object")),
      };
    });
}

/** Reads the counters of a cgroup in the unified hierarchy. */
export async function readStatsV2(path: string): Promise<CgroupStatsV2> {
  const collected = Promise.all([
    read(`${path}/cpu.stat`).then(parseKeyValues),
    read(`${path}/memory.stat`).then(parseKeyValues),
    read(`${path}/io.stat`),
    ...["cpu", "memory", "io"].map((name) => read(`${path}/${name}.pressure`)),
  ] as const);
  const pids = readNumbers(`${path}/pids.`, ["current", "max"]);
  const names = ["current", "max", "peak", "swap.current", "swap.max", "swap.peak"] as const;
  const memory = readNumbers(`${path}/memory.`, names);
  const events = parseKeyValues(readNow(`${path}/memory.events`));
  const [rdma, hugetlb] = [readRdma(path), readHugetlbV2(path)];
  const [cpu, stat, io, ...pressure] = await collected;
  const [cpuPsi, memoryPsi, ioPsi] = pressure.map(parsePressure);
  return {
    version: 2,
    metrics: {
      pids: { current: pids.current, limit: pids.max },
      cpu: {
        usageUsec: cpu.get("usage_usec"),
        userUsec: cpu.get("user_usec"),
        systemUsec: cpu.get("system_usec"),
        nrPeriods: cpu.get("nr_periods"),
        nrThrottled: cpu.get("nr_throttled"),
        throttledUsec: cpu.get("throttled_usec"),
        psi: cpuPsi,
      },
      memory: {
        ...pickCounters(memoryStatV2, stat),
        usage: memory.current,
        usageLimit: memory.max,
        swapUsage: memory["swap.current"],
        swapLimit: memory["swap.max"],
        maxUsage: memory.peak,
        swapMaxUsage: memory["swap.peak"],
        psi: memoryPsi,
      },
      rdma,
      io: { usage: parseIoStat(io ?? ""), psi: ioPsi },
      hugetlb,
      memoryEvents:
        events.size === 0
          ? undefined // no memory controller
          : {
              low: events.get("low"),
              high: events.get("high"),
              max: events.get("max"),
              oom: events.get("oom"),
              oomKill: events.get("oom_kill"),
            },
    },
  };
}

function readHugetlbV2(path: string): v2.HugeTlbStatInit[] {
  return hugePageSizes().map((pagesize) => {
    const { current, max } = readNumbers(`${path}/hugetlb.${pagesize}.`, ["current", "max"]);
    return { pagesize, current, max };
  });
}

/** Lines of `MAJOR:MINOR rbytes=N wbytes=N rios=N …`. */
export function parseIoStat(text: string): v2.IOEntryInit[] {
  const entries: v2.IOEntryInit[] = [];
  for (const line of text.split("\n")) {
    const [, major, minor, rest] = /^(\d+):(\d+) (.+)$/.exec(line) ?? [];
    if (rest === undefined) continue;
    const values = new Map(rest.split(" ").map((pair) => pair.split("=") as [string, string]));
    entries.push({
      major: BigInt(major!),
      minor: BigInt(minor!),
      rbytes: parseNumber(values.get("rbytes")),
      wbytes: parseNumber(values.get("wbytes")),
      rios: parseNumber(values.get("rios")),
      wios: parseNumber(values.get("wios")),
    });
  }
  return entries;
}

/** Lines of `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`; undefined when pressure isn't accounted. */
export function parsePressure(text: string | undefined): v2.PSIStatsInit | undefined {
  if (text === undefined) return undefined;
  const lines = new Map<string, v2.PSIDataInit>();
  for (const line of text.split("\n")) {
    const [kind, ...pairs] = line.split(" ");
    if (kind !== "some" && kind !== "full") continue;
    const values = new Map(pairs.map((pair) => pair.split("=") as [string, string]));
    const average = (name: string) => Number.parseFloat(values.get(name) ?? "0") || 0;
    lines.set(kind, {
      avg10: average("avg10"),
      avg60: average("avg60"),
      avg300: average("avg300"),
      total: parseNumber(values.get("total")),
    });
  }
  return { some: lines.get("some"), full: lines.get("full") };
}
