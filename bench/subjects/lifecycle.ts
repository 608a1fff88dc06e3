// What people do with containers, timed as they see it: by containerd's own client.

import type { Subject } from "../bench.ts";

const RUN = "ctr run -d";
const EXEC = "ctr task exec true";
const REMOVE = "ctr task delete -f";
const TO_END = "ctr run --rm true";
const PARALLEL = "20 times ctr run -d at once";

/** ctr ends with the status of the task that it has deleted. */
const deleted = { statuses: [0, 137] };
const idle = ["sh", "-c", "while :; do sleep 60; done"];

export const lifecycle: Subject = {
  rows: [
    {
      name: RUN,
      unit: "ms",
      aim: { runc: { of: "ratio", atMost: 0.88 }, crun: { of: "ratio", atMost: 0.8 } },
    },
    { name: EXEC, unit: "ms", aim: { of: "ratio", atMost: 1 } },
    { name: REMOVE, unit: "ms", aim: { of: "ratio", atMost: 0.75 } },
    { name: TO_END, unit: "ms", aim: { of: "ratio", atMost: 0.8 } },
  ],
  async measure(bench, side) {
    const id = bench.live.newId("life");
    const runMs = await bench.ctrMs(bench.runArgs(side, ["-d", "--null-io"], id, idle));
    const execMs = await bench.ctrMs(["task", "exec", "--exec-id", "x", id, "true"]);
    const removeMs = await bench.ctrMs(["task", "delete", "-f", id], deleted);
    await bench.ctrMs(["container", "delete", id]);
    const toEndMs = await bench.ctrMs(bench.runArgs(side, ["--rm"], bench.live.newId("life"), ["true"]));
    return { [RUN]: runMs, [EXEC]: execMs, [REMOVE]: removeMs, [TO_END]: toEndMs };
  },
};

export const parallel: Subject = {
  rows: [{ name: PARALLEL, unit: "ms", aim: { of: "ratio", atMost: 0.75 } }],
  maxRounds: 10,
  warmUps: 1,
  async measure(bench, side) {
    const count = 20;
    const id = `${bench.live.newId("many")}-@`;
    const ms = await bench.ctrMs(bench.runArgs(side, ["-d", "--null-io"], id, idle), { count });
    await bench.ctrMs(["task", "delete", "-f", id], { count, ...deleted });
    await bench.ctrMs(["container", "delete", id], { count });
    return { [PARALLEL]: ms };
  },
};
