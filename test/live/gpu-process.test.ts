// The whole loop with CRIU on a process that is in no container: lock, checkpoint, dump, kill, restore, restore, unlock. On the stand-in
// driver; with CEDANA_TEST_REAL_GPU=1 (`npm run test:gpu`) the same client on this machine's own driver and GPU.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { deadlines } from "../../src/gpu/deadlines.ts";
import { DriverMeans, HelperKeeper } from "../../src/gpu/means.ts";
import { isAlive } from "../../src/linux/proc.ts";
import { whyNoDump } from "../criu/harness.ts";
import {
  driverEnvironment,
  Gpus,
  makeDirectory,
  onRealGpu,
  standIn,
  UUIDS,
  withEnvironment,
} from "../gpu/harness.ts";
import { machineWithGpu } from "../gpu/machine.ts";
import { until } from "./harness/until.ts";

const machine = onRealGpu ? machineWithGpu() : undefined;
const missing = whyNoDump() ?? (typeof machine === "string" ? machine : undefined);
const driver = onRealGpu ? "this machine's driver" : "the stand-in driver";

describe.skipIf(missing)(`a process with a GPU, ${driver} and CRIU${missing ? ` (${missing})` : ""}`, () => {
  let work: string;
  let gpus: Gpus;
  const pids: number[] = [];
  beforeEach(() => {
    work = mkdtempSync("/tmp/cedana-gpu-");
    gpus = new Gpus();
  });
  afterEach(async () => {
    for (const pid of pids.splice(0)) {
      if (isAlive(pid)) process.kill(pid, "SIGKILL");
      await until(() => !isAlive(pid), { what: () => `the end of ${pid}` });
    }
    gpus[Symbol.dispose]();
    rmSync(work, { recursive: true, force: true });
  });

  async function criu(command: "dump" | "restore", args: string[]): Promise<{ status: number; log: string }> {
    const images = makeDirectory(join(work, "images"));
    const log = `${command}.log`;
    const child = spawn("criu", [command, "-D", images, "-o", log, "-v4", "--shell-job", ...args], {
      stdio: "ignore",
    });
    const [status] = await once(child, "exit");
    return { status, log: readFileSync(join(images, log), "utf8") };
  }

  const numbers = (output: string) =>
    (readFileSync(output, "utf8").match(/(?<=^client )\d+$/gm) ?? []).map(Number);

  it("is refused while it runs, and comes back with its GPU memory and its counter when it was checkpointed", async () => {
    const directory = await standIn();
    using _ = withEnvironment(onRealGpu ? {} : driverEnvironment(directory, gpus));
    await using helpers = new HelperKeeper();
    const means = new DriverMeans(helpers, deadlines(), String);
    const devices = Math.min(2, (await means.devices()).length);
    const output = join(work, "output");
    const file = openSync(output, "a");
    const child = spawn(join(directory, "client-dlsym"), ["--devices", String(devices)], {
      env: onRealGpu ? {} : { LD_LIBRARY_PATH: directory, CEDANA_TEST_GPU_DIR: gpus.path },
      stdio: ["ignore", file, file],
      detached: true,
    });
    closeSync(file);
    pids.push(child.pid!);
    const ended = once(child, "exit"); // a pid comes back only when its process has been reaped
    await until(() => numbers(output).length > 3, { what: () => "the first numbers" });

    const early = await criu("dump", ["--tree", String(child.pid), "--leave-running"]);
    expect(early.status).not.toBe(0);
    expect(early.log).toMatch(onRealGpu ? /nvidia/ : /landlock/);

    const pid = child.pid!;
    await expect(means.unlock(pid)).rejects.toThrow(/another state/);
    await means.lock(pid, 5000);
    expect(await means.state(pid)).toBe("locked");
    await means.checkpoint(pid);
    const last = numbers(output).at(-1)!;
    const dump = await criu("dump", ["--tree", String(pid)]);
    expect(dump.status, dump.log.slice(-2000)).toBe(0);
    await ended;
    gpus.wipe();
    const restore = await criu("restore", ["--restore-detached"]);
    expect(restore.status, restore.log.slice(-2000)).toBe(0);
    expect(await means.state(pid)).toBe("checkpointed");
    await means.restore(pid, []);
    if (!onRealGpu) expect(gpus.allocations(UUIDS[1])).toBe(3);
    await means.unlock(pid);
    await until(() => numbers(output).at(-1)! > last + 3, {
      what: () => readFileSync(output, "utf8").slice(-200),
    });
    const all = numbers(output);
    expect(all).toEqual(all.map((_, index) => all[0]! + index));
  });
});
