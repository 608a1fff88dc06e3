// cedana.io/checkpoint-on and cedana.io/auto-resume: a container is checkpointed instead of being ended by a signal, and the next one
// of its key goes on where it was, once.

import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { type EngineName, isControl, type Live } from "./harness/live.ts";
import { liveFor } from "./harness/suite.ts";
import { entries } from "./harness/system.ts";
import { until } from "./harness/until.ts";

const COUNTER = ["counter", "20", "7"]; // 7 is what it ends with at TERM

describe.skipIf(isControl).each<EngineName>(["runc", "crun"])("cedana.io/checkpoint-on over %s", (engine) => {
  let live: Live;
  let store: CheckpointStore;
  liveFor({ engine }, async (started) => {
    live = started;
    store = new CheckpointStore(join(live.dir, "var/checkpoints"));
  });

  const keyed = (key: string, more: Record<string, string> = {}) => ({
    annotations: { "cedana.io/checkpoint-on": "SIGTERM", "cedana.io/auto-resume": key, ...more },
  });
  const generations = (key: string) => store.generations({ namespace: live.namespace }, key);

  /** A container of a key that has come to some number, and was checkpointed there. @returns that number, at least */
  async function leave(key: string): Promise<number> {
    await using task = await live.run(COUNTER, keyed(key));
    let last = await task.nextNumber();
    while (last < 5) last = await task.nextNumber();
    await task.kill(15);
    expect(await task.wait()).toBe(143);
    await live.events.waitFor(task.id, "exit");
    expect(live.events.summary(task.id)).toEqual(["create", "start", "exit 143"]);
    return last;
  }

  it("ends with the signal's status, and the next container of its key goes on, once", async () => {
    const last = await leave("once");
    expect(await generations("once")).toHaveLength(1);
    {
      await using second = await live.run(COUNTER, keyed("once"));
      expect(await second.nextNumber()).toBeGreaterThan(last);
      await using third = await live.run(COUNTER, keyed("once")); // beside it
      expect(await third.nextNumber()).toBe(0);
      await second.kill(15);
      expect(await second.wait()).toBe(143);
    }
    await using fourth = await live.run(COUNTER, keyed("once"));
    expect(await fourth.nextNumber()).toBeGreaterThan(last);
  });

  // What the engine has no part in is tried with one.
  it.skipIf(engine === "crun")(
    "gives one checkpoint to one of many that want it at the same moment",
    async () => {
      const last = await leave("many");
      const tasks = await Promise.all(Array.from({ length: 4 }, () => live.run(COUNTER, keyed("many"))));
      try {
        const first = await Promise.all(tasks.map((task) => task.nextNumber()));
        expect(first.filter((number) => number > last)).toHaveLength(1);
        expect(first.filter((number) => number === 0)).toHaveLength(3);
      } finally {
        for (const task of tasks) await task[Symbol.asyncDispose]();
      }
    },
  );

  it.skipIf(engine === "crun")(
    "leaves it for the next one when a container of the key was never started, and for nobody of another key",
    async () => {
      const last = await leave("back");
      {
        await using never = await live.create(COUNTER, keyed("back"));
        expect(await never.state()).toMatchObject({ status: "CREATED" });
        await using other = await live.run(COUNTER, keyed("back2"));
        expect(await other.nextNumber()).toBe(0);
      }
      await using task = await live.run(COUNTER, keyed("back"));
      expect(await task.nextNumber()).toBeGreaterThan(last);
      for (const key of ["../back", "a/b", "", "..", "tmp"].filter(Boolean))
        await expect(live.create(COUNTER, keyed(key)), key).rejects.toMatchObject({
          status: "INVALID_ARGUMENT",
        });
    },
  );

  it.skipIf(engine === "crun")("sends the signal when the dump fails", async () => {
    // A lock that nobody has allowed for.
    await using task = await live.run(["locks"], keyed("fails", { "cedana.io/kill-signal": "KILL" }));
    await task.stdout.line();
    await task.kill(15);
    expect(await task.wait()).toBe(137);
    expect(await generations("fails")).toEqual([]);
  });

  it.skipIf(engine === "crun")(
    "is given up at a KILL: what was there before stays, and nothing half",
    async () => {
      const last = await leave("killed");
      await using task = await live.run(
        ["memory", "256"],
        keyed("killed", { "cedana.io/auto-resume": "big" }),
      );
      await task.stdout.line();
      await task.kill(15);
      await until(() => entries(join(live.dir, "var/checkpoints", live.namespace, "-/big/tmp")).length > 0, {
        everyMs: 1,
        what: () => "a checkpoint under way",
      });
      await task.kill(9);
      expect(await task.wait()).toBe(137);
      await until(() => entries(join(live.dir, "var/checkpoints", live.namespace, "-/big/tmp")).length === 0);
      expect(await generations("big")).toEqual([]);
      await using next = await live.run(COUNTER, keyed("killed"));
      expect(await next.nextNumber()).toBeGreaterThan(last);
    },
  );

  it("comes to its end though cedanad is killed in the middle", async () => {
    {
      await using task = await live.run(["memory", "256"], keyed("crash"));
      await task.stdout.line();
      await task.kill(15);
      await until(
        () => entries(join(live.dir, "var/checkpoints", live.namespace, "-/crash/tmp")).length > 0,
        {
          everyMs: 1,
          what: () => "a checkpoint under way",
        },
      );
      await live.killCedanad();
      expect(await task.wait()).toBe(143);
    }
    expect(await generations("crash")).toHaveLength(1);
    await using next = await live.run(["memory", "256"], keyed("crash"));
    await next.stdout.line();
  });
});
