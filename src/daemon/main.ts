import { chmodSync, existsSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { pino } from "pino";
import { fillDeviceSlot } from "../checkpoint/device-slot.ts";
import { setPluginLoader } from "../features/registry.ts";
import { gpuSlot } from "../gpu/slot.ts";
import { setCloexec } from "../linux/addon.ts";
import { unpackDirectory } from "../runtime/configuration.ts";
import { culprit } from "../shim/culprit.ts";
import { ShimServer } from "../shim/shim-server.ts";
import { apiSocketName, daemonSocketName } from "../shim/socket-name.ts";
import { listenForApi } from "./api/listener.ts";
import { takeLock } from "./lock.ts";
import { leaveOwnCgroups } from "./own-cgroup.ts";
import { keepLogShort } from "./own-log.ts";
import { isAllowedPeer } from "./peer.ts";
import { RuntimeServer } from "./runtime-server.ts";

/*
 * cedanad: one per node (exactly: per mount namespace), started by whoever first needs it, by systemd's socket unit, or by
 * hand. It gets its listening socket as fd 3 by the protocol of socket activation, from a launcher or keeper also the lock as
 * fd 4 (addon/keeper/PROTOCOL.md, "Starting cedanad"). Everything that must outlive it is in the keepers and in the bundles.
 */

const BUILD = process.env.CEDANA_BUILD ?? "0.1.0";
const SOCKET_FD = 3;
// By then every keeper has come back, and whoever goes on with a dump that was cut off has a lock on it.
const SWEEP_STORE_AFTER_MS = 60_000;

const runDirectory = process.env.CEDANA_RUN_DIR || "/run/cedana";
const log = pino({ level: process.env.CEDANA_LOG_LEVEL || "info", base: { pid: process.pid } });

process.on("uncaughtException", (error) => {
  const who = culprit();
  if (!who) {
    // State is in the bundles and the keepers; going on with a half-done transition would be worse than a restart of 100 ms.
    log.fatal({ err: error }, "uncaught");
    process.exit(70);
  }
  log.fatal({ err: error }, `uncaught, in the work for ${who.what}, whose connection ends; please report it`);
  who.fail();
});

// The slab that small Buffers are cut from is always alive, so V8 takes each one for long-lived, and lets it go only at a full collection,
// for which our few objects give little cause: 30 kB for each container, 5 MB at a time. By itself a Buffer is gone with the next scavenge.
Buffer.poolSize = 0;

mkdirSync(join(runDirectory, "s"), { recursive: true, mode: 0o700 });
mkdirSync(join(runDirectory, "c"), { recursive: true, mode: 0o700 });
chmodSync(runDirectory, 0o700);

const socketPath = join(runDirectory, daemonSocketName());
const apiPath = join(runDirectory, apiSocketName());
const pidFile = join(runDirectory, "cedanad.pid");

const passed = process.env.LISTEN_FDS === "1";
void serve();

async function serve(): Promise<void> {
  if (!(await takeLock(`${socketPath}.lock`, passed, log))) {
    log.fatal({ socketPath }, "another cedanad serves this run directory");
    process.exit(73);
  }

  fillDeviceSlot(gpuSlot);
  setPluginLoader(async () => await (await import("../plugins/load.ts")).loadPlugins(log, BUILD));

  /** of the management API */
  const calls = { active: 0 };
  const runtime = new RuntimeServer({
    log,
    endBelowConmon: () => end("conmon waits for its children"),
    isBusy: () => calls.active > 0 || gpuSlot.isRecovering(),
  });
  await runtime
    .revive(runDirectory)
    .catch((error) =>
      log.error({ err: error }, "take up what an earlier cedanad has left of cedana-runtime's containers"),
    );

  const shim = new ShimServer({
    log,
    runDirectory,
    build: BUILD,
    versionMax: Number(process.env.CEDANA_KEEPER_PROTOCOL_MAX) || undefined,
    beginRuntime: (socket, message) => runtime.begin(socket, message),
  });

  const server = createServer((socket) => {
    if (isAllowedPeer(socket, log)) shim.accept(socket);
    else socket.destroy();
  });
  server.on("error", (error) => {
    log.fatal({ err: error, socketPath }, "listen");
    process.exit(69);
  });
  // Before the shims' socket is served: whoever has had an answer there finds this one, too.
  listenForApi(apiPath, { log, shim, runDirectory, calls });
  if (!passed) rmSync(socketPath, { force: true });
  server.listen(passed ? { fd: SOCKET_FD } : { path: socketPath }, () => {
    if (!passed) chmodSync(socketPath, 0o600);
    else setCloexec(SOCKET_FD, true);
    writeFileSync(pidFile, `${process.pid}\n`, { mode: 0o600 });
    log.info({ socketPath, build: BUILD, node: process.version }, "cedanad serves");
  });

  keepLogShort(join(runDirectory, "cedanad.log"), log);

  // What a restore that a crash of the machine has cut off had unpacked.
  if (existsSync(unpackDirectory()))
    void import("../checkpoint/unpack.ts")
      .then(({ sweepUnpacked }) => sweepUnpacked(unpackDirectory()))
      .catch((error) => log.warn({ err: error }, "sweep unpacked checkpoints"));

  setTimeout(
    () =>
      void import("./sweep-store.ts")
        .then(({ sweepStore }) => sweepStore(log))
        .catch((error) => log.warn({ err: error }, "sweep what crashes and GPU containers have left")),
    SWEEP_STORE_AFTER_MS,
  ).unref();

  for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => end(signal));

  function end(why: string): never {
    log.info({ why, tasks: shim.taskCount }, "cedanad ends; containers go on");
    rmSync(pidFile, { force: true });
    rmSync(apiPath, { force: true });
    if (!passed || !process.env.LISTEN_PID) rmSync(socketPath, { force: true });
    leaveOwnCgroups();
    process.exit(0);
  }
}
