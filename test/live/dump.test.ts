// Checkpoints that we take by ourselves, into the store: `cedana dump containerd`.

import { execFile } from "node:child_process";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { verifyDirectory } from "../../src/checkpoint/archive/index.ts";
import { readManifest } from "../../src/checkpoint/manifest.ts";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { verifyImages } from "../../src/criu/image/index.ts";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import type { LiveTask } from "./harness/task.ts";

const _run = promisify(execFile);
const COUNTER = ["counter", "20", "7"];

interface Dumped {
  name: string;
  generation: string;
  path: string;
  bytes: number;
  frozenMs: number;
}

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination);
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    let store: CheckpointStore;
    beforeAll(async () => {
      live = await Live.start(combination);
      store = new CheckpointStore(join(live.dir, "var/checkpoints"));
    });
    afterEach(() => live.expectNoLeftovers());
    afterAll(() => live?.stop());

    async function dump(task: LiveTask, ...flags: string[]): Promise<Dumped> {
      return JSON.parse(await live.cedana("dump", "containerd", task.id, "--json", ...flags)) as Dumped;
    }

    it("takes a checkpoint into the store, and the container runs on", async () => {
      await using task = await live.run(COUNTER);
      await task.nextNumber();
      const dumped = await dump(task, "--name", "web");
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
      expect(await task.status()).toBe("RUNNING");
      const [found] = await store.generations({ namespace: live.namespace }, "web");
      expect(found).toMatchObject({ path: dumped.path, generation: dumped.generation });
      expect((await verifyDirectory(dumped.path)).verified).toBeGreaterThan(10);
      expect((await verifyImages(join(dumped.path, "checkpoint"))).findings).toEqual([]);
      expect(dumped.frozenMs).toBeGreaterThan(0);
      expect(await readManifest(dumped.path)).toMatchObject({
        name: "web",
        trigger: "command",
        containerId: task.id,
        options: { leaveRunning: true },
        rootfsDiff: { source: "overlay" },
      });
      expect(readdirSync(task.bundle).filter((name) => /dump|criu|frozen|attempt/.test(name))).toEqual([]);
    });
  });
}
