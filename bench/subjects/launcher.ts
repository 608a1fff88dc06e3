// The calls by which containerd executes a shim: `start`, and `delete` with nothing left to delete.

import { execFileSync } from "node:child_process";
import { closeSync, constants, existsSync, mkdirSync, openSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { encode } from "../../test/live/harness/proto.ts";
import { containerSpec } from "../../test/live/harness/spec.ts";
import { isAlive } from "../../test/live/harness/system.ts";
import { until } from "../../test/live/harness/until.ts";
import type { Bench, Side, Subject } from "../bench.ts";

const START = "start call";
const DELETE = "delete call, nothing left to delete";

export const launcher: Subject = {
  rows: [
    { name: START, unit: "ms", aim: { of: "ratio", atMost: 0.2 } },
    { name: DELETE, unit: "ms" },
  ],
  async measure(bench, side) {
    const { live } = bench;
    const id = live.newId("start");
    const bundle = join(live.dir, id); // the Go shim takes it for granted that it is named after the container
    mkdirSync(bundle, { mode: 0o700 });
    writeFileSync(join(bundle, "runtime"), bench.engine); // the Go shim's Create would have written it
    // containerd's end of the shim's log; a Go shim without it ends at once.
    const log = join(bundle, "log");
    execFileSync("mkfifo", [log]);
    const logFd = openSync(log, constants.O_RDWR | constants.O_NONBLOCK);
    const spec = containerSpec({ args: ["true"], cgroupsPath: `/${live.namespace}/${id}`, programs: "/" });
    writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
    const options = join(bundle, "options");
    writeFileSync(options, encode("google.protobuf.Any", { ...live.engineOptions() }));
    const call = (...action: string[]) =>
      bench.timed(
        [
          binary(bench, side),
          "-namespace",
          live.namespace,
          "-id",
          id,
          "-address",
          live.address,
          "-publish-binary",
          join(live.binaries, "containerd"),
          ...action,
        ],
        {
          cwd: bundle,
          stdin: options,
          // As containerd 1.7 sets it for a shim.
          env: {
            TTRPC_ADDRESS: `${live.address}.ttrpc`,
            GRPC_ADDRESS: live.address,
            NAMESPACE: live.namespace,
            MAX_SHIM_VERSION: "2",
            GOMAXPROCS: "2",
          },
        },
      );

    const { ms: startMs, output } = await call("start");
    const socket = output.match(/unix:\/\/(\/\S+)/)?.[1];
    if (!socket) throw new Error(`start answered ${JSON.stringify(output)}`);
    const { pid } = live.shimOf(id);
    process.kill(pid, "SIGKILL");
    await until(() => !isAlive(pid), { everyMs: 1, what: () => `the end of the shim ${pid}` });
    const { ms: deleteMs } = await call("-bundle", bundle, "delete");
    if (side === "ours" && existsSync(socket)) throw new Error(`delete left the socket ${socket}`);
    rmSync(socket, { force: true }); // the Go shim's stays behind
    closeSync(logFd);
    rmSync(bundle, { recursive: true });
    return { [START]: startMs, [DELETE]: deleteMs };
  },
};

function binary(bench: Bench, side: Side): string {
  const name = side === "ours" ? "containerd-shim-cedana-v2" : "containerd-shim-runc-v2";
  const found = bench.live
    .environment()
    .PATH!.split(":")
    .map((directory) => join(directory, name))
    .find(existsSync);
  if (!found) throw new Error(`${name} is not on containerd's PATH`);
  return found;
}
