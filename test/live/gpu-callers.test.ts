// Containers with GPUs (the stand-in driver of test/gpu/libcuda) outside of containerd's API: ctr, cedana-runtime on a bundle, and Podman.

import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { allPids } from "../../src/linux/proc.ts";
import { countsOn, gpuOptions, runClient } from "../gpu/container.ts";
import { driverEnvironment, Gpus, LINKER, standIn, UUIDS } from "../gpu/harness.ts";
import { CallerPlace, missingCallers, Podman } from "./harness/callers.ts";
import { Live } from "./harness/live.ts";
import { missingFor } from "./harness/matrix.ts";
import { IMAGE } from "./harness/programs.ts";
import { containerSpec } from "./harness/spec.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const numbersIn = (text: string) => (text.match(/(?<=\bclient )\d+/g) ?? []).map(Number);

function commandOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8");
  } catch {
    return ""; // it has ended
  }
}

/** One by one, without a gap. */
function expectCounted(text: string, beyond: number): void {
  expect(text).not.toContain("FAILED");
  const all = numbersIn(text);
  expect(all.at(-1)).toBeGreaterThan(beyond);
  expect(all).toEqual(all.map((_, index) => all[0]! + index));
}

/** Nothing comes for a while, in which several lines would. */
async function expectStill(task: LiveTask): Promise<void> {
  const before = task.stdout.text.length;
  await new Promise((resolve) => setTimeout(resolve, 100));
  expect(task.stdout.text.length).toBe(before);
}

