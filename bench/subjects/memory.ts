// Memory of everything that belongs to the shim: the proportional set sizes of all its processes; and for us cedanad with all
// that is resident of it. Its PSS would flatter us: the measuring program runs on the same Node and shares 40 MB of text with it.

import { isAlive, memoryOf } from "../../test/live/harness/system.ts";
import { until } from "../../test/live/harness/until.ts";
import { type Bench, median, type Samples, type Side, type Subject } from "../bench.ts";

const COUNTS = [1, 10, 100];
const containers = (count: number) => `memory, ${count} container${count > 1 ? "s" : ""}`;
const POD = "memory, a pod of 3";
const CEDANAD = "cedanad with one container";
const KEEPER = "private memory of a keeper";

/** What was just started gives back what only its start needed. */
const SETTLE_MS = 500;

export const memory: Subject = {
  rows: [
    { name: POD, unit: "kB" },
    ...COUNTS.map((count) => ({
      name: containers(count),
      unit: "kB",
      ...(count === 100 && { aim: { of: "ratio" as const, atMost: 0.2 } }),
    })),
    { name: CEDANAD, unit: "kB", aim: { of: "ours", atMost: 70 * 1024 } },
    { name: KEEPER, unit: "kB", aim: { of: "ours", atMost: 100 } },
  ],
  maxRounds: 3,
  warmUps: 0,
  async measure(bench, side) {
    const samples: Samples = {};
    // Each round from a new cedanad: what one keeps of a hundred containers before is the soak's business.
    const before = side === "ours" ? bench.live.cedanad() : undefined;
    if (before) {
      process.kill(before.pid, "SIGKILL");
      await until(() => !isAlive(before.pid), { what: () => `the end of cedanad ${before.pid}` });
    }
    {
      const sandbox = bench.live.newId("pod");
      await using _pod = await bench.addIdle(side, 3, (index) => ({
        "io.kubernetes.cri.sandbox-id": sandbox,
        "io.kubernetes.cri.container-type": index === 0 ? "sandbox" : "container",
      }));
      samples[POD] = (await measured(bench, side)).total;
    }
    await using everything = new AsyncDisposableStack();
    let present = 0;
    for (const count of COUNTS) {
      everything.use(await bench.addIdle(side, count - present));
      present = count;
      const { total, cedanad, shims } = await measured(bench, side);
      samples[containers(count)] = total;
      if (side === "theirs") continue;
      if (count === 1) samples[CEDANAD] = cedanad;
      if (count === 100) samples[KEEPER] = median(shims.map((shim) => shim.private));
    }
    return samples;
  },
};

async function measured(bench: Bench, side: Side) {
  await new Promise((resolve) => setTimeout(resolve, SETTLE_MS));
  const shims = bench.live.shims().map((info) => memoryOf(info.pid));
  const cedanad = side === "ours" ? memoryOf(bench.live.cedanad()!.pid).rss : 0;
  return { shims, cedanad, total: cedanad + shims.reduce((sum, shim) => sum + shim.pss, 0) };
}
