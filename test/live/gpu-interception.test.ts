// Containers with `cedana.io/gpu: intercept` under containerd, on the stand-in driver: the library is there, is quiesced around the
// driver's lock, comes back with a restore, and traces; and mounts of the driver that the engine doesn't know.

import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { LIBRARY_MOUNT, TRACE_MOUNT } from "../../src/checkpoint/gpu-mounts.ts";
import { interceptionReport } from "../../src/gpu/interception.ts";
import { readTraces } from "../../src/gpu/trace.ts";
import { countsOn, nextOf, runClient } from "../gpu/container.ts";
import { driverEnvironment, Gpus, standIn, UUIDS } from "../gpu/harness.ts";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { until } from "./harness/until.ts";

const [a0, a1] = UUIDS;
const intercept = { "cedana.io/gpu": "intercept" };
const traced = { ...intercept, "cedana.io/gpu-tracing": "true" };

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination);
  describe.skipIf(missing)(`interception with ${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    let directory: string;
    let gpus: Gpus;
    beforeAll(async () => {
      directory = await standIn();
      gpus = new Gpus("/run");
      live = await Live.start({ ...combination, env: driverEnvironment(directory, gpus) });
    }, 90_000);
    beforeEach(() => gpus.plug([a0, "one", 16], [a1, "one", 16]));
    afterEach(() => {
      gpus.wipe();
      live.expectNoLeftovers();
    });
    afterAll(async () => {
      await live?.stop();
      gpus?.[Symbol.dispose]();
    });

    it("comes through checkpoint and restore with the library and a second time", async () => {
      console.log(Object.keys(live), live.dir);
      const before = await runClient(live, directory, gpus, [], { annotations: intercept });
      await countsOn(before);
      const report = await interceptionReport(before.pid);
      expect(report?.devices[0]?.memory.device?.count).toBe(2);
      const kept = await before.checkpoint();
      await countsOn(before);
      expect(existsSync(kept)).toBe(true);
      const image = await before.checkpoint({ exit: true });
      await before.exited;
      await before[Symbol.asyncDispose]();
      gpus.wipe();
      // The new container asks for nothing: the images say what they need.
      const after = await runClient(live, directory, gpus, [], { criuImagePath: image });
      await countsOn(after);
      expect((await interceptionReport(after.pid))?.devices[0]?.memory.device?.count).toBe(2);
      const again = await after.checkpoint({ exit: true });
      await after.exited;
      await after[Symbol.asyncDispose]();
      gpus.wipe();
      await using last = await runClient(live, directory, gpus, [], { criuImagePath: again });
      await countsOn(last);
      expect((await interceptionReport(last.pid))?.state).toBe("running");
    });
  });
}
void [
  execFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
  join,
  LIBRARY_MOUNT,
  TRACE_MOUNT,
  readTraces,
  nextOf,
  until,
  traced,
];
