import { existsSync, mkdirSync, mkdtempSync, rmdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { NotFound } from "../../src/errors/index.ts";
import { Cgroup } from "../../src/linux/cgroup.ts";
import {
  encodeMetrics,
  hugePageSize,
  parseBlkio,
  parseIoStat,
  parseKeyValues,
  parseNumber,
  parsePartitions,
  parsePressure,
  parseRdma,
} from "../../src/linux/stats.ts";
import { Metrics as MetricsV1 } from "../../src/proto/generated/cgroups_v1.ts";
import { Metrics as MetricsV2 } from "../../src/proto/generated/cgroups_v2.ts";

describe("a file's numbers", () => {
  it("are exact above what a double can hold", () => {
    expect(parseNumber("9223372036854771712\n")).toBe(9223372036854771712n);
    expect(parseNumber("max\n")).toBe(2n ** 64n - 1n);
  });

  it("are 0 where there is none, as in containerd's library", () => {
    expect([undefined, "", "-1", "x"].map(parseNumber)).toEqual([0n, 0n, 0n, 0n]);
  });

  it("come by key", () => {
    expect([...parseKeyValues("oom_kill_disable 0\nunder_oom 1\n\nbroken\n")]).toEqual([
      ["oom_kill_disable", 0n],
      ["under_oom", 1n],
    ]);
  });

  it("come by device in blkio", () => {
    const devices = parsePartitions(
      "major minor  #blocks  name\n\n 254        0  268435456 vda\n   8  1 1 sda1\n",
    );
    expect(parseBlkio("254:0 Read 3\n254:0 Total 3\n7:1 9\nTotal 3\n", devices)).toEqual([
      { op: "Read", device: "/dev/vda", major: 254n, minor: 0n, value: 3n },
      { op: "Total", device: "/dev/vda", major: 254n, minor: 0n, value: 3n },
      { op: "", device: "", major: 7n, minor: 1n, value: 9n },
    ]);
  });

  it("come by device in io.stat, where a device may have none", () => {
    expect(parseIoStat("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:0 \n")).toEqual([
      { major: 254n, minor: 0n, rbytes: 1n, wbytes: 2n, rios: 3n, wios: 4n },
    ]);
  });

  it("say how long processes waited", () => {
    const text =
      "some avg10=0.10 avg60=1.00 avg300=20.55 total=123\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
    expect(parsePressure(text)).toEqual({
      some: { avg10: 0.1, avg60: 1, avg300: 20.55, total: 123n },
      full: { avg10: 0, avg60: 0, avg300: 0, total: 0n },
    });
    expect(parsePressure(undefined)).toBeUndefined();
  });

  it("count handles of RDMA devices", () => {
    expect(parseRdma("mlx4_0 hca_handle=2 hca_object=2000\nocrdma1 hca_handle=3 hca_object=max\n\n")).toEqual(
      [
        { device: "mlx4_0", hcaHandles: 2, hcaObjects: 2000 },
        { device: "ocrdma1", hcaHandles: 3, hcaObjects: 2 ** 32 - 1 },
      ],
    );
  });

  it("have the size of their pages in the file's name", () => {
    expect(["hugepages-2048kB", "hugepages-1048576kB", "hugepages-64kB", "x"].map(hugePageSize)).toEqual([
      "2MB",
      "1GB",
      "64KB",
      undefined,
    ]);
  });
});

describe("a cgroup's files", () => {
  let directory: string;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), "cedana-stats-"));
  });
  afterEach(() => rmSync(directory, { recursive: true }));

  const files = (group: string, contents: Record<string, string>) => {
    mkdirSync(join(directory, group), { recursive: true });
    for (const [name, text] of Object.entries(contents)) writeFileSync(join(directory, group, name), text);
    return join(directory, group);
  };

  it("make the message of v1", async () => {
    const memory = {
      "memory.stat":
        "cache 1\nrss 2\nrss_huge 3\npgpgin 4\npgmajfault 5\nhierarchical_memory_limit 6\nhierarchical_memsw_limit 7\ntotal_cache 8\ntotal_pgpgout 9\ntotal_unevictable 10\n",
      "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
      "memory.usage_in_bytes": "100\n",
      "memory.max_usage_in_bytes": "200\n",
      "memory.failcnt": "1\n",
      "memory.limit_in_bytes": "9223372036854771712\n",
      "memory.memsw.usage_in_bytes": "101\n",
      "memory.kmem.usage_in_bytes": "102\n",
      "memory.kmem.tcp.failcnt": "103\n",
    };
    const cgroup = Cgroup.fromPaths({
      version: 1,
      paths: {
        freezer: files("freezer", {}),
        memory: files("memory", memory),
        pids: files("pids", { "pids.current": "4\n", "pids.max": "max\n" }),
        cpu: files("cpu", { "cpu.stat": "nr_periods 1\nnr_throttled 2\nthrottled_time 3\n" }),
        cpuacct: files("cpuacct", {
          "cpuacct.usage": "1234567\n",
          "cpuacct.usage_percpu": "1000000 234567 \n",
          "cpuacct.stat": "user 7\nsystem 2\n",
        }),
        blkio: files("blkio", {
          "blkio.throttle.io_serviced": "1:0 Read 5\nTotal 5\n",
          "blkio.throttle.io_service_bytes": "1:0 Read 20480\nTotal 20480\n",
        }),
      },
    });
    const { typeUrl, value } = await encodeMetrics(cgroup);
    expect(typeUrl).toBe("io.containerd.cgroups.v1.Metrics");
    const metrics = MetricsV1.decode(value);
    expect(metrics.pids).toEqual({ current: 4n, limit: 0n });
    expect(metrics.cpu).toEqual({
      usage: { total: 1234567n, kernel: 20_000_000n, user: 70_000_000n, perCpu: [1000000n, 234567n] },
      throttling: { periods: 1n, throttledPeriods: 2n, throttledTime: 3n },
    });
    expect(metrics.memory).toMatchObject({
      cache: 1n,
      rss: 2n,
      rssHuge: 3n,
      pgPgIn: 4n,
      pgMajFault: 5n,
      hierarchicalMemoryLimit: 6n,
      hierarchicalSwapLimit: 7n,
      totalCache: 8n,
      totalPgPgOut: 9n,
      totalUnevictable: 10n,
      usage: { usage: 100n, max: 200n, failcnt: 1n, limit: 9223372036854771712n },
      swap: { usage: 101n },
      kernel: { usage: 102n },
      kernelTcp: { failcnt: 103n },
    });
    expect(metrics.memoryOomControl).toEqual({ oomKillDisable: 0n, underOom: 0n, oomKill: 3n });
    expect(metrics.blkio?.ioServicedRecursive).toMatchObject([
      { op: "Read", major: 1n, minor: 0n, value: 5n },
    ]);
    expect(metrics.blkio?.ioServiceBytesRecursive).toMatchObject([{ value: 20480n }]);
    expect(metrics.network).toEqual([]);
  });

  it("of the CFQ scheduler go before the throttler's where they count something", async () => {
    const blkio = files("blkio", {
      "blkio.io_serviced_recursive": "8:0 Read 7\nTotal 7\n",
      "blkio.time_recursive": "8:0 55\n",
      "blkio.throttle.io_serviced": "8:0 Read 1\n",
    });
    const { value } = await encodeMetrics(Cgroup.fromPaths({ version: 1, paths: { blkio } }));
    const metrics = MetricsV1.decode(value);
    expect(metrics.blkio?.ioServicedRecursive).toMatchObject([{ value: 7n }]);
    expect(metrics.blkio?.ioTimeRecursive).toMatchObject([{ op: "", value: 55n }]);
  });

  it("make the message of v2", async () => {
    const path = files("unified", {
      "cgroup.controllers": "cpu memory pids io\n",
      "pids.current": "4\n",
      "pids.max": "max\n",
      "cpu.stat":
        "usage_usec 10\nuser_usec 7\nsystem_usec 3\nnr_periods 1\nnr_throttled 2\nthrottled_usec 4\n",
      "cpu.pressure": "some avg10=0.50 avg60=0.00 avg300=0.00 total=9\n",
      "memory.stat": "anon 1\nfile 2\nkernel_stack 3\nthp_collapse_alloc 4\nunknown_to_us 5\n",
      "memory.current": "100\n",
      "memory.max": "max\n",
      "memory.swap.current": "7\n",
      "memory.swap.max": "max\n",
      "memory.peak": "150\n",
      "memory.events": "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\n",
      "io.stat": "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
    });
    const { typeUrl, value } = await encodeMetrics(Cgroup.fromPaths({ version: 2, paths: { "": path } }));
    expect(typeUrl).toBe("io.containerd.cgroups.v2.Metrics");
    const metrics = MetricsV2.decode(value);
    expect(metrics.pids).toEqual({ current: 4n, limit: 2n ** 64n - 1n });
    expect(metrics.cpu).toMatchObject({ usageUsec: 10n, userUsec: 7n, systemUsec: 3n, throttledUsec: 4n });
    expect(metrics.cpu?.psi?.some).toMatchObject({ avg10: 0.5, total: 9n });
    expect(metrics.memory).toMatchObject({
      anon: 1n,
      file: 2n,
      kernelStack: 3n,
      thpCollapseAlloc: 4n,
      usage: 100n,
      usageLimit: 2n ** 64n - 1n,
      swapUsage: 7n,
      swapLimit: 2n ** 64n - 1n,
      maxUsage: 150n,
    });
    expect(metrics.memoryEvents).toEqual({ low: 0n, high: 1n, max: 2n, oom: 3n, oomKill: 4n });
    expect(metrics.io?.usage).toMatchObject([{ major: 254n, rbytes: 1n, wios: 4n }]);
  });

  it("that are missing count as 0, and a removed cgroup is not found", async () => {
    const path = files("unified", {});
    const cgroup = Cgroup.fromPaths({ version: 2, paths: { "": path } });
    const metrics = MetricsV2.decode((await encodeMetrics(cgroup)).value);
    expect(metrics.memory?.usage).toBe(0n);
    expect(metrics.memoryEvents).toBeUndefined();
    rmSync(path, { recursive: true });
    await expect(encodeMetrics(cgroup)).rejects.toThrow(NotFound);
  });
});

