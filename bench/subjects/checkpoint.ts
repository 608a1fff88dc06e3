// Checkpoint by ctr into containerd's content store; checkpoint into a directory of images, and restore from there.

import { mkdtempSync, rmSync } from "node:fs";
import { join } from "node:path";
import { anyOf } from "../../test/live/harness/proto.ts";
import type { LiveTask } from "../../test/live/harness/task.ts";
import { type Bench, type Samples, type Side, type Subject, timeMs } from "../bench.ts";

const SIZES = [16, 256];
const store = (mib: number) => `ctr task checkpoint into the content store, ${mib} MiB`;
const dump = (mib: number) => `checkpoint into a directory, ${mib} MiB`;
const restore = (mib: number) => `restore, ${mib} MiB`;
const noSlower = { of: "ratio" as const, atMost: 1 };

export const checkpoint: Subject = {
  rows: SIZES.flatMap((mib) => [
    { name: store(mib), unit: "ms", aim: noSlower },
    { name: dump(mib), unit: "ms", aim: noSlower },
    { name: restore(mib), unit: "ms", aim: noSlower },
  ]),
  maxRounds: 7,
  warmUps: 1,
  async measure(bench, side) {
    const samples: Samples = {};
    // crun is told a work directory that does not exist: under the Go shim its checkpoint fails every time.
    if (side === "theirs" && bench.engine === "crun") return samples;
    for (const mib of SIZES) {
      const { storeMs, dumpMs, restoreMs } = await once(bench, side, mib);
      samples[store(mib)] = storeMs;
      samples[dump(mib)] = dumpMs;
      samples[restore(mib)] = restoreMs;
    }
    return samples;
  },
};

async function once(bench: Bench, side: Side, mib: number) {
  const { live } = bench;
  const images = mkdtempSync(join(live.dir, "image-"));
  const id = live.newId("memory");
  const args = ["memory", String(mib)];
  // Beside the mount namespace in which crun sees version 2 of cgroups alone, CRIU would restore the host's version 1 too.
  const cgroups = bench.engine === "crun" ? { cgroupsMode: "ignore" } : {};
  const options = { id, runtime: bench.runtime(side) };
  try {
    let [storeMs, dumpMs] = [0, 0];
    {
      await using task = await live.run(args, options);
      await task.stdout.lineMatching(/^ready /, 60_000);
      storeMs = await bench.ctrMs(["task", "checkpoint", id]);
      await forgetCheckpoints(bench);
      await aSecondAfterTheLast();
      // Not by ctr, which knows an image path only for containerd's own runtime. Like ctr, with the task paused.
      dumpMs = await timeMs(async () => {
        await task.pause();
        await live.client.tasks.checkpoint(
          id,
          anyOf("containerd.runc.v1.CheckpointOptions", { imagePath: images, exit: true, ...cgroups }),
        );
      });
      await task.wait();
    }
    let restored: LiveTask | undefined;
    const restoreMs = await timeMs(async () => {
      restored = await live.restore(images, args, options);
    });
    await using task = restored!;
    await task.stdout.lineMatching(/^\d+ [0-9a-f]{16}$/);
    return { storeMs, dumpMs, restoreMs };
  } finally {
    rmSync(images, { recursive: true });
    await forgetCheckpoints(bench);
  }
}

/** containerd 1.7 refuses to store what it already has, the spec of the same container for one. */
export async function forgetCheckpoints({ live }: Bench): Promise<void> {
  for (const name of (await live.ctr("images", "ls", "-q")).split("\n"))
    if (name.includes("checkpoint")) await live.ctr("images", "rm", "--sync", name);
}

let lastMs = 0;

/** containerd 1.7 stores a tar of an empty directory, whose only difference from the last is a time in seconds. */
async function aSecondAfterTheLast(): Promise<void> {
  const leftMs = lastMs + 1_100 - Date.now();
  if (leftMs > 0) await new Promise((resolve) => setTimeout(resolve, leftMs));
  lastMs = Date.now();
}
