// A container's whole life, with each engine on each containerd.

import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import type { Live } from "./harness/live.ts";
import { everyCombination, missingFor } from "./harness/matrix.ts";
import { anyJson, decode } from "./harness/proto.ts";
import { liveFor } from "./harness/suite.ts";
import { isAlive } from "./harness/system.ts";
import { until } from "./harness/until.ts";

for (const combination of everyCombination) {
  const missing = missingFor(combination);
  describe.skipIf(missing)(
    `${combination.engine} on containerd ${combination.containerd}${missing ? ` (${missing})` : ""}`,
    () => {
      let live: Live;
      liveFor(combination, (started) => {
        live = started;
      });

      it("runs a program to its end and delivers its output and exit code", async () => {
        const { id, status, stdout } = await live.runToEnd(["sh", "-c", "echo hello; echo bad >&2; exit 7"]);
        expect(stdout).toBe("hello\n");
        expect(status).toBe(7);
        await live.events.waitFor(id, "delete");
        expect(live.events.summary(id)).toEqual(["create", "start", "exit 7", "delete"]);
      });

      it("keeps stdout and stderr apart", async () => {
        await using task = await live.run(["sh", "-c", "echo out; echo err >&2"]);
        expect(await task.stdout.line()).toBe("out");
        expect(await task.stderr.line()).toBe("err");
        await task.exited;
      });

      it("goes through created, running and stopped with the pid of the process", async () => {
        await using task = await live.create(["counter"]);
        expect(task.pid).toBeGreaterThan(1);
        expect(await task.state()).toMatchObject({ status: "CREATED", pid: task.pid });
        const { pid } = task;
        await task.start();
        expect(task.pid).toBe(pid);
        expect(await task.nextNumber()).toBe(0);
        expect(await task.state()).toMatchObject({ status: "RUNNING", pid });
        expect(readFileSync(`/proc/${pid}/cmdline`, "latin1")).toBe("counter\0");
        await task.kill(9);
        expect(await task.wait()).toBe(137);
        expect(await task.state()).toMatchObject({ status: "STOPPED", exitStatus: 137 });
        expect(await task.delete()).toBe(137);
        await expect(task.state()).rejects.toMatchObject({ status: "NOT_FOUND" });
      });

      it("delivers a signal, and the exit code of the program's answer to it", async () => {
        await using task = await live.run(["counter", "20", "42"]);
        await task.nextNumber();
        await task.kill(15);
        expect(await task.wait()).toBe(42);
      });

      it("answers Wait for many at once, and again after the exit", async () => {
        await using task = await live.run(["counter", "20", "9"]);
        const waits = Array.from({ length: 8 }, () => task.wait());
        await task.nextNumber();
        await task.kill(15);
        expect(await Promise.all(waits)).toEqual(Array(8).fill(9));
        expect(await task.wait()).toBe(9);
      });

      it("runs further processes and keeps their codes apart from init's", async () => {
        await using task = await live.run(["sleeper", "3"]);
        const first = await task.execToEnd(["sh", "-c", "echo inside; exit 5"]);
        expect(first).toMatchObject({ status: 5, stdout: "inside\n" });
        await using second = await task.exec(["counter", "20", "6"], { execId: "second" });
        expect(await second.nextNumber()).toBe(0);
        expect(await second.state()).toMatchObject({ status: "RUNNING", pid: second.pid });
        const infos = await live.client.tasks.pids(task.id);
        expect(infos.map((info) => info.pid).sort()).toEqual([task.pid, second.pid].sort());
        const details = infos.find((info) => info.pid === second.pid)!.info!;
        expect(decode("containerd.runc.v1.ProcessDetails", details.value)).toEqual({ execId: "second" });
        await second.kill(15);
        expect(await second.wait()).toBe(6);
        expect(await second.delete()).toBe(6);
        await task.kill(15);
        expect(await task.wait()).toBe(3);
        expect(await task.delete()).toBe(3);
        await live.events.waitFor(task.id, "delete");
        expect(live.events.summary(task.id)).toEqual([
          "create",
          "start",
          "exec-added e1",
          "exec-started e1",
          "exit e1 5",
          "exec-added second",
          "exec-started second",
          "exit second 6",
          "exit 3",
          "delete",
        ]);
      });

      it("stops and goes on with pause and resume", async () => {
        await using task = await live.run(["counter", "5"]);
        await task.nextNumber();
        await task.pause();
        expect(await task.status()).toBe("PAUSED");
        const before = await quiet(task.stdout);
        expect(await quiet(task.stdout)).toBe(before);
        await task.resume();
        expect(await task.status()).toBe("RUNNING");
        task.stdout.skip();
        await task.nextNumber();
        await live.events.waitFor(task.id, "resumed");
        expect(live.events.summary(task.id)).toEqual(["create", "start", "paused", "resumed"]);
      });

      it("passes stdin on, and its end by CloseIO", async () => {
        await using task = await live.run(["sh", "-c", "cat; echo end; exit 4"], { stdin: true });
        task.write("one\n");
        expect(await task.stdout.line()).toBe("one");
        task.write("two\n");
        expect(await task.stdout.line()).toBe("two");
        await task.closeStdin();
        expect(await task.stdout.line()).toBe("end");
        expect(await task.wait()).toBe(4);
      });

      it("gives a program a terminal that follows the size of the client's", async () => {
        await using task = await live.create(["sh", "-c", "tty; exec size"], { terminal: true, stdin: true });
        await task.resize(120, 40);
        await task.start();
        expect(await task.stdout.line()).toMatch(/^\/dev\/(console|pts\/\d+)$/);
        await task.stdout.lineMatching(/^\d+ \d+$/);
        await task.resize(100, 30);
        await task.stdout.lineMatching(/^30 100$/);
        await task.kill(9);
        expect(await task.wait()).toBe(137);
      });

      it("talks to a shell on a terminal", async () => {
        await using task = await live.run(["sh"], { terminal: true, stdin: true });
        task.write("echo $((6*7)); exit 3\n");
        await task.stdout.lineMatching(/^42$/);
        expect(await task.wait()).toBe(3);
      });

      it("gives an exec process a terminal of its own", async () => {
        await using task = await live.run(["sleeper"]);
        await using exec = await task.exec(["sh", "-c", "test -t 0 && echo terminal; exec size"], {
          terminal: true,
          stdin: true,
        });
        expect(await exec.stdout.line()).toBe("terminal");
        await exec.resize(90, 20);
        await exec.stdout.lineMatching(/^20 90$/);
      });

      it("counts CPU time and processes", async () => {
        await using task = await live.run(["counter", "1"]);
        await task.nextNumber();
        const [metric] = await live.client.tasks.metrics(task.id);
        expect(metric!.id).toBe(task.id);
        const url = metric!.data!.typeUrl;
        const v1 = url === "io.containerd.cgroups.v1.Metrics";
        expect(url).toBe(v1 ? url : "io.containerd.cgroups.v2.Metrics");
        const cpu = decode<{ cpu: { usage?: { total: number }; usageUsec?: number } }>(
          v1 ? "io.containerd.cgroups.V1Metrics" : "io.containerd.cgroups.V2Metrics",
          metric!.data!.value,
        ).cpu;
        expect(cpu.usage?.total ?? cpu.usageUsec).toBeGreaterThan(0);
      });

      it("runs with its first process killed from outside, and reports that", async () => {
        await using task = await live.run(["counter"]);
        await task.nextNumber();
        process.kill(task.pid, "SIGKILL");
        expect(await task.wait()).toBe(137);
      });

      it("needs no stdio at all", async () => {
        const { status } = await live.runToEnd(["sh", "-c", "echo into the void; exit 2"], { stdio: false });
        expect(status).toBe(2);
      });

      it("says of a program that isn't there that it isn't, and leaves nothing", async () => {
        const failed = live.run(["/no/such/program"]);
        await expect(failed).rejects.toThrow(/no such file|not found|executable file/i);
      });

      // ctr asks for CPU shares, which crun refuses where version 2 of cgroups has no controllers.
      it.skipIf(combination.engine === "crun")("serves ctr: run, exec, kill, delete", async () => {
        const id = live.newId("ctr");
        await live.ctr(
          "run",
          "-d",
          "--null-io",
          ...live.ctrRuntimeFlags(),
          "cedana.local/busybox:latest",
          id,
          "top",
          "-b",
        );
        expect(await live.ctr("task", "exec", "--exec-id", "x", id, "echo", "hi")).toBe("hi\n");
        expect(await live.ctr("task", "ls")).toMatch(new RegExp(`^${id}\\s+\\d+\\s+RUNNING`, "m"));
        await live.ctr("task", "kill", "-s", "SIGKILL", id);
        await live.events.waitFor(id, "exit");
        await live.ctr("task", "delete", id).catch((error) => {
          if (error.code !== 137) throw error; // ctr ends with the task's exit code
        });
        await live.ctr("container", "delete", id);
        expect(
          live.events.summary(id).filter((line) => !line.includes("exec-") && !line.includes(" x ")),
        ).toEqual(["create", "start", "exit 137", "delete"]);
      });

      it("ends the process of the shim with its last task", async () => {
        const task = await live.run(["counter", "20", "0"]);
        await task.nextNumber();
        const { pid } = live.shimOf(task.id);
        await task.kill(9);
        await task.wait();
        await task.delete();
        await task.io.close();
        await until(() => !isAlive(pid), { what: () => `the end of the shim ${pid}` });
      });

      it.skipIf(combination.engine === "crun")("changes limits of a running container", async () => {
        await using task = await live.run(["sleeper"], { pidsLimit: 50 });
        await live.client.tasks.update(
          task.id,
          anyJson("types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", {
            pids: { limit: 33 },
          }),
        );
        const path = `/sys/fs/cgroup/pids/${live.namespace}/${task.id}/pids.max`;
        expect(readFileSync(path, "utf8").trim()).toBe("33");
      });
    },
  );
}

/** Bytes that have arrived when none come for 60 ms: three rounds of a counter that prints every 5. */
async function quiet(output: { bytes: number }): Promise<number> {
  for (;;) {
    const before = output.bytes;
    await new Promise((resolve) => setTimeout(resolve, 60));
    if (output.bytes === before) return before;
  }
}
