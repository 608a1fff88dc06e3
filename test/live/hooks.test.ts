// The container's own hooks around its checkpoints, and what it is told after a restore.

import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { BreakableDaemon } from "./harness/breakable.ts";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import type { Spec } from "./harness/spec.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const COUNTER = ["counter", "20", "7"];

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination);
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    const configuration = `/run/cedana-hooks-${combination.engine}.json`;
    let live: Live;
    let daemon: BreakableDaemon;
    beforeAll(async () => {
      daemon = new BreakableDaemon();
      live = await Live.start({
        ...combination,
        // 1.7 can't store two checkpoints of a container within one second.
        containerd: "2.1",
        env: { CEDANA_CONFIG: configuration, CEDANA_DAEMON: daemon.program },
      });
      allow(true);
    });
    afterEach(() => live.expectNoLeftovers());
    afterAll(async () => {
      await live?.stop();
      daemon[Symbol.dispose]();
      rmSync(configuration, { force: true });
    });

    function allow(hooks: boolean): void {
      const rules = { annotations: { hooks }, restoreFromPaths: [live.dir] };
      writeFileSync(configuration, JSON.stringify(rules), { mode: 0o600 });
    }

    const preDump = (command: string | string[], more: Record<string, string> = {}) => ({
      "cedana.io/hook.pre-dump": typeof command === "string" ? command : JSON.stringify(command),
      ...more,
    });

    async function inContainer(task: LiveTask, script: string): Promise<string> {
      const { stdout, status } = await task.execToEnd(["sh", "-c", script]);
      expect(status, script).toBe(0);
      return stdout.trim();
    }

    async function runsOn(task: LiveTask): Promise<void> {
      expect(await task.status()).toBe("RUNNING");
      task.stdout.skip();
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
    }

    /** Pids of the processes in the container that have this among their arguments. */
    async function pidsOf(task: LiveTask, argument: string): Promise<number[]> {
      return (await task.pids()).filter((pid) => {
        try {
          return readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0").includes(argument);
        } catch {
          return false; // it has ended
        }
      });
    }

    const hookFiles = (task: LiveTask) =>
      readdirSync(task.bundle).filter((name) => /hook|attempt|frozen|criu-work/.test(name));

    it("runs a command in the container before the dump, as its first process was run", async () => {
      const script = `echo "$CEDANA_HOOK $PLACE $(pwd)" > /run/told; echo hello`;
      const options = { annotations: preDump(script), cwd: "/tmp", env: ["PLACE=here"] };
      await using task = await live.run(COUNTER, options);
      await task.nextNumber();
      const image = await task.checkpoint();
      expect(await inContainer(task, "cat /run/told")).toBe("pre-dump here /tmp");
      expect(live.cedanadLog()).toMatch(/"output":"hello".*pre-dump hook/);
      expect(
        JSON.parse(readFileSync(join(image, "cedana.json"), "utf8")).timings.preDumpHook,
      ).toBeGreaterThan(1);
      expect(hookFiles(task)).toEqual([]);
      await runsOn(task);
      // It has ended before: the restored container has what it wrote, and not it.
      await task.destroy();
      await using restored = await live.restore(image, COUNTER);
      await restored.nextNumber();
      expect(await restored.pids()).toHaveLength(1);
      expect(await inContainer(restored, "cat /run/told")).toBe("pre-dump here /tmp");
    });

    it("takes a list of arguments, for containers without a shell", async () => {
      await using task = await live.run(COUNTER, {
        annotations: preDump(["/bin/busybox", "touch", "/run/a b"]),
      });
      await task.nextNumber();
      await task.checkpoint();
      expect(await inContainer(task, "ls /run")).toContain("a b");
    });

    it("runs it for a paused container, too, which stands still again afterwards", async () => {
      await using task = await live.run(COUNTER, { annotations: preDump("echo x >> /run/told") });
      await task.nextNumber();
      await task.pause();
      await task.checkpoint();
      expect(await task.status()).toBe("PAUSED");
      task.stdout.skip();
      await expect(task.nextNumber(300)).rejects.toThrow();
      await task.resume();
      await runsOn(task);
      expect(await inContainer(task, "cat /run/told")).toBe("x");
      // As a user does it.
      await live.ctr("task", "checkpoint", task.id);
      await runsOn(task);
      expect(await inContainer(task, "cat /run/told")).toBe("x\nx");
      for (const name of (await live.ctr("images", "ls", "-q")).split("\n"))
        if (name.includes("checkpoint")) await live.ctr("images", "rm", "--sync", name);
    });

    it("refuses the dump when it fails, with what it printed, and leaves the container as it was", async () => {
      await using task = await live.run(COUNTER, {
        annotations: preDump("echo the queue is not empty >&2; exit 3"),
      });
      await task.nextNumber();
      const image = mkdtempSync(join(live.dir, "image-"));
      const refused = task.checkpoint({ imagePath: image });
      await expect(refused).rejects.toMatchObject({ status: "FAILED_PRECONDITION" });
      await expect(refused).rejects.toThrow(/pre-dump hook.*status 3; it printed: the queue is not empty/);
      expect(readdirSync(image)).toEqual([]);
      expect(hookFiles(task)).toEqual([]);
      await runsOn(task);
      await task.pause();
      await expect(task.checkpoint({ imagePath: image })).rejects.toThrow(/status 3/);
      expect(await task.status()).toBe("PAUSED");
    });

    it("refuses the dump when it can't be run", async () => {
      await using task = await live.run(COUNTER, { annotations: preDump(["/bin/no-such-program"]) });
      await task.nextNumber();
      await expect(task.checkpoint()).rejects.toThrow(/pre-dump hook.*could not be run: .*no-such-program/);
      await runsOn(task);
    });

    it("kills it with all of its session when its time is over, however loud it was", async () => {
      await using task = await live.run(COUNTER, {
        annotations: preDump("sleep 4321 & yes loud & sleep 4321", { "cedana.io/hook-timeout": "1500ms" }),
      });
      await task.nextNumber();
      const refused = task.checkpoint();
      await expect(refused).rejects.toThrow(
        /did not end within 1500 ms and was killed; it printed: ….*loud/s,
      );
      expect(await pidsOf(task, "4321")).toEqual([]);
      expect(await pidsOf(task, "loud")).toEqual([]);
      expect(hookFiles(task)).toEqual([]);
      await runsOn(task);
    });

    it("leaves nothing of it behind that would be dumped, also when it succeeds", async () => {
      await using task = await live.run(COUNTER, {
        annotations: preDump("sleep 4321 > /dev/null 2>&1 & true"),
      });
      await task.nextNumber();
      const image = await task.checkpoint();
      expect(await pidsOf(task, "4321")).toEqual([]);
      await task.destroy();
      await using restored = await live.restore(image, COUNTER);
      await restored.nextNumber();
      expect(await pidsOf(restored, "4321")).toEqual([]);
    });

    it("runs it once, also when cedanad is killed meanwhile or at the boundaries around it", async () => {
      await using task = await live.run(COUNTER, {
        annotations: preDump("echo x >> /run/told; while [ ! -e /run/go ]; do sleep 0.01; done; echo done"),
      });
      await task.nextNumber();
      for (const paused of [false, true]) {
        await inContainer(task, "rm -f /run/told /run/go");
        if (paused) await task.pause();
        const image = task.checkpoint();
        await until(async () => (await pidsOf(task, "-c")).length > 0, { what: () => "the hook" });
        await live.killCedanad();
        await task.status(); // the next one is there
        const [hook] = await until(async () => {
          const pids = await pidsOf(task, "-c");
          return pids.length > 0 && existsSync(`/proc/${pids[0]}/root/run/told`) ? pids : undefined;
        });
        writeFileSync(`/proc/${hook}/root/run/go`, "");
        expect(existsSync(join(await image, "cedana.json"))).toBe(true);
        expect(await task.status()).toBe(paused ? "PAUSED" : "RUNNING");
        if (paused) await task.resume();
        await runsOn(task);
        expect(await inContainer(task, "cat /run/told")).toBe("x");
      }
      // The same steps below either engine, so once; a paused container goes through all that another does.
      if (combination.engine !== "runc") return;
      for (const boundary of ["preDumpHook.before", "preflightDump.before", "preDumpHook.after"]) {
        await inContainer(task, "rm -f /run/told; touch /run/go");
        daemon.crashNextAt(`dump.${boundary}`);
        await live.killCedanad();
        await task.status();
        await task.pause();
        await task.checkpoint();
        expect(await task.status(), boundary).toBe("PAUSED");
        await task.resume();
        await runsOn(task);
        expect(await inContainer(task, "cat /run/told"), boundary).toBe("x");
        expect(hookFiles(task), boundary).toEqual([]);
      }
    });

    it("pauses a container again that ran for its hook when nobody asks any more", async () => {
      await using task = await live.run(COUNTER);
      await task.nextNumber();
      await task.pause();
      // As it is left by a crash in the hook, after which the caller has gone, too.
      const { Cgroup } = await import("../../src/linux/cgroup.ts");
      if (live.options.cgroup === "host") {
        const cgroup = await Cgroup.of(task.pid);
        await cgroup.thaw();
        writeFileSync(join(task.bundle, "cedana-hook-ran"), "1\n");
        await live.killCedanad();
        await until(() => cgroup.isFrozen(), { what: () => "the pause" });
        await until(() => hookFiles(task).length === 0, { what: () => "the end of the note" });
      }
      await task.resume();
      await runsOn(task);
    });

    const told = async (task: LiveTask) =>
      JSON.parse(await inContainer(task, "cat /run/cedana/restore.json"));

    it("tells a restored container what has become of it, and counts its restores", async () => {
      let image: string;
      const annotations = {
        "io.kubernetes.cri.sandbox-name": "web-0",
        "io.kubernetes.cri.sandbox-namespace": "shop",
        "io.kubernetes.cri.container-name": "web",
      };
      const first = {
        id: live.newId("old"),
        edit: (spec: Record<string, unknown>) => {
          spec.hostname = "one";
        },
        annotations,
      };
      {
        await using task = await live.run(COUNTER, first);
        await task.nextNumber();
        expect(await inContainer(task, "ls /run")).toBe("");
        image = await task.checkpoint();
      }
      for (const generation of [1, 2, 3]) {
        const id = live.newId("new");
        const hostname = `host${generation}`;
        const beforeMs = Date.now();
        await using task = await live.restore(image, COUNTER, {
          id,
          edit: (spec) => {
            spec.hostname = hostname;
          },
        });
        await task.nextNumber();
        const facts = await told(task);
        expect(facts).toMatchObject({
          version: 1,
          generation,
          why: "caller",
          new: { containerId: id, namespace: live.namespace, hostname },
        });
        expect(facts.old.namespace).toBe(live.namespace);
        if (generation === 1)
          expect(facts.old).toEqual({
            containerId: first.id,
            namespace: live.namespace,
            hostname: "one",
            pod: { namespace: "shop", name: "web-0", container: "web" },
          });
        expect(facts.new.pod).toBeUndefined();
        expect(Date.parse(facts.dumpedAt)).toBeLessThanOrEqual(Date.parse(facts.restoredAt));
        expect(Date.parse(facts.restoredAt)).toBeGreaterThanOrEqual(beforeMs);
        expect(
          await inContainer(task, "ls -a /run/cedana | wc -l; stat -c %a /run/cedana/restore.json"),
        ).toBe("3\n644");
        await live.killCedanad(); // the number is on record
        image = await task.checkpoint();
      }
    });

    const restored = (command: string, more: Record<string, string> = {}) => ({
      annotations: { "cedana.io/hook.post-restore": command, ...more },
    });

    it("runs a command in the restored container before it counts as started", async () => {
      let image: string;
      {
        await using task = await live.run(COUNTER);
        await task.nextNumber();
        image = await task.checkpoint();
      }
      const script =
        "test -e /run/cedana/restore.json && echo $CEDANA_HOOK $CEDANA_GENERATION $CEDANA_WHY > /run/told";
      await using task = await live.restore(image, COUNTER, restored(script));
      expect(await inContainer(task, "cat /run/told")).toBe("post-restore 1 caller");
      expect(hookFiles(task)).toEqual([]);
      await runsOn(task);
      await live.events.waitFor(task.id, "start");
      expect(live.events.summary(task.id).slice(0, 2)).toEqual(["create", "start"]);
    });

    it("fails the restore with it, and leaves nothing", async () => {
      let image: string;
      {
        await using task = await live.run(COUNTER);
        await task.nextNumber();
        image = await task.checkpoint();
      }
      for (const [command, more, message] of [
        ["echo no peer; exit 4", {}, /post-restore hook.*status 4; it printed: no peer/],
        ["sleep 4321", { "cedana.io/hook-timeout": "1s" }, /did not end within 1000 ms/],
      ] as const) {
        const task = await live.create(COUNTER, { ...restored(command, more), criuImagePath: image });
        try {
          await expect(task.start()).rejects.toThrow(message);
          expect(await task.status()).toBe("STOPPED");
          const left = live.leftovers().filter((line) => /^cgroup|^engine state|\(container,/.test(line));
          expect(left).toEqual([]);
          expect(hookFiles(task)).toEqual([]);
          expect(await task.delete()).toBe(255);
        } finally {
          await task.destroy();
        }
      }
    });

    it("starts afresh where the container wants that, and tells nobody of a restore", async () => {
      let image: string;
      {
        await using task = await live.run(COUNTER);
        while ((await task.nextNumber()) < 3);
        image = await task.checkpoint();
      }
      const from = { "cedana.io/restore-from": image };
      {
        await using task = await live.run(
          COUNTER,
          restored("exit 4", { ...from, "cedana.io/on-restore-failure": "fresh" }),
        );
        while ((await task.nextNumber()) !== 0);
        expect(await inContainer(task, "ls /run")).toBe("");
      }
      await using task = await live.run(COUNTER, restored("true", from));
      expect(await task.nextNumber()).toBeGreaterThan(2);
      expect(await told(task)).toMatchObject({ generation: 1, why: "annotation" });
    });

    it("runs it once, also when cedanad is killed meanwhile or at the boundaries around it", async () => {
      let image: string;
      {
        await using task = await live.run(COUNTER);
        await task.nextNumber();
        image = await task.checkpoint();
      }
      {
        const script = "echo x >> /run/told; while [ ! -e /run/go ]; do sleep 0.01; done";
        await using task = await live.create(COUNTER, { ...restored(script), criuImagePath: image });
        const started = task.start();
        const pid = await until(async () => {
          const pids = await live.client.tasks.pids(task.id).catch(() => []);
          return pids.length > 1 && existsSync(`/proc/${pids[0]!.pid}/root/run/told`)
            ? pids[0]!.pid
            : undefined;
        });
        await live.killCedanad();
        writeFileSync(`/proc/${pid}/root/run/go`, "");
        await started;
        expect(await inContainer(task, "cat /run/told")).toBe("x");
        await runsOn(task);
      }
      if (combination.engine !== "runc") return;
      for (const boundary of ["tellContainer.after", "postRestoreHook.before"]) {
        await using task = await live.create(COUNTER, {
          ...restored("echo x >> /run/told"),
          criuImagePath: image,
        });
        daemon.crashNextAt(`restore.${boundary}`);
        await live.killCedanad();
        await task.status();
        await task.start();
        expect(await inContainer(task, "cat /run/told"), boundary).toBe("x");
        expect((await told(task)).generation, boundary).toBe(1);
        await runsOn(task);
      }
    });

    it("writes nothing outside of a container whose /run leads there, nor into what it shares", async () => {
      const outside = mkdtempSync(join(live.dir, "outside-"));
      const victim = join(outside, "victim");
      writeFileSync(victim, "mine");
      const shared = mkdtempSync(join(live.dir, "shared-"));
      const hostile: [script: string, mounts: object[], written: boolean][] = [
        [`mkdir -p ${outside}; rm -rf /run/cedana; ln -s ${outside} /run/cedana`, [], false],
        [`mkdir /run/cedana; ln -s ${victim} /run/cedana/restore.json`, [], true], // the link is replaced
        ["mkdir -p /run/cedana/restore.json/x", [], false],
        ["touch /run/cedana", [], false],
        [
          "true",
          [{ destination: "/run/cedana", type: "bind", source: shared, options: ["rbind", "rw"] }],
          false,
        ],
      ];
      for (const [script, mounts, written] of hostile) {
        const options = { mounts: mounts as never };
        let image: string;
        {
          await using task = await live.run(COUNTER, options);
          await task.nextNumber();
          await inContainer(task, script);
          image = await task.checkpoint();
        }
        await using task = await live.restore(image, COUNTER, options);
        await runsOn(task);
        const { status } = await task.execToEnd(["sh", "-c", "grep -q generation /run/cedana/restore.json"]);
        expect(status === 0, script).toBe(written);
        expect(readdirSync(outside), script).toEqual(["victim"]);
        expect(readFileSync(victim, "utf8"), script).toBe("mine");
        expect(readdirSync(shared), script).toEqual([]);
      }
      expect(live.cedanadLog()).toMatch(/write \/run\/cedana\/restore.json into the container/);
      expect(live.cedanadLog()).toMatch(/which is not the container's alone/);
    });

    it("restores a container that has no place for it, and makes one where it can", async () => {
      for (const readonly of [true, false]) {
        // No /run but the image's own, or none at all.
        const edit = (spec: Spec) => {
          spec.root.readonly = readonly;
          spec.mounts = spec.mounts.filter((mount: Spec) => mount.destination !== "/run");
        };
        let image: string;
        {
          await using task = await live.run(COUNTER, { edit });
          await task.nextNumber();
          image = await task.checkpoint();
        }
        await using task = await live.restore(image, COUNTER, { edit });
        await runsOn(task);
        if (!readonly) expect((await told(task)).generation).toBe(1);
      }
      expect(live.cedanadLog()).toMatch(/EROFS[^\n]*write \/run\/cedana\/restore.json/);
    });

    it("is an error where the administrator has not allowed it, or that means nothing", async () => {
      allow(false);
      const denied = live.create(COUNTER, { annotations: preDump("true") });
      await expect(denied).rejects.toThrow(/hook.pre-dump is not allowed on this node.*annotations/s);
      const other = live.create(COUNTER, { annotations: { "cedana.io/hook.post-restore": "true" } });
      await expect(other).rejects.toThrow(/not allowed on this node/);
      allow(true);
      for (const [annotations, message] of [
        [preDump(""), /must be a command/],
        [preDump("[1]"), /list of strings/],
        [preDump("true", { "cedana.io/hook-timeout": "soon" }), /must be a time/],
        [{ "cedana.io/hook.pre-drink": "true" }, /names no hook; there are pre-dump and post-restore/],
      ] as const)
        await expect(live.create(COUNTER, { annotations })).rejects.toThrow(message);
      // Allowed at its creation, and not any more.
      await using task = await live.run(COUNTER, { annotations: preDump("true") });
      await task.nextNumber();
      allow(false);
      await expect(task.checkpoint()).rejects.toThrow(/not allowed on this node/);
      allow(true);
      await runsOn(task);
    });
  });
}
