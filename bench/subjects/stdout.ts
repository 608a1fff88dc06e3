// A container writes as fast as it can, a reader takes as fast as it can; between them is only the shim.

import { execFileSync, spawn } from "node:child_process";
import { closeSync, constants, mkdtempSync, openSync, rmSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { LiveTask, Stdio } from "../../test/live/harness/task.ts";
import type { Bench, Side, Subject } from "../bench.ts";

const KINDS = [
  { what: "64 KiB blocks", size: 65536, bytes: 2 ** 31, speed: 1.3, cpu: 0.35 },
  { what: "128-byte lines", size: 128, bytes: 2 ** 27, speed: 0.95 },
];
const speed = (what: string) => `stdout, ${what}`;
const cpu = (what: string) => `stdout, ${what}: CPU of the shim`;

export const stdout: Subject = {
  rows: KINDS.flatMap((kind) => [
    { name: speed(kind.what), unit: "MB/s", aim: { of: "ratio" as const, atLeast: kind.speed } },
    {
      name: cpu(kind.what),
      unit: "ms/GB",
      ...(kind.cpu !== undefined && { aim: { of: "ratio" as const, atMost: kind.cpu } }),
    },
  ]),
  maxRounds: 15,
  warmUps: 1,
  async measure(bench, side) {
    const samples: Record<string, number> = {};
    for (const { what, size, bytes } of KINDS) {
      const { ns, cpuNs } = await relay(bench, side, bytes, size);
      samples[speed(what)] = bytes / 1e6 / (ns / 1e9);
      samples[cpu(what)] = cpuNs / 1e6 / (bytes / 1e9);
    }
    return samples;
  },
};

async function relay(bench: Bench, side: Side, bytes: number, size: number) {
  const { live } = bench;
  const directory = mkdtempSync(join(live.ioDir, "stdout-"));
  const [fifo, silent] = [join(directory, "stdout"), join(directory, "stderr")];
  execFileSync("mkfifo", [fifo, silent]);
  const silentFd = openSync(silent, constants.O_RDONLY | constants.O_NONBLOCK);
  // The Go shim waits in Create for the reader, so it comes first, and hears later whose CPU time it is to take.
  const reader = spawn(join(bench.programs, "reader"), [fifo, String(bytes)], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  const lines = createInterface(reader.stdout)[Symbol.asyncIterator]();
  try {
    await lines.next();
    const id = live.newId("write");
    const args = ["writer", String(bytes), String(size)];
    const runtime = bench.runtime(side);
    const rootfs = await live.createContainer(args, { id, runtime });
    const task = new LiveTask(live, id, new Stdio(live.ioDir, { stdio: false }));
    await using _cleanUp = { [Symbol.asyncDispose]: () => task.destroy() };
    await live.client.tasks.create({
      containerId: id,
      rootfs,
      stdin: "",
      stdout: fifo,
      stderr: silent,
      terminal: false,
      options: live.engineOptions(),
    });
    const pids = [live.shimOf(id).pid, ...(side === "ours" ? [live.cedanad()!.pid] : [])];
    reader.stdin.end(`${pids.join(" ")}\n`);
    await task.start();
    const { value } = await lines.next();
    const [ns, cpuNs] = String(value).split(" ").map(Number);
    if (ns === undefined || cpuNs === undefined) throw new Error(`the reader said ${value}`);
    const { exitStatus } = await task.exited!;
    if (exitStatus !== 0) throw new Error(`the writer ended with ${exitStatus}`);
    return { ns, cpuNs };
  } finally {
    reader.kill("SIGKILL");
    closeSync(silentFd);
    rmSync(directory, { recursive: true });
  }
}
