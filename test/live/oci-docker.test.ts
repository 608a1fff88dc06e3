import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { Docker, missingCallers, type Outcome } from "./harness/callers.ts";
import { IMAGE } from "./harness/programs.ts";
import { until } from "./harness/until.ts";

// Docker with runc, with cedana-runtime in runc's place (`path`), and with our shim (`runtimeType`): the same commands, the same
// outcomes. No network: the machine's is not ours to configure.

const missing = missingCallers();
const runtimes = ["runc", "wrapper", "shim"];
const loop = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done";

describe.skipIf(missing)(`docker${missing ? ` (${missing})` : ""}`, () => {
  let docker: Docker;
  beforeAll(async () => {
    docker = await Docker.start();
  });
  afterEach(async () => {
    await docker.place.expectNoLeftovers((argv) => /dockerd|^containerd |\/containerd |cedanad/.test(argv));
  });
  afterAll(async () => await docker?.stop());

  /** On every runtime; a container's name (@) says which. `run` gets the flags that choose it. */
  const all = async (...args: string[]) => await on(runtimes, args);
  async function on(chosen: readonly string[], args: readonly string[]): Promise<Outcome> {
    const outcomes = await Promise.all(
      chosen.map(async (runtime) => {
        const flags = args[0] === "run" ? ["--runtime", runtime, "--network", "none"] : [];
        const [command, ...rest] = args.map((arg) => arg.replaceAll("@", `c-${runtime}`));
        const { status, stdout, stderr } = await docker.run(command!, ...flags, ...rest);
        const clean = (text: string) =>
          text.replaceAll(`c-${runtime}`, "@").replaceAll(/\b[0-9a-f]{64}\b/g, "ID");
        return { status, stdout: clean(stdout), stderr: clean(stderr) };
      }),
    );
    for (const [index, outcome] of outcomes.entries()) {
      const what = `docker ${args.join(" ")} with ${chosen[index]}: ${outcome.stderr}`;
      expect(outcome.status, what).toBe(outcomes[0]!.status);
      // Why an engine could not run something, docker prints as it is told: our shim has other words than runc's.
      if (chosen[index] !== "shim" || outcome.status < 125)
        expect(outcome.stdout, what).toBe(outcomes[0]!.stdout);
    }
    expect(outcomes[1]!.stderr, `docker ${args.join(" ")}`).toBe(outcomes[0]!.stderr); // the wrapper's words are runc's
    return outcomes[0]!;
  }

  const inspect = async (what: string) => (await all("inspect", "--format", what, "@")).stdout.trim();

  /** Docker stores a tar that may differ from the last one only in a time in seconds, and containerd refuses it then. */
  const unlessThere = async (...args: string[]) =>
    await until(
      () =>
        docker.ok(...args).then(
          () => true,
          (error: Error) => {
            if (!/already exists/.test(error.message)) throw error;
            return false;
          },
        ),
      { everyMs: 1_100, what: () => `docker ${args.join(" ")}` },
    );

  it("runs to the end with the container's status and output", async () => {
    const said = await all("run", "--rm", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 3");
    expect(said).toEqual({ status: 3, stdout: "out\n", stderr: "err\n" });
    expect((await all("run", "--rm", IMAGE, "no-such-program")).status).toBe(127);
    expect(
      (await all("run", "--rm", "--init", IMAGE, "sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' '")).stdout,
    ).toContain("docker-init");
    expect((await all("run", "--rm", "--tty", IMAGE, "tty")).stdout).toMatch(/^\/dev\/pts\/0\r?\n$/);
    expect(
      (await all("run", "--rm", "--user", "1:2", "--workdir", "/tmp", IMAGE, "sh", "-c", "pwd; id -u; id -g"))
        .stdout,
    ).toBe("/tmp\n1\n2\n");
  });

  it("keeps a container: exec, logs, stats, top, pause, update, restart, stop, kill", async () => {
    expect((await all("run", "--detach", "--name", "@", IMAGE, "sh", "-c", loop)).stdout).toBe("ID\n");
    expect(await all("exec", "@", "echo", "in")).toMatchObject({ status: 0, stdout: "in\n" });
    expect((await all("exec", "@", "sh", "-c", "exit 9")).status).toBe(9);
    expect((await all("exec", "--tty", "@", "tty")).stdout).toMatch(/pts/);
    expect((await all("exec", "@", "no-such-program")).status).toBe(126); // docker says so of an exec
    const counted = docker.place.hasController("pids");
    for (const runtime of runtimes)
      expect(
        await docker.ok("stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", `c-${runtime}`),
      ).toMatch(counted ? /^c-\w+ [1-9]/ : /^c-\w+ 0/);
    expect((await docker.ok("top", "c-wrapper", "-o", "pid,args")).includes("trap")).toBe(true);
    expect((await all("pause", "@")).status).toBe(0);
    expect(await inspect("{{.State.Status}}")).toBe("paused");
    expect((await all("exec", "@", "true")).status).not.toBe(0);
    expect((await all("unpause", "@")).status).toBe(0);
    expect((await all("update", "--pids-limit", "77", "@")).status).toBe(0);
    expect(
      (
        await all(
          "exec",
          "@",
          "sh",
          "-c",
          "cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null; true",
        )
      ).stdout,
    ).toBe(counted ? "77\n" : "");
    expect((await all("restart", "--time", "10", "@")).status).toBe(0);
    expect((await all("stop", "--time", "10", "@")).status).toBe(0);
    expect(await inspect("{{.State.Status}} {{.State.ExitCode}}")).toBe("exited 7");
    expect((await all("logs", "@")).stdout).toBe("up\nbye\nup\nbye\n");
    expect((await all("start", "@")).status).toBe(0);
    expect((await all("kill", "@")).status).toBe(0);
    expect((await all("wait", "@")).stdout).toBe("137\n");
    expect((await all("rm", "@")).status).toBe(0);
  });

  it("checkpoints, lists, starts from a checkpoint, removes it", async () => {
    const both = async (...args: string[]) => await on(runtimes, args);
    const counter = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done";
    expect(
      (
        await both(
          "run",
          "--detach",
          "--name",
          "@",
          "--security-opt",
          "seccomp=unconfined",
          // Docker tells only runtimes of the type io.containerd.runc.v2 that a container is to end with its checkpoint.
          "--annotation",
          "cedana.io/checkpoint-exit=true",
          IMAGE,
          "sh",
          "-c",
          counter,
        )
      ).status,
    ).toBe(0);
    const numbers = async (runtime: string) =>
      (await docker.ok("logs", `c-${runtime}`)).split("\n").map(Number);
    for (const runtime of runtimes)
      await until(async () => (await numbers(runtime)).length > 2, { everyMs: 50 });
    const leaving = async (...args: string[]) => await on(["runc", "wrapper"], args);
    expect((await leaving("checkpoint", "create", "--leave-running", "@", "first")).status).toBe(0);
    expect((await both("inspect", "--format", "{{.State.Status}}", "@")).stdout.trim()).toBe("running");
    expect((await both("checkpoint", "create", "@", "second")).status).toBe(0);
    for (const runtime of runtimes)
      await until(
        async () =>
          (await docker.ok("inspect", "--format", "{{.State.Status}}", `c-${runtime}`)) === "exited",
        { everyMs: 50 },
      );
    expect((await both("checkpoint", "create", "@", "third")).status).not.toBe(0);
    expect((await leaving("checkpoint", "ls", "@")).stdout.split("\n").map((line) => line.trim())).toEqual([
      "CHECKPOINT NAME",
      "first",
      "second",
      "",
    ]);
    for (const runtime of runtimes) await unlessThere("start", "--checkpoint", "second", `c-${runtime}`);
    for (const runtime of runtimes) {
      const before = (await numbers(runtime)).length;
      await until(async () => (await numbers(runtime)).length > before + 1, {
        everyMs: 50,
        what: () => `${runtime} to count on`,
      });
      const all = await numbers(runtime);
      expect(all).toEqual(all.map((_, at) => at)); // no number is missing, none comes twice
    }
    expect((await leaving("checkpoint", "rm", "@", "first")).status).toBe(0);
    expect((await both("checkpoint", "rm", "@", "second")).status).toBe(0);
    expect((await both("rm", "--force", "@")).status).toBe(0);
  });

  it("leaves a container running that its shim checkpoints, lists it, and starts from there", {
    timeout: 60_000,
  }, async () => {
    const counter = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done";
    const flags = ["--runtime", "shim", "--network", "none", "--security-opt", "seccomp=unconfined"];
    await docker.ok("run", "--detach", "--name", "box", ...flags, IMAGE, "sh", "-c", counter);
    const numbers = async () => (await docker.ok("logs", "box")).split("\n").map(Number);
    await until(async () => (await numbers()).length > 2, { everyMs: 50 });
    await docker.ok("checkpoint", "create", "--leave-running", "box", "first");
    // Docker tells only runtimes of the type io.containerd.runc.v2 that a container is to end with its checkpoint.
    await unlessThere("checkpoint", "create", "box", "second");
    const before = (await numbers()).length;
    await until(async () => (await numbers()).length > before + 1, { everyMs: 50 });
    const listed = (await docker.ok("checkpoint", "ls", "box")).split("\n").map((line) => line.trim());
    expect(listed).toEqual(["CHECKPOINT NAME", "first", "second"]);
    await docker.ok("kill", "box");
    await docker.ok("wait", "box");
    const end = (await numbers()).length;
    await docker.ok("start", "--checkpoint", "first", "box");
    await until(async () => (await numbers()).length > end + 1, { everyMs: 50 });
    const again = (await numbers())[end]!; // the log goes on with what it has had before
    expect(again).toBeGreaterThan(1);
    expect(again).toBeLessThan(end);
    await docker.ok("checkpoint", "rm", "box", "first");
    await docker.ok("checkpoint", "rm", "box", "second");
    expect(await docker.ok("checkpoint", "ls", "box")).toBe("CHECKPOINT NAME");
    await docker.ok("rm", "--force", "box");
  });

  it("goes on after docker stop where it was, by checkpoint-on and auto-resume", {
    timeout: 60_000,
  }, async () => {
    const ours = async (...args: string[]) => await on(["wrapper", "shim"], args);
    const keyed = [
      ...["--annotation", "cedana.io/checkpoint-on=SIGTERM", "--annotation", "cedana.io/auto-resume=@"],
      ...["--security-opt", "seccomp=unconfined"],
    ];
    const counter = "trap 'exit 7' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done";
    expect((await ours("run", "--detach", "--name", "@", ...keyed, IMAGE, "sh", "-c", counter)).status).toBe(
      0,
    );
    const numbers = async (runtime: string) =>
      (await docker.ok("logs", `c-${runtime}`)).split("\n").map(Number);
    for (const runtime of ["wrapper", "shim"])
      await until(async () => (await numbers(runtime)).length > 2, { everyMs: 50 });
    expect((await ours("stop", "--time", "30", "@")).status).toBe(0);
    const left = await ours("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "@");
    expect(left.stdout.trim(), docker.place.cedanadLog()).toBe("exited 143");
    expect((await ours("start", "@")).status).toBe(0);
    for (const runtime of ["wrapper", "shim"]) {
      const before = (await numbers(runtime)).length;
      await until(async () => (await numbers(runtime)).length > before + 1, { everyMs: 50 });
      const all = await numbers(runtime);
      expect(all).toEqual(all.map((_, at) => at)); // no number is missing, none comes twice
    }
    expect((await ours("rm", "--force", "@")).status).toBe(0);
  });

  it("takes what the wrapper says for what it can", async () => {
    const info = JSON.parse(await docker.ok("info", "--format", "{{json .Runtimes}}"));
    expect(Object.keys(info)).toEqual(expect.arrayContaining(["runc", "wrapper", "shim"]));
    expect(info.wrapper.status).toEqual(info.runc.status); // `features`, as the engine prints them
  });
});
