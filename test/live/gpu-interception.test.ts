// Containers with `cedana.io/gpu: intercept`, on the stand-in driver: the library is there, is quiesced around the driver's lock, comes back
// with a restore, and traces; and mounts of a driver that the engine doesn't know.

import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { interceptionReport } from "../../src/gpu/interception.ts";
import { readTraces } from "../../src/gpu/trace.ts";
import { countsOn, runClient } from "../gpu/container.ts";
import { driverEnvironment, Gpus, standIn, UUIDS } from "../gpu/harness.ts";
import { missingCallers, Podman } from "./harness/callers.ts";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { IMAGE, programs } from "./harness/programs.ts";
import type { Spec } from "./harness/spec.ts";
import { until } from "./harness/until.ts";

const [a0, a1] = UUIDS;
const CONFIG = "/run/cedana-gpu-interception.json";
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
      gpus = new Gpus("/run"); // there before containerd's mount namespace is
      const env = { ...driverEnvironment(directory, gpus), CEDANA_CONFIG: CONFIG };
      live = await Live.start({ ...combination, env });
    }, 90_000);
    beforeEach(() => {
      configure({});
      gpus.plug([a0, "one", 16], [a1, "one", 16]);
    });
    afterEach(() => {
      gpus.wipe();
      live.expectNoLeftovers();
    });
    afterAll(async () => {
      await live?.stop();
      gpus?.[Symbol.dispose]();
      rmSync(CONFIG, { force: true });
    });

    function configure(configuration: object): void {
      writeFileSync(CONFIG, JSON.stringify(configuration), { mode: 0o600 });
    }

    it("comes through a checkpoint and a restore, and through a second of both", async () => {
      const before = await runClient(live, directory, gpus, ["--fork"], { annotations: intercept });
      await countsOn(before);
      await countsOn(before, "client2");
      expect((await interceptionReport(before.pid))?.devices[0]?.memory.device?.count).toBe(2);
      // Every process that is started later has the library, too.
      expect((await before.execToEnd(["sh", "-c", "echo $LD_PRELOAD"])).stdout).toBe(
        "/dev/cedana-gpu/libcuda.so.1\n",
      );
      await before.checkpoint();
      await countsOn(before);
      const image = await before.checkpoint({ exit: true });
      await before.exited;
      await before[Symbol.asyncDispose]();
      gpus.wipe();
      // The new container asks for nothing: the images say what they need.
      const after = await runClient(live, directory, gpus, [], {
        criuImagePath: image,
        // A GPU that the old one hadn't: /dev is the images', so its node is made.
        edit: (spec) => spec.linux.devices.push({ path: "/dev/nvidia7", type: "c", major: 10, minor: 229 }),
      });
      await countsOn(after);
      expect((await after.execToEnd(["sh", "-c", "test -c /dev/nvidia7 && echo there"])).stdout).toBe(
        "there\n",
      );
      expect(await interceptionReport(after.pid)).toMatchObject({
        state: "running",
        devices: [{ memory: { device: { count: 2 } } }, {}],
      });
      // A child that it forks now must still begin anew.
      expect(readFileSync(`/proc/${after.pid}/smaps`, "utf8")).toMatch(/^VmFlags:.* wf/m);
      const again = await after.checkpoint({ exit: true });
      await after.exited;
      await after[Symbol.asyncDispose]();
      gpus.wipe();
      await using last = await runClient(live, directory, gpus, [], { criuImagePath: again });
      await countsOn(last);
      await countsOn(last, "client2");
    });

    it("says by name what can't be checkpointed, and nothing is broken by trying", async () => {
      await using task = await runClient(live, directory, gpus, ["--managed"], { annotations: intercept });
      await countsOn(task);
      await expect(task.checkpoint()).rejects.toThrow(
        /process \d+ \(client\) of .* has on its GPUs what the driver can't checkpoint: managed memory \(UVM\)/,
      );
      await countsOn(task);
    });

    it("traces where the administrator allows it, and goes on with it after a restore", async () => {
      await expect(runClient(live, directory, gpus, [], { annotations: traced })).rejects.toThrow(
        /cedana\.io\/gpu-tracing lets a container write files on this node, which its administrator has not allowed/,
      );
      configure({ gpu: { tracing: true } });
      const before = await runClient(live, directory, gpus, [], { annotations: traced });
      await countsOn(before);
      const image = await before.checkpoint({ exit: true });
      await before.exited;
      const traces = join(live.dir, "var/gpu-traces", `${live.namespace}.${before.id}`);
      await before[Symbol.asyncDispose]();
      const first = await readTraces(traces);
      expect(first.otherData.calls.cuLaunchKernel?.calls).toBeGreaterThan(2);
      gpus.wipe();
      await using after = await runClient(live, directory, gpus, [], { criuImagePath: image });
      await countsOn(after);
      const launches = await until(
        async () => {
          const { calls } = (await readTraces(traces)).otherData;
          const count = calls.cuLaunchKernel?.calls ?? 0;
          return count > first.otherData.calls.cuLaunchKernel!.calls && count;
        },
        { what: () => "the restored process to trace" },
      );
      expect(launches).toBeGreaterThan(3);
      expect(readdirSync(traces)).toHaveLength(1);
    });

    it("is forbidden where the administrator says so", async () => {
      configure({ annotations: { deny: ["gpu"] } });
      await expect(runClient(live, directory, gpus, [], { annotations: intercept })).rejects.toThrow(
        /annotation cedana\.io\/gpu is denied by this node's configuration/,
      );
    });

    it("dumps what NVIDIA's hooks have mounted, and says what of it another node lacks", async () => {
      const driver = join(live.dir, "driver/usr/lib");
      mkdirSync(driver, { recursive: true });
      const file = join(driver, "libnvidia-ml.so.999.1");
      writeFileSync(file, "the driver's own\n");
      // As their hooks do, past the engine: into the container's mount namespace, on a file that they make.
      const hook = join(live.dir, "hook");
      writeFileSync(
        hook,
        `#!/bin/sh\nset -e\nbundle=$(sed -n 's/.*"bundle":"\\([^"]*\\)".*/\\1/p')\nmkdir -p $bundle/rootfs/usr/lib\ntouch $bundle/rootfs/usr/lib/libnvidia-ml.so.999.1\nmount --bind ${file} $bundle/rootfs/usr/lib/libnvidia-ml.so.999.1\n`,
        { mode: 0o755 },
      );
      const mounted = "/usr/lib/libnvidia-ml.so.999.1";
      const withHook = (spec: Spec) => {
        spec.hooks = {
          createContainer: [{ path: hook, env: ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }],
        };
      };
      const before = await live.run(["counter"], { edit: withHook });
      await before.nextNumber();
      expect((await before.execToEnd(["cat", mounted])).stdout).toBe("the driver's own\n");
      const image = await before.checkpoint({ exit: true });
      await before.exited;
      await before[Symbol.asyncDispose]();
      {
        await using after = await live.run(["counter"], { criuImagePath: image });
        await after.nextNumber();
        expect((await after.execToEnd(["cat", mounted])).stdout).toBe("the driver's own\n");
      }
      rmSync(file);
      await expect(live.run(["counter"], { criuImagePath: image })).rejects.toThrow(
        new RegExp(
          `${file} of the GPU driver, which it has mounted at ${mounted}, is not on this node: it needs the same version of the driver`,
        ),
      );
    });
  });
}

