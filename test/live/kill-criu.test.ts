// CRIU or the engine is killed in the middle of a dump or a restore: the container runs on, or the task can be deleted; nothing is left.

import { execFileSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { DeadlyCriu, dumpMoments, restoreMoments } from "./harness/deadly-criu.ts";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { entries } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const ROUNDS = process.env.CEDANA_SOAK ? 40 : 3;

/** CRIUs at work for a bundle. */
function criuIn(bundle: string): number[] {
  return entries("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      try {
        const isHere = readlinkSync(`/proc/${pid}/cwd`).startsWith(bundle);
        return isHere && readFileSync(`/proc/${pid}/comm`, "utf8").startsWith("criu");
      } catch {
        return false; // it has ended
      }
    });
}

function numberAfter(task: LiveTask, what: string): Promise<number> {
  return task.nextNumber().catch((cause) => {
    throw new Error(`nothing more of a container after the end of ${what}`, { cause });
  });
}

const nonEmpty = <T>(list: T[]) => (list.length > 0 ? list : undefined);

const outcomeOf = (call: Promise<unknown>) =>
  call.then(
    () => "done",
    (error: Error) => error.message,
  );

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination);
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let deadly: DeadlyCriu;
    let live: Live;
    let good: string;
    beforeAll(async () => {
      deadly = new DeadlyCriu();
      live = await Live.start({ ...combination, path: deadly.directory });
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      good = await task.checkpoint();
    });
    afterEach(() => live.expectNoLeftovers());
    afterAll(async () => {
      await live?.stop();
      deadly?.[Symbol.dispose]();
    });

    it("leaves the container running, or a whole checkpoint of it, when one is killed in a dump", async () => {
      let task = await live.run(["counter"]);
      await task.nextNumber();
      let failed = 0;
      for (const victim of ["criu", "engine"] as const)
        for (const moment of dumpMoments) {
          const what = `${victim} at ${moment}`;
          const image = mkdtempSync(join(live.dir, "image-"));
          deadly.killNextAt(moment, victim);
          const outcome = await outcomeOf(task.checkpoint({ imagePath: image, exit: true }));
          expect(deadly.killed(), what).toBe(victim === "criu" ? "criu" : combination.engine);
          if (outcome === "done") {
            // CRIU went on alone, to its end.
            expect(victim, what).toBe("engine");
            expect(await task.wait(), what).toBe(137);
            await task.destroy();
            task = await live.restore(image, ["counter"]);
            await task.nextNumber();
            continue;
          }
          failed++;
          expect(await task.status(), what).toBe("RUNNING");
          task.stdout.skip();
          const before = await numberAfter(task, what);
          expect(await task.nextNumber(), what).toBe(before + 1);
          expect(readdirSync(image), what).toEqual([]);
        }
      expect(failed).toBeGreaterThanOrEqual(dumpMoments.length);
      await task.destroy();
    });

    it("leaves the container running when CRIU is killed and a helper of it holds the engine's connection", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      deadly.killNextAt("start", "criu");
      const outcome = await outcomeOf(task.checkpoint());
      // It is CRIU asked for its version, without which crun goes on, to one that lives.
      if (combination.engine === "runc") expect(outcome).not.toBe("done");
      expect(deadly.killed()).toBe("criu");
      expect(await task.status()).toBe("RUNNING");
      task.stdout.skip();
      await task.nextNumber();
    });

    it("leaves the memory right, or no process, when CRIU is killed while it reads it", async () => {
      await using task = await live.run(["memory", "64"]);
      const sum = (await task.stdout.lineMatching(/^ready (\S+)/))[1];
      for (let round = 0; round < ROUNDS; round++) {
        const image = mkdtempSync(join(live.dir, "image-"));
        const dump = outcomeOf(task.checkpoint({ imagePath: image }));
        const pids = await until(() => nonEmpty(criuIn(task.bundle)), { what: () => "CRIU", everyMs: 1 });
        await new Promise((resolve) => setTimeout(resolve, (round / ROUNDS) * 80));
        let killed = 0;
        for (const pid of pids) {
          try {
            process.kill(pid, "SIGKILL");
            killed++;
          } catch {
            // ESRCH: it was quicker
          }
        }
        const outcome = await dump;
        if (outcome === "done" || killed === 0) continue; // it had the last word
        expect(readdirSync(image)).toEqual([]);
        // CRIU runs code in the processes: killed in that moment, it takes them along, at the latest once they are thawed.
        task.stdout.skip();
        const line = await task.stdout.lineMatching(/^\d+ (\S+)/).catch((error: unknown) => {
          if (!task.stdout.ended) throw error;
        });
        if (!line) {
          await task.wait();
          return;
        }
        expect(line[1]).toBe(sum);
      }
    });

    it("lets packets in again when CRIU is killed while it keeps them away", async () => {
      await using task = await live.run(["sh", "-c", "nc -l -p 7000 & counter"]);
      await task.nextNumber();
      await until(async () => (await task.execToEnd(["netstat", "-ltn"])).stdout.includes(":7000"), {
        what: () => "the listener",
      });
      deadly.killNextAt("post-dump", "criu");
      expect(await outcomeOf(task.checkpoint())).not.toBe("done");
      expect(deadly.killed()).toBe("criu");
      const rules = "iptables-save; ip6tables-save; nft list ruleset";
      const enter = ["--target", String(task.pid), "--net", "sh", "-c", `{ ${rules}; } 2>&1`];
      expect(execFileSync("nsenter", enter, { encoding: "utf8" })).not.toContain("CRIU");
      task.stdout.skip();
      await task.nextNumber();
    });

    it("leaves a task that can be deleted, and the images, when one is killed in a restore", async () => {
      const before = readdirSync(good).sort();
      // What is CRIU's is the same with both engines.
      const moments = combination.engine === "runc" ? restoreMoments : restoreMoments.slice(1, 4);
      for (const victim of ["criu", "engine"] as const)
        for (const moment of moments) {
          const what = `${victim} at ${moment}`;
          const task = await live.create(["counter"], { criuImagePath: good });
          deadly.killNextAt(moment, victim);
          const outcome = await outcomeOf(task.start());
          const killed = deadly.killed();
          if (killed === undefined)
            expect(outcome, what).toBe("done"); // this engine has CRIU go without that moment
          else {
            expect(outcome, what).not.toBe("done");
            expect(await task.status(), what).toBe("STOPPED");
            const left = live
              .leftovers()
              .filter((line) =>
                new RegExp(`(?:^cgroup|^engine state|criu).*/${task.id}\\b|\\(container,`).test(line),
              );
            expect(left, what).toEqual([]);
            expect(await task.delete(), what).toBe(255);
          }
          await task.destroy();
          expect(readdirSync(good).sort(), what).toEqual(before);
        }
      await using restored = await live.restore(good, ["counter"]);
      await restored.nextNumber();
    });
  });
}
