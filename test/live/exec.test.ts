// Execs in storms, programs that end before Start returns, and what calls in the wrong state are answered: with the statuses and
// words of the Go shim, against which this file runs too (CEDANA_TEST_RUNTIME=io.containerd.runc.v2).

import { describe, expect, it } from "vitest";
import { isControl, type Live } from "./harness/live.ts";
import { bothEngines, missingFor, oursOnly } from "./harness/matrix.ts";
import { liveFor } from "./harness/suite.ts";
import { fdsOf, processStat } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const STORM = 60;
const AT_ONCE = 10;

/** Runs `work(0)` to `work(count - 1)`, some at a time. */
async function inParallel<T>(count: number, work: (index: number) => Promise<T>): Promise<T[]> {
  const results: T[] = [];
  let next = 0;
  const worker = async () => {
    while (next < count) {
      const index = next++;
      results[index] = await work(index);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
  return results;
}

for (const combination of bothEngines) {
  const missing = missingFor(combination);
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor(combination, (started) => {
      live = started;
    });

    it(`runs ${STORM} execs, ${AT_ONCE} at a time, with and without terminal: codes, output, events, no zombies, no fds`, async () => {
      await using task = await live.run(["sleeper"]);
      const shim = live.shims()[0]!.pid;
      await task.execToEnd(["true"]);
      const fdsBefore = fdsOf(shim).size;
      const codes = await inParallel(STORM, async (index) => {
        const { status, stdout } = await task.execToEnd(["sh", "-c", `echo exec ${index}; exit ${index}`], {
          terminal: index % 3 === 0,
        });
        expect(stdout.trim()).toBe(`exec ${index}`);
        return status;
      });
      expect(codes).toEqual(codes.map((_, index) => index));
      await live.events.waitFor(task.id, "exit", { execId: `e${STORM + 1}` });
      await until(() => live.events.of(task.id).filter(({ topic }) => topic === "exit").length === STORM + 1);
      for (let number = 1; number <= STORM + 1; number++) {
        const own = live.events.of(task.id).filter(({ execId }) => execId === `e${number}`);
        expect(own.map(({ topic }) => topic)).toEqual(["exec-added", "exec-started", "exit"]);
      }
      if (isControl) return;
      const children = live.processes().filter(({ ppid }) => ppid === shim);
      expect(children.filter(({ state }) => state === "Z")).toEqual([]);
      expect(children.map(({ pid }) => pid)).toEqual([task.pid]);
      expect(fdsOf(shim).size).toBe(fdsBefore);
      expect(processStat(task.pid)!.state).toBe("S");
    });

    it("tells of programs that end before their Start returns in order, many at once", async () => {
      const ids = await inParallel(20, async () => {
        const { id, status } = await live.runToEnd(["true"], { stdio: false });
        expect(status).toBe(0);
        return id;
      });
      for (const id of ids) {
        await live.events.waitFor(id, "delete");
        expect(live.events.summary(id)).toEqual(["create", "start", "exit 0", "delete"]);
      }
    });

    it("answers Wait before the start, while it runs and after the exit", async () => {
      await using task = await live.create(["sh", "-c", "exit 9"], { stdio: false });
      const early = task.wait();
      await task.start();
      expect(await early).toBe(9);
      expect(await task.wait()).toBe(9);
      expect(await task.exited).toMatchObject({ exitStatus: 9 });
    });

    it("answers one of two deletions, and says to the other that the task isn't there", async (context) => {
      oursOnly(context, "leaks itself now and then when two deletions meet");
      await using task = await live.run(["true"], { stdio: false });
      await task.exited;
      const answers = await Promise.allSettled([1, 2].map(() => live.client.tasks.delete(task.id)));
      const refused = answers.filter((answer) => answer.status === "rejected");
      expect(refused.map(({ reason }) => reason.status)).toEqual(["NOT_FOUND"]);
    });

    describe("refuses, in the Go shim's words,", () => {
      /** The Go shim gives hardly any wrong state a status of its own. */
      const refused = async (
        call: Promise<unknown>,
        status: string,
        words: string | RegExp,
      ): Promise<void> => {
        const error = await call.then(
          () => undefined,
          (error) => error as { status: string; details: string },
        );
        expect(error?.details).toMatch(words);
        const known = isControl && status === "FAILED_PRECONDITION" ? /FAILED_PRECONDITION|UNKNOWN/ : status;
        expect(error?.status).toMatch(known);
      };
      const wrongState = (call: Promise<unknown>, words: string | RegExp) =>
        refused(call, "FAILED_PRECONDITION", words);

      it("what a task that is only created can't do", async () => {
        await using task = await live.create(["sleeper"], { stdio: false });
        await wrongState(task.pause(), /cannot pause a? ?task in created state/);
        await wrongState(task.checkpoint(), "cannot checkpoint a task in created state");
        await refused(live.client.tasks.create(createRequest(task)), "ALREADY_EXISTS", "already exists");
      });

      it("what a running task can't do", async () => {
        await using task = await live.run(["sleeper"], { stdio: false });
        const { tasks } = live.client;
        await wrongState(task.delete(), "cannot delete a running process");
        await wrongState(tasks.start(task.id, ""), "cannot start a running process");
        await wrongState(task.resume(), "cannot resume a running process");
        await refused(task.kill(99), "UNKNOWN", /invalid argument/i);
        await refused(tasks.update(task.id, resources("no json")), "UNKNOWN", "");
        await refused(tasks.start(task.id, "nobody"), "NOT_FOUND", "process does not exist nobody");
        await refused(tasks.get(task.id, "nobody"), "NOT_FOUND", "process does not exist nobody");
        await refused(tasks.wait(task.id, "nobody"), "NOT_FOUND", "process does not exist nobody");
        await refused(tasks.deleteProcess(task.id, "nobody"), "NOT_FOUND", "process does not exist nobody");
        await refused(tasks.kill(task.id, 9, { execId: "nobody" }), "NOT_FOUND", "does not exist nobody");
        await tasks.resizePty(task.id, "", 10, 10); // without a terminal: nothing, and no error
        await task.pause();
        await wrongState(task.pause(), "cannot pause a paused container");
        await wrongState(task.delete(), "cannot delete a paused process");
        await wrongState(task.addExec({ args: ["true"], stdio: false }), "cannot exec in a paused state");
        await task.resume();
        expect(await task.status()).toBe("RUNNING");
      });

      it("what an exec can't do", async () => {
        await using task = await live.run(["sleeper"], { stdio: false });
        const { tasks } = live.client;
        await using added = await task.addExec({ args: ["sleeper"], execId: "dup", stdio: false });
        await refused(
          task.addExec({ args: ["true"], execId: "dup", stdio: false }),
          "ALREADY_EXISTS",
          /dup.*already exists/,
        );
        await wrongState(added.kill(9), "process not created");
        const exited = added.wait();
        await added.start();
        await wrongState(added.start(), "cannot start a running process");
        await wrongState(added.delete(), "cannot delete a running process");
        await added.kill(9);
        expect(await exited).toBe(137);
        await refused(added.kill(9), "NOT_FOUND", "process already finished");
        await wrongState(added.start(), "cannot start a stopped process");
        await using absent = await task.addExec({ args: ["/no/such"], stdio: false });
        await refused(absent.start(), "UNKNOWN", /no such file|not found/i);
        const spec = {
          ...resources("no json"),
          typeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process",
        };
        const nowhere = { stdin: "", stdout: "", stderr: "", terminal: false };
        await refused(
          tasks.exec({ containerId: task.id, execId: "broken", spec, ...nowhere }),
          isControl ? "UNKNOWN" : "INVALID_ARGUMENT",
          isControl ? "invalid character" : "the process spec of exec broken",
        );
      });

      it("what a task that has ended can't do", async () => {
        await using task = await live.run(["sleeper"], { stdio: false });
        const { tasks } = live.client;
        await task.kill(9);
        await task.wait();
        await refused(task.kill(15), "NOT_FOUND", "process already finished");
        await wrongState(task.start(), "cannot start a stopped process");
        await wrongState(task.pause(), "cannot pause a stopped container");
        await wrongState(task.resume(), "cannot resume a stopped container");
        await wrongState(task.checkpoint(), /cannot checkpoint a stopped|stopped/);
        await wrongState(task.addExec({ args: ["true"], stdio: false }), "cannot exec in a stopped state");
        await wrongState(tasks.update(task.id, resources("{}")), "cannot update a stopped container");
        expect(await task.pids()).toEqual([]);
        await tasks.closeIO(task.id, "");
        await tasks.resizePty(task.id, "", 10, 10);
      });

      it("anything of a task that nobody knows", async () => {
        for (const call of ["get", "wait", "pids", "pause", "resume", "delete"] as const)
          await refused(live.client.tasks[call]("nobody", ""), "NOT_FOUND", "nobody");
        await refused(live.client.tasks.kill("nobody", 9), "NOT_FOUND", "nobody");
      });
    });

    it("answers a Wait for an exec that is deleted without having run", async (context) => {
      oursOnly(context, "lets it wait for ever");
      await using task = await live.run(["sleeper"], { stdio: false });
      await using exec = await task.addExec({ args: ["true"], stdio: false });
      const waiting = expect(exec.wait()).rejects.toMatchObject({ status: "NOT_FOUND" });
      await exec.delete();
      await waiting;
    });

    it("kills a task that is paused", async () => {
      await using task = await live.run(["sleeper"], { stdio: false });
      await using exec = await task.exec(["sleeper"], { stdio: false });
      await task.pause();
      await task.kill(9);
      expect(await task.wait()).toBe(137);
      expect(await exec.wait()).toBe(137);
      await exec.delete();
      expect(await task.delete()).toBe(137);
      await live.events.waitFor(task.id, "delete");
      expect(live.events.summary(task.id).slice(-4)).toEqual(["paused", "exit e1 137", "exit 137", "delete"]);
    });

    it("sends a signal to all processes of a task", async () => {
      await using task = await live.run(["signals"]);
      await task.stdout.lineMatching(/^ready$/);
      await using exec = await task.exec(["signals"]);
      await exec.stdout.lineMatching(/^ready$/);
      await task.kill(10, true);
      await task.stdout.lineMatching(/^signal 10$/);
      await exec.stdout.lineMatching(/^signal 10$/);
    });

    it("runs an exec in a container that is only created", async () => {
      await using task = await live.create(["sleeper"], { stdio: false });
      expect(await task.execToEnd(["sh", "-c", "exit 4"])).toMatchObject({ status: 4 });
      await task.start();
      expect(await task.status()).toBe("RUNNING");
    });
  });
}

const resources = (text: string) => ({
  typeUrl: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources",
  value: Buffer.from(text),
});

const createRequest = (task: LiveTask) => ({
  containerId: task.id,
  rootfs: [],
  stdin: "",
  stdout: "",
  stderr: "",
  terminal: false,
});
