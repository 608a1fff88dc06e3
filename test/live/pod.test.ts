// Pods: a pause container and two more that share its pid namespace, in one keeper.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { ContainerdVersion, Live } from "./harness/live.ts";
import { missingFor } from "./harness/matrix.ts";
import { liveFor } from "./harness/suite.ts";
import { isAlive, pidsInCgroups } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const GROUP = "io.containerd.runc.v2.group";
const SANDBOX = "io.kubernetes.cri.sandbox-id";

interface PodOfThree {
  pause: LiveTask;
  web: LiveTask;
  side: LiveTask;
}

/** `web` has a second process, which no signal for its init reaches by itself. */
async function startPod(live: Live, annotation = SANDBOX): Promise<PodOfThree> {
  const name = live.newId("pod");
  const annotations = { [annotation]: name };
  const pause = await live.run(["sleeper"], {
    id: name,
    annotations: { ...annotations, "io.kubernetes.cri.container-type": "sandbox" },
  });
  const namespaces = { pid: `/proc/${pause.pid}/ns/pid` };
  const web = await live.run(["sh", "-c", "sleeper & exec counter 20 5"], { annotations, namespaces });
  const side = await live.run(["counter", "20", "6"], { annotations, namespaces });
  return { pause, web, side };
}

async function endPod({ pause, web, side }: PodOfThree): Promise<void> {
  for (const task of [side, web, pause]) await task.destroy();
}

const processesOf = (live: Live, task: LiveTask) => pidsInCgroups(`${live.namespace}/${task.id}`);

for (const containerd of ["1.7", "2.1"] as const satisfies ContainerdVersion[]) {
  const missing = missingFor({ containerd, engine: "runc" });
  describe.skipIf(missing)(`a pod on containerd ${containerd}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor({ containerd, engine: "runc" }, (started) => {
      live = started;
    });

    it.each([SANDBOX, GROUP])("has one shim for its three containers (%s)", async (annotation) => {
      const pod = await startPod(live, annotation);
      try {
        const [shim, ...others] = live.shims();
        expect(others).toEqual([]);
        for (const task of [pod.pause, pod.web, pod.side])
          expect(readFileSync(`/proc/${task.pid}/stat`, "latin1").split(") ")[1]!.split(" ")[1]).toBe(
            String(shim!.pid),
          );
        if (containerd === "1.7") {
          const addresses = [pod.pause, pod.web, pod.side].map((task) =>
            readFileSync(join(task.bundle, "address"), "utf8"),
          );
          expect(new Set(addresses).size).toBe(1);
          expect(addresses[0]).toMatch(/^unix:\/\/\//);
        }
      } finally {
        await endPod(pod);
      }
    });

    it("loses all of a container by SIGKILL, and nothing of its siblings", async () => {
      const pod = await startPod(live);
      try {
        await pod.web.nextNumber();
        await until(() => processesOf(live, pod.web).length === 2, { what: () => "both processes of web" });
        await pod.web.kill(9);
        expect(await pod.web.wait()).toBe(137);
        await until(() => processesOf(live, pod.web).length === 0, {
          what: () => `the end of ${processesOf(live, pod.web)}`,
        });
        expect(await pod.web.delete()).toBe(137);
        const before = await pod.side.nextNumber();
        expect(await pod.side.nextNumber()).toBe(before + 1);
        expect(await pod.pause.status()).toBe("RUNNING");
        await pod.side.kill(15);
        expect(await pod.side.wait()).toBe(6);
        expect(await pod.side.delete()).toBe(6);
        expect(await pod.pause.status()).toBe("RUNNING");
        const again = await live.run(["counter", "20", "8"], {
          annotations: { [SANDBOX]: pod.pause.id },
          namespaces: { pid: `/proc/${pod.pause.pid}/ns/pid` },
        });
        expect(live.shims()).toHaveLength(1);
        await again.destroy();
      } finally {
        await endPod(pod);
      }
    });

    it("ends as a whole with the init of its pid namespace", async () => {
      const pod = await startPod(live);
      try {
        await pod.side.nextNumber();
        await pod.pause.kill(9);
        const codes = await Promise.all([pod.pause, pod.web, pod.side].map((task) => task.wait()));
        expect(codes).toEqual([137, 137, 137]);
        for (const task of [pod.pause, pod.web, pod.side]) {
          expect(await task.delete()).toBe(137);
          await live.events.waitFor(task.id, "delete");
          expect(live.events.summary(task.id)).toEqual(["create", "start", "exit 137", "delete"]);
        }
      } finally {
        await endPod(pod);
      }
    });

    it("whose keeper is killed is cleaned up whole, and another pod goes on", async () => {
      const [pod, other] = [await startPod(live), await startPod(live)];
      try {
        const tasks = [pod.pause, pod.web, pod.side];
        await pod.side.nextNumber();
        process.kill(live.shimOf(pod.pause.id).pid, "SIGKILL");
        for (const task of tasks)
          await until(() => !isAlive(task.pid), { what: () => `the end of ${task.id}` });
        for (const task of tasks) {
          await live.events.waitFor(task.id, "exit"); // containerd's own, of its `delete` call
          await until(async () => (await task.state().catch(() => undefined)) === undefined, {
            what: () => `containerd to forget ${task.id}`,
          });
          expect(processesOf(live, task)).toEqual([]);
        }
        const before = await other.side.nextNumber();
        expect(await other.side.nextNumber()).toBe(before + 1);
        expect(await other.side.execToEnd(["sh", "-c", "exit 3"])).toMatchObject({ status: 3 });
        for (const task of [other.pause, other.web, other.side]) expect(await task.status()).toBe("RUNNING");
      } finally {
        for (const task of [pod.pause, pod.web, pod.side]) {
          await task.io.close();
          await live.removeContainer(task.id);
        }
        await endPod(other);
      }
    });
  });
}
