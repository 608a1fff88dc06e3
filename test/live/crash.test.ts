// cedanad is killed, hangs, or can't start; keepers are killed; containerd is killed. No container notices.

import { describe, expect, it } from "vitest";
import { Live } from "./harness/live.ts";
import { generator } from "./harness/random.ts";
import { liveFor } from "./harness/suite.ts";
import { isAlive } from "./harness/system.ts";
import { until } from "./harness/until.ts";

/** `npm run soak` makes many more of the short ones. */
const LONG_LIVES = 50;
const SHORT_LIVES = 15;

describe("cedanad", () => {
  let live: Live;
  liveFor({ containerd: "1.7", engine: "runc" }, (started) => {
    live = started;
  });

  it("may be killed while a container runs, and while it ends", async () => {
    await using task = await live.run(["counter", "10", "7"]);
    const waiting = task.wait();
    const before = await task.nextNumber();
    await live.killCedanad();
    expect(await task.nextNumber()).toBe(before + 1);
    expect(await task.status()).toBe("RUNNING");
    await live.killCedanad();
    process.kill(task.pid, "SIGTERM");
    expect(await waiting).toBe(7);
    expect(await task.wait()).toBe(7);
    expect(await task.delete()).toBe(7);
    await live.events.waitFor(task.id, "delete");
    expect(live.events.summary(task.id)).toEqual(["create", "start", "exit 7", "delete"]);
  });

  it("is replaced when it hangs, and the call that waited is answered", async () => {
    await using task = await live.run(["counter"]);
    await task.nextNumber();
    const { pid } = live.cedanad()!;
    process.kill(pid, "SIGSTOP");
    try {
      const found = await task.execToEnd(["sh", "-c", "exit 9"]);
      expect(found.status).toBe(9);
    } finally {
      if (isAlive(pid)) process.kill(pid, "SIGCONT");
    }
    expect(live.cedanad()!.pid).not.toBe(pid);
  });

  /** Kills cedanad once within the next `ms`, and waits until that has happened. */
  const killWithin = async (ms: number, random: () => number) => {
    await new Promise((resolve) => setTimeout(resolve, 1 + random() * ms));
    await live.killCedanad();
  };

  it(`may be killed at a random moment of a short life, ${SHORT_LIVES} times: outputs, codes and events are right`, async () => {
    const random = generator(20_240_601);
    for (let round = 0; round < SHORT_LIVES; round++) {
      const killer = killWithin(80, random);
      const expected = round % 200;
      const { id, status, stdout } = await live.runToEnd([
        "sh",
        "-c",
        `echo round ${round}; exit ${expected}`,
      ]);
      await killer;
      expect(stdout, `round ${round}`).toBe(`round ${round}\n`);
      expect(status, `round ${round}`).toBe(expected);
      await live.events.waitFor(id, "delete");
      expect(live.events.summary(id), `round ${round}`).toEqual([
        "create",
        "start",
        `exit ${expected}`,
        "delete",
      ]);
    }
  }, 600_000);

  /** One kill for each wave of work: what was in work at two kills would be refused, and rightly. */
  async function killedOnce<T>(afterMs: number, work: Promise<T>[]): Promise<T[]> {
    const killer = new Promise((resolve) => setTimeout(resolve, afterMs)).then(() => live.killCedanad());
    const results = await Promise.all(work);
    await killer;
    return results;
  }

  it("may be killed in a storm of execs in a pod: outputs, codes and events are right", async () => {
    const annotations = { "io.kubernetes.cri.sandbox-id": "storm" };
    await using first = await live.run(["sleeper"], { annotations });
    await using second = await live.run(["sleeper"], { annotations });
    const tasks = [first, second];
    const random = generator(7);
    for (let wave = 0; wave < 4; wave++) {
      const results = await killedOnce(
        10 + random() * 150,
        Array.from({ length: 10 }, (_, index) =>
          tasks[index % 2]!.execToEnd(["sh", "-c", `echo exec ${index}; exit ${index}`], {
            terminal: index % 5 === 0,
          }),
        ),
      );
      expect(results.map(({ status, stdout }) => [status, stdout.trim()])).toEqual(
        results.map((_, index) => [index, `exec ${index}`]),
      );
    }
    for (const task of tasks)
      for (let number = 1; number <= 20; number++) {
        await live.events.waitFor(task.id, "exit", { execId: `e${number}` });
        const own = live.events.of(task.id).filter(({ execId }) => execId === `e${number}`);
        expect(own.map(({ topic }) => topic)).toEqual(["exec-added", "exec-started", "exit"]);
      }
  });

  it("may be killed while many short containers live at once in a pod and outside", async () => {
    const annotations = { "io.kubernetes.cri.sandbox-id": "crowd" };
    await using _pause = await live.run(["sleeper"], { annotations });
    const random = generator(11);
    for (let wave = 0; wave < 3; wave++) {
      const ended = await killedOnce(
        10 + random() * 200,
        Array.from({ length: 8 }, (_, index) =>
          live.runToEnd(["sh", "-c", `exit ${index}`], { stdio: false, ...(index % 2 && { annotations }) }),
        ),
      );
      for (const [index, { id, status }] of ended.entries()) {
        expect(status).toBe(index);
        await live.events.waitFor(id, "delete");
        expect(live.events.summary(id)).toEqual(["create", "start", `exit ${index}`, "delete"]);
      }
    }
  });

  it(`may be killed at a random moment of a long life, ${LONG_LIVES} times: each call is answered, and happens once`, async () => {
    const random = generator(20_240_602);
    for (let round = 0; round < LONG_LIVES; round++) {
      const at = `round ${round}`;
      const killer = killWithin(300, random);
      await using task = await live.run(["signals"]);
      expect(await task.stdout.line(), at).toBe("ready");
      const exec = await task.execToEnd(["sh", "-c", `echo exec ${round}; exit ${round}`]);
      expect(exec, at).toEqual({ status: round, stdout: `exec ${round}\n`, stderr: "" });
      await task.kill(10);
      expect(await task.stdout.line(), at).toBe("signal 10");
      await task.pause();
      await task.resume();
      await task.kill(12);
      expect(await task.stdout.line(), at).toBe("signal 12");
      const exited = task.wait();
      await task.kill(9);
      expect(await exited, at).toBe(137);
      expect(await task.delete(), at).toBe(137);
      await killer;
      await task.stdout.end();
      expect(task.stdout.text, at).toBe("ready\nsignal 10\nsignal 12\n"); // and no signal twice
      await live.events.waitFor(task.id, "delete");
      expect(live.events.summary(task.id), at).toEqual([
        "create",
        "start",
        "exec-added e1",
        "exec-started e1",
        `exit e1 ${round}`,
        "paused",
        "resumed",
        "exit 137",
        "delete",
      ]);
    }
  }, 600_000);

  it("survives containerd: a restarted containerd finds the container running, and its exit code", async () => {
    await using task = await live.run(["counter", "20", "5"], { stdio: false });
    await live.stopContainerd("SIGKILL");
    await live.startContainerd();
    expect(await task.status()).toBe("RUNNING");
    await task.kill(15);
    expect(await task.wait()).toBe(5);
  });
});

describe("a keeper", () => {
  it("that is killed takes its own containers along and no others", async () => {
    await using live = await Live.start({ containerd: "1.7", engine: "runc" });
    await using other = await live.run(["counter"]);
    const task = await live.run(["counter"]);
    await task.nextNumber();
    const { pid } = live.shimOf(task.id);
    process.kill(pid, "SIGKILL");
    await until(() => !isAlive(task.pid), { what: () => "the end of the container" });
    await until(async () => (await task.status().catch(() => "GONE")) !== "RUNNING", {
      what: () => "containerd's notice",
    });
    const before = await other.nextNumber();
    expect(await other.nextNumber()).toBe(before + 1);
    await task.io.close();
    await live.removeContainer(task.id).catch(() => undefined);
  });
});
