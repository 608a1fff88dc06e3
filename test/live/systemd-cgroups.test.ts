// Containers in scopes that systemd makes, as Kubernetes and Podman have them on a host where systemd is process 1 and all cgroups
// are of version 2: what Debian is. Elsewhere scripts/with-systemd.sh makes such a host; `npm test` runs these in it. A limit is
// only asked for where the host's version 2 has its controller.

import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { Live, type RunOptions } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { numbersIn } from "./harness/output.ts";
import { until } from "./harness/until.ts";

const MEMORY = 64 << 20;
const slice = "/sys/fs/cgroup/system.slice";

const controllers = existsSync("/sys/fs/cgroup/cgroup.controllers")
  ? readFileSync("/sys/fs/cgroup/cgroup.controllers", "utf8").trim().split(" ")
  : [];
const limits = {
  ...(controllers.includes("memory") && { memoryLimit: MEMORY }),
  ...(controllers.includes("pids") && { pidsLimit: 40 }),
};

const lacks = !existsSync("/run/systemd/system")
  ? "systemd doesn't run here"
  : existsSync("/sys/fs/cgroup/cgroup.controllers")
    ? undefined
    : "the host's cgroups are of version 1";

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination) ?? lacks;
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    beforeAll(async () => {
      live = await Live.start(combination);
    });
    afterEach(() => live.expectNoLeftovers());
    afterAll(() => live?.stop());

    // crun makes a cgroup of its own in the scope.
    const own = combination.engine === "crun" ? "/container" : "";
    const scopeOf = (id: string) => `${live.namespace}-${id}.scope`;
    const readOf = (id: string, file: string) => readFileSync(join(slice, scopeOf(id), file), "utf8").trim();
    // Of version 2; a host in namespaces has its machine's hierarchies of version 1 in there, too.
    const unified = (text: string) => text.match(/^0::.*$/gm) ?? [];
    const cgroupOf = (pid: number) => unified(readFileSync(`/proc/${pid}/cgroup`, "utf8"))[0];
    const inScope = (id: string, runtimeOptions: { criuImagePath?: string } = {}): RunOptions => ({
      id,
      ...limits,
      runtimeOptions: live.engineOptions({ systemdCgroup: true, ...runtimeOptions }),
      edit: (spec) => {
        spec.linux.cgroupsPath = `system.slice:${live.namespace}:${id}`;
      },
    });
    const expectLimits = (id: string) => {
      if (limits.memoryLimit) expect(readOf(id, "memory.max")).toBe(`${MEMORY}`);
      if (limits.pidsLimit) expect(readOf(id, "pids.max")).toBe("40");
    };
    const scopeIsGone = (id: string) =>
      until(() => !existsSync(join(slice, scopeOf(id))), { what: () => `the end of ${scopeOf(id)}` });

    it("lives in its scope: limits, execs, pause and resume, exit code", async () => {
      await using task = await live.run(["counter"], inScope("life"));
      expect(cgroupOf(task.pid)).toBe(`0::/system.slice/${scopeOf("life")}${own}`);
      expectLimits("life");
      const { status, stdout } = await task.execToEnd(["cat", "/proc/1/cgroup", "/proc/self/cgroup"]);
      expect(status).toBe(0);
      const [init, exec] = unified(stdout);
      expect(exec).toBe(init);
      await task.pause();
      expect(readOf("life", `.${own}/cgroup.events`)).toMatch(/^frozen 1$/m);
      expect(await task.status()).toBe("PAUSED");
      await task.resume();
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
      await task.kill(9);
      expect(await task.wait()).toBe(137);
      await task.delete();
      await scopeIsGone("life");
    });

    it("is restored into a scope of its own, with its limits, and again from there", async () => {
      let task = await live.run(["counter"], inScope("gen0"));
      let last = await task.nextNumber();
      for (const id of ["gen1", "gen2"]) {
        const image = await task.checkpoint({ exit: true });
        expect(await task.wait()).toBe(137);
        await task.stdout.end().catch(() => undefined);
        last = numbersIn(task.stdout.text).at(-1) ?? last;
        await task.destroy();
        await scopeIsGone(task.id);
        task = await live.restore(image, ["counter"], inScope(id, { criuImagePath: image }));
        expect(await task.nextNumber()).toBe(last + 1);
        expect(cgroupOf(task.pid)).toBe(`0::/system.slice/${scopeOf(id)}${own}`);
        expectLimits(id);
      }
      expect((await task.execToEnd(["true"])).status).toBe(0);
      await task.kill(9);
      expect(await task.wait()).toBe(137);
      await task.delete();
      await scopeIsGone(task.id);
    });
  });
}
