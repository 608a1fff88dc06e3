import { describe, expect, it } from "vitest";
import { adapterSteps } from "../../src/checkpoint/adapters.ts";
import { runChain, type Step } from "../../src/checkpoint/chain.ts";
import { type DumpAdapter, dumpFeatures, type PluginDump } from "../../src/checkpoint/features.ts";
import { Feature } from "../../src/features/registry.ts";

interface Context {
  signal: AbortSignal;
  times: { step: string; ms: number }[];
  log: string[];
}

const PATIENCE_MS = 200;

async function run(adapters: readonly DumpAdapter[], last: Step<Context>): Promise<Context> {
  const feature = new Feature<readonly DumpAdapter[]>("Test", dumpFeatures.dumpMiddleware.faultOf);
  feature.provide("test", adapters);
  const context: Context = { signal: new AbortController().signal, times: [], log: [] };
  const steps = adapterSteps(
    feature,
    PATIENCE_MS,
    async () => ({}) as PluginDump,
    (one: Context, plugin) => one.log.push(`part of ${plugin}`),
  );
  await runChain("test", [...steps, last], context);
  return context;
}

const core: Step<Context> = async (context, next) => {
  context.log.push("core");
  await next();
};

describe("adapters of plugins", () => {
  it("wrap what follows, in their order, each with a time of its own", async () => {
    const order: string[] = [];
    const adapter = (name: string): DumpAdapter => ({
      name,
      async run(_dump, next) {
        order.push(`${name} in`);
        await next();
        order.push(`${name} out`);
      },
    });
    const context = await run([adapter("a"), adapter("b")], core);
    expect(order).toEqual(["a in", "b in", "b out", "a out"]);
    expect(context.times.map(({ step }) => step)).toEqual(["test:a", "test:b", "core"]);
    expect(context.log).toEqual(["part of test", "part of test", "core"]);
  });

  it("are left out where they have nothing to do", async () => {
    const refuse = async () => {
      throw new Error("was asked");
    };
    expect((await run([{ name: "a", when: () => false, run: refuse }], core)).log).toEqual(["core"]);
  });

  it("refuse by an error, which names them", async () => {
    const adapter: DumpAdapter = {
      name: "gate",
      async run() {
        throw new Error("closed");
      },
    };
    await expect(run([adapter], core)).rejects.toMatchObject({ message: "closed", step: "test:gate" });
  });

  it("can't leave out the rest, call it twice, or keep its error to themselves", async () => {
    await expect(run([{ name: "a", async run() {} }], core)).rejects.toThrow("left out the rest");
    const twice: DumpAdapter = {
      name: "a",
      async run(_dump, next) {
        await next();
        await next();
      },
    };
    await expect(run([twice], core)).rejects.toThrow("called the rest of the chain twice");
    const silent: DumpAdapter = {
      name: "a",
      async run(_dump, next) {
        await next().catch(() => {});
      },
    };
    const failing: Step<Context> = async () => {
      throw new Error("no space");
    };
    await expect(run([silent], failing)).rejects.toThrow("no space");
  });

  it("are waited for even by one that doesn't wait for the rest", async () => {
    const hasty: DumpAdapter = {
      name: "a",
      async run(_dump, next) {
        void next();
      },
    };
    const slow: Step<Context> = async (context, next) => {
      await new Promise((resolve) => setTimeout(resolve, 20));
      context.log.push("slow");
      await next();
    };
    expect((await run([hasty], slow)).log).toContain("slow");
  });

  it("that hang are given up, before and after the rest; the rest itself may take its time", async () => {
    const forever = () => new Promise<never>(() => {});
    await expect(run([{ name: "a", run: forever }], core)).rejects.toMatchObject({
      name: "TimedOut",
      step: "test:a",
    });
    const after: DumpAdapter = {
      name: "a",
      async run(_dump, next) {
        await next();
        await forever();
      },
    };
    await expect(run([after], core)).rejects.toMatchObject({ name: "TimedOut" });
    const patient: Step<Context> = async (context, next) => {
      await new Promise((resolve) => setTimeout(resolve, 2 * PATIENCE_MS));
      context.log.push("patient");
      await next();
    };
    const plain: DumpAdapter = { name: "a", run: async (_dump, next) => await next() };
    expect((await run([plain], patient)).log).toContain("patient");
  });
});
