// How long an application stands still for a checkpoint: a dump of our own into the store, against containerd's way with the Go shim.
// And what archiving takes: against zstd's and gzip's own programs on the same file, and of cedanad's memory and event loop.

import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { createArchive } from "../../src/checkpoint/archive/index.ts";
import { readManifest } from "../../src/checkpoint/manifest.ts";
import { encodeMessage, MessageReader, messageType } from "../../src/shim/keeper-protocol.ts";
import { entries } from "../../test/live/harness/system.ts";
import type { LiveTask } from "../../test/live/harness/task.ts";
import { type Bench, type Samples, type Side, type Subject, timeMs } from "../bench.ts";
import { writeSampleMemory } from "../sample-memory.ts";
import { forgetCheckpoints } from "./checkpoint.ts";

const SMALL_MIB = 16;
const LARGE_MIB = 1024;
const small = `standstill, ${SMALL_MIB} MiB (theirs: ctr task checkpoint --image-path)`;
const large = `standstill, ${LARGE_MIB} MiB, zstd (theirs: ctr task checkpoint)`;
const ofCriu = "… divided by CRIU's own frozen time";
const memory = "… growth of cedanad's memory";
const answers = "… how long cedanad lets a caller wait, p99";

export const standstill: Subject = {
  rows: [
    { name: small, unit: "ms", aim: { of: "ratio", atMost: 0.45 } },
    { name: large, unit: "ms", aim: { of: "ratio", atMost: 0.2 } },
    { name: ofCriu, unit: "×", aim: { of: "ours", atMost: 1.2 } },
    { name: memory, unit: "MiB", aim: { of: "ours", atMost: 64 } },
    { name: answers, unit: "ms", aim: { of: "ours", atMost: 20 } },
  ],
  maxRounds: 7,
  warmUps: 1,
  async measure(bench, side) {
    return { ...(await measureSmall(bench, side)), ...(await measureLarge(bench, side)) };
  },
};

async function measureSmall(bench: Bench, side: Side): Promise<Samples> {
  // Under the Go shim crun's checkpoint fails every time.
  if (side === "theirs" && bench.engine === "crun") return {};
  await using task = await begin(bench, side, SMALL_MIB);
  if (side === "ours") {
    const gap = await longestGap(task, () => bench.live.cedana("dump", "containerd", task.id));
    forgetStore(bench);
    return { [small]: gap };
  }
  const images = mkdtempSync(join(bench.live.dir, "image-"));
  try {
    return {
      [small]: await longestGap(task, () =>
        bench.ctrMs(["task", "checkpoint", "--image-path", images, task.id]),
      ),
    };
  } finally {
    rmSync(images, { recursive: true });
    await forgetCheckpoints(bench);
  }
}

async function measureLarge(bench: Bench, side: Side): Promise<Samples> {
  if (side === "theirs" && bench.engine === "crun") return {};
  await using task = await begin(bench, side, LARGE_MIB);
  if (side === "theirs") {
    const gap = await longestGap(task, () => bench.ctrMs(["task", "checkpoint", task.id]));
    await forgetCheckpoints(bench);
    return { [large]: gap };
  }
  await bench.live.cedana("checkpoint", "list").catch(() => ""); // the API is loaded before its memory is looked at
  const watch = watchDaemon(bench);
  let path = "";
  const gap = await longestGap(task, async () => {
    path = JSON.parse(
      await bench.live.cedana("dump", "containerd", task.id, "--compression", "zstd", "--json"),
    ).path;
  });
  const { grownMiB, waitsMs } = await watch.end();
  const criuMs = (await readManifest(path))!.timings.criuFrozenMs!;
  forgetStore(bench);
  return {
    [large]: gap,
    [ofCriu]: gap / criuMs,
    [memory]: grownMiB,
    [answers]: waitsMs.toSorted((a, b) => a - b)[Math.floor(waitsMs.length * 0.99)]!,
  };
}

