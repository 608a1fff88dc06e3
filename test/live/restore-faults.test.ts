// cedanad ends at each boundary between the steps of a restore: the call is answered, the container runs once, nothing is left.

import { mkdtempSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { restoreChecks, restoreSteps } from "../../src/checkpoint/restore.ts";
import { boundariesOf } from "./harness/boundaries.ts";
import { BreakableDaemon } from "./harness/breakable.ts";
import { Live } from "./harness/live.ts";
import type { LiveTask } from "./harness/task.ts";

/** Files of a restore, in the bundle. */
const leftIn = (task: LiveTask) =>
  readdirSync(task.bundle).filter((name) => /^criu-|attempt|original|\.new$/.test(name));

describe("a crash of cedanad in a restore", () => {
  it("leaves one whole container, at each boundary of its steps and of the checks before it", async () => {
    using daemon = new BreakableDaemon();
    await using live = await Live.start({
      containerd: "1.7",
      engine: "runc",
      env: { CEDANA_DAEMON: daemon.program },
    });
    const image = mkdtempSync(join(live.dir, "image-"));
    {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      await task.checkpoint({ imagePath: image });
    }
    let first: number | undefined;
    const before = readdirSync(image).sort();
    const checks = boundariesOf("checkRestore", restoreChecks);
    const steps = boundariesOf("restore", restoreSteps);
    for (const boundary of checks) {
      daemon.crashNextAt(boundary);
      await live.killCedanad();
      await using task = await live.create(["counter"], { criuImagePath: image });
      expect(await task.status(), boundary).toBe("CREATED");
    }
    for (const boundary of steps) {
      await using task = await live.create(["counter"], { criuImagePath: image });
      daemon.crashNextAt(boundary);
      await live.killCedanad();
      await task.status(); // a delivery to the one that is dying would count
      await task.start();
      expect(await task.status(), boundary).toBe("RUNNING");
      const number = await task.nextNumber();
      first ??= number;
      expect(number, boundary).toBe(first);
      expect(leftIn(task), boundary).toEqual([]);
      await live.events.waitFor(task.id, "start");
      expect(live.events.summary(task.id), boundary).toEqual(["create", "start"]);
    }
    expect(readdirSync(image).sort()).toEqual(before);
    expect(live.cedanadLog().match(/cedanad serves/g)!.length).toBeGreaterThan(
      2 * (checks.length + steps.length),
    );
    await live.expectNoLeftovers();
  });
});
