import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { type CallerPlace, missingCallers, Podman } from "./harness/callers.ts";
import { isControl, type Live } from "./harness/live.ts";
import { IMAGE } from "./harness/programs.ts";
import { liveFor } from "./harness/suite.ts";
import { entries } from "./harness/system.ts";
import { until } from "./harness/until.ts";

// What a container makes of SIGTERM (src/runtime/kill-policy.ts), under containerd, and under Podman with cedana-runtime.

const stubborn = "trap 'echo hup; exit 3' HUP; trap '' INT TERM; echo up; while :; do sleep 0.02; done";

describe.skipIf(isControl)("kill-signal, kill-grace and kill-escalation", () => {
  let live: Live;
  liveFor({}, (started) => {
    live = started;
  });

  async function run(settings: Record<string, string>) {
    const annotations = Object.fromEntries(
      Object.entries(settings).map(([key, value]) => [`cedana.io/kill-${key}`, value]),
    );
    const task = await live.run(["sh", "-c", stubborn], { annotations });
    expect(await task.stdout.line()).toBe("up");
    return task;
  }

  it("make TERM another signal, and leave others alone", async () => {
    await using task = await run({ signal: "SIGHUP" });
    await task.kill(2);
    await task.kill(15);
    expect(await task.stdout.line()).toBe("hup");
    expect(await task.wait()).toBe(3);
  });

  it("send what follows, one grace after the other", async () => {
    await using task = await run({ grace: "100ms", escalation: "INT,HUP,KILL" });
    const sent = Date.now();
    await task.kill(15);
    expect(await task.wait()).toBe(3); // by HUP, the second step
    expect(Date.now() - sent).toBeGreaterThanOrEqual(200);
  });

  it("end with KILL where only a grace is given; a second TERM prolongs nothing", async () => {
    await using task = await run({ grace: "300ms" });
    await task.kill(15);
    await task.kill(15);
    expect(await task.wait()).toBe(137);
  });

  it("keep their promise when cedanad is killed within the grace", async () => {
    await using task = await run({ grace: "500ms", escalation: "HUP" });
    await task.kill(15);
    await live.killCedanad();
    expect(await task.wait()).toBe(3);
  });

  it("refuse at create what is no signal", async () => {
    await expect(run({ signal: "SIGBLAH" })).rejects.toThrow(
      /cedana.io\/kill-signal names "SIGBLAH", which is no signal/,
    );
    await expect(run({ escalation: "KILL" })).rejects.toMatchObject({ status: "INVALID_ARGUMENT" });
  });

  it("are an exec's own, by its environment", async () => {
    await using task = await run({ signal: "KILL" });
    const exec = await task.exec(["sh", "-c", stubborn], { env: ["CEDANA_KILL_SIGNAL=HUP"] });
    expect(await exec.stdout.line()).toBe("up");
    await exec.kill(15);
    expect(await exec.wait()).toBe(3);
    await exec.delete();
    await expect(task.exec(["true"], { env: ["CEDANA_KILL_SIGNAL=BLAH"] })).rejects.toThrow(
      /CEDANA_KILL_SIGNAL names "BLAH"/,
    );
    await task.kill(15);
    expect(await task.wait()).toBe(137);
  });
});

const missing = missingCallers();

