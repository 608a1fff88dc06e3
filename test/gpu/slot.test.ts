import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, it } from "vitest";
import type { DeviceOwner } from "../../src/checkpoint/device-slot.ts";
import { mayHaveGpu } from "../../src/gpu/present.ts";
import { gpuSlot } from "../../src/gpu/slot.ts";
import { withEnvironment } from "./harness.ts";

it("looks at nothing of a container where the machine has no GPU driver", async (context) => {
  const place = mkdtempSync(join(tmpdir(), "cedana-slot-"));
  using _ = withEnvironment({
    CEDANA_RUN_DIR: place,
    CEDANA_GPU_DRIVER: undefined,
    CEDANA_GPU_PROGRAM: undefined,
  });
  context.skip(mayHaveGpu(), "this machine has one");
  const looked: string[] = [];
  const owner = new Proxy({} as DeviceOwner, {
    get: (_owner, name) => {
      if (name !== "initPid") looked.push(String(name));
      return name === "initPid" ? process.pid : undefined;
    },
  });
  expect(await gpuSlot.findForDump(owner)).toBeUndefined();
  gpuSlot.recover(owner);
  gpuSlot.recoverAll("/", owner.log);
  expect(looked).toEqual(["log"]); // by this test
  rmSync(place, { recursive: true });
});
