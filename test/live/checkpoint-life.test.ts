// After a restore, a container is as good as new: under another id, on another containerd, a second time, on a terminal.

import { mkdtempSync, readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor, skipUnless } from "./harness/matrix.ts";
import { numbersIn, Output } from "./harness/output.ts";
import type { Spec } from "./harness/spec.ts";
import { liveFor } from "./harness/suite.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

/** Cgroups of a process, those of version 2 or of the controllers that containers always get. */
function cgroupsOf(pid: number): string[] {
  const lines = readFileSync(`/proc/${pid}/cgroup`, "utf8").split("\n");
  return lines.filter((line) => /^0::|:(freezer|memory|pids):/.test(line)).map((line) => line.split(":")[2]!);
}

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination);
  const { engine } = combination;
  describe.skipIf(missing)(`${engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor(combination, (started) => {
      live = started;
    });

    it("restores under another id, into the cgroup and the limits of the new container", async () => {
      const version2 = live.options.cgroup === "v2"; // without controllers, on a hybrid host
      const limit = (pidsLimit: number) => (version2 ? {} : { pidsLimit });
      const task = await live.run(["tree"], limit(40));
      await task.nextNumber();
      const image = await task.checkpoint({ exit: true });
      await task.destroy();
      await using restored = await live.restore(image, ["tree"], limit(50));
      await restored.nextNumber();
      const pids = await restored.pids();
      expect(pids.length).toBeGreaterThan(5);
      const own = live.processes().filter(({ kind }) => kind === "container");
      expect(pids.sort()).toEqual(own.map(({ pid }) => pid).sort());
      for (const pid of pids) {
        const found = cgroupsOf(pid).filter((path) => path.includes(live.namespace));
        expect(new Set(found)).toEqual(new Set([`/${live.namespace}/${restored.id}`]));
        expect(found.length).toBe(version2 ? 1 : found.length);
      }
      if (!version2)
        expect(
          readFileSync(`/sys/fs/cgroup/pids/${live.namespace}/${restored.id}/pids.max`, "utf8").trim(),
        ).toBe("50");
    });

    it("restores a cgroup namespace of its own, at the new cgroup", async () => {
      const edit = (spec: Spec) => spec.linux.namespaces.push({ type: "cgroup" });
      const task = await live.run(["counter"], { edit });
      await task.nextNumber();
      const image = await task.checkpoint({ exit: true });
      await task.destroy();
      await using restored = await live.restore(image, ["counter"], { edit });
      const { stdout } = await restored.execToEnd(["cat", "/proc/1/cgroup"]);
      expect(stdout).toMatch(/^0::\/$/m);
      expect(cgroupsOf(restored.pid)).toContain(`/${live.namespace}/${restored.id}`);
    });

    it("restores two from one image, beside the one that it was taken of", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      const image = await task.checkpoint();
      const files = () => readdirSync(image).map((name) => [name, statSync(join(image, name)).size]);
      const before = files();
      await using first = await live.restore(image, ["counter"]);
      await using second = await live.restore(image, ["counter"]);
      const start = await first.nextNumber();
      expect(await second.nextNumber()).toBe(start);
      await first.kill(9);
      expect(await first.wait()).toBe(137);
      expect(await second.nextNumber()).toBe(start + 1);
      await task.nextNumber();
      expect(files()).toEqual(before);
    });

    it("takes a paused container, ends it when told to, and restores it running", async () => {
      const task = await live.run(["counter"]);
      await task.nextNumber();
      await task.pause();
      const image = await task.checkpoint({ exit: true });
      expect(await task.wait()).toBe(137);
      await task.stdout.end();
      const last = numbersIn(task.stdout.text).at(-1)!;
      await task.destroy();
      await using restored = await live.restore(image, ["counter"]);
      expect(await restored.nextNumber()).toBe(last + 1);
      expect(await restored.status()).toBe("RUNNING");
    });

    it("has stdin, exec, attach, pause, wait and kill after the first restore, and after the second", async () => {
      const script = 'n=0; while read -r line; do n=$((n+1)); echo "$n $line"; done; exit 42';
      const args = ["sh", "-c", script];
      let task: LiveTask = await live.run(args, { stdin: true });
      try {
        for (const round of [1, 2, 3]) {
          task.write(`line ${round}\n`);
          await task.stdout.lineMatching(new RegExp(`^${round} line ${round}$`, "m"));
          expect(await task.execToEnd(["sh", "-c", "echo in; exit 3"])).toMatchObject({
            status: 3,
            stdout: "in\n",
          });
          await task.pause();
          expect(await task.status()).toBe("PAUSED");
          await task.resume();
          if (round === 3) break;
          const image = await task.checkpoint({ exit: true });
          await task.wait();
          await task.destroy();
          task = await live.restore(image, args, { stdin: true });
        }
        // Somebody else comes to read, as `ctr task attach` does.
        await task.stdout.leave();
        const attached = new Output(task.io.stdoutPath);
        task.write("attached\n");
        await attached.lineMatching(/^4 attached$/m);
        await attached.leave();
        await task.closeStdin();
        expect(await task.wait()).toBe(42);
      } finally {
        await task.destroy();
      }
    });

    it("keeps 256 MiB of memory as they were", async () => {
      const args = ["memory", "256"];
      const task = await live.run(args);
      const sum = (await task.stdout.lineMatching(/^ready ([0-9a-f]+)/, 30_000))[1]!;
      const image = await task.checkpoint({ exit: true });
      await task.destroy();
      await using restored = await live.restore(image, args);
      const [, later] = await restored.stdout.lineMatching(/^\d+ ([0-9a-f]+)/, 30_000);
      expect(later).toBe(sum);
    });

    it("keeps the window's size of a terminal, changes it, and lets a second reader attach", async () => {
      const options = { terminal: true, stdin: true };
      const task = await live.run(["size"], options);
      await task.resize(100, 40);
      await task.stdout.lineMatching(/^40 100/m);
      const image = await task.checkpoint({ exit: true });
      await task.destroy();
      await using restored = await live.restore(image, ["size"], options);
      expect(await restored.execToEnd(["sh", "-c", "stty size < /dev/console"])).toMatchObject({
        stdout: "40 100\n",
      });
      await restored.resize(90, 30);
      await restored.stdout.lineMatching(/^30 90/m);
      await restored.stdout.leave();
      const attached = new Output(restored.io.stdoutPath);
      await restored.resize(80, 20);
      await attached.lineMatching(/^20 80/m);
      await attached.leave();
      await restored.kill(9);
      expect(await restored.wait()).toBe(137);
    });

    it("restores on another containerd of another version", async () => {
      const task = await live.run(["counter", "20", "7"]);
      await task.nextNumber();
      const image = await task.checkpoint({ exit: true });
      await task.destroy();
      await using other = await Live.start({ containerd: "1.7", engine });
      await using restored = await other.restore(image, ["counter", "20", "7"], { id: "elsewhere" });
      const first = await restored.nextNumber();
      expect(first).toBeGreaterThan(0);
      expect(await restored.nextNumber()).toBe(first + 1);
      await restored.kill(15);
      expect(await restored.wait()).toBe(7);
      await restored.destroy();
      await other.expectNoLeftovers();
    });

    it("restores what the engine's own command dumped, without a manifest", async (context) => {
      // There, CRIU would take all version 1 cgroups of the host into the images, and make them again.
      skipUnless(context, live.options.cgroup === "host", "not on a hybrid host seen as version 2");
      const task = await live.run(["counter"]);
      await task.nextNumber();
      const image = mkdtempSync(join(live.dir, "image-"));
      await live.engine("checkpoint", "--image-path", image, task.id);
      await until(async () => (await task.status()) === "STOPPED", {
        what: () => "the end of the container",
      });
      await task.destroy();
      await using restored = await live.restore(image, ["counter"]);
      expect(await restored.nextNumber()).toBeGreaterThan(0);
    });
  });
}

const onVersion2 = { containerd: "2.1", engine: "runc", cgroup: "v2" } as const;
const missingThere = missingFor(onVersion2);
describe.skipIf(missingThere)(`runc on cgroup version 2${missingThere ? ` (${missingThere})` : ""}`, () => {
  it("restores into the new container's cgroup, and the cgroups that the container has made below it", async () => {
    await using live = await Live.start(onVersion2);
    const edit = (spec: Spec) => {
      spec.linux.namespaces.push({ type: "cgroup" });
      const options = ["rw", "nosuid", "noexec", "nodev", "relatime"];
      spec.mounts.push({ destination: "/sys/fs/cgroup", type: "cgroup", source: "cgroup", options });
    };
    const script = "mkdir /sys/fs/cgroup/sub && echo $$ > /sys/fs/cgroup/sub/cgroup.procs && exec counter";
    const args = ["sh", "-c", script];
    await using task = await live.run(args, { edit });
    await task.nextNumber();
    const image = await task.checkpoint();
    await using restored = await live.restore(image, args, { edit });
    await restored.nextNumber();
    for (const { pid, id } of [task, restored])
      expect(cgroupsOf(pid)).toContain(`/${live.namespace}/${id}/sub`);
    expect((await restored.execToEnd(["cat", "/proc/1/cgroup"])).stdout).toMatch(/^0::\/sub$/m);
    expect(await restored.pids()).toEqual([restored.pid]);
    await task.destroy();
    await restored.destroy();
    await live.expectNoLeftovers();
  });
});
