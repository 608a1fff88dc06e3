// CRIU's gate: the engine starts while the container runs, and its CRIU waits until it stands still. Whoever dies meanwhile, the
// container runs on, and nothing is left.

import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { readManifest } from "../../src/checkpoint/manifest.ts";
import { childrenOf, processStat } from "../../src/linux/proc.ts";
import { Holder } from "./harness/holder.ts";
import { isControl, Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { anyOf } from "./harness/proto.ts";
import { entries } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const REAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

for (const combination of enginesForCheckpoints) {
  const missing = isControl ? "the Go shim has none" : missingFor(combination);
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    let path: string;
    let holder: Holder;
    const configuration = `/run/cedana-gate-test-${combination.engine}.json`;

    beforeAll(async () => {
      path = mkdtempSync("/run/cg-");
      // A criu that notes whether the container stands still when it is started.
      const criu = [
        "#!/bin/sh",
        `if pid=$(cat ${path}/pid 2>/dev/null); then`,
        "  state=/sys/fs/cgroup/freezer$(sed -n 's/^[0-9]*:freezer://p' /proc/$pid/cgroup)/freezer.state",
        "  [ -e $state ] || state=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$pid/cgroup)/cgroup.freeze",
        `  case $(cat $state) in FROZEN | 1) echo frozen ;; *) echo runs ;; esac >>${path}/states`,
        `  env | grep -E "GATE|criu-gate.*:/" >>${path}/states`,
        "fi",
        `PATH=${REAL_PATH} exec criu "$@"`,
      ];
      writeFileSync(join(path, "criu"), `${criu.join("\n")}\n`, { mode: 0o755 });
      live = await Live.start({ ...combination, path, env: { CEDANA_CONFIG: configuration } });
      holder = new Holder(join(live.dir, "plugins"));
      writeFileSync(configuration, JSON.stringify({ plugins: holder.configuration }), { mode: 0o600 });
    });
    afterEach(() => live.expectNoLeftovers());
    afterAll(async () => {
      await live?.stop();
      for (const one of [configuration, path]) rmSync(one, { recursive: true, force: true });
    });

    /** Begins a checkpoint, and comes back when it holds the container frozen, with the engine and its CRIU at the gate. */
    async function heldAtGate(task: LiveTask, imagePath: string) {
      holder.hold();
      const outcome = task.checkpoint({ imagePath }).then(
        () => "done",
        (error: Error) => error.message,
      );
      await holder.isHeld(() => "the held dump");
      const engine = entries("/proc")
        .filter((name) => /^\d+$/.test(name))
        .map(Number)
        .find((pid) => commandOf(pid).includes("checkpoint\0") && commandOf(pid).includes(task.bundle))!;
      const [criu] = childrenOf(engine).filter((pid) => processStat(pid)?.comm === "criu");
      expect(commandOf(criu!)).toMatch(/^criu\0swrk\0/);
      return { outcome, engine, criu: criu!, release: () => holder.release() };
    }

    function commandOf(pid: number): string {
      try {
        return readFileSync(`/proc/${pid}/cmdline`, "utf8");
      } catch {
        return ""; // it has ended
      }
    }

    /** The container runs, and the bundle is as before. */
    async function isUnharmed(task: LiveTask): Promise<void> {
      expect(await task.status()).toBe("RUNNING");
      task.stdout.skip();
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
      expect(readdirSync(task.bundle).filter((name) => /gate|criu-|frozen|attempt/.test(name))).toEqual(
        ["criu-dump.log"].filter((name) => existsSync(join(task.bundle, name))),
      );
    }

    it("asks CRIU for its version while the container runs, and has it dump when it stands still", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      writeFileSync(join(path, "pid"), String(task.pid));
      try {
        const image = await task.checkpoint();
        // Behind the first dump, cedanad asks it for its version by itself.
        expect(readFileSync(join(path, "states"), "utf8")).toMatch(/^(runs\n)*frozen\n(runs\n)?$/);
        // Decided behind the engine's start: it has come to CRIU all the same.
        expect((await readManifest(image))!.options.networkLock).toBe("skip");
      } finally {
        for (const name of ["pid", "states"]) rmSync(join(path, name), { force: true });
      }
      await isUnharmed(task);
    });

    it.each(["engine", "criu"] as const)(
      "leaves the container running when the %s is killed at the gate",
      async (victim) => {
        await using task = await live.run(["counter"]);
        await task.nextNumber();
        const imagePath = mkdtempSync(join(live.dir, "image-"));
        const held = await heldAtGate(task, imagePath);
        process.kill(held[victim], "SIGKILL");
        await until(() => commandOf(held.criu) === "", { what: () => "the end of CRIU" });
        held.release();
        expect(await held.outcome).toMatch(/checkpoint|criu/i);
        expect(readdirSync(imagePath)).toEqual([]);
        await isUnharmed(task);
      },
    );

    it("goes on after cedanad is killed while CRIU waits at the gate of the frozen container", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      const imagePath = mkdtempSync(join(live.dir, "image-"));
      const held = await heldAtGate(task, imagePath);
      await live.killCedanad();
      await until(() => commandOf(held.engine) === "", { what: () => "the end of the engine" });
      held.release();
      expect(await held.outcome).toBe("done");
      expect((await readManifest(imagePath))?.options.leaveRunning).toBe(true);
      await isUnharmed(task);
    });

    it("runs an engine that finds its CRIU past PATH without a gate", async () => {
      const binaryName = join(path, combination.engine);
      const engine = `#!/bin/sh\nPATH=${REAL_PATH} exec ${combination.engine} "$@"\n`;
      writeFileSync(binaryName, engine, { mode: 0o755 });
      const runtimeOptions = anyOf("containerd.runc.v1.Options", { binaryName });
      await using task = await live.run(["counter"], { runtimeOptions });
      await task.nextNumber();
      const image = await task.checkpoint();
      expect((await readManifest(image))!.options.networkLock).toBe("skip");
      expect(live.cedanadLog()).toContain("started again without");
      await isUnharmed(task);
    });

    // Nothing that cedana gives the engine's environment arrives. In each round, the program writes to a file, whose size CRIU notes.
    it.each([
      ["fails", "is started again", false, "started again without"],
      ["dumps the running container", "dumps it again", false, "thrown away, and dumped again"],
      ["dumps the running container to its end", "takes its files then", true, "as they are at its end"],
    ])(
      "lets memory and files be of one moment behind an engine that clears its environment: it %s, and cedana %s",
      async (_what, _then, exit, said) => {
        const binaryName = join(path, combination.engine);
        // What is in the place of CRIU's log doesn't bar the way where an administrator has it written elsewhere.
        const clear = 'for arg; do [ "$last" = --work-path ] && rmdir "$arg/dump.log"; last=$arg; done';
        const engine = [
          "#!/bin/sh",
          ...(said.startsWith("started") ? [] : [clear]),
          `exec env -i PATH=${REAL_PATH} ${combination.engine} "$@"`,
        ];
        writeFileSync(binaryName, `${engine.join("\n")}\n`, { mode: 0o755 });
        const runtimeOptions = anyOf("containerd.runc.v1.Options", { binaryName });
        await using task = await live.run(["files"], { runtimeOptions });
        await task.nextNumber();
        const earlier = live.cedanadLog().length;
        const flags = exit ? ["--exit"] : [];
        const dumped = await live.cedana("dump", "containerd", task.id, "--json", ...flags);
        const { path: directory } = JSON.parse(dumped) as { path: string };
        expect(live.cedanadLog().slice(earlier)).toContain(said);
        const files = await live.cedana("image", "decode", join(directory, "checkpoint/files.img"));
        const log = JSON.parse(files).entries.find(
          (one: { reg?: { name: string } }) => one.reg?.name === "/tmp/log",
        );
        const root = mkdtempSync(join(live.dir, "root-"));
        execFileSync("tar", ["-C", root, "-xf", join(directory, "rootfs-diff.tar")]);
        expect(statSync(join(root, "tmp/log")).size).toBe(Number(log.reg.size));
        // It was told to CRIU to no avail.
        expect((await readManifest(directory))!.options.networkLock).toBe(undefined);
        if (exit) expect(await task.wait()).toBe(137);
        else await isUnharmed(task);
        live.takeBaseline(); // the thread that took the files is there for some seconds
      },
    );
  });
}
