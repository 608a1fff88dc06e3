// cedana.io/lazy: a restored container starts at once, and its memory is filled behind it. Whatever happens to the page daemon, the
// program never sees a byte that it has not written: it goes on, or waits, or is ended.

import { existsSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { Live } from "./harness/live.ts";
import { bothEngines, missingFor } from "./harness/matrix.ts";
import { isAlive } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const LAZY = { "cedana.io/lazy": "true" };
/** So much that some of it is missing still when a test looks. */
const MIB = 192;

for (const combination of bothEngines) {
  const missing = missingFor(combination);
  const title = `a lazy restore with ${combination.engine}`;
  describe.skipIf(missing)(`${title}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    let images: string;
    let last: number;
    const args = ["pattern", String(MIB), "5"];

    beforeAll(async () => {
      live = await Live.start(combination);
      ({ images, last } = await dumped(args));
    });
    afterEach(() => live.expectNoLeftovers());
    afterAll(async () => {
      if (images) rmSync(images, { recursive: true });
      await live?.stop();
    });

    async function dumped(args: string[]): Promise<{ images: string; last: number }> {
      await using task = await live.run(args);
      const last = await task.nextNumber();
      return { images: await task.checkpoint({ exit: true }), last };
    }

    /** Pids of guard and daemon, as long as there is one that fills memory. */
    function pageDaemon(task: LiveTask): { guard: number; daemon: number } | undefined {
      const file = join(task.bundle, "lazy-pages/guard");
      if (!existsSync(file)) return undefined;
      const [guard = 0, daemon = 0] = readFileSync(file, "utf8").split(" ").map(Number);
      return { guard, daemon };
    }

    function lazyState(task: LiveTask): string | undefined {
      return JSON.parse(readFileSync(join(task.bundle, "cedana-task.json"), "utf8")).lazy?.state;
    }

    const isFilled = (task: LiveTask) =>
      until(() => lazyState(task) === "filled" && !existsSync(join(task.bundle, "lazy-pages")), {
        timeoutMs: 60_000,
        what: () => `all memory, state ${lazyState(task)}`,
      });

    it("goes on with the next number, and all memory is as it was", async () => {
      await using task = await live.restore(images, args, { annotations: LAZY });
      expect(await task.nextNumber()).toBeGreaterThanOrEqual(last);
      await isFilled(task);
      const now = await task.nextNumber();
      while ((await task.nextNumber()) < now + MIB); // once around
      expect(task.stdout.text).not.toContain("WRONG");
      expect(readdirSync(task.bundle).filter((name) => /restore|lazy/.test(name))).toEqual([
        "restore.log.json",
      ]);
    });

    it("blocks, and is killed, when the page daemon is killed; nothing wrong is ever read", async () => {
      await using task = await live.restore(images, args, { annotations: LAZY });
      const { guard, daemon } = pageDaemon(task)!;
      process.kill(daemon, "SIGKILL");
      expect(await task.wait()).toBe(137);
      expect(task.stdout.text).not.toContain("WRONG");
      await until(() => !isAlive(guard), { what: () => "the guard's end" });
    });
  });
}
