// Lazy restore: how soon the program says something, against our own eager restore of the same images.

import { mkdtempSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { until } from "../../test/live/harness/until.ts";
import type { Bench, Samples, Side, Subject } from "../bench.ts";

const MIB = 1024;
const firstOutput = `first output after a lazy restore, ${MIB} MiB (right: an eager one of ours)`;
const whole = `until a lazy restore has filled all memory, ${MIB} MiB`;

let images: string | undefined;

export const lazy: Subject = {
  rows: [
    { name: firstOutput, unit: "ms", aim: { of: "ratio", atMost: 0.3 } },
    { name: whole, unit: "ms" },
  ],
  maxRounds: 7,
  warmUps: 1,
  async measure(bench, side) {
    images ??= await dumped(bench);
    return await restored(bench, side, images);
  },
};

const args = ["pattern", String(MIB), "5"];

/** Once for all rounds: it goes with the bench's directory. */
async function dumped({ live }: Bench): Promise<string> {
  const directory = mkdtempSync(join(live.dir, "image-"));
  await using task = await live.run(args);
  await task.nextNumber(60_000);
  return await task.checkpoint({ imagePath: directory, exit: true });
}

async function restored({ live }: Bench, side: Side, images: string): Promise<Samples> {
  const annotations: Record<string, string> = side === "ours" ? { "cedana.io/lazy": "true" } : {};
  const begun = performance.now();
  let firstMs = 0;
  await using task = await live.restore(images, args, { annotations });
  await task.nextNumber();
  firstMs = performance.now() - begun;
  if (side === "theirs") return { [firstOutput]: firstMs, [whole]: firstMs };
  const record = join(task.bundle, "cedana-task.json");
  await until(() => JSON.parse(readFileSync(record, "utf8")).lazy?.state === "filled", { timeoutMs: 60_000 });
  return { [firstOutput]: firstMs, [whole]: performance.now() - begun };
}
