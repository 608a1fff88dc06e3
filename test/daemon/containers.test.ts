import { expect, it } from "vitest";
import { queryContainers } from "../../src/daemon/api/containers.ts";
import type { ApiCall } from "../../src/daemon/api/context.ts";
import { BrokenImage } from "../../src/errors/index.ts";

it("tells of every container, also where the checkpoints of one can't be told", async () => {
  const task = (id: string, spec: () => Promise<object>) => ({
    namespace: "ns",
    id,
    bundle: `/bundle/${id}`,
    engine: { binary: "runc" },
    init: { state: "stopped", pid: 0 },
    spec,
  });
  const tasks = [
    task("broken", () => Promise.reject(new BrokenImage("config.json is not JSON"))),
    task("whole", async () => ({ annotations: {} })),
  ];
  const pods = [{ namespace: "ns", tasks: new Map(tasks.map((one) => [one.id, one])) }];
  const call = { shim: { pods }, signal: new AbortController().signal } as unknown as ApiCall;
  const { containers } = await queryContainers({ ids: [], namespace: "" }, call);
  expect(containers).toMatchObject([
    { id: "broken", checkpoints: [{ fault: "config.json is not JSON" }] },
    { id: "whole", checkpoints: [] },
  ]);
});
