import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, expect, it } from "vitest";
import { CgroupOfRestore } from "../../../src/runtime/oci/restore-cgroup.ts";
import { cgroupRoots, isAlive, removeCgroups } from "../../live/harness/system.ts";
import { until } from "../../live/harness/until.ts";

const name = `cedana-test-restore-${process.pid}`;
const children: ChildProcess[] = [];
/** Nobody can enter a fresh one of cpuset, which has no CPU yet. */
const groups =
  process.getuid!() === 0
    ? cgroupRoots()
        .filter((root) => !root.endsWith("cpuset"))
        .map((root) => join(root, name))
    : [];

async function start(...argv: string[]): Promise<number> {
  const child = spawn(argv[0]!, argv.slice(1), { stdio: "ignore" });
  children.push(child);
  await once(child, "spawn");
  for (const group of groups) writeFileSync(join(group, "cgroup.procs"), String(child.pid));
  return child.pid!;
}

afterEach(async () => {
  for (const child of children) child.kill("SIGKILL");
  await Promise.all(children.map((child) => child.signalCode ?? once(child, "exit")));
  removeCgroups(name);
});

it.skipIf(groups.length === 0)(
  "what a failed restore has left is ended, and nothing of others in its cgroup",
  async () => {
    for (const group of groups) mkdirSync(group);
    const before = await start("sleep", "100");
    const within = await CgroupOfRestore.before({ linux: { cgroupsPath: `/${name}` } }, "c", false);
    const theirs = await start("sleep", "100");
    const restored = await start("unshare", "--mount", "sleep", "100");
    await until(async () => {
      await within.empty();
      return !isAlive(restored);
    });
    expect([before, theirs].map(isAlive)).toEqual([true, true]);
  },
);
