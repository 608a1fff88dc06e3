// What goes wrong with the driver, the helper, CRIU or cedanad in the middle: the container's processes have their GPUs afterwards, and run.
// On the stand-in driver, whose fault switches stand in test/gpu/libcuda/RULES.md.

import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmdirSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { childrenOf } from "../../src/linux/proc.ts";
import { countsOn, gpuOptions, runClient } from "../gpu/container.ts";
import { driverEnvironment, Gpus, standIn, UUIDS } from "../gpu/harness.ts";
import { BreakableDaemon } from "./harness/breakable.ts";
import { DeadlyCriu, dumpMoments, restoreMoments } from "./harness/deadly-criu.ts";
import { Live } from "./harness/live.ts";
import { missingFor } from "./harness/matrix.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const [a0, a1] = UUIDS;
const combination = { containerd: "2.1", engine: "runc" } as const;
const missing = missingFor(combination);
const both = ["--devices", "2", "--fork"];

/*
 * What the tests of this file go through, all of it: each fault switch of the stand-in (RULES.md) at each of the driver's calls, and the end of
 * each process that takes part in the middle of each call. The last test compares. `state` is what is asked before anything is touched, and at
 * each step; that it hangs is test/gpu/driver.test.ts's.
 */
const faultsOf = {
  lock: ["never", "error", "hang", "slow", "die"],
  checkpoint: ["error", "hang", "slow", "die", "alloc", "broken"],
  restore: ["error", "hang", "slow", "die"],
  unlock: ["error", "hang", "slow", "die"],
  state: ["error"],
} as const;
/** Of a dump that leaves the container running, which gives all back. */
const callsOfDump = ["lock", "checkpoint", "restore", "unlock"] as const;
const callsOfRestore = ["restore", "unlock"] as const;
const everything = [
  ...[...callsOfDump, "state" as const].flatMap((call) =>
    faultsOf[call].map((fault) => `dump: ${call} ${fault}`),
  ),
  ...[...callsOfRestore, "state" as const].flatMap((call) =>
    faultsOf[call].map((fault) => `restore: ${call} ${fault}`),
  ),
  ...callsOfDump.flatMap((call) => ["helper", "cedanad"].map((killed) => `dump: ${call}, ${killed} killed`)),
  ...callsOfRestore.flatMap((call) =>
    ["helper", "cedanad"].map((killed) => `restore: ${call}, ${killed} killed`),
  ),
  ...dumpMoments.map((moment) => `dump: CRIU killed at ${moment}`),
  ...restoreMoments.map((moment) => `restore: CRIU killed at ${moment}`),
];
const tried = new Set<string>();