const missingRunc = missingFor({ containerd: "1.7", engine: "runc" });
describe.skipIf(missingRunc)(`GPUs by ctr${missingRunc ? ` (${missingRunc})` : ""}`, () => {
  it("are checkpointed while ctr holds the task paused, and come back from the content store", async () => {
    const directory = await standIn();
    using gpus = new Gpus("/run");
    await using live = await Live.start({
      containerd: "2.1",
      engine: "runc",
      env: driverEnvironment(directory, gpus),
    });
    await using task = await runClient(live, directory, gpus, ["--devices", "2"]);
    const last = await countsOn(task);
    await live.ctr("task", "checkpoint", task.id); // pauses it meanwhile
    task.stdout.skip();
    expect(await countsOn(task)).toBeGreaterThan(last);
    await task.pause();
    const image = await task.checkpoint();
    expect(await task.status()).toBe("PAUSED");
    await expectStill(task);
    await task.resume();
    await countsOn(task);
    await task[Symbol.asyncDispose]();
    gpus.wipe();
    await using after = await runClient(live, directory, gpus, [], { criuImagePath: image });
    await countsOn(after);
  });

  it("are checkpointed by NVIDIA's program where the administrator wants that", async () => {
    const directory = await standIn();
    using gpus = new Gpus("/run");
    await using live = await Live.start({
      containerd: "2.1",
      engine: "runc",
      env: {
        ...driverEnvironment(directory, gpus),
        CEDANA_GPU_PROGRAM: join(directory, "cuda-checkpoint"),
        CEDANA_GPU_MEANS: "cuda-checkpoint",
      },
    });
    const task = await runClient(live, directory, gpus, ["--devices", "2"]);
    await countsOn(task);
    const image = await task.checkpoint({ exit: true });
    await task.exited;
    await task[Symbol.asyncDispose]();
    const { gpu } = JSON.parse(readFileSync(join(image, "cedana.json"), "utf8"));
    expect(gpu).toMatchObject({ means: "cuda-checkpoint", processes: [{ comm: "client" }] });
    gpus.wipe();
    await using after = await runClient(live, directory, gpus, [], {
      criuImagePath: image,
      annotations: { "cedana.io/gpu-map": "0=1,1=0" },
    });
    await countsOn(after);
  });

  it("are checkpointed by CRIU's plugin where the administrator wants that", async () => {
    const directory = await standIn();
    using gpus = new Gpus("/run");
    // The stand-in for it, or a real one's directory; that one also wants CRIU_FAULT=138 where there is no GPU.
    const plugins = process.env.CEDANA_TEST_CUDA_PLUGIN ?? join(directory, "criu-plugin");
    await using live = await Live.start({
      containerd: "2.1",
      engine: "runc",
      path: directory, // CRIU's plugin looks for cuda-checkpoint there
      env: {
        ...driverEnvironment(directory, gpus),
        CEDANA_GPU_DRIVER: join(directory, "r550/libcuda.so.1"),
        CEDANA_GPU_PROGRAM: join(directory, "cuda-checkpoint"),
        CEDANA_GPU_MEANS: "criu-plugin",
        CEDANA_CRIU_PLUGINS: plugins,
      },
    });
    const both = ["client", "client2"];
    const countOn = async (task: LiveTask) => {
      for (const name of both) {
        task.stdout.skip();
        await countsOn(task, name);
      }
    };
    const task = await runClient(live, directory, gpus, ["--devices", "2", "--fork"]);
    await countOn(task);
    const calls = gpus.watchCalls();
    await task.checkpoint();
    for (const name of both)
      expect(calls().filter((call) => call.endsWith(` ${name}`))).toEqual(
        ["lock", "checkpoint", "restore", "unlock"].map((call) => `${call} ${name}`),
      );
    await countOn(task);
    await task.pause();
    await task.checkpoint(); // CRIU lets it run for the plugin
    expect(await task.status()).toBe("PAUSED");
    await expectStill(task);
    await task.resume();
    await countOn(task);
    const image = await task.checkpoint({ exit: true });
    await task.exited;
    await task[Symbol.asyncDispose]();
    const { gpu } = JSON.parse(readFileSync(join(image, "cedana.json"), "utf8"));
    expect(gpu).toMatchObject({ means: "criu-plugin" });
    gpus.wipe();
    await expect(
      runClient(live, directory, gpus, [], {
        criuImagePath: image,
        annotations: { "cedana.io/gpu-map": "0=1,1=0" },
      }),
    ).rejects.toThrow(/CRIU's CUDA plugin.*can't give them other GPUs.*cedana\.io\/gpu-map/);
    await using after = await runClient(live, directory, gpus, [], { criuImagePath: image });
    await countOn(after);
    expect([gpus.allocations(UUIDS[0]), gpus.allocations(UUIDS[1])]).toEqual([6, 6]);
  });

  it("cost a container without any nothing: nothing is started, nothing loaded", async () => {
    const directory = await standIn();
    using gpus = new Gpus("/run");
    await using live = await Live.start({
      containerd: "2.1",
      engine: "runc",
      env: driverEnvironment(directory, gpus),
    });
    await using task = await live.run(["counter"], gpuOptions(directory, gpus)); // devices, but no client
    await task.nextNumber();
    const [seen, queries] = [gpus.watchCalls(), gpus.watchQueries()];
    const image = await task.checkpoint();
    const manifest = JSON.parse(readFileSync(join(image, "cedana.json"), "utf8"));
    expect(manifest.gpu).toBeUndefined();
    expect([...seen(), ...queries()]).toEqual([]);
    expect(existsSync(join(live.runDir, "gpu"))).toBe(false);
    const { pid } = live.cedanad()!;
    expect(readFileSync(`/proc/${pid}/maps`, "utf8")).not.toContain("libcuda");
    // One with a client is noticed by the same means.
    await using client = await runClient(live, directory, gpus);
    await countsOn(client);
    await client.checkpoint();
    expect(queries().length).toBe(1);
    expect(seen().length).toBe(4);
  });
});

