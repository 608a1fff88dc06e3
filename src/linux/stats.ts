import { readdir, readFile } from "node:fs/promises";
import type * as v1 from "../proto/generated/cgroups_v1.ts";
import type * as v2 from "../proto/generated/cgroups_v2.ts";
import { pack } from "../proto/index.ts";
import type { Cgroup } from "./cgroup.ts";

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
export async function encodeMetrics(cgroup: Cgroup): Promise<{ typeUrl: string; value: Uint8Array }> {
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

async function read(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, "utf8");
  } catch (err) {
    // Missing controller or file (ENOENT), removed meanwhile (ENODEV), pressure accounting off (EOPNOTSUPP).
    if (["ENOENT", "ENODEV", "EOPNOTSUPP"].includes((err as NodeJS.ErrnoException).code ?? ""))
      return undefined;
    throw err;
  }
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

/** Reads `prefix + name` for each name, in parallel. */
async function readNumbers<const Name extends string>(
  prefix: string,
  names: readonly Name[],
): Promise<Record<Name, bigint>> {
  const values = await Promise.all(names.map(async (name) => parseNumber(await read(prefix + name))));
  return Object.fromEntries(names.map((name, at) => [name, values[at]])) as Record<Name, bigint>;
}

/** Sizes of huge pages as the hugetlb controller's file names spell them; they never change while a kernel runs. */
async function hugePageSizes(): Promise<string[]> {
  cachedHugePageSizes ??= readdir("/sys/kernel/mm/hugepages").then(
    (names) => names.map(hugePageSize).filter((size) => size !== undefined),
    () => [], // a kernel without huge pages
  );
  return cachedHugePageSizes;
}
let cachedHugePageSizes: Promise<string[]> | undefined;

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
  const [hugetlb, pids, usage, throttling, memory, memoryOomControl, blkio, rdma] = await Promise.all([
    present(paths.get("hugetlb"), readHugetlbV1),
    present(paths.get("pids"), readPidsV1),
    present(paths.get("cpuacct"), readCpuUsage),
    present(paths.get("cpu"), readThrottling),
    present(paths.get("memory"), readMemoryV1),
    present(paths.get("memory"), readOomControl),
    present(paths.get("blkio"), readBlkio),
    present(paths.get("rdma"), readRdma),
  ]);
  return {
    version: 1,
    metrics: {
      hugetlb,
      pids,
      cpu: { usage: usage ?? {}, throttling: throttling ?? {} },
      memory,
      blkio,
      rdma,
      memoryOomControl,
    },
  };
}

async function present<T>(
  path: string | undefined,
  readIt: (path: string) => Promise<T>,
): Promise<T | undefined> {
  return path === undefined ? undefined : readIt(path);
}

async function readHugetlbV1(path: string): Promise<v1.HugetlbStatInit[]> {
  const sizes = await hugePageSizes();
  return Promise.all(
    sizes.map(async (pagesize) => {
      const names = ["usage_in_bytes", "max_usage_in_bytes", "failcnt"] as const;
      const n = await readNumbers(`${path}/hugetlb.${pagesize}.`, names);
      return { pagesize, usage: n.usage_in_bytes, max: n.max_usage_in_bytes, failcnt: n.failcnt };
    }),
  );
}

// "max" is 0 in v1's answer and 2^64-1 in v2's: so containerd's library has it, and so its clients expect it.
async function readPidsV1(path: string): Promise<v1.PidsStatInit> {
  const { current, max } = await readNumbers(`${path}/pids.`, ["current", "max"]);
  return { current, limit: max === maxUint64 ? 0n : max };
}

async function readCpuUsage(path: string): Promise<v1.CPUUsageInit> {
  const [total, perCpu, ticks] = await Promise.all([
    read(`${path}/cpuacct.usage`),
    read(`${path}/cpuacct.usage_percpu`),
    read(`${path}/cpuacct.stat`).then(parseKeyValues),
  ]);
  return {
    total: parseNumber(total),
    kernel: (ticks.get("system") ?? 0n) * nanosecondsPerTick,
    user: (ticks.get("user") ?? 0n) * nanosecondsPerTick,
    perCpu: (perCpu ?? "").split(/\s+/).filter(Boolean).map(parseNumber),
  };
}

