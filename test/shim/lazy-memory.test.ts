import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { WrongState } from "../../src/errors/index.ts";
import { startTime } from "../../src/linux/proc.ts";
import { LazyMemory, type LazyRecord } from "../../src/shim/lazy-memory.ts";

let directory: string;
let events: string[];
let memory: LazyMemory;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "lazy-memory-"));
  events = [];
  const log = {
    info: () => {},
    warn: () => {},
    error: (fields: unknown) => events.push(JSON.stringify(fields)),
  };
  memory = new LazyMemory({
    signal: async () => {},
    log,
    changed: () => events.push(memory.record?.state ?? "nothing"),
    filled: async () => void events.push("discarded"),
    kill: async () => void events.push("killed"),
  });
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

/** As a cedanad leaves it: guard and daemon are processes that have ended, unless it is said otherwise. */
function record(state: LazyRecord["state"], guard = { pid: 1, started: -1 }): LazyRecord {
  return { state, daemon: { directory, guard, daemon: { pid: 1, started: -1 } } };
}

describe("the memory of a task that a cedanad before us has restored lazily", () => {
  it("is whole when the guard has written that the daemon ended well", async () => {
    writeFileSync(join(directory, "ended"), "exit 0\n");
    void memory.revive(record("filling"), true);
    await memory.whole();
    expect(memory.record).toEqual({ state: "filled" });
    expect(events).toContain("discarded");
    expect(events).not.toContain("killed");
  });

  it("is whole when it was, though nothing is left that says so", async () => {
    rmSync(directory, { recursive: true });
    void memory.revive(record("filled"), true);
    await memory.whole();
    expect(memory.record).toEqual({ state: "filled" });
    expect(events).not.toContain("killed");
  });

  it.each([
    ["signal 9\n", /was ended by signal 9/],
    ["exit 1\n", /ended with status 1/],
    ["deadline 0\n", /no restore came/],
    [undefined, /lost its guard/],
  ])("is lost when the daemon ended otherwise (%j), and the task is killed", async (said, reason) => {
    if (said !== undefined) writeFileSync(join(directory, "ended"), said);
    void memory.revive(record("filling"), true);
    await expect(memory.whole()).rejects.toThrow(WrongState);
    await expect(memory.whole()).rejects.toThrow(reason);
    expect(events).toContain("killed");
    expect(events.indexOf("lost")).toBeLessThan(events.indexOf("killed")); // on record first
    await memory.end();
    expect(memory.record).toMatchObject({ state: "lost", reason: expect.stringMatching(reason) });
  });

  it("is waited for as long as a caller wants, and no longer than the container lives", async () => {
    void memory.revive(record("filling", { pid: process.pid, started: startTime(process.pid)! }), true);
    const gone = new AbortController();
    const waiting = memory.whole(gone.signal);
    gone.abort(new Error("the caller has gone"));
    await expect(waiting).rejects.toThrow("the caller has gone");
    expect(memory.record?.state).toBe("filling");
  });
});