const v1 = "/sys/fs/cgroup";
const haveV1 = process.getuid?.() === 0 && existsSync(`${v1}/memory/cgroup.procs`);

it.skipIf(!haveV1)("a real cgroup of version 1 has its limits in the message (as root)", async () => {
  const paths: Record<string, string> = {};
  for (const controller of ["memory", "pids", "cpu", "cpuacct", "blkio"]) {
    if (!existsSync(`${v1}/${controller}/cgroup.procs`)) continue;
    paths[controller] = `${v1}/${controller}/cedana-stats-${process.pid}`;
    mkdirSync(paths[controller]);
  }
  try {
    writeFileSync(`${paths.memory}/memory.limit_in_bytes`, String(64 << 20));
    if (paths.pids) writeFileSync(`${paths.pids}/pids.max`, "42");
    const { value } = await encodeMetrics(Cgroup.fromPaths({ version: 1, paths }));
    const metrics = MetricsV1.decode(value);
    expect(metrics.memory?.usage?.limit).toBe(64n << 20n);
    expect(metrics.memory?.hierarchicalMemoryLimit).toBe(64n << 20n);
    if (paths.pids) expect(metrics.pids).toEqual({ current: 0n, limit: 42n });
    if (paths.cpuacct) expect(metrics.cpu?.usage?.perCpu.length).toBeGreaterThan(0);
  } finally {
    for (const path of Object.values(paths)) rmdirSync(path);
  }
});