async function readThrottling(path: string): Promise<v1.ThrottleInit> {
  const values = parseKeyValues(await read(`${path}/cpu.stat`));
  return {
    periods: values.get("nr_periods") ?? 0n,
    throttledPeriods: values.get("nr_throttled") ?? 0n,
    throttledTime: values.get("throttled_time") ?? 0n,
  };
}

async function readMemoryV1(path: string): Promise<v1.MemoryStatInit> {
  const entry = async (prefix: string): Promise<v1.MemoryEntryInit> => {
    const names = ["limit_in_bytes", "usage_in_bytes", "max_usage_in_bytes", "failcnt"] as const;
    const n = await readNumbers(`${path}/${prefix}.`, names);
    return {
      limit: n.limit_in_bytes,
      usage: n.usage_in_bytes,
      max: n.max_usage_in_bytes,
      failcnt: n.failcnt,
    };
  };
  const [stat, usage, swap, kernel, kernelTcp] = await Promise.all([
    read(`${path}/memory.stat`),
    entry("memory"),
    entry("memory.memsw"),
    entry("memory.kmem"),
    entry("memory.kmem.tcp"),
  ]);
  return { ...pickCounters(memoryStatV1, parseKeyValues(stat)), usage, swap, kernel, kernelTcp };
}

async function readOomControl(path: string): Promise<v1.MemoryOomControlInit> {
  const values = parseKeyValues(await read(`${path}/memory.oom_control`));
  return {
    oomKillDisable: values.get("oom_kill_disable") ?? 0n,
    underOom: values.get("under_oom") ?? 0n,
    oomKill: values.get("oom_kill") ?? 0n,
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
async function readBlkio(path: string): Promise<v1.BlkIOStatInit> {
  const devices = parsePartitions((await read("/proc/partitions")) ?? "");
  const readAll = async (files: Readonly<Record<string, string>>) => {
    const fields = await Promise.all(
      Object.entries(files).map(async ([field, file]) => {
        return [field, parseBlkio((await read(`${path}/blkio.${file}`)) ?? "", devices)] as const;
      }),
    );
    return Object.fromEntries(fields) as Record<string, v1.BlkIOEntryInit[]>;
  };
  if ((await read(`${path}/blkio.io_serviced_recursive`)) !== undefined) {
    const cfq = await readAll(blkioFiles);
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

async function readRdma(path: string): Promise<v1.RdmaStatInit> {
  const [current, limit] = await Promise.all([read(`${path}/rdma.current`), read(`${path}/rdma.max`)]);
  return { current: parseRdma(current ?? ""), limit: parseRdma(limit ?? "") };
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
  const numbers = ["current", "max", "peak", "swap.current", "swap.max", "swap.peak"] as const;
  const [pids, cpu, stat, memory, events, io, hugetlb, rdma, cpuPsi, memoryPsi, ioPsi] = await Promise.all([
    readNumbers(`${path}/pids.`, ["current", "max"]),
    read(`${path}/cpu.stat`).then(parseKeyValues),
    read(`${path}/memory.stat`).then(parseKeyValues),
    readNumbers(`${path}/memory.`, numbers),
    read(`${path}/memory.events`).then(parseKeyValues),
    read(`${path}/io.stat`).then((text) => parseIoStat(text ?? "")),
    readHugetlbV2(path),
    readRdma(path),
    read(`${path}/cpu.pressure`).then(parsePressure),
    read(`${path}/memory.pressure`).then(parsePressure),
    read(`${path}/io.pressure`).then(parsePressure),
  ]);
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
      io: { usage: io, psi: ioPsi },
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

async function readHugetlbV2(path: string): Promise<v2.HugeTlbStatInit[]> {
  return Promise.all(
    (await hugePageSizes()).map(async (pagesize) => {
      const { current, max } = await readNumbers(`${path}/hugetlb.${pagesize}.`, ["current", "max"]);
      return { pagesize, current, max };
    }),
  );
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
