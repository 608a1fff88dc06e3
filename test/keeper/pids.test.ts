// cedana-pids: which ids are taken in another pid namespace, and where the kernel goes on in it.

import { type ChildProcess, spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { askPidNamespace, holdersOf } from "../../src/linux/pid-namespace.ts";
import { BUILD_TIMEOUT_MS, buildKeeper, keeperBinary } from "./harness.ts";

const SET = "echo $((ID - 1)) > /proc/sys/kernel/ns_last_pid";
beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

describe.skipIf(process.getuid?.() !== 0)("cedana-pids", () => {
  let unshare: ChildProcess;
  let path: string;
  beforeEach(async () => {
    // 40 is a process, 50 a process group whose first process has ended, 60 a zombie.
    const script = `
      ${SET.replace("ID", "40")}; sleep 1000 &
      set -m; ${SET.replace("ID", "50")}; (sleep 1000 & sleep 1000 & exit 0) & wait $!; set +m
      ${SET.replace("ID", "60")}; sh -c 'exit 0' &
      echo ready; exec sleep 1000`;
    unshare = spawn("unshare", ["--pid", "--fork", "--kill-child", "bash", "-c", script], {
      stdio: ["ignore", "pipe", "ignore"], // bash tells of its jobs
    });
    await new Promise((resolve) => unshare.stdout!.once("data", resolve));
    const init = readFileSync(`/proc/${unshare.pid}/task/${unshare.pid}/children`, "utf8").trim();
    path = `/proc/${init}/ns/pid`;
  });
  afterEach(async () => {
    const ended = new Promise((resolve) => unshare.once("exit", resolve));
    unshare.kill("SIGKILL");
    await ended;
  });

  it("finds processes, process groups without their first process, and zombies", async () => {
    const state = await askPidNamespace(keeperBinary, path, [1, 39, 40, 50, 60, 61, 4_000_000, 5_000_000]);
    expect(state.taken).toEqual([1, 40, 50, 60]);
    expect(state.last).toBeGreaterThanOrEqual(60);
    expect(state.max).toBeGreaterThan(300);
    const holders = await holdersOf(path, [...state.taken, 39]);
    expect([...holders.keys()].sort((a, b) => a - b)).toEqual([1, 40, 50, 60]);
    expect(holders.get(40)).toMatch(/^process \d+ \(sleep\)/);
    expect(holders.get(50)).toMatch(/^the process group of \d+ \(sleep\)/);
    expect(holders.get(60)).toMatch(
      /^process \d+ \((?:sh|bash)\).*, which has ended and waits for its parent \d+$/,
    );
  });

  it("makes the kernel go on elsewhere", async () => {
    await askPidNamespace(keeperBinary, path, [], 3000);
    expect((await askPidNamespace(keeperBinary, path, [])).last).toBeGreaterThanOrEqual(3000);
  });

  it("says why it can't", async () => {
    await expect(askPidNamespace(keeperBinary, "/nowhere", [1])).rejects.toThrow(/\/nowhere: No such file/);
    await expect(askPidNamespace(keeperBinary, "/dev/null", [1])).rejects.toThrow(/join the pid namespace/);
    await expect(askPidNamespace(keeperBinary, path, [1], 2 ** 40)).rejects.toThrow(/write .*ns_last_pid/);
    await expect(askPidNamespace("/nowhere", path, [1])).rejects.toThrow(/ENOENT/);
  });
});
