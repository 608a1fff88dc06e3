import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { isControl, Live } from "./harness/live.ts";

// What a container makes of SIGTERM (src/runtime/kill-policy.ts), under containerd.

const stubborn = "trap 'echo hup; exit 3' HUP; trap '' INT TERM; echo up; while :; do sleep 0.02; done";

describe.skipIf(isControl)("kill-signal, kill-grace and kill-escalation", () => {
  let live: Live;
  beforeAll(async () => {
    live = await Live.start();
  });
  afterEach(() => live.expectNoLeftovers());
  afterAll(() => live?.stop());

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
