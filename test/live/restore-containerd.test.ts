// `cedana restore containerd`: a checkpoint of the store as a container of containerd's.

import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { isControl, type Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { liveFor } from "./harness/suite.ts";
import { until } from "./harness/until.ts";

for (const combination of enginesForCheckpoints) {
  const missing = isControl ? "the Go shim restores nothing of ours" : missingFor(combination);
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor(combination, (started) => {
      live = started;
    });

    async function restore(...args: string[]): Promise<{ id: string; pid: number; created: boolean }> {
      const flags = ["--namespace", live.namespace, "--address", live.address, "--json"];
      return JSON.parse(await live.cedana("restore", "containerd", ...args, ...flags));
    }

    const numbersIn = (path: string) =>
      (existsSync(path) ? readFileSync(path, "utf8") : "")
        .split("\n")
        .filter(Boolean)
        .map((line) => Number.parseInt(line, 10));

    /** The numbers of a counter's file, when there are some. */
    const someNumbers = (path: string) =>
      until(() => (numbersIn(path).length >= 3 ? numbersIn(path) : undefined), {
        what: () => `numbers in ${path}`,
      });

    async function end(id: string): Promise<void> {
      await live.ctr("task", "kill", "-s", "SIGKILL", id);
      await until(async () => /STOPPED/.test(await live.ctr("task", "ls")), {
        what: () => `the end of ${id}`,
      });
      await live.ctr("task", "delete", id);
    }

    it("restores the container that was dumped, and a new one like it", async () => {
      await using task = await live.run(["counter", "20", "0"]);
      let last = await task.nextNumber();
      while (last < 5) last = await task.nextNumber();
      await live.cedana("dump", "containerd", task.id, "--exit");
      await task.wait();
      const output = join(live.dir, "tmp/out #1?.log");

      const again = await restore(task.id, "--output", output);
      expect(again).toMatchObject({ id: task.id, created: false });
      const [first] = await someNumbers(output);
      expect(first).toBeGreaterThan(last);
      await expect(restore(task.id)).rejects.toThrow(/has a task, of pid \d+: end it first/);
      await live.ctr("task", "kill", "-s", "SIGKILL", task.id);
      await until(async () => (await task.status()) === "STOPPED", { what: () => "its end" });

      const copy = await restore(task.id, "--id", "copy", "--output", `${output}.copy`);
      expect(copy).toMatchObject({ id: "copy", created: true });
      expect((await someNumbers(`${output}.copy`))[0]).toBeGreaterThan(last);
      const info = JSON.parse(await live.ctr("containers", "info", "copy"));
      expect(info).toMatchObject({ ID: "copy", SnapshotKey: "copy", Image: live.image });
      expect(info.Spec.linux.cgroupsPath).toMatch(/copy$/);
      await end("copy");
      await live.ctr("containers", "delete", "copy");
    });

    it("can be checkpointed again, though nobody reads its output and it has no input", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      await live.cedana("dump", "containerd", task.id);
      await restore(task.id, "--id", "again");
      await live.cedana("dump", "containerd", "again", "--exit");
      await until(async () => /^again .*STOPPED/m.test(await live.ctr("task", "ls")), {
        what: () => "its end",
      });
      expect(await restore("again")).toMatchObject({ id: "again", created: false });
      await live.ctr("task", "delete", "--force", "again");
      await live.ctr("containers", "delete", "again");
    });

    it("leaves nothing of a container whose restore fails", async () => {
      const store = new CheckpointStore(join(live.dir, "var/checkpoints"));
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      await live.cedana("dump", "containerd", task.id, "--name", "broken");
      const { path } = await store.find({ namespace: live.namespace }, "broken");
      const image = join(path, "checkpoint/core-1.img");
      writeFileSync(image, readFileSync(image).fill(0xff, 8));
      await expect(restore("broken", "--id", "copy")).rejects.toThrow(/copy|CRIU/);
      expect(await live.ctr("containers", "ls", "-q")).not.toMatch(/^copy$/m);
      expect(await live.ctr("snapshots", "ls")).not.toMatch(/^copy /m);
      await expect(restore("missing")).rejects.toThrow(/checkpoint missing of namespace .* does not exist/);
      await expect(restore("broken", "--id", "copy", "--like", "nobody")).rejects.toThrow(
        /is to be like nobody/,
      );
      expect(await task.status()).toBe("RUNNING");
    });
  });
}
