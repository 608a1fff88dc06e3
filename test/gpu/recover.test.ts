// What a dump that was cut off has left locked is given back in the background: on the stand-in driver, without any container.

import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pino } from "pino";
import { expect, it } from "vitest";
import type { DeviceOwner } from "../../src/checkpoint/device-slot.ts";
import { deadlines } from "../../src/gpu/deadlines.ts";
import { readJournal, writeJournal } from "../../src/gpu/journal.ts";
import { DriverMeans, HelperKeeper } from "../../src/gpu/means.ts";
import { gpuSlot } from "../../src/gpu/slot.ts";
import type { Cgroup } from "../../src/linux/cgroup.ts";
import { isAlive, startTime } from "../../src/linux/proc.ts";
import { until } from "../live/harness/until.ts";
import { Client, driverEnvironment, Gpus, standIn, withEnvironment } from "./harness.ts";

it("is tried again until the driver can, and is under way until then", async () => {
  const directory = await standIn();
  using gpus = new Gpus();
  using _ = withEnvironment({
    ...driverEnvironment(directory, gpus),
    CEDANA_RUN_DIR: join(gpus.path, "run"),
  });
  await using client = await Client.start(directory, gpus);
  const { pid } = client;
  await using helpers = new HelperKeeper();
  const means = new DriverMeans(helpers, deadlines(), String);
  await means.lock(pid, 1000);
  await means.checkpoint(pid);
  const owner: DeviceOwner = {
    what: "task c",
    initPid: pid,
    directory: join(gpus.path, "bundle"),
    paused: false,
    log: pino({ level: "silent" }),
    get hasEnded() {
      return !isAlive(pid);
    },
    cgroup: async () => ({ isFrozen: async () => false }) as Cgroup,
  };
  expect(gpuSlot.isRecovering()).toBe(false);
  gpuSlot.recover(owner); // without a journal nothing was touched
  const entry = { pid, startTime: startTime(pid)!, comm: "client", before: "running" as const };
  writeJournal(owner, { v1: new Map(), v2: undefined } as never, [entry]);
  const cutOff = join(gpus.path, "run/gpu/1-1.json.new");
  writeFileSync(cutOff, "{"); // a crash within a journal's writing
  gpus.faults("restore=error:46");
  const calls = gpus.watchCalls();
  gpuSlot.recover(owner);
  await until(() => calls().filter((call) => call === "restore client").length >= 2, {
    timeoutMs: 20_000,
    what: () => `a second try: ${calls()}`,
  });
  expect(gpuSlot.isRecovering()).toBe(true);
  expect(await means.state(pid)).toBe("checkpointed");
  gpus.faults();
  await until(() => !gpuSlot.isRecovering(), { timeoutMs: 20_000, what: () => "the end of it" });
  expect(readJournal(owner)).toBeUndefined();
  expect(existsSync(cutOff)).toBe(false);
  await client.next(2);
}, 60_000);
