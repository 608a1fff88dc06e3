// Containers with GPUs (the stand-in driver of test/gpu/libcuda) under containerd: what their GPUs hold comes back with them.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import type { CheckpointManifest } from "../../src/checkpoint/manifest.ts";
import { countsOn, nextOf, runClient } from "../gpu/container.ts";
import { driverEnvironment, Gpus, standIn, UUIDS } from "../gpu/harness.ts";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";

const [a0, a1, b0, b1] = UUIDS;

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination);
  describe.skipIf(missing)(`GPUs with ${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    let directory: string;
    let gpus: Gpus;
    beforeAll(async () => {
      directory = await standIn();
      gpus = new Gpus("/run"); // there before containerd's mount namespace is
      live = await Live.start({ ...combination, env: driverEnvironment(directory, gpus) });
    }, 90_000);
    beforeEach(() => {
      gpus.faults();
      gpus.plug([a0, "one", 16], [a1, "one", 16]);
    });
    afterEach(async () => {
      gpus.wipe();
      await live.expectNoLeftovers();
    });
    afterAll(async () => {
      await live?.stop();
      gpus?.[Symbol.dispose]();
    });

    const manifestOf = (image: string) =>
      JSON.parse(readFileSync(join(image, "cedana.json"), "utf8")) as CheckpointManifest;

    it("come back with two processes and two devices, and run on after a checkpoint that leaves them running", async () => {
      const before = await runClient(live, directory, gpus, ["--devices", "2", "--fork"]);
      let image: string;
      try {
        await countsOn(before);
        const kept = await before.checkpoint();
        await countsOn(before);
        await countsOn(before, "client2");
        expect(manifestOf(kept).gpu).toMatchObject({
          means: "driver",
          driverVersion: 13000,
          devices: [{ uuid: a0 }, { uuid: a1 }],
          processes: [
            {
              comm: "client",
              before: "running",
              times: { lockMs: expect.any(Number), unlockMs: expect.any(Number) },
            },
            { comm: "client2", times: { checkpointMs: expect.any(Number), restoreMs: expect.any(Number) } },
          ],
        });
        expect(await live.cedana("preflight", before.id)).toContain("can be checkpointed");
        const shown = await live.cedana("checkpoint", "inspect", kept);
        expect(shown).toMatch(/GPU state +of 2 processes, by driver, driver 999\.stand-in/);
        expect(shown).toMatch(
          /on GPU +\d+ client2, .*: lock [\d.]+ ms, checkpoint [\d.]+ ms, restore [\d.]+ ms, unlock [\d.]+ ms/,
        );
        image = await before.checkpoint({ exit: true });
        await before.exited;
      } finally {
        await before[Symbol.asyncDispose]();
      }
      const last = Math.max(
        ...[...before.stdout.text.matchAll(/^client (\d+)$/gm)].map((match) => Number(match[1])),
      );
      gpus.wipe(); // what comes back comes from the images
      await using after = await runClient(live, directory, gpus, ["--devices", "2", "--fork"], {
        criuImagePath: image,
      });
      expect(await nextOf(after)).toBeLessThanOrEqual(last + 2); // a line may have been under way
      await countsOn(after);
      await countsOn(after, "client2");
      expect([gpus.allocations(a0), gpus.allocations(a1)]).toEqual([6, 6]);
    });

    it("come back on other devices, by the map or by index", async () => {
      const before = await runClient(live, directory, gpus, ["--devices", "2"]);
      await countsOn(before);
      const image = await before.checkpoint({ exit: true });
      await before.exited;
      await before[Symbol.asyncDispose]();
      gpus.wipe();
      gpus.plug([b0, "one", 16], [b1, "one", 16]);
      {
        await using after = await runClient(live, directory, gpus, [], {
          criuImagePath: image,
          annotations: { "cedana.io/gpu-map": `0=GPU-${b1},${a1}=0` },
        });
        await countsOn(after);
        expect([gpus.allocations(b0), gpus.allocations(b1)]).toEqual([3, 3]);
      }
      gpus.wipe();
      {
        await using after = await runClient(live, directory, gpus, [], { criuImagePath: image });
        await countsOn(after);
      }
      gpus.wipe();
      gpus.plug([b0, "one", 16], [b1, "other", 16]);
      await expect(runClient(live, directory, gpus, [], { criuImagePath: image })).rejects.toThrow(
        /no GPU here can take the place of GPU-a1a1a1a1-.*\(one\)/,
      );
    });
  });
}
