// Checkpoint and restore as a user types them, with containerd's own ctr.

import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { GO_SHIM, type Live } from "./harness/live.ts";
import { type Combination, missingFor, skipUnless } from "./harness/matrix.ts";
import { numbersIn } from "./harness/output.ts";
import { IMAGE, repository } from "./harness/programs.ts";
import { liveFor } from "./harness/suite.ts";
import { until } from "./harness/until.ts";

const combinations: Combination[] = [
  // Not crun: what ctr makes has limits, for which a hybrid host seen as version 2 has no controllers.
  { containerd: "1.7", engine: "runc" },
  { containerd: "2.1", engine: "runc" },
];

for (const combination of combinations) {
  const missing = missingFor(combination);
  const title = `ctr ${combination.containerd} with ${combination.engine}`;
  describe.skipIf(missing)(`${title}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor(combination, (started) => {
      live = started;
    });

    /** `ctr run` of the counter, whose output goes to a file. */
    async function ctrRun(id: string): Promise<string> {
      const output = join(live.dir, `${id}.out`);
      const flags = [...live.ctrRuntimeFlags(), "--log-uri", `file://${output}`];
      const mount = `type=bind,src=${live.programs},dst=/programs,options=rbind:ro`;
      await live.ctr("run", "--detach", ...flags, "--mount", mount, IMAGE, id, "/programs/counter");
      await until(() => existsSync(output) && numbersIn(readFileSync(output, "utf8")).length > 2, {
        what: () => "the first numbers",
      });
      return output;
    }

    /** Kills and removes it, and returns its last number. */
    async function end(id: string, output: string): Promise<number> {
      await live.ctr("task", "delete", "--force", id).catch((error: Error) => {
        if (!/137/.test(error.message)) throw error; // ctr ends with the task's exit status
      });
      await live.ctr("container", "delete", id);
      return numbersIn(readFileSync(output, "utf8")).at(-1)!;
    }

    it("brings a container back from the content store, with the files that it had changed", async () => {
      const output = await ctrRun("before");
      await live.ctr("task", "exec", "--exec-id", "e", "before", "sh", "-c", "echo kept > /changed");
      const [image, second] = ["cedana.local/checkpoint:1", "cedana.local/checkpoint:2"];
      const twice = combination.containerd === "2.1"; // what ctr 1.7 makes of a restored container it can't restore
      await live.ctr("container", "checkpoint", "--rw", "--task", "before", image);
      const last = await end("before", output);
      const restored = await ctrRestore("after", image);
      try {
        const first = await restored.firstNumber();
        expect(first).toBeGreaterThan(0);
        expect(first).toBeLessThanOrEqual(last + 2); // a ctr that leaves may take a line along
        const cat = await live.ctr("task", "exec", "--exec-id", "e", "after", "cat", "/changed");
        expect(cat).toBe("kept\n");
        if (twice) await live.ctr("container", "checkpoint", "--rw", "--task", "after", second);
      } finally {
        await restored.end();
      }
      await live.ctr("images", "rm", "--sync", image);
      if (!twice) return;
      const again = await ctrRestore("again", second);
      try {
        expect(await again.firstNumber()).toBeGreaterThan(last);
      } finally {
        await again.end();
      }
      await live.ctr("images", "rm", "--sync", second);
    });

    /** `ctr container restore --live`, then `ctr task attach`, which reads on in the FIFOs that the restore made. */
    async function ctrRestore(id: string, image: string) {
      await live.ctr("container", "restore", "--rw", "--live", id, image);
      const [file, ...args] = live.ctrArgv(["task", "attach", id]);
      const attach: ChildProcess = spawn(file!, args, { stdio: ["ignore", "pipe", "ignore"] });
      const gone = new Promise((resolve) => attach.once("exit", resolve));
      let text = "";
      attach.stdout!.on("data", (chunk: Buffer) => {
        text += chunk.toString();
      });
      return {
        firstNumber: async () => {
          const numbers = await until(
            () => {
              const found = numbersIn(text);
              return found.length > 3 && found;
            },
            { what: () => `numbers of ${id}: ${text}` },
          );
          expect(numbers).toEqual(numbers.map((_, index) => numbers[0]! + index));
          return numbers[0]!;
        },
        end: async () => {
          await live.ctr("task", "kill", "--signal", "SIGKILL", id);
          await gone;
          await live.ctr("task", "delete", id).catch(() => {}); // attach has deleted it, or ends with its exit status
          await live.ctr("container", "delete", id);
        },
      };
    }

    it("dumps into the directory that --image-path names, and ends the container with --exit", async (context) => {
      skipUnless(
        context,
        combination.containerd === "2.1",
        "ctr 1.7 has --image-path for io.containerd.runc.v2 only",
      );
      const output = await ctrRun("c");
      const [kept, last] = [mkdtempSync(join(live.dir, "image-")), mkdtempSync(join(live.dir, "image-"))];
      const work = mkdtempSync(join(live.dir, "work-"));
      await live.ctr("task", "checkpoint", "--image-path", kept, "--work-path", work, "c");
      expect(existsSync(join(work, "dump.log"))).toBe(true);
      const count = numbersIn(readFileSync(output, "utf8")).length;
      await until(() => numbersIn(readFileSync(output, "utf8")).length > count + 2, {
        what: () => "the container to go on",
      });
      await new Promise((resolve) => setTimeout(resolve, 1_000)); // ctr names a checkpoint by its second, and refuses a name twice
      await live.ctr("task", "checkpoint", "--exit", "--image-path", last, "c");
      await until(async () => /\bSTOPPED\b/.test(await live.ctr("task", "ls")), {
        what: () => "the end of the container",
      });
      const number = await end("c", output);
      expect(JSON.parse(readFileSync(join(last, "cedana.json"), "utf8"))).toMatchObject({
        containerId: "c",
        options: { leaveRunning: false },
      });
      expect(existsSync(join(kept, "cedana.json"))).toBe(true);
      expect(number).toBeGreaterThan(count);
    });

    it("is the runtime io.containerd.runc.v2 too, where the runtime's path names our shim", async () => {
      const runtimePath = join(repository, "bin/containerd-shim-cedana-v2");
      const task = await live.run(["counter"], { runtime: GO_SHIM, runtimePath });
      await task.nextNumber();
      expect(live.shimOf(task.id).argv[0]).toContain("cedana");
      const image = mkdtempSync(join(live.dir, "image-"));
      await live.ctr("task", "checkpoint", "--exit", "--image-path", image, task.id);
      expect(await task.wait()).toBe(137);
      await task.stdout.end();
      const last = numbersIn(task.stdout.text).at(-1)!;
      await task.destroy();
      await using restored = await live.restore(image, ["counter"], { runtime: GO_SHIM, runtimePath });
      expect(await restored.nextNumber()).toBe(last + 1);
    });
  });
}