describe.skipIf(missing)(`GPU faults${missing ? ` (${missing})` : ""}`, () => {
  let live: Live;
  let directory: string;
  let gpus: Gpus;
  let daemon: BreakableDaemon;
  let deadly: DeadlyCriu;
  let disk: string;
  beforeAll(async () => {
    directory = await standIn();
    gpus = new Gpus("/run");
    daemon = new BreakableDaemon();
    deadly = new DeadlyCriu();
    disk = mkdtempSync("/run/cd-");
    execFileSync("mount", ["-t", "tmpfs", "-o", "size=256k", "cedana-live", disk]);
    live = await Live.start({
      ...combination,
      path: deadly.directory,
      env: {
        ...driverEnvironment(directory, gpus),
        CEDANA_GPU_DEADLINES: "lock=1500,checkpoint=1500,restore=1500,unlock=1500,ask=8000",
        CEDANA_DAEMON: daemon.program,
      },
    });
  }, 90_000);
  beforeEach(() => {
    gpus.faults();
    gpus.plug([a0, "one", 16], [a1, "one", 16]);
  });
  afterEach(async () => {
    gpus.faults();
    gpus.wipe();
    await live.expectNoLeftovers();
  });
  afterAll(async () => {
    await live?.stop();
    daemon?.[Symbol.dispose]();
    deadly?.[Symbol.dispose]();
    gpus?.[Symbol.dispose]();
    execFileSync("umount", [disk]);
    rmdirSync(disk);
  });

  /** Sets fault switches, and notes them. */
  function fail(during: "dump" | "restore", ...switches: string[]): void {
    gpus.faults(...switches);
    for (const one of switches) {
      const [, call, fault] = /^(\w+)(?:@\w+)?=(\w+)/.exec(one) ?? [];
      tried.add(`${during}: ${call} ${fault}`);
    }
  }

  /** Kills one of ours in the middle of a call of the driver that `act` leads to. */
  async function killAt(
    during: "dump" | "restore",
    call: string,
    killed: "helper" | "cedanad",
    act: () => Promise<unknown>,
  ): Promise<unknown> {
    fail(during, `${call}@client2=slow:700`);
    tried.add(`${during}: ${call}, ${killed} killed`);
    const seen = gpus.watchCalls();
    const outcome = act().then(
      () => undefined,
      (error: Error) => error,
    );
    await until(() => seen().includes(`${call} client2`), { everyMs: 2, what: () => `${call}: ${seen()}` });
    if (killed === "cedanad") await live.killCedanad();
    else {
      const helper = childrenOf(live.cedanad()!.pid).find((pid) => commandOf(pid).includes("gpu-helper"));
      process.kill(helper!, "SIGKILL");
    }
    const error = await outcome;
    gpus.faults();
    return error;
  }

  const journals = () => (existsSync(join(live.runDir, "gpu")) ? readdirSync(join(live.runDir, "gpu")) : []);

  /** Both processes count on, and nothing is left to be given back. */
  async function bothRun(task: LiveTask, what: string): Promise<void> {
    await until(() => journals().length === 0, { what: () => `${what}: the end of the journal` });
    expect(await task.status(), what).toBe("RUNNING");
    for (const name of ["client", "client2"]) {
      task.stdout.skip();
      await countsOn(task, name);
    }
  }

  const failing: [fault: string, message: RegExp][] = [
    [
      "lock@client2=never",
      /lock of the GPU state of process \d+ \(client2\) .*did not come to an end in time/,
    ],
    ["lock@client2=error:999", /lock .*\(client2\) of task .*999.*\(step lockDevices\)/],
    [
      "checkpoint@client=error:2",
      /checkpoint .*\(client\).*not enough host memory.*\(step checkpointDevices\)/,
    ],
    ["checkpoint@client2=alloc:3", /not enough host memory/],
    ["checkpoint@client2=error:46", /GPU is not available/],
    ["nvml=off mig=on lock@client=error:401", /another state/],
    ["state=error:999", /the GPU state of process \d+ .*can't be asked for.*999.*\(step lockDevices\)/],
  ];
  it("fails by name, and both processes run on, when one of the driver's calls does", async () => {
    await using task = await runClient(live, directory, gpus, both);
    await countsOn(task, "client2");
    const image = mkdtempSync(join(live.dir, "image-"));
    for (const [fault, message] of failing) {
      fail("dump", ...fault.split(" "));
      await expect(task.checkpoint({ imagePath: image }), fault).rejects.toThrow(message);
      expect(readdirSync(image), fault).toEqual([]);
      gpus.faults();
      await bothRun(task, fault);
    }
  });

  it("fails when a call doesn't return or nothing can be given back, and both run on as soon as the driver lets them", async () => {
    await using task = await runClient(live, directory, gpus, both);
    await countsOn(task, "client2");
    const image = mkdtempSync(join(live.dir, "image-"));
    for (const [fault, message] of [
      ["lock@client2=hang", /lock on process \d+ did not return in \d+ ms/],
      ["checkpoint@client=hang", /checkpoint on process \d+ did not return in 1500 ms/],
      ["restore@client2=error:46", /did not get their GPU back.*restore .*\(client2\).*46/],
      ["restore@client=hang", /did not get their GPU back.*restore on process/],
      ["unlock@client2=error:999", /did not get their GPU back.*unlock/],
      ["unlock@client=hang", /did not get their GPU back.*unlock on process/],
    ] as [string, RegExp][]) {
      fail("dump", fault);
      await expect(task.checkpoint({ imagePath: image }), fault).rejects.toThrow(message);
      expect(readdirSync(image), fault).toEqual([]);
      gpus.faults();
      await bothRun(task, fault);
    }
    await task.checkpoint();
    await bothRun(task, "all of them");
  }, 120_000);

  it("refuses what the driver can't checkpoint, by its name, while it runs", async () => {
    await using task = await runClient(live, directory, gpus, both);
    await countsOn(task, "client2");
    const calls = gpus.watchCalls();
    gpus.faults("mig=on");
    await expect(task.checkpoint()).rejects.toThrow(/GPU-a0a0.*divided into instances \(MIG\)/);
    gpus.faults("memory=huge");
    await expect(task.checkpoint()).rejects.toThrow(/must fit into host memory/);
    expect(calls()).toEqual([]);
    gpus.faults("memory=unknown"); // NVML doesn't say: no reason to refuse
    await task.checkpoint();
    gpus.faults();
    await bothRun(task, "refusals");
    const made = await task.execToEnd([
      "sh",
      "-c",
      "mkdir -p /tmp/nvidia-mps && mkfifo /tmp/nvidia-mps/control",
    ]);
    expect(made.status).toBe(0);
    const since = calls().length;
    await expect(task.checkpoint()).rejects.toThrow(/through MPS \(\/tmp\/nvidia-mps\/control\)/);
    expect(calls()).toHaveLength(since);
  });

  it("fails when a process begins to use a GPU in the middle of it, and all run on", async () => {
    await using task = await runClient(live, directory, gpus, both);
    await countsOn(task, "client2");
    fail("dump", "lock@client2=slow:900");
    const seen = gpus.watchCalls();
    const failed = task.checkpoint().then(
      () => undefined,
      (error: Error) => error,
    );
    await until(() => seen().includes("lock client2"), { everyMs: 2, what: () => `the call: ${seen()}` });
    await using late = await task.exec([`${directory}/client-dlsym`, "--name", "late"], {
      env: [`LD_LIBRARY_PATH=${directory}/rt`, `CEDANA_TEST_GPU_DIR=${gpus.path}`],
    });
    await late.stdout.lineMatching(/^late \d+/);
    expect(String(await failed)).toMatch(
      /process \d+ \(late\) of task .* has begun to use a GPU in the middle/,
    );
    gpus.faults();
    late.stdout.skip();
    await late.stdout.lineMatching(/^late \d+/);
    await bothRun(task, "a newcomer");
  });

  it("says that a process is lost when the driver says so, and the other one runs on", async () => {
    await using task = await runClient(live, directory, gpus, both);
    await countsOn(task, "client2");
    fail("dump", "checkpoint@client2=broken");
    await expect(task.checkpoint()).rejects.toThrow(
      /managed \(UVM\) memory.*marked it as failed: its GPU state is lost/,
    );
    gpus.faults();
    task.stdout.skip();
    await countsOn(task, "client");
  });

  it("goes on without a process that dies in the middle of it", async () => {
    await using task = await runClient(live, directory, gpus, both);
    await countsOn(task, "client2");
    for (const call of callsOfDump) {
      await using victim = await task.exec([`${directory}/client-dlsym`, "--name", "victim"], {
        env: [`LD_LIBRARY_PATH=${directory}/rt`, `CEDANA_TEST_GPU_DIR=${gpus.path}`],
      });
      await victim.stdout.lineMatching(/^victim \d+/);
      fail("dump", `${call}@victim=die`);
      const outcome = await task.checkpoint().then(
        () => "a checkpoint",
        (error: Error) => error.message,
      );
      // Of one that was in the dump, the images have all. Before that it is missing in them.
      expect(outcome, call).toMatch(
        call === "restore" || call === "unlock" ? "a checkpoint" : /\(victim\)|has ended/,
      );
      gpus.faults();
      await victim.exited;
      await bothRun(task, `death at ${call}`);
    }
  });

  it("gives the GPUs back when CRIU fails, and when it is killed", async () => {
    await using task = await runClient(live, directory, gpus, [...both, "--bytes", "2000000"]);
    await countsOn(task, "client2");
    await expect(task.checkpoint({ imagePath: join(disk, "image") })).rejects.toThrow(
      /step criuDump|ENOSPC|space/,
    );
    await bothRun(task, "a full disk");
    for (const moment of dumpMoments) {
      const image = mkdtempSync(join(live.dir, "image-"));
      deadly.killNextAt(moment, "criu");
      await expect(task.checkpoint({ imagePath: image }), moment).rejects.toThrow();
      expect(deadly.killed(), moment).toBe("criu");
      tried.add(`dump: CRIU killed at ${moment}`);
      expect(readdirSync(image), moment).toEqual([]);
      await bothRun(task, `CRIU killed at ${moment}`);
    }
  });

  it("gives the GPUs back when the helper is killed, at each of the driver's calls", async () => {
    await using task = await runClient(live, directory, gpus, both);
    await countsOn(task, "client2");
    for (const call of callsOfDump) {
      const error = await killAt("dump", call, "helper", () => task.checkpoint());
      expect(String(error), call).toMatch(/the GPU helper has ended \(SIGKILL\)/);
      await bothRun(task, `helper killed at ${call}`);
    }
  });

  it("finishes the checkpoint when cedanad is killed, at each of the driver's calls", async () => {
    await using task = await runClient(live, directory, gpus, both);
    await countsOn(task, "client2");
    for (const call of callsOfDump) {
      const image = mkdtempSync(join(live.dir, "image-"));
      expect(
        await killAt("dump", call, "cedanad", () => task.checkpoint({ imagePath: image })),
      ).toBeUndefined();
      const manifest = JSON.parse(readFileSync(join(image, "cedana.json"), "utf8"));
      expect(manifest.gpu.processes, call).toHaveLength(2);
      await bothRun(task, `cedanad killed at ${call}`);
    }
  });

  it("finishes the checkpoint when cedanad ends between the steps", async () => {
    await using task = await runClient(live, directory, gpus, both);
    await countsOn(task, "client2");
    const boundaries = [
      "lockDevices.before",
      "freeze.before", // locked
      "checkpointDevices.before",
      "takeRootfs.before", // checkpointed
      "criuDump.before",
      "checkpointDevices.after", // dumped
      "freeze.after",
      "lockDevices.after", // given back
      "findDevices.after",
    ];
    for (const boundary of boundaries) {
      const image = mkdtempSync(join(live.dir, "image-"));
      daemon.crashNextAt(`dump.${boundary}`);
      await live.killCedanad();
      await task.status();
      await task.checkpoint({ imagePath: image });
      expect(
        JSON.parse(readFileSync(join(image, "cedana.json"), "utf8")).gpu.processes,
        boundary,
      ).toHaveLength(2);
      await bothRun(task, boundary);
    }
  });

  it("gives the GPUs back when nobody repeats the dump that a crash of cedanad has cut off", async () => {
    await using task = await runClient(live, directory, gpus, both);
    await countsOn(task, "client2");
    gpus.faults("checkpoint@client2=slow:700");
    const seen = gpus.watchCalls();
    const failed = task.checkpoint().then(
      () => undefined,
      (error: Error) => error,
    );
    // Twice in the middle of it: the third delivery is refused.
    await until(() => seen().includes("checkpoint client2"), {
      everyMs: 2,
      what: () => `the call: ${seen()}`,
    });
    daemon.crashNextAt("dump.checkpointDevices.before");
    await live.killCedanad();
    expect(String(await failed)).toMatch(/INTERNAL/);
    gpus.faults();
    await bothRun(task, "nobody repeats");
  });

  describe("at a restore", () => {
    let image: string;
    let files: string[];
    beforeAll(async () => {
      gpus.plug([a0, "one", 16], [a1, "one", 16]);
      await using task = await runClient(live, directory, gpus, both);
      await countsOn(task, "client2");
      image = await task.checkpoint({ exit: true });
      await task.exited;
      files = readdirSync(image).sort();
    }, 30_000);

    const create = () =>
      live.create([`${directory}/client-dlsym`], gpuOptions(directory, gpus, { criuImagePath: image }));

    /** Nothing of the container is left, and all of the images. */
    async function expectUndone(task: LiveTask, what: string): Promise<void> {
      expect(await task.status(), what).toBe("STOPPED");
      const left = live.leftovers().filter((line) => /^cgroup|^engine state|\(container,/.test(line));
      expect(left, what).toEqual([]);
      expect(readdirSync(image).sort(), what).toEqual(files);
    }

    /** Both run with what they had, and go. */
    async function expectRestored(task: LiveTask): Promise<void> {
      await countsOn(task, "client");
      await countsOn(task, "client2");
      await task[Symbol.asyncDispose]();
      gpus.wipe();
    }

    it("kills what it has restored when the driver can't give the GPUs, and keeps the images", async () => {
      for (const [fault, message] of [
        ["restore@client2=error:46", /restore .*\(client2\).*46.*\(step restoreDevices\)/],
        ["restore@client2=hang", /restore on process \d+ did not return/],
        ["restore@client2=die", /client2/],
        ["unlock@client2=error:999", /unlock .*\(client2\)/],
        ["unlock@client=hang", /unlock on process/],
        ["unlock@client2=die", /client2/],
        ["state=error:999", /can't be asked for.*999.*\(step restoreDevices\)/],
      ] as [string, RegExp][]) {
        gpus.wipe();
        fail("restore", fault);
        await using task = await create();
        await expect(task.start(), fault).rejects.toThrow(message);
        gpus.faults();
        await expectUndone(task, fault);
      }
    }, 60_000);

    it("kills what it has restored when the helper or CRIU is killed, and keeps the images", async () => {
      for (const call of callsOfRestore) {
        gpus.wipe();
        await using task = await create();
        const error = await killAt("restore", call, "helper", () => task.start());
        expect(String(error), call).toMatch(/the GPU helper has ended \(SIGKILL\)/);
        await expectUndone(task, `helper killed at ${call}`);
      }
      for (const moment of restoreMoments) {
        gpus.wipe();
        await using task = await create();
        deadly.killNextAt(moment, "criu");
        await expect(task.start(), moment).rejects.toThrow();
        expect(deadly.killed(), moment).toBe("criu");
        tried.add(`restore: CRIU killed at ${moment}`);
        await expectUndone(task, `CRIU killed at ${moment}`);
      }
    }, 60_000);

    it("is gone on with when cedanad ends between the steps, and in the middle of the driver's calls", async () => {
      gpus.wipe();
      for (const boundary of [
        "prepareDevices.after",
        "criuRestore.before",
        "restoreDevices.before",
        "tellContainer.before",
        "restoreDevices.after",
      ]) {
        await using task = await create();
        daemon.crashNextAt(`restore.${boundary}`);
        await live.killCedanad();
        await task.status();
        await task.start();
        await expectRestored(task);
      }
      for (const call of callsOfRestore) {
        await using task = await create();
        expect(await killAt("restore", call, "cedanad", () => task.start()), call).toBeUndefined();
        await expectRestored(task);
      }
    }, 60_000);
  });

  it("has tried every fault at every step", ({ skip, task }) => {
    const others = task.suite!.tasks.flatMap((one) => (one.type === "suite" ? one.tasks : [one]));
    skip(
      others.some(({ mode }) => mode === "skip"),
      "only a part of the tests was run",
    );
    expect(everything.filter((one) => !tried.has(one))).toEqual([]);
    expect(everything).toHaveLength(20 + 9 + 8 + 4 + 3 + 6);
  });
});

function commandOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8");
  } catch {
    return ""; // it has ended
  }
}
