import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { gpuHealth } from "../../src/gpu/health.ts";
import { driverEnvironment, Gpus, standIn, UUIDS, withEnvironment } from "./harness.ts";

describe("the health of GPUs, on the stand-in driver", () => {
  let directory: string;
  let gpus: Gpus;
  beforeAll(async () => {
    directory = await standIn();
    gpus = new Gpus();
  }, 60_000);
  afterAll(() => gpus[Symbol.dispose]());

  it("tells of driver, means, devices, memory and libraries", async () => {
    using _ = withEnvironment(driverEnvironment(directory, gpus));
    gpus.plug([UUIDS[0], "one", 16], [UUIDS[1], "two", 32]);
    const rows = await gpuHealth();
    expect(rows).toMatchObject(
      [
        { name: "GPU driver", status: "ok", summary: "999.stand-in, 2 GPUs" },
        { name: "GPU checkpoints", status: "ok", summary: /interface 13\.0, and to other GPUs/ },
        { status: "ok", summary: "one, 16 MiB" },
        { status: "ok", summary: "two, 32 MiB" },
        { name: "GPU memory", status: "ok" },
        { name: "GPU libraries in containers" },
      ].map(({ summary, ...row }) => ({
        ...row,
        ...(summary !== undefined && {
          summary: typeof summary === "string" ? summary : expect.stringMatching(summary),
        }),
      })),
    );
    gpus.faults("persistence=off");
    expect((await gpuHealth())[2]).toMatchObject({
      status: "warning",
      summary: expect.stringContaining("persistence"),
    });
    gpus.faults("mig=on");
    expect((await gpuHealth())[3]).toMatchObject({
      status: "warning",
      summary: expect.stringContaining("MIG"),
    });
    gpus.faults("nvml=off");
    expect(await gpuHealth()).toMatchObject([{ status: "warning" }, { status: "ok" }, {}]);
    gpus.faults();
  });

  it("says what a driver lacks, and that there is none", async () => {
    using _ = withEnvironment({
      ...driverEnvironment(directory, gpus),
      CEDANA_GPU_DRIVER: join(directory, "r550/libcuda.so.1"),
      PATH: "/nonexistent",
    });
    expect((await gpuHealth())[1]).toMatchObject({
      status: "failed",
      summary: expect.stringContaining("r570"),
    });
    using _none = withEnvironment({ CEDANA_GPU_DRIVER: undefined });
    if (process.env.CEDANA_TEST_REAL_GPU !== "1")
      expect(await gpuHealth()).toEqual([
        { name: "GPU driver", status: "absent", summary: "there is no NVIDIA driver" },
      ]);
  });
});