async function begin(bench: Bench, side: Side, mib: number): Promise<LiveTask> {
  const task = await bench.live.run(["gaps", String(mib)], { runtime: bench.runtime(side) });
  await task.stdout.lineMatching(/^ready/, 60_000);
  return task;
}

/** The longest time for which the program noticed that it stood still meanwhile, milliseconds. */
async function longestGap(task: LiveTask, work: () => Promise<unknown>): Promise<number> {
  const before = task.stdout.text.length;
  await work();
  // What it says of the last one comes with its next look at the clock.
  await new Promise((resolve) => setTimeout(resolve, 50));
  const gaps = task.stdout.text.slice(before).match(/^\d+\.\d$/gm) ?? [];
  if (gaps.length === 0) throw new Error("the program noticed nothing");
  return Math.max(...gaps.map(Number));
}

function forgetStore({ live }: Bench): void {
  rmSync(join(live.dir, "var/checkpoints"), { recursive: true, force: true });
}

/** Looks at cedanad's memory, and asks it something all the time. */
function watchDaemon({ live }: Bench) {
  const { pid } = live.cedanad()!;
  const rssMiB = () => Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))![1]) / 1024;
  const before = rssMiB();
  let most = before;
  const waitsMs: number[] = [];
  let over = false;
  const memory = setInterval(() => {
    most = Math.max(most, rssMiB());
  }, 10);
  const socket = connect(
    join(live.runDir, entries(live.runDir).find((name) => /^cedanad.*\.sock$/.test(name))!),
  );
  const reader = new MessageReader();
  let answered = () => {};
  socket.on("data", (chunk: Buffer) => {
    if ([...reader.push(chunk)].length > 0) answered();
  });
  const asked = new Promise<void>((resolve, reject) => {
    socket.on("error", reject);
    void (async () => {
      while (!over) {
        waitsMs.push(
          await timeMs(async () => {
            const answer = new Promise<void>((done) => {
              answered = done;
            });
            socket.write(encodeMessage(messageType.STATUS, {}));
            await answer;
          }),
        );
        await new Promise((next) => setTimeout(next, 5));
      }
      socket.destroy();
      resolve();
    })();
  });
  return {
    end: async () => {
      over = true;
      await asked;
      clearInterval(memory);
      return { grownMiB: most - before, waitsMs };
    },
  };
}

// ---- archives --------------------------------------------------------------------------------------------------------

const zstd = `archive of ${LARGE_MIB} MiB, zstd (theirs: zstd -T2 -1)`;
const gzip = `archive of ${LARGE_MIB} MiB, zstd (theirs: gzip -1)`;

export const archiving: Subject = {
  rows: [
    { name: zstd, unit: "ms", aim: { of: "ratio", atMost: 1.25 } }, // 0.8 of its speed
    { name: gzip, unit: "ms", aim: { of: "ratio", atMost: 0.25 } },
  ],
  maxRounds: 5,
  warmUps: 0,
  async measure(bench, side) {
    const directory = join(bench.live.dir, "archive");
    const pages = join(directory, "checkpoint/pages-1.img");
    mkdirSync(join(directory, "checkpoint"), { recursive: true });
    writeFileSync(join(directory, "checkpoint/inventory.img"), "");
    writeSampleMemory(pages, LARGE_MIB);
    const to = join(bench.live.dir, "archived");
    try {
      if (side === "ours") {
        const ms = await timeMs(() => createArchive(directory, to));
        return { [zstd]: ms, [gzip]: ms };
      }
      const run = (...argv: string[]) =>
        timeMs(
          async () => void execFileSync(argv[0]!, argv.slice(1), { stdio: ["ignore", "ignore", "inherit"] }),
        );
      const zstdMs = await run("zstd", "-T2", "-1", "-q", pages, "-o", to);
      rmSync(to);
      return { [zstd]: zstdMs, [gzip]: await run("sh", "-c", `gzip -1 -c "${pages}" > "${to}"`) };
    } finally {
      rmSync(directory, { recursive: true });
      rmSync(to, { force: true });
    }
  },
};
