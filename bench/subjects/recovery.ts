// What the one process per node costs: its start, and the time without it. The Go shim has nothing to compare with.

import { isAlive } from "../../test/live/harness/system.ts";
import { until } from "../../test/live/harness/until.ts";
import { type Bench, type Subject, timeMs } from "../bench.ts";

const STATE = "cedanad killed with 100 containers: until a State is answered";
const LIST = "cedanad killed with 100 containers: until ctr task ls is answered";
const WARM_LIST = "ctr task ls with 100 containers";
const FIRST = "ctr run --rm true with no cedanad running";
const WARM = "ctr run --rm true with a warm cedanad";
const MORE = "the first call's additional time";

const KILLS = 3;

export const gap: Subject = {
  rows: [
    { name: STATE, unit: "ms", aim: { of: "ours", atMost: 300 } },
    { name: LIST, unit: "ms", aim: { of: "ours", atMost: 300 } },
    { name: WARM_LIST, unit: "ms" },
  ],
  oursOnly: true,
  maxRounds: 2,
  warmUps: 0,
  async measure(bench) {
    const { live } = bench;
    await using _containers = await bench.addIdle("ours", 100);
    const samples = { [STATE]: [] as number[], [LIST]: [] as number[], [WARM_LIST]: [] as number[] };
    const { containerId } = (await live.client.tasks.list()).map(({ id }) => ({ containerId: id })).at(-1)!;
    for (let kill = 0; kill < KILLS; kill++) {
      samples[WARM_LIST]!.push(await bench.ctrMs(["task", "ls"]));
      process.kill(live.cedanad()!.pid, "SIGKILL");
      samples[STATE]!.push(await timeMs(() => live.client.tasks.get(containerId)));
      await settled(bench);
      process.kill(live.cedanad()!.pid, "SIGKILL");
      samples[LIST]!.push(await bench.ctrMs(["task", "ls"]));
      await settled(bench);
      const states = (await live.client.tasks.list()).map((task) => task.status);
      const running = states.filter((status) => status === "RUNNING").length;
      if (running !== 100) throw new Error(`${running} of 100 containers are running after a kill`);
    }
    return samples;
  },
};

/** One that ends sooner after its start is started ever more slowly: a loop of crashes is another matter. */
const NOT_EARLY_MS = 5_200;

/** Every keeper has found the new cedanad, and it has lived long enough for its end not to look like a loop of crashes. */
async function settled(bench: Bench): Promise<void> {
  await bench.live.client.tasks.list();
  await new Promise((resolve) => setTimeout(resolve, NOT_EARLY_MS));
}

export const firstCall: Subject = {
  rows: [
    { name: FIRST, unit: "ms" },
    { name: WARM, unit: "ms" },
    { name: MORE, unit: "ms", aim: { of: "ours", atMost: 150 } },
  ],
  oursOnly: true,
  maxRounds: 10,
  warmUps: 1,
  async measure(bench) {
    const { live } = bench;
    const once = () => bench.ctrMs(bench.runArgs("ours", ["--rm"], live.newId("first"), ["true"]));
    await once();
    const warmMs = await once();
    // Without keepers: one that sees the end of cedanad would start the next.
    await until(() => live.shims().length === 0, { what: () => "the end of the last keeper" });
    const { pid } = live.cedanad()!;
    process.kill(pid, "SIGKILL");
    await until(() => !isAlive(pid), { what: () => `the end of cedanad ${pid}` });
    const firstMs = await once();
    return { [FIRST]: firstMs, [WARM]: warmMs, [MORE]: firstMs - warmMs };
  },
};
