import { spawn } from "node:child_process";
import { once } from "node:events";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CriuFailed } from "../../src/errors/index.ts";
import { Ending } from "../../src/shim/ending.ts";
import { Process } from "../../src/shim/process.ts";
import { until } from "../live/harness/until.ts";

const stdio = { terminal: false, stdin: "", stdout: "", stderr: "" };
const ending = { signal: 15, escalation: [], status: 143 };

let init: Process;
let did: string[];
let dump: PromiseWithResolvers<void>;
let task: Ending;
let keeper: { connected: boolean };
beforeEach(() => {
  keeper = { connected: true };
  init = new Process("", "io", stdio, "running");
  did = [];
  task = new Ending({
    what: "task c1",
    log: { info() {}, error() {}, warn: (_fields: unknown, message?: string) => did.push(message!) },
    init,
    keeper,
    changed: () => did.push(task.record ? "recorded" : "record gone"),
    checkpoint: (signal) => {
      did.push("dump");
      dump = Promise.withResolvers();
      signal.addEventListener("abort", () => dump.reject(signal.reason));
      return dump.promise;
    },
    send: async (signal) => void did.push(`signal ${signal}`),
    over: () => did.push("over"),
  });
});

describe("a checkpoint instead of a signal", () => {
  it("is on record before it begins, and holds the exit until it is over", async () => {
    expect(task.begin(ending)).toBe(true);
    expect(did).toEqual(["recorded", "dump"]);
    expect(task.isUnderWay).toBe(true);
    init.heldExit = { status: 137, atNs: 1n, sequence: 1 };
    expect(task.begin(ending)).toBe(true); // a second signal changes nothing
    dump.resolve();
    await until(() => did.includes("over"));
    expect(did).toEqual(["recorded", "dump", "over"]);
    expect(task.isUnderWay).toBe(false);
    expect(task.statusOf(137)).toBe(143);
  });

  it("that fails lets the signal through, and the next one is as good as the first", async () => {
    task.begin(ending);
    dump.reject(new CriuFailed("no"));
    await until(() => did.includes("over"));
    expect(did.slice(2)).toEqual([
      "not checkpointed instead of a signal: it gets the signal",
      "record gone",
      "signal 15",
      "over",
    ]);
    expect(task.statusOf(137)).toBe(137);
    did.length = 0;
    expect(task.begin(ending)).toBe(true);
    expect(task.isUnderWay).toBe(true); // its exit is held again
    task.giveUp();
    await until(() => did.includes("over"));
    expect(did).toContain("signal 15");
  });

  it("is given up for a SIGKILL, whose status its end then has", async () => {
    task.begin(ending);
    task.giveUp();
    init.heldExit = { status: 137, atNs: 1n, sequence: 1 };
    await until(() => did.includes("over"));
    expect(did).toEqual(["recorded", "dump", "recorded", "not checkpointed at its end", "over"]);
    expect(task.statusOf(137)).toBe(137);
  });

  it("is not begun for one that has ended, or has not begun", () => {
    init.markExited({ status: 0, atNs: 1n });
    expect(task.begin(ending)).toBe(false);
    expect(did).toEqual([]);
  });

  describe("after a crash of cedanad", () => {
    let child: ReturnType<typeof spawn>;
    beforeEach(async () => {
      child = spawn("sleep", ["1000"], { stdio: "ignore" });
      await once(child, "spawn");
      init.pid = child.pid!;
      task.revive({ ...ending, killed: false });
    });
    afterEach(() => child.kill("SIGKILL"));

    it("is waited for to its end", async () => {
      task.resume(Promise.resolve());
      expect(task.isUnderWay).toBe(true);
      init.heldExit = { status: 137, atNs: 1n, sequence: 1 };
      await until(() => did.includes("over"));
      expect(did).toEqual(["over"]);
      expect(task.statusOf(137)).toBe(143);
    });

    it("is waited for no longer than somebody is there who could tell", async () => {
      init.pid = 2 ** 22; // it has ended
      task.resume(Promise.resolve());
      await new Promise((resolve) => setImmediate(resolve));
      expect(did).toEqual([]);
      keeper.connected = false;
      await until(() => did.includes("over"));
      expect(did).toEqual(["over"]);
    });

    it("ends with the signal when nothing was begun and the container lives", async () => {
      task.resume(undefined);
      await until(() => did.includes("over"));
      expect(did.slice(1)).toEqual(["record gone", "signal 15", "over"]);
    });
  });
});