describe.skipIf(missing)(`the same by cedana-runtime under Podman${missing ? ` (${missing})` : ""}`, () => {
  let podman: Podman;
  beforeAll(async () => {
    podman = await Podman.start("runc");
  });
  afterEach(async () => {
    await podman.on("wrapper", "rm", "--all", "--force", "--time", "0");
    expect(entries(`${podman.place.runDir}/oci`)).toEqual([]); // no marker without its container
    await podman.place.expectNoLeftovers((argv) => /cedanad/.test(argv));
  });
  afterAll(async () => await podman?.stop());

  async function ok(...args: string[]): Promise<string> {
    const { status, stdout, stderr } = await podman.on("wrapper", ...args);
    expect(status, `podman ${args.join(" ")}: ${stderr}`).toBe(0);
    return stdout.trim();
  }
  async function run(settings: Record<string, string>): Promise<void> {
    const annotations = Object.entries(settings).flatMap(([key, value]) => [
      "--annotation",
      `cedana.io/kill-${key}=${value}`,
    ]);
    await ok("run", "--detach", "--name", "c", ...annotations, IMAGE, "sh", "-c", stubborn);
    await until(async () => (await ok("logs", "c")).includes("up"), { everyMs: 50 });
  }

  it("TERM becomes another signal, at podman stop, too; others are left alone", {
    timeout: 60_000,
  }, async () => {
    await run({ signal: "SIGHUP" });
    expect(await ok("inspect", "--format", "{{.State.Status}}", "c")).toBe("running");
    await ok("kill", "--signal", "INT", "c");
    await ok("exec", "c", "true");
    await ok("stop", "--time", "20", "c");
    expect(await ok("wait", "c")).toBe("3");
    expect(await ok("logs", "c")).toBe("up\nhup");
    await ok("start", "c"); // from the same annotations again
    await ok("kill", "--signal", "TERM", "c");
    expect(await ok("wait", "c")).toBe("3");
  });

  it("what follows is sent after the grace, also by a cedanad that was started after it", {
    timeout: 60_000,
  }, async () => {
    await run({ grace: "200ms", escalation: "INT,HUP" });
    await ok("kill", "--signal", "TERM", "c");
    expect(await ok("wait", "c")).toBe("3");
    await ok("start", "c");
    await until(async () => (await ok("logs", "c")).match(/^up$/gm)?.length === 2, { everyMs: 50 });
    await ok("kill", "--signal", "TERM", "c");
    killCedanad(podman.place);
    await ok("kill", "--signal", "CONT", "c").catch(() => {}); // whatever needs cedanad starts it
    expect(await ok("wait", "c")).toBe("3");
  });

  it("a container has its terminal, stdin and status as ever, foreground or not", async () => {
    const annotated = ["run", "--rm", "--annotation", "cedana.io/kill-signal=HUP"];
    expect(await ok(...annotated, "--tty", IMAGE, "sh", "-c", "tty; test -t 0 && test -t 1")).toBe(
      "/dev/pts/0",
    );
    const failing = await podman.on(
      "wrapper",
      ...annotated,
      IMAGE,
      "sh",
      "-c",
      "echo out; echo err >&2; exit 3",
    );
    expect(failing).toEqual({ status: 3, stdout: "out\n", stderr: "err\n" });
    expect((await podman.on("wrapper", ...annotated, IMAGE, "no-such-program")).status).toBe(127);
    expect((await podman.on("wrapper", ...annotated, IMAGE, "/etc/passwd")).status).toBe(126);
    const argv = podman.argv("wrapper", [...annotated, "--cgroup-parent", `/${podman.place.namespace}`]);
    const cat = podman.place.spawn([...argv, "--interactive", IMAGE, "cat"], { input: true });
    let said = "";
    cat.stdout!.on("data", (chunk) => (said += chunk));
    cat.stdin!.end("line\n".repeat(1000));
    expect(await new Promise((resolve) => cat.once("close", resolve))).toBe(0);
    expect(said).toBe("line\n".repeat(1000));
  });

  it("what is no signal is refused at create, and nothing is left", async () => {
    const { status, stderr } = await podman.on(
      "wrapper",
      "run",
      "--annotation",
      "cedana.io/kill-signal=BLAH",
      IMAGE,
      "true",
    );
    expect(status).not.toBe(0);
    expect(stderr).toContain('cedana.io/kill-signal names "BLAH", which is no signal');
    const { stderr: store } = await podman.on(
      "wrapper",
      "run",
      "--annotation",
      "cedana.io/auto-resume=../x",
      IMAGE,
      "true",
    );
    expect(store).toContain('"../x" is not a name');
  });
});

/** The one that logged last, if it still runs. */
function killCedanad(place: CallerPlace): void {
  try {
    process.kill(place.cedanadPid(), "SIGKILL");
  } catch {
    // ESRCH: it ended by itself, below conmon
  }
}
