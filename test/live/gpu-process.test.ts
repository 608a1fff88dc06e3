// The whole loop with CRIU on a process that is in no container: lock, checkpoint, dump, kill, restore, restore, unlock.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { deadlines } from "../../src/gpu/deadlines.ts";
import { DriverMeans, HelperKeeper } from "../../src/gpu/means.ts";
import { isAlive } from "../../src/linux/proc.ts";
import { whyNoDump } from "../criu/harness.ts";
import { driverEnvironment, Gpus, makeDirectory, standIn, UUIDS, withEnvironment } from "../gpu/harness.ts";
import { until } from "./harness/until.ts";

const missing = whyNoDump();

describe.skipIf(missing)(
  `a process with a GPU, the stand-in driver and CRIU${missing ? ` (${missing})` : ""}`,
  () => {
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

    async function criu(
      command: "dump" | "restore",
      args: string[],
    ): Promise<{ status: number; log: string }> {
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
      using _ = withEnvironment(driverEnvironment(directory, gpus));
      const output = join(work, "output");
      const file = openSync(output, "a");
      const child = spawn(join(directory, "client-dlsym"), ["--devices", "2"], {
        env: { LD_LIBRARY_PATH: directory, CEDANA_TEST_GPU_DIR: gpus.path },
        stdio: ["ignore", file, file],
        detached: true,
      });
      closeSync(file);
      pids.push(child.pid!);
      const ended = once(child, "exit"); // a pid comes back only when its process has been reaped
      await until(() => numbers(output).length > 3, { what: () => "the first numbers" });

      const early = await criu("dump", ["--tree", String(child.pid), "--leave-running"]);
      expect(early.status).not.toBe(0);
      expect(early.log).toMatch(/landlock/);

      const pid = child.pid!;
      await using helpers = new HelperKeeper();
      const means = new DriverMeans(helpers, deadlines(), String);
      await means.lock(pid, 1000);
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
      expect(gpus.allocations(UUIDS[1])).toBe(3);
      await means.unlock(pid);
      await until(() => numbers(output).at(-1)! > last + 3, {
        what: () => readFileSync(output, "utf8").slice(-200),
      });
      const all = numbers(output);
      expect(all).toEqual(all.map((_, index) => all[0]! + index));
    });
  },
);
