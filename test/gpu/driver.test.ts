// The addon's calls in the helper process, and the rules of the stand-in driver, without any container.

import { execFileSync } from "node:child_process";
import { chmodSync, copyFileSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { TimedOut, Unavailable, Unsupported } from "../../src/errors/index.ts";
import { deadlines } from "../../src/gpu/deadlines.ts";
import { GpuHelper } from "../../src/gpu/helper.ts";
import { chooseMeans, DriverMeans, HelperKeeper, type Means, ProgramMeans } from "../../src/gpu/means.ts";
import { askNvml } from "../../src/gpu/nvml.ts";
import { isAlive } from "../../src/linux/proc.ts";
import { until } from "../live/harness/until.ts";
import { Client, driverEnvironment, Gpus, standIn, UUIDS, withEnvironment } from "./harness.ts";

const limits = deadlines("lock=2000,checkpoint=3000,restore=3000,unlock=3000,ask=3000");
const who = (pid: number) => `process ${pid}`;

describe("the driver's calls, by the helper, on the stand-in driver", () => {
  let directory: string;
  let gpus: Gpus;
  let environment: Disposable;
  beforeAll(async () => {
    directory = await standIn();
    gpus = new Gpus();
    environment = withEnvironment(driverEnvironment(directory, gpus));
  }, 60_000);
  afterAll(() => {
    environment[Symbol.dispose]();
    gpus[Symbol.dispose]();
  });

  async function open(): Promise<DriverMeans> {
    const means = new DriverMeans(new HelperKeeper(), limits, who);
    await means.open();
    return means;
  }

  it("go through the states, and the client goes on with its counter and its buffers", async () => {
    await using client = await Client.start(directory, gpus, ["--devices", "2"]);
    await using means = await open();
    const { pid } = client;
    expect(await means.restoreThread(pid)).toBeGreaterThan(pid);
    expect(await means.state(pid)).toBe("running");
    await expect(means.unlock(pid)).rejects.toThrow(/\(CUDA_ERROR_ILLEGAL_STATE, 401\): .*another state/);
    await expect(means.checkpoint(pid)).rejects.toThrow(/401/);
    await means.lock(pid, 1000);
    expect(await means.state(pid)).toBe("locked");
    expect(await client.standsStill()).toBe(true);
    const last = client.last();
    const held = () => readFileSync(`/proc/${pid}/maps`, "utf8").includes(`${gpus.path}/mem-`);
    expect(held()).toBe(true);
    await means.checkpoint(pid);
    expect(await means.state(pid)).toBe("checkpointed");
    expect(held()).toBe(false);
    expect(gpus.allocations(UUIDS[0])).toBe(0);
    gpus.wipe();
    await expect(means.unlock(pid)).rejects.toThrow(/401/);
    await means.restore(pid, []);
    expect(await means.state(pid)).toBe("locked");
    expect(await client.standsStill()).toBe(true);
    await means.unlock(pid);
    expect(await client.next()).toBeGreaterThan(last);
    expect(client.lines.map((line) => Number(line.split(" ")[1]))).toEqual(
      client.lines.map((_, index) => 6 + index),
    );
  });

  it.each(["linked", "dlsym", "procaddress"] as const)(
    "find clients however they found the driver: %s",
    async (kind) => {
      await using client = await Client.start(directory, gpus, [], { kind });
      await using means = await open();
      await means.lock(client.pid, 1000);
      await means.checkpoint(client.pid);
      await means.restore(client.pid, []);
      await means.unlock(client.pid);
      await client.next(2);
    },
  );

  it("say that a process without a GPU is none of theirs", async () => {
    await using means = await open();
    expect(await means.restoreThread(process.pid)).toBeUndefined();
  });

  it("don't grant a lock before the work is done, and leave the process running", async () => {
    await using means = await open();
    await using client = await Client.start(directory, gpus, ["--spin", "1000", "--interval", "0"]);
    await expect(means.lock(client.pid, 50)).rejects.toThrow(TimedOut);
    expect(await means.state(client.pid)).toBe("running");
    await client.next(2);
    await means.lock(client.pid, 2000);
    await means.unlock(client.pid);
  });

  it("move memory to other devices, all of them named, and of the same model", async () => {
    using there = new Gpus();
    there.plug([UUIDS[0], "one", 8], [UUIDS[1], "one", 8]);
    using _ = withEnvironment({ CEDANA_TEST_GPU_DIR: there.path });
    await using client = await Client.start(directory, there, ["--devices", "2"]);
    await using means = await open();
    expect((await means.devices()).map(({ uuid }) => uuid)).toEqual([UUIDS[0], UUIDS[1]]);
    await means.lock(client.pid, 1000);
    await means.checkpoint(client.pid);
    const [a0, a1, b0, b1] = UUIDS;
    there.plug([b0, "one", 8], [b1, "other", 8], [a1, "one", 8]);
    await expect(means.restore(client.pid, [])).rejects.toThrow(Unavailable); // the first has gone
    await expect(means.restore(client.pid, [[a0, b0]])).rejects.toThrow(Unsupported); // not all
    await expect(
      means.restore(client.pid, [
        [a0, b0],
        [a1, b1],
      ]),
    ).rejects.toThrow(Unsupported); // another model
    there.plug([b0, "one", 8], [b1, "one", 0]);
    await expect(
      means.restore(client.pid, [
        [a0, b0],
        [a1, b1],
      ]),
    ).rejects.toThrow(/not enough free memory/);
    there.plug([b0, "one", 8], [b1, "one", 8]);
    await means.restore(client.pid, [
      [a0, b1],
      [a1, b0],
    ]);
    await means.unlock(client.pid);
    await client.next(3);
    expect([there.allocations(b0), there.allocations(b1)]).toEqual([3, 3]);
  });

  it("fail for managed memory, and the process is marked as failed", async () => {
    await using client = await Client.start(directory, gpus, ["--managed"]);
    await using means = await open();
    await means.lock(client.pid, 1000);
    await expect(means.checkpoint(client.pid)).rejects.toThrow(/managed \(UVM\) memory/);
    expect(await means.state(client.pid)).toBe("failed");
  });

  it("leave a process locked when there is no host memory for one of its allocations", async () => {
    await using client = await Client.start(directory, gpus);
    await using means = await open();
    await means.lock(client.pid, 1000);
    gpus.faults("checkpoint=alloc:2");
    await expect(means.checkpoint(client.pid)).rejects.toThrow(/not enough host memory/);
    gpus.faults();
    expect(await means.state(client.pid)).toBe("locked");
    await means.unlock(client.pid);
    await client.next(2);
  });

  it("that don't return end the helper at their deadline; the next one finds the work done", async () => {
    await using client = await Client.start(directory, gpus);
    await using helpers = new HelperKeeper();
    const means = new DriverMeans(helpers, limits, who);
    await means.lock(client.pid, 1000);
    gpus.faults("checkpoint=hang");
    const { pid } = helpers.helper();
    const short = new DriverMeans(helpers, { ...limits, checkpoint: 200 }, who);
    // On the helper that is there: a library is loaded once.
    await expect(helpers.helper().call("checkpoint", { pid: client.pid }, 200)).rejects.toThrow(
      /checkpoint on process \d+ did not return in 200 ms/,
    );
    await until(() => !isAlive(pid), { what: () => "the helper's end" });
    expect(await short.state(client.pid)).toBe("locked");
    gpus.faults();
    await until(async () => (await short.state(client.pid)) === "checkpointed", {
      what: () => "the work's end",
    });
    await short.restore(client.pid, []);
    await short.unlock(client.pid);
    await client.next(2);
  });

  it("fail by name on a driver that is too old, or not there", async () => {
    using _ = withEnvironment({
      CEDANA_GPU_DRIVER: join(directory, "r550/libcuda.so.1"),
      PATH: "/nonexistent",
    });
    await expect(chooseMeans(new HelperKeeper(), limits, who)).rejects.toThrow(
      /driver \(13\.0\) can't checkpoint: it has no cuCheckpointProcess.*cuda-checkpoint is not in PATH/,
    );
    using _none = withEnvironment({ CEDANA_GPU_DRIVER: "/nonexistent/libcuda.so.1" });
    await expect(chooseMeans(new HelperKeeper(), limits, who)).rejects.toThrow(/cannot open shared object/);
  });

  it("are told from what a driver's library writes to its stdout", async () => {
    using place = new Gpus();
    const library = join(place.path, "libcuda.so.1");
    execFileSync("cc", ["-shared", "-fPIC", "-x", "c", "-", "-o", library], {
      input: '#include <unistd.h>\n__attribute__((constructor)) void f(void) { if (write(1, "{\\n", 2)) {} }',
    });
    using _ = withEnvironment({ CEDANA_GPU_DRIVER: library, CEDANA_GPU_MEANS: "driver" });
    await using helpers = new HelperKeeper();
    await expect(chooseMeans(helpers, limits, who)).rejects.toThrow(
      /driver \(of unknown version\) can't checkpoint/,
    );
    expect(helpers.helper().isAlive).toBe(true);
  });

  it("are made by the means that the administrator has chosen, and no other", async () => {
    using _ = withEnvironment({
      CEDANA_GPU_MEANS: "criu-plugin",
      CEDANA_GPU_PROGRAM: join(directory, "cuda-checkpoint"),
    });
    await using helpers = new HelperKeeper();
    await expect(chooseMeans(helpers, limits, who)).rejects.toThrow(
      /^the GPU state can't be checkpointed: CRIU has no CUDA plugin/,
    );
    using place = new Gpus();
    writeFileSync(join(place.path, "cuda_plugin.so"), "");
    using _plugin = withEnvironment({ CEDANA_CRIU_PLUGINS: place.path });
    expect(await chooseMeans(helpers, limits, who)).toBe("criu-plugin");
    using _program = withEnvironment({ CEDANA_GPU_MEANS: "cuda-checkpoint" });
    expect(await chooseMeans(helpers, limits, who)).toBeInstanceOf(ProgramMeans);
    using _none = withEnvironment({ CEDANA_GPU_MEANS: "magic" });
    await expect(chooseMeans(helpers, limits, who)).rejects.toThrow(
      /may be driver, cuda-checkpoint, criu-plugin/,
    );
  });

  it("refuse to move memory with a driver that can't", async () => {
    await using client = await Client.start(directory, gpus);
    gpus.faults("version=12080");
    try {
      await using means = await open();
      await means.lock(client.pid, 1000);
      await means.checkpoint(client.pid);
      await expect(means.restore(client.pid, [[UUIDS[0], UUIDS[1]]])).rejects.toThrow(/13\.0 or newer can/);
      await means.restore(client.pid, []);
      await means.unlock(client.pid);
    } finally {
      gpus.faults();
    }
  });

  it("are made by NVIDIA's program where the library can't be used", async () => {
    using _ = withEnvironment({
      CEDANA_GPU_DRIVER: "/nonexistent/libcuda.so.1",
      PATH: `${directory}:${process.env.PATH}`,
      LD_LIBRARY_PATH: directory,
    });
    await using client = await Client.start(directory, gpus);
    await using helpers = new HelperKeeper();
    const means = (await chooseMeans(helpers, limits, who)) as Means;
    expect(means).toBeInstanceOf(ProgramMeans);
    expect(await means.restoreThread(client.pid)).toBeGreaterThan(0);
    expect(await means.restoreThread(process.pid)).toBeUndefined();
    {
      // A program that can't be run says nothing of the process.
      using place = new Gpus();
      const program = join(place.path, "cuda-checkpoint");
      copyFileSync(join(directory, "cuda-checkpoint"), program);
      using _program = withEnvironment({ CEDANA_GPU_PROGRAM: program, CEDANA_GPU_MEANS: "cuda-checkpoint" });
      const broken = (await chooseMeans(helpers, limits, who)) as Means;
      chmodSync(program, 0o644);
      await expect(broken.restoreThread(client.pid)).rejects.toThrow(/EACCES/);
    }
    await means.lock(client.pid, 1000);
    await means.checkpoint(client.pid);
    expect(await means.state(client.pid)).toBe("checkpointed");
    await means.restore(client.pid, [
      [UUIDS[0], UUIDS[1]],
      [UUIDS[1], UUIDS[0]],
    ]);
    await means.unlock(client.pid);
    await client.next(2);
    expect(gpus.allocations(UUIDS[1])).toBeGreaterThan(0);
  });

  it("hold every other thread of a process, and let it go", async () => {
    await using client = await Client.start(directory, gpus);
    await using helper = GpuHelper.start();
    const { held } = await helper.call("holdThreads", { pid: client.pid, except: 0 }, 3000);
    expect(held).toBeGreaterThan(2);
    await until(async () => (await helper.call("heldStopped", {}, 3000)).stopped, { what: () => "the stop" });
    expect(await client.standsStill()).toBe(true);
    expect(await helper.call("releaseThreads", {}, 3000)).toEqual({ released: held });
    await client.next(2);
    await helper.call("holdThreads", { pid: client.pid, except: 0 }, 3000);
    process.kill(helper.pid, "SIGKILL"); // the kernel lets go
    await client.next(2);
  });

  it("tell what NVML knows", async () => {
    await using client = await Client.start(directory, gpus);
    await using helpers = new HelperKeeper();
    const answer = await askNvml(helpers, limits);
    expect(answer).toMatchObject({
      driver: "999.stand-in",
      devices: [
        { name: "STANDIN-1", migMode: 0, persistenceMode: 1 },
        { uuid: "GPU-a1a1a1a1-a1a1-a1a1-a1a1-a1a1a1a1a1a1" },
      ],
    });
    if (answer.error !== undefined) throw new Error(answer.error);
    const mine = answer.devices[0]!.processes.find(({ pid }) => pid === client.pid);
    expect(mine).toEqual({ pid: client.pid, usedBytes: 1 << 20 });
    gpus.faults("memory=unknown");
    const vague = await askNvml(helpers, limits);
    gpus.faults();
    if (vague.error !== undefined) throw new Error(vague.error);
    expect(vague.devices[0]!.processes).toContainEqual({ pid: client.pid });
  });
});