const missing = missingCallers();
describe.skipIf(missing)(`interception by cedana-runtime${missing ? ` (${missing})` : ""}`, () => {
  let podman: Podman;
  let testPrograms: string;
  beforeAll(async () => {
    [podman, testPrograms] = [await Podman.start("runc"), await programs()];
  });
  afterEach(async () => {
    await podman.on("wrapper", "rm", "--all", "--force", "--time", "0");
    await podman.place.expectNoLeftovers((argv) => /cedanad/.test(argv));
  });
  afterAll(async () => await podman?.stop());

  it("gives the container of Podman the library, through a checkpoint and a restore", async () => {
    const ok = async (...args: string[]) => {
      const { status, stdout, stderr } = await podman.on("wrapper", ...args);
      expect(status, `podman ${args.join(" ")}: ${stderr}`).toBe(0);
      return stdout.trim();
    };
    const annotation = ["--annotation", "cedana.io/gpu=intercept"];
    const volume = ["--volume", `${testPrograms}:/programs:ro`];
    const run = ["run", "--detach", "--name", "gpu", ...annotation, ...volume, IMAGE, "/programs/counter"];
    await ok(...run);
    const pid = Number(await ok("inspect", "--format", "{{.State.Pid}}", "gpu"));
    const mounts = () => readFileSync(`/proc/${pid}/mountinfo`, "utf8");
    expect(mounts()).toMatch(/ \/dev\/cedana-gpu ro,/);
    expect(readFileSync(`/proc/${pid}/environ`, "utf8").split("\0")).toContain(
      "LD_PRELOAD=/dev/cedana-gpu/libcuda.so.1",
    );
    const bundle = await ok("inspect", "--format", "{{.OCIConfigPath}}", "gpu");
    expect(readFileSync(bundle, "utf8")).not.toContain("cedana-gpu"); // it is Podman's
    await ok("container", "checkpoint", "gpu");
    await ok("container", "restore", "gpu");
    const restored = Number(await ok("inspect", "--format", "{{.State.Pid}}", "gpu"));
    expect(readFileSync(`/proc/${restored}/mountinfo`, "utf8")).toMatch(/ \/dev\/cedana-gpu ro,/);
  });
});
