import { describe, expect, it } from "vitest";
import { NotFound, WrongState } from "../../src/errors/index.ts";
import {
  execTransitions,
  initTransitions,
  Process,
  type ProcessState,
  type ProcessVerb,
} from "../../src/shim/process.ts";

const stdio = { terminal: false, stdin: "", stdout: "", stderr: "" };

describe("the states of a process", () => {
  const verbs: ProcessVerb[] = ["start", "pause", "resume", "checkpoint", "exit", "fail", "delete"];
  for (const [name, table, execId] of [
    ["init", initTransitions, ""],
    ["exec", execTransitions, "e"],
  ] as const)
    for (const [state, known] of Object.entries(table))
      for (const verb of verbs) {
        const next = (known as Record<string, string>)[verb];
        it(`${name}: ${verb} of a ${state} one ${next ? `makes it ${next}` : "is refused and changes nothing"}`, () => {
          const process = new Process(execId, "io", stdio, state as ProcessState);
          if (next) {
            process.move(verb);
            expect(process.state).toBe(next);
          } else {
            expect(() => process.move(verb)).toThrow(WrongState);
            expect(process.state).toBe(state);
          }
        });
      }

  it("answers waiters before and after the exit", async () => {
    const process = new Process("", "io", stdio, "running");
    const before = [process.waitForExit(), process.waitForExit()];
    process.markExited({ status: 7, atNs: 1n });
    expect(await Promise.all([...before, process.waitForExit()])).toEqual(
      Array(3).fill({ status: 7, atNs: 1n }),
    );
    expect(process.state).toBe("stopped");
  });

  it("that is deleted before it ran lets nobody wait", async () => {
    const process = new Process("e", "io", stdio, "created");
    const before = process.waitForExit();
    process.neverRan();
    await expect(before).rejects.toThrow(NotFound);
    await expect(process.waitForExit()).rejects.toThrow(NotFound);
  });

  it("does calls in the order of their arrival, and goes on after one that fails", async () => {
    const process = new Process("", "io", stdio, "running");
    const done: number[] = [];
    const first = process.inTurn(async () => {
      await new Promise((resolve) => setImmediate(resolve));
      done.push(1);
      throw new Error("first");
    });
    const second = process.inTurn(async () => void done.push(2));
    await expect(first).rejects.toThrow("first");
    await second;
    expect(done).toEqual([1, 2]);
  });
});
