// cedanad ends at each boundary between the steps of a restore: the call is answered, the container runs once, nothing is left.

import { mkdtempSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { restoreChecks } from "../../src/checkpoint/restore/checks.ts";
import { restoreSteps } from "../../src/checkpoint/restore.ts";
import { boundariesOf } from "./harness/boundaries.ts";
import { BreakableDaemon } from "./harness/breakable.ts";
import { Live } from "./harness/live.ts";
import type { LiveTask } from "./harness/task.ts";

// What only looks has nothing to undo: one moment in each of these steps. At a create, two of them stand for all.
const looks = new Set<string>(restoreChecks.map((step) => step.name));
const boundaries = boundariesOf("restore", restoreSteps).filter(
  (boundary) => !(boundary.endsWith(".after") && looks.has(boundary.split(".")[1]!)),
);
const boundariesOfCreate = ["checkRestore.openCheckpoint.after", "checkRestore.refuseDifferences.before"];

/** Files of a restore, in the bundle. */
const leftIn = (task: LiveTask) =>
  readdirSync(task.bundle).filter((name) => /^criu-|attempt|original|\.new$/.test(name));

describe("a crash of cedanad in a restore", () => {
  // Two new cedanads for each boundary: a second where the machine is idle, three where it isn't.
  it("leaves one whole container, at each boundary of its steps", { timeout: 240_000 }, async () => {
    using daemon = new BreakableDaemon();
    await using live = await Live.start({
      containerd: "1.7",
      engine: "runc",
      env: daemon.env,
    });
    const image = mkdtempSync(join(live.dir, "image-"));
    {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      await task.checkpoint({ imagePath: image });
    }
    let first: number | undefined;
    const before = readdirSync(image).sort();
    for (const boundary of boundariesOfCreate) {
      daemon.crashNextAt(boundary);
      await live.killCedanad();
      await using task = await live.create(["counter"], { criuImagePath: image });
      expect(await task.status(), boundary).toBe("CREATED");
    }
    for (const boundary of boundaries) {
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
    const crashes = boundariesOfCreate.length + boundaries.length;
    expect(live.cedanadLog().match(/cedanad serves/g)!.length).toBeGreaterThan(2 * crashes);
    await live.expectNoLeftovers();
  });

  it("that ends two cedanads leaves a task that can be deleted, with the container that runs already", async () => {
    // Where the engine has restored it, and nobody has been told.
    const fault = `restore.${restoreSteps.at(-1)!.name}.before`;
    await using live = await Live.start({
      containerd: "1.7",
      engine: "runc",
      env: { CEDANA_FAULT: `crash:${fault}` },
    });
    const image = mkdtempSync(join(live.dir, "image-"));
    {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      await task.checkpoint({ imagePath: image });
    }
    const task = await live.create(["counter"], { criuImagePath: image });
    await expect(task.start()).rejects.toThrow(/was in work when cedanad ended, twice/);
    expect(await task.status()).toBe("CREATED");
    await task.delete();
    await task.destroy();
    await live.expectNoLeftovers();
  });
});
