// Checkpoint by ctr into containerd's content store; checkpoint into a directory of images, and restore from there.

import { mkdtempSync, rmSync } from "node:fs";
import { join } from "node:path";
import { anyOf } from "../../test/live/harness/proto.ts";
import type { LiveTask } from "../../test/live/harness/task.ts";
import { type Aim, type Bench, type Samples, type Side, type Subject, timeMs } from "../bench.ts";

const SIZES = [16, 256];
const store = (mib: number) => `ctr task checkpoint into the content store, ${mib} MiB`;
const dump = (mib: number) => `checkpoint into a directory, ${mib} MiB`;
const restore = (mib: number) => `restore, ${mib} MiB`;
const noSlower: Aim = { of: "ratio", atMost: 1 };

const live = (mib: number) => `ctr container restore --live, ${mib} MiB`;

const rowsOf = (sizes: number[], aim: Aim) =>
  sizes.flatMap((mib) => [store, dump, restore, live].map((name) => ({ name: name(mib), unit: "ms", aim })));

async function measure(bench: Bench, side: Side, sizes: number[]): Promise<Samples> {
  const samples: Samples = {};
  // crun is told a work directory that does not exist: under the Go shim its checkpoint fails every time.
  if (side === "theirs" && bench.engine === "crun") return samples;
  for (const mib of sizes) {
    const { storeMs, dumpMs, restoreMs } = await once(bench, side, mib);
    samples[store(mib)] = storeMs;
    samples[dump(mib)] = dumpMs;
    samples[restore(mib)] = restoreMs;
    samples[live(mib)] = await restoredByCtr(bench, side, mib);
  }
  return samples;
}

export const checkpoint: Subject = {
  rows: rowsOf(SIZES, noSlower),
  maxRounds: 7,
  warmUps: 1,
  measure: (bench, side) => measure(bench, side, SIZES),
};

/** Every file of ours is digested meanwhile. */
export const largeCheckpoint: Subject = {
  rows: rowsOf([1024], noSlower),
  maxRounds: 3,
  warmUps: 1,
  measure: (bench, side) => measure(bench, side, [1024]),
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

/** As a user restores: from the content store, by containerd's client. */
async function restoredByCtr(bench: Bench, side: Side, mib: number): Promise<number> {
  const { live } = bench;
  const id = live.newId("memory");
  const reference = `checkpoint/${id}:1`;
  try {
    {
      await using task = await live.run(["memory", String(mib)], { id, runtime: bench.runtime(side) });
      await task.stdout.lineMatching(/^ready /, 60_000);
      await live.ctr("container", "checkpoint", "--rw", "--task", id, reference);
    }
    try {
      return await bench.ctrMs(["container", "restore", "--rw", "--live", id, reference]);
    } finally {
      await live.ctr("task", "delete", "--force", id).catch(() => {}); // it may not have come so far
      await live.ctr("container", "rm", id).catch(() => {});
    }
  } finally {
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
