// The loop in containers that whoever has a GPU runs on it (`npm run test:gpu`): lock, checkpoint, dump, kill, restore, restore, unlock. Here it
// runs on the stand-in driver, by the same code: only what a container gets of the machine is another (test/gpu/machine.ts).

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import type { CheckpointManifest } from "../../src/checkpoint/manifest.ts";
import { deadlines } from "../../src/gpu/deadlines.ts";
import { interceptionReport } from "../../src/gpu/interception.ts";
import { DriverMeans, HelperKeeper } from "../../src/gpu/means.ts";
import { countsOn } from "../gpu/container.ts";
import { Gpus, onRealGpu, standIn, withEnvironment } from "../gpu/harness.ts";
import { type GpuMachine, machineWithGpu, optionsOn, standInMachine } from "../gpu/machine.ts";
import { Live, type RunOptions } from "./harness/live.ts";
import { missingFor } from "./harness/matrix.ts";
import type { LiveTask } from "./harness/task.ts";

const combination = { containerd: "2.1", engine: "runc" } as const;
const own = onRealGpu ? machineWithGpu() : undefined;
const missing = missingFor(combination) ?? (typeof own === "string" ? own : undefined);
const driver = onRealGpu ? "this machine's driver" : "the stand-in driver";

describe.skipIf(missing)(`a GPU container on ${driver}${missing ? ` (${missing})` : ""}`, () => {
  let live: Live;
  let gpus: Gpus;
  let machine: GpuMachine;
  let client: string;
  let devices: number;
  beforeAll(async () => {
    const directory = await standIn();
    client = join(directory, "client-dlsym");
    gpus = new Gpus("/run");
    machine = typeof own === "object" ? own : standInMachine(directory, gpus);
    live = await Live.start({ ...combination, env: { ...machine.daemonEnv } });
    using _ = withEnvironment({ ...machine.daemonEnv });
    await using helpers = new HelperKeeper();
    devices = Math.min(2, (await new DriverMeans(helpers, deadlines(), String).devices()).length);
  }, 90_000);
  afterEach(async () => {
    gpus.wipe();
    await live.expectNoLeftovers();
  });
  afterAll(async () => {
    await live?.stop();
    gpus?.[Symbol.dispose]();
  });

  async function run(more: RunOptions = {}): Promise<LiveTask> {
    const args = [client, "--devices", String(devices), "--fork", "--bytes", "4000000"];
    return await live.run(args, optionsOn(machine, client, more));
  }

  async function bothCount(task: LiveTask): Promise<void> {
    for (const name of ["client", "client2"]) {
      task.stdout.skip();
      await countsOn(task, name);
    }
  }

  const counters = (task: LiveTask, name: string) =>
    [...task.stdout.text.matchAll(new RegExp(`^${name} (\\d+)$`, "gm"))].map((match) => Number(match[1]));

  for (const annotations of [{}, { "cedana.io/gpu": "intercept" }]) {
    const how = "cedana.io/gpu" in annotations ? "with interception" : "by the driver alone";
    it(`goes on after a checkpoint, and comes back from one with its counters and buffers, ${how}`, async () => {
      const before = await run({ annotations });
      let image: string;
      try {
        await bothCount(before);
        const report = await interceptionReport(before.pid);
        if ("cedana.io/gpu" in annotations)
          expect(report?.devices[0]?.memory.device?.bytes).toBeGreaterThanOrEqual(8_000_000);
        else expect(report).toBeUndefined();
        await before.checkpoint();
        await bothCount(before);
        image = await before.checkpoint({ exit: true });
        await before.exited;
      } finally {
        await before[Symbol.asyncDispose]();
      }
      const { gpu } = JSON.parse(readFileSync(join(image, "cedana.json"), "utf8")) as CheckpointManifest;
      expect(gpu).toMatchObject({ means: "driver", processes: [{ comm: "client" }, { comm: "client2" }] });
      gpus.wipe(); // of the stand-in; a GPU's memory has gone with its process
      await using after = await run({ criuImagePath: image });
      await bothCount(after);
      for (const name of ["client", "client2"]) {
        const last = counters(before, name).at(-1)!;
        const [first] = counters(after, name);
        // Lines that were under way in the pipe when it ended may be lost; a counter that begins anew is none of these.
        expect(first, name).toBeGreaterThan(last);
        expect(first, name).toBeLessThan(last + 10);
      }
    }, 120_000);
  }
});
