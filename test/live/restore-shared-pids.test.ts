// Containers that share a pid namespace, as those of a pod with shareProcessNamespace do, go on in another one in which others live.

import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { pidsInCgroups } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const namespaceOf = (pid: number) => `/proc/${pid}/ns/pid`;
const LAST = "/proc/sys/kernel/ns_last_pid";
/** The kernel doesn't come to lower ids again, nor do we send it there. */
const LOWEST = 300;

function lastId(init: LiveTask): number {
  const text = execFileSync("nsenter", [`--pid=${namespaceOf(init.pid)}`, "cat", LAST], { encoding: "utf8" });
  return Number(text);
}

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination);
  const { engine } = combination;
  describe.skipIf(missing)(
    `a container in a shared pid namespace, with ${engine}${missing ? ` (${missing})` : ""}`,
    () => {
      let live: Live;
      /** of `tree`, ten processes that keep to their ids, in a namespace with a pause container */
      let image: string;
      let ids: number[];
      beforeAll(async () => {
        live = await Live.start(combination);
        const pause = await live.run(["sleeper"]);
        const tree = await live.run(["tree"], { namespaces: { pid: namespaceOf(pause.pid) } });
        await until(async () => (await tree.nextNumber()) > 1); // all ten have answered
        ids = pidsInCgroups(`${live.namespace}/${tree.id}`)
          .map((pid) => Number(/^NSpid:.*\t(\d+)$/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"))![1]))
          .sort((a, b) => a - b);
        expect(ids).toHaveLength(10);
        await live.cedana("dump", "containerd", tree.id, "--name", "tree");
        image = await tree.checkpoint({ exit: true });
        await tree.destroy();
        await pause.destroy();
      });
      afterEach(() => live.expectNoLeftovers());
      afterAll(() => live?.stop());

      /** A namespace with a pause container, which goes last. */
      async function inNamespace(work: (pause: LiveTask) => Promise<void>): Promise<void> {
        const pause = await live.run(["sleeper"]);
        try {
          await work(pause);
        } finally {
          await pause.destroy();
        }
      }

      async function restoreInto(pause: LiveTask, hooks?: object): Promise<LiveTask> {
        return await live.restore(image, ["tree"], {
          namespaces: { pid: namespaceOf(pause.pid) },
          edit: (spec) => Object.assign(spec, hooks && { hooks }),
        });
      }

      // crun runs no hook in the middle of a restore: with it, only where the ids go on is seen.
      it("goes on, and who comes meanwhile gets other ids", () =>
        inNamespace(async (pause) => {
          // runc's hook comes when CRIU has made the first process, and not yet the others.
          const script = `echo; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1000 >/dev/null 2>&1 & done`;
          const enter = ["nsenter", `--pid=${namespaceOf(pause.pid)}`, "sh", "-c", script];
          const createRuntime = [{ path: "/usr/bin/nsenter", args: enter }];
          const restored = await restoreInto(pause, engine === "runc" ? { createRuntime } : undefined);
          await restored.nextNumber();
          expect(lastId(pause)).toBeGreaterThan(LOWEST);
          await restored.destroy();
        }));

      it("waits for one that has an id for a moment", () =>
        inNamespace(async (pause) => {
          const enter = (script: string) => [
            `--pid=${namespaceOf(pause.pid)}`,
            "sh",
            "-c",
            script.replaceAll("LAST", LAST),
          ];
          execFileSync("nsenter", enter("echo 1000 > LAST")); // for the next shell
          const script = `echo ${ids.at(-1)! - 1} > LAST; sleep 1000 & echo $!; wait`;
          const holder: ChildProcess = spawn("nsenter", enter(script), {
            stdio: ["ignore", "pipe", "inherit"],
          });
          const line = await new Promise((resolve) => holder.stdout!.once("data", resolve));
          expect(Number(line)).toBe(ids.at(-1));
          const restoring = restoreInto(pause);
          restoring.catch(() => {}); // awaited below
          try {
            await until(() => /waits for process ids that are taken/.test(live.cedanadLog()), {
              what: () => `cedanad to wait: ${live.cedanadLog()}`,
            });
          } finally {
            execFileSync("nsenter", enter(`kill -9 ${ids.at(-1)}`));
          }
          const restored = await restoring;
          await restored.nextNumber();
          await restored.destroy();
        }));

      /** A container that has some of the ids, and goes on with what it does. */
      async function besideHolder(pause: LiveTask, work: (id: string) => Promise<void>): Promise<void> {
        const args = ["sh", "-c", "for i in $(seq 20); do sleeper & done; exec counter 20"];
        const other = await live.run(args, { namespaces: { pid: namespaceOf(pause.pid) } });
        try {
          const number = await other.nextNumber();
          await work(other.id);
          expect(await other.nextNumber()).toBe(number + 1);
        } finally {
          await other.destroy();
        }
      }

      // Each of the two waits first: one with each engine.
      if (engine === "runc")
        it("is refused where another container's process stays, by name", () =>
          inNamespace((pause) =>
            besideHolder(pause, async (id) => {
              const taken = `process ids of the checkpoint are taken .*\\b\\d+ by process \\d+ \\(sleeper\\) in cgroup /${live.namespace}/${id}\\b`;
              await expect(restoreInto(pause)).rejects.toThrow(new RegExp(`FAILED_PRECONDITION.*${taken}`));
            }),
          ));
      else
        it("starts afresh where another container's process stays, if it says so", () =>
          inNamespace((pause) =>
            besideHolder(pause, async (id) => {
              const afresh = await live.run(["tree"], {
                namespaces: { pid: namespaceOf(pause.pid) },
                annotations: {
                  "cedana.io/restore-from": "tree",
                  "cedana.io/on-restore-failure": "fresh",
                },
              });
              expect(await afresh.nextNumber()).toBe(0);
              expect(live.cedanadLog()).toMatch(
                new RegExp(`by process \\d+ \\(sleeper\\) in cgroup /${live.namespace}/${id}\\b`),
              );
              await afresh.destroy();
            }),
          ));
    },
  );
}
