import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { missingCallers, type Outcome, Podman, type Side, sides } from "./harness/callers.ts";
import type { EngineName } from "./harness/live.ts";
import { IMAGE } from "./harness/programs.ts";
import { cgroupsOf } from "./harness/system.ts";
import { until } from "./harness/until.ts";

// Podman with the engine itself and with cedana-runtime in its place: every command on both sides, with the same outcome.
// The network is the host's, for the machine keeps its own to itself. Cgroups are systemd's where systemd runs.

const missing = missingCallers();
const loop = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done";

describe.skipIf(missing).each<EngineName>(["runc", "crun"])(
  `podman over %s${missing ? ` (${missing})` : ""}`,
  (engine) => {
    let podman: Podman;
    beforeAll(async () => {
      podman = await Podman.start(engine);
    });
    afterEach(async () => await podman.place.expectNoLeftovers());
    afterAll(async () => await podman?.stop());

    /** A container's name says its side; all else of the outcomes must be equal. */
    async function both(...args: string[]): Promise<Outcome> {
      const outcomes = await Promise.all(
        sides.map((side) => podman.on(side, ...args.map((arg) => arg.replaceAll("@", side)))),
      );
      const [bare, ours] = outcomes.map((outcome, index) => normal(outcome, sides[index]!));
      expect(ours, args.join(" ")).toEqual(bare);
      return bare!;
    }

    function normal({ status, stdout, stderr }: Outcome, side: Side): Outcome {
      const clean = (text: string) =>
        text
          .replaceAll(side, "@")
          .replaceAll(/^(sleep [\d.]+|\[sleep\]) *\n/gm, "") // what a loop has just begun, or not; or what has just ended
          .replaceAll(/[0-9a-f]{64}/g, "ID")
          .replaceAll(/time="[^"]*"/g, "time=T");
      return { status, stdout: clean(stdout), stderr: clean(stderr) };
    }

    const inspect = async (what: string) => (await both("inspect", "--format", what, "@")).stdout.trim();

    it("runs to the end with the container's status, output and stdin", async () => {
      expect(await both("run", "--rm", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 3")).toMatchObject({
        status: 3,
        stdout: "out\n",
      });
      expect((await both("run", "--rm", IMAGE, "no-such-program")).status).toBe(127);
      expect((await both("run", "--rm", IMAGE, "/etc/passwd")).status).toBe(126);
      expect(
        (await both("run", "--rm", "--init", IMAGE, "sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' '")).stdout,
      ).toContain("init");
      expect(
        (await both("run", "--rm", "--tty", IMAGE, "sh", "-c", "tty; test -t 0 && test -t 1")).stdout,
      ).toMatch(/^\/dev\/pts\/0\r?\n$/);
      expect(
        (
          await both(
            "run",
            "--rm",
            "--env",
            "A=b",
            "--workdir",
            "/tmp",
            "--user",
            "1:2",
            IMAGE,
            "sh",
            "-c",
            "echo $A; pwd; id -u; id -g",
          )
        ).stdout,
      ).toBe("b\n/tmp\n1\n2\n");
      expect(
        (
          await both(
            "run",
            "--rm",
            "--preserve-fds",
            "0",
            "--ulimit",
            "nofile=64:64",
            IMAGE,
            "sh",
            "-c",
            "ulimit -n; ls /proc/self/fd",
          )
        ).stdout,
      ).toMatch(/^64\n/);
    });

    it("keeps a container: exec, logs, top, pause, update, signals, restart, stop", async () => {
      expect((await both("run", "--detach", "--name", "@", IMAGE, "sh", "-c", loop)).stdout).toBe("ID\n");
      expect(await both("exec", "@", "echo", "in")).toMatchObject({ status: 0, stdout: "in\n" });
      expect((await both("exec", "@", "sh", "-c", "exit 9")).status).toBe(9);
      expect((await both("exec", "@", "no-such-program")).status).toBe(127);
      expect((await both("exec", "--tty", "@", "tty")).stdout).toMatch(/pts/);
      expect((await both("exec", "--detach", "@", "touch", "/tmp/detached")).status).toBe(0);
      for (const side of sides)
        await until(async () => !(await podman.on(side, "top", side, "args")).stdout.includes("touch"));
      expect((await both("top", "@", "args")).stdout).toContain("trap");
      expect((await both("pause", "@")).status).toBe(0);
      expect(await inspect("{{.State.Status}}")).toBe("paused");
      expect((await both("exec", "@", "true")).status).not.toBe(0);
      expect((await both("unpause", "@")).status).toBe(0);
      expect((await both("kill", "--signal", "NOSUCH", "@")).status).not.toBe(0);
      expect((await both("kill", "--signal", "USR1", "@")).status).toBe(0); // a first process takes only what it has a handler for
      for (const side of sides) {
        const { stdout, stderr } = await podman.on(
          side,
          "stats",
          "--no-stream",
          "--format",
          "{{.Name}} {{.PIDs}}",
          side,
        );
        if (podman.place.hasController("pids")) expect(stdout, stderr).toMatch(new RegExp(`^${side} [1-9]`));
        else expect(stdout, stderr).toMatch(new RegExp(`^${side} `)); // no controllers, no numbers
      }
      if (podman.place.hasController("pids")) {
        expect((await both("update", "--pids-limit", "77", "@")).status).toBe(0);
        const limits = cgroupsOf(podman.place.namespace)
          .filter((path) => !path.endsWith(".scope/container")) // crun gives the scope's limits to its cgroup in it, too
          .map((path) => join(path, "pids.max"))
          .filter(existsSync);
        expect(limits.filter((path) => readFileSync(path, "utf8") === "77\n").length).toBe(2);
      }
      expect((await both("restart", "--time", "5", "@")).status).toBe(0);
      expect((await both("stop", "--time", "10", "@")).status).toBe(0);
      expect(await inspect("{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}")).toBe("exited 7 0");
      expect((await both("logs", "@")).stdout).toBe("up\nbye\nup\nbye\n");
      expect((await both("start", "@")).status).toBe(0);
      expect((await both("kill", "@")).status).toBe(0);
      expect((await both("wait", "@")).stdout).toBe("137\n");
      expect((await both("rm", "@")).status).toBe(0);
    });

    // Podman's own affairs from here on, which the engines don't even see: once is enough.
    it.skipIf(engine === "crun")("checks health", async () => {
      const health = ["--health-cmd", "test -e /ok", "--health-interval", "disable", "--health-retries", "1"];
      expect((await both("run", "--detach", "--name", "@", ...health, IMAGE, "sh", "-c", loop)).status).toBe(
        0,
      );
      expect((await both("healthcheck", "run", "@")).status).toBe(1);
      expect(await inspect("{{.State.Health.Status}}")).toBe("unhealthy");
      await both("exec", "@", "touch", "/ok");
      expect((await both("healthcheck", "run", "@")).status).toBe(0);
      expect(await inspect("{{.State.Health.Status}}")).toBe("healthy");
      expect((await both("rm", "--force", "--time", "0", "@")).status).toBe(0);
    });

    it.skipIf(engine === "crun")("has pods", async () => {
      expect((await both("pod", "create", "--name", "pod-@", "--network", "host")).status).toBe(0);
      expect(
        (await both("run", "--detach", "--pod", "pod-@", "--name", "@", IMAGE, "sh", "-c", loop)).status,
      ).toBe(0);
      expect((await both("run", "--rm", "--pod", "pod-@", IMAGE, "hostname")).status).toBe(0);
      expect(
        (await both("pod", "inspect", "--format", "{{.State}} {{.NumContainers}}", "pod-@")).stdout,
      ).toBe("Running 2\n");
      expect((await both("pod", "pause", "pod-@")).status).toBe(0);
      expect((await both("pod", "unpause", "pod-@")).status).toBe(0);
      expect((await both("pod", "stop", "--time", "5", "pod-@")).status).toBe(0);
      expect(await inspect("{{.State.ExitCode}}")).toBe("7");
      expect((await both("pod", "rm", "--force", "pod-@")).status).toBe(0);
    });
  },
);
