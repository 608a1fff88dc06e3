// Out of memory, and what Stats says beside what the cgroup's files say.

import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import * as v1 from "../../src/proto/generated/cgroups_v1.ts";
import * as v2 from "../../src/proto/generated/cgroups_v2.ts";
import { BreakableDaemon } from "./harness/breakable.ts";
import { isControl, Live, type LiveOptions, lacksMemoryCgroup } from "./harness/live.ts";
import { oursOnly, skipUnless } from "./harness/matrix.ts";
import { cgroupRoots } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";

const MEMORY = 32 << 20;

/** The unified hierarchy, when it controls memory. */
function unifiedWithMemory(): string | undefined {
  const roots = cgroupRoots().filter((root) => existsSync(join(root, "cgroup.controllers")));
  return roots.find((root) => readFileSync(join(root, "cgroup.controllers"), "utf8").includes("memory"));
}

const hosts: [name: string, options: LiveOptions, lacks: string | undefined][] = [
  [
    "version 1 of cgroups",
    { cgroup: "host" },
    lacksMemoryCgroup() ?? (unifiedWithMemory() && "the host has version 2"),
  ],
  [
    "version 2 of cgroups",
    { cgroup: "v2" },
    unifiedWithMemory() ? undefined : "version 2 has no memory controller here",
  ],
];

describe.each(hosts)("out of memory, with %s", (_name, options, lacks) => {
  it("is told before the exit that it causes, and for a process that init survives", async (context) => {
    skipUnless(context, lacks === undefined, lacks ?? "");
    await using live = await Live.start(options);
    await using task = await live.run(["eater"], { memoryLimit: MEMORY });
    expect(await task.wait()).toBe(137);
    expect(await task.delete()).toBe(137);
    await live.events.waitFor(task.id, "delete");
    expect(live.events.summary(task.id)).toEqual(["create", "start", "oom", "exit 137", "delete"]);

    await using survivor = await live.run(["sh", "-c", "eater; echo code $?; exec sleeper 3"], {
      memoryLimit: MEMORY,
    });
    expect(await survivor.stdout.line()).toBe("eating");
    expect(await survivor.stdout.line()).toBe("code 137");
    await live.events.waitFor(survivor.id, "oom");
    const exec = await survivor.execToEnd(["eater"]);
    expect(exec.status).toBe(137);
    await live.events.waitFor(survivor.id, "oom", { count: 2 });
    await survivor.kill(15);
    expect(await survivor.wait()).toBe(3);
    await live.events.waitFor(survivor.id, "exit");
    expect(live.events.summary(survivor.id).filter((line) => !line.includes("e1"))).toEqual([
      "create",
      "start",
      "oom",
      "oom",
      "exit 3",
    ]);
  });
});

it("out of memory while cedanad is away is told by the next one", async (context) => {
  oursOnly(context, "has no cedanad");
  skipUnless(context, lacksMemoryCgroup() === undefined, "no memory controller");
  using daemon = new BreakableDaemon();
  await using live = await Live.start({ env: { CEDANA_DAEMON: daemon.program } });
  await using task = await live.run(["sh", "-c", "read line; eater; echo code $?; exec sleeper"], {
    memoryLimit: MEMORY,
    stdin: true,
  });
  daemon.break();
  await live.killCedanad();
  task.write("go\n");
  await task.stdout.lineMatching(/^code 137$/);
  expect(live.events.summary(task.id)).toEqual(["create", "start"]);
  daemon.mend();
  await live.events.waitFor(task.id, "oom");
});

describe.each([
  ["version 1", { cgroup: "host" }],
  ["version 2", { cgroup: "v2" }],
] as [string, LiveOptions][])("Stats with %s of cgroups", (_name, options) => {
  it("says what the cgroup's files say of a container that stands still", async (context) => {
    if (options.cgroup === "host")
      skipUnless(context, lacksMemoryCgroup() === undefined, "no memory controller");
    await using live = await Live.start(options);
    const limits = unifiedWithMemory() || options.cgroup === "host";
    await using task = await live.run(["memory", "8"], limits ? { pidsLimit: 40, memoryLimit: MEMORY } : {});
    await task.stdout.lineMatching(/^1 /);
    await task.pause();
    const [metric] = await live.client.tasks.metrics(task.id);
    const { typeUrl, value } = metric!.data!;
    if (typeUrl === "io.containerd.cgroups.v1.Metrics") checkV1(live, task, v1.Metrics.decode(value));
    else checkV2(live, task, v2.Metrics.decode(value));
  });
});

function reader(live: Live, task: LiveTask) {
  const read = (controller: string, file: string) => {
    // The mount namespace of a containerd that sees version 2 only has it at another place.
    const root = join("/proc", String(live.containerdPid), "root/sys/fs/cgroup", controller);
    return readFileSync(join(root, live.namespace, task.id, file), "utf8").trim();
  };
  const keyed = (controller: string, file: string) =>
    new Map(
      read(controller, file)
        .split("\n")
        .map((line) => [line.split(" ")[0]!, BigInt(line.split(" ")[1] ?? 0)] as const),
    );
  return { read, keyed, number: (controller: string, file: string) => BigInt(read(controller, file)) };
}

function checkV1(live: Live, task: LiveTask, metrics: v1.Metrics): void {
  const { read, keyed, number } = reader(live, task);
  expect(metrics.pids).toMatchObject({ current: 1n, limit: 40n });
  expect(metrics.cpu!.usage!.total).toBe(number("cpuacct", "cpuacct.usage"));
  expect(metrics.cpu!.usage!.total).toBeGreaterThan(0n);
  expect(metrics.cpu!.usage!.perCpu.map(String)).toEqual(
    read("cpuacct", "cpuacct.usage_percpu").split(/\s+/),
  );
  const throttling = keyed("cpu", "cpu.stat");
  expect(metrics.cpu!.throttling).toMatchObject({ periods: throttling.get("nr_periods") });
  const stat = keyed("memory", "memory.stat");
  const { memory } = metrics;
  expect(memory).toMatchObject({
    rss: stat.get("rss"),
    cache: stat.get("cache"),
    pgFault: stat.get("pgfault"),
    totalActiveAnon: stat.get("total_active_anon"),
    hierarchicalMemoryLimit: BigInt(MEMORY),
  });
  expect(memory!.rss).toBeGreaterThan(8n << 20n);
  expect(memory!.usage).toMatchObject({
    limit: BigInt(MEMORY),
    usage: number("memory", "memory.usage_in_bytes"),
    max: number("memory", "memory.max_usage_in_bytes"),
    failcnt: number("memory", "memory.failcnt"),
  });
  expect(metrics.memoryOomControl).toMatchObject({
    oomKill: keyed("memory", "memory.oom_control").get("oom_kill"),
  });
}

function checkV2(live: Live, task: LiveTask, metrics: v2.Metrics): void {
  const { keyed, number } = reader(live, task);
  if (isControl && !unifiedWithMemory()) return; // the Go shim counts nothing without controllers
  const cpu = keyed("", "cpu.stat");
  expect(metrics.cpu).toMatchObject({
    usageUsec: cpu.get("usage_usec"),
    userUsec: cpu.get("user_usec"),
    systemUsec: cpu.get("system_usec"),
  });
  expect(metrics.cpu!.usageUsec).toBeGreaterThan(0n);
  if (!unifiedWithMemory()) return; // nothing more is counted there
  expect(metrics.pids).toMatchObject({ current: 1n, limit: 40n });
  expect(metrics.memory).toMatchObject({
    usage: number("", "memory.current"),
    anon: keyed("", "memory.stat").get("anon"),
  });
}