const missing = missingCallers();
describe.skipIf(missing)(`GPUs without containerd${missing ? ` (${missing})` : ""}`, () => {
  let directory: string;
  let gpus: Gpus;
  beforeAll(async () => {
    directory = await standIn();
    gpus = new Gpus("/run");
  }, 60_000);
  afterEach(() => {
    gpus.faults();
    gpus.wipe();
  });
  afterAll(() => gpus?.[Symbol.dispose]());

  it("come back in a runc container by cedana-runtime", async () => {
    const place = await CallerPlace.start("runc");
    try {
      const env = { ...place.env, ...driverEnvironment(directory, gpus) };
      const bundle = mkdtempSync(join(place.dir, "bundle-"));
      mkdirSync(join(bundle, "rootfs"));
      const spec = containerSpec({
        ...gpuOptions(directory, gpus),
        args: [`${directory}/client-dlsym`, "--devices", "2"],
        namespaces: { network: "host" },
        cgroupsPath: `/${place.namespace}/c`,
        programs: directory,
      });
      writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
      const runtime = (...args: string[]) =>
        place.runtime("wrapper", "--root", join(place.dir, "runc"), ...args);
      const output = join(place.dir, "output");
      // A pipe, whose other end goes to a file: CRIU knows a pipe of the engine's stdio again, not a file of the host.
      const shell = (command: string[]) => [
        "sh",
        "-c",
        `(${command.map((word) => `'${word}'`).join(" ")} || echo "FAILED: $?") 2>&1 < /dev/null | cat >> ${output} 2>/dev/null &`,
      ];
      await place.ok(shell(runtime("run", "--detach", "--bundle", bundle, "c")), { env });
      const read = () => (existsSync(output) ? readFileSync(output, "utf8") : "");
      await until(() => numbersIn(read()).length > 3, { what: () => `the first numbers: ${read()}` });
      const images = join(place.dir, "images");
      // A crash of cedanad in the middle: the next one gives back what was taken, and takes it anew, for the wrapper asks once more.
      gpus.faults("checkpoint=slow:700");
      const seen = gpus.watchCalls();
      const cut = place.run(
        runtime("checkpoint", "--leave-running", "--image-path", join(place.dir, "cut"), "c"),
        {
          env,
        },
      );
      await until(() => seen().includes("checkpoint client"), {
        everyMs: 2,
        what: () => "the driver's call",
      });
      const pidFile = readdirSync(place.runDir).find((name) => /^cedanad.*\.pid$/.test(name))!;
      process.kill(Number(readFileSync(join(place.runDir, pidFile), "utf8")), "SIGKILL");
      const { status, stderr } = await cut;
      expect(status, stderr).toBe(0);
      expect(existsSync(join(place.dir, "cut/cedana.json"))).toBe(true);
      gpus.faults();
      // The wrapper is killed in the middle, and the driver can't give the GPU back at first.
      const counted = numbersIn(read()).at(-1)!;
      await until(() => numbersIn(read()).at(-1)! > counted + 2, { what: () => "to go on before" });
      gpus.faults("checkpoint=slow:700", "restore=error:46");
      const seenNow = gpus.watchCalls();
      const killed = join(place.dir, "killed");
      const ended = place
        .run(runtime("checkpoint", "--leave-running", "--image-path", killed, "c"), { env })
        .then(
          ({ status }) => status,
          () => "killed", // by a signal
        );
      await until(() => seenNow().includes("checkpoint client"), {
        everyMs: 2,
        what: () => "the driver's call for the wrapper",
      });
      const wrapper = allPids().find(
        (pid) => commandOf(pid).includes(`cedana-runtime\0`) && commandOf(pid).includes(killed),
      );
      process.kill(wrapper!, "SIGKILL");
      expect(await ended).not.toBe(0);
      await until(() => seenNow().includes("restore client"), {
        what: () => `to be given back: ${seenNow()}`,
      });
      const stopped = numbersIn(read()).at(-1)!;
      gpus.faults();
      await until(() => numbersIn(read()).at(-1)! > stopped + 2, {
        timeoutMs: 20_000,
        what: () => "to go on after the wrapper's end",
      });
      const whole = runtime("checkpoint", "--leave-running", "--image-path", join(place.dir, "whole"), "c");
      await place.ok(whole, { env });
      const afterCrash = numbersIn(read()).at(-1)!;
      await until(() => numbersIn(read()).at(-1)! > afterCrash + 2, { what: () => "to go on after a crash" });
      await place.ok(runtime("checkpoint", "--image-path", images, "c"), { env });
      const last = numbersIn(read()).at(-1)!;
      gpus.wipe();
      const foreground = await place.run(
        runtime("restore", "--bundle", bundle, "--image-path", images, "d"),
        { env },
      );
      expect(foreground.stderr).toMatch(/restore container d in the background \(--detach\)/);
      await place.ok(shell(runtime("restore", "--detach", "--bundle", bundle, "--image-path", images, "d")), {
        env,
      });
      await until(() => numbersIn(read()).at(-1)! > last + 2, {
        what: () => `to go on: ${read().slice(-300)}`,
      });
      await place.ok(runtime("kill", "d", "KILL"), { env });
      await until(async () => (await place.run(runtime("delete", "d"), { env })).status === 0, {
        what: () => "delete",
      });
      expectCounted(read(), last);
    } finally {
      await place.stop();
    }
  });

  it("come back by Podman through cedana-runtime", async () => {
    const podman = await Podman.start("runc", { daemonEnv: driverEnvironment(directory, gpus) });
    try {
      const ok = async (...args: string[]) => {
        const { status, stdout, stderr } = await podman.on("wrapper", ...args);
        expect(status, `podman ${args.join(" ")}: ${stderr}\n${podman.place.cedanadLog().slice(-2000)}`).toBe(
          0,
        );
        return stdout;
      };
      const linker = `${join(directory, "rt", basename(LINKER))}:${LINKER}:ro`;
      const inContainer = [
        ...["--security-opt", "seccomp=unconfined"],
        ...["--device", "/dev/fuse:/dev/nvidia0", "--device", "/dev/fuse:/dev/nvidia1"],
        ...[
          "--volume",
          linker,
          "--volume",
          `${directory}:${directory}:ro`,
          "--volume",
          `${gpus.path}:${gpus.path}`,
        ],
        ...["--env", `LD_LIBRARY_PATH=${directory}/rt`, "--env", `CEDANA_TEST_GPU_DIR=${gpus.path}`],
        ...[IMAGE, `${directory}/client-procaddress`, "--devices", "2"],
      ];
      await ok("run", "--detach", "--name", "c", ...inContainer);
      const counted = async (beyond: number) =>
        await until(
          async () => {
            const text = await ok("logs", "c");
            return (numbersIn(text).at(-1) ?? 0) > beyond && text;
          },
          {
            everyMs: 50,
            what: () => `c to count beyond ${beyond}: ${podman.place.cedanadLog().slice(-1000)}`,
          },
        );
      await counted(8);
      await ok("container", "checkpoint", "--leave-running", "c");
      await ok("container", "checkpoint", "c");
      const last = numbersIn(await ok("logs", "c")).at(-1)!;
      gpus.wipe();
      await ok("container", "restore", "c");
      expectCounted(await counted(last + 3), last);
      expect(gpus.allocations(UUIDS[1])).toBe(3);
      await ok("rm", "--force", "--time", "0", "c");
      // By annotation, at the engine's create: it stands still until its start.
      gpus.wipe();
      const named = (key: string) => ["--annotation", `cedana.io/${key}=gpus`];
      await ok(
        ...["run", "--detach", "--name", "c", "--annotation", "cedana.io/checkpoint-on=TERM"],
        ...[...named("checkpoint-name"), ...inContainer],
      );
      await counted(8);
      const beforeTerm = numbersIn(await ok("logs", "c")).at(-1)!;
      await ok("stop", "--time", "30", "c");
      await ok("rm", "c");
      gpus.wipe();
      await ok("create", "--name", "c", ...named("restore-from"), ...inContainer);
      await ok("init", "c"); // the engine's create, without its start
      expect(gpus.allocations(UUIDS[1])).toBe(3);
      await new Promise((resolve) => setTimeout(resolve, 100));
      expect(numbersIn(await ok("logs", "c"))).toEqual([]);
      await ok("start", "c");
      const text = await counted(beforeTerm + 5);
      expectCounted(text, beforeTerm);
      expect(numbersIn(text)[0]).toBeGreaterThan(8);
    } finally {
      await podman.stop();
    }
  });
});
