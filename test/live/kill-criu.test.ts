// CRIU or the engine is killed in the middle of a dump or a restore: the container runs on, or the task can be deleted; nothing is left.

import { mkdtempSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { DeadlyCriu, dumpMoments, restoreMoments } from "./harness/deadly-criu.ts";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";

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
          const before = await task.nextNumber();
          expect(await task.nextNumber(), what).toBe(before + 1);
          expect(readdirSync(image), what).toEqual([]);
        }
      expect(failed).toBeGreaterThanOrEqual(dumpMoments.length);
      await task.destroy();
    });

    it("leaves a task that can be deleted, and the images, when one is killed in a restore", async () => {
      const before = readdirSync(good).sort();
      for (const victim of ["criu", "engine"] as const)
        for (const moment of restoreMoments) {
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
