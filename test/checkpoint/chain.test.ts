import { describe, expect, it } from "vitest";
import { type ChainContext, runChain, type Step, timesByStep } from "../../src/checkpoint/chain.ts";
import { messageOf, NotFound, toStatus, WrongState } from "../../src/errors/index.ts";

interface Context extends ChainContext {
  said: string[];
}

const context = (signal = new AbortController().signal): Context => ({ said: [], times: [], signal });

/** A step that says when it begins, ends, and undoes. */
function saying(name: string, fail?: Error): Step<Context> {
  const step: Step<Context> = async ({ said }, next) => {
    said.push(`+${name}`);
    if (fail) throw fail;
    try {
      await next();
    } catch (error) {
      said.push(`!${name}`);
      throw error;
    }
    said.push(`-${name}`);
  };
  Object.defineProperty(step, "name", { value: name });
  return step;
}

describe("a chain", () => {
  it("goes through its steps and back, and names them with their times", async () => {
    const c = context();
    await runChain("dump", [saying("a"), saying("b"), saying("c")], c);
    expect(c.said).toEqual(["+a", "+b", "+c", "-c", "-b", "-a"]);
    expect(Object.keys(timesByStep(c.times))).toEqual(["a", "b", "c"]);
  });

  it("counts for a step its own time only", async () => {
    const wait = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
    async function outer(_: Context, next: () => Promise<void>) {
      await next();
    }
    async function inner(_: Context, next: () => Promise<void>) {
      await wait(30);
      await next();
    }
    const c = context();
    await runChain("dump", [outer, inner], c);
    const { outer: outerMs, inner: innerMs } = timesByStep(c.times);
    expect(innerMs).toBeGreaterThan(25);
    expect(outerMs).toBeLessThan(innerMs!);
  });

  it("undoes from the inside out, and says in which step it failed", async () => {
    const c = context();
    const failing = runChain("dump", [saying("a"), saying("b", new WrongState("it moved")), saying("c")], c);
    const error = await failing.catch((caught: unknown) => caught);
    expect(error).toBeInstanceOf(WrongState);
    expect(toStatus(error)).toEqual({ code: 9, message: "it moved (step b)" });
    expect(c.said).toEqual(["+a", "+b", "!a"]);
  });

  it("keeps the class of an error, and makes one of ours of any other", async () => {
    for (const [thrown, message] of [
      [new NotFound("no task"), "no task (step b)"],
      [new RangeError("too far"), "too far (step b)"],
    ] as const) {
      const error = await runChain("dump", [saying("a"), saying("b", thrown)], context()).catch((e) => e);
      expect(messageOf(error)).toBe(message);
    }
  });

  it("turns back at the next step when it is aborted", async () => {
    const abort = new AbortController();
    const c = context(abort.signal);
    async function aborting(_: Context, next: () => Promise<void>) {
      abort.abort(new Error("the caller has gone"));
      await next();
    }
    const error = await runChain("dump", [saying("a"), aborting, saying("b")], c).catch((e) => e);
    expect(toStatus(error).code).toBe(1);
    expect(messageOf(error)).toMatch(/cancelled.*step b.*the caller has gone/);
    expect(c.said).toEqual(["+a", "!a"]);
  });

  it("refuses a step that leaves the rest out, or calls it twice", async () => {
    async function leavesOut() {}
    async function twice(_: Context, next: () => Promise<void>) {
      await next();
      await next();
    }
    await expect(runChain("dump", [leavesOut], context())).rejects.toThrow(/left out the rest/);
    await expect(runChain("dump", [twice], context())).rejects.toThrow(/twice/);
  });

  it("tells of its boundaries", async () => {
    const boundaries: string[] = [];
    await runChain("dump", [saying("a"), saying("b")], {
      ...context(),
      onBoundary: (name) => boundaries.push(name),
    });
    expect(boundaries).toEqual(["dump.a.before", "dump.b.before", "dump.b.after", "dump.a.after"]);
  });
});
