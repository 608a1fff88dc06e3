import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout } from "node:timers/promises";
import { CriuWorker, explainCriuLog } from "../../criu/index.ts";
import { messageOf, TimedOut } from "../../errors/index.ts";
import { processStat } from "../../linux/proc.ts";
import type { HealthRow } from "../health.ts";

/**
 * A process with an inet socket, which CRIU before 4.2 can't dump on new kernels, and nothing special besides: Node would have an
 * io_uring, which no CRIU can dump. It stops itself when the socket is there, so that there is something to wait for.
 */
const PROGRAM = "exec 3<>/dev/udp/127.0.0.1/9 && kill -STOP $$";
const READY_TIMEOUT_MS = 5_000;

/** Dumps a process of our own, which runs on and is then ended: what a container's dump takes, without a container. */
export async function dumpTrial(signal: AbortSignal): Promise<HealthRow> {
  const directory = await mkdtemp(join(tmpdir(), "cedana-trial-"));
  const child = spawn("bash", ["--norc", "-c", PROGRAM], {
    detached: true, // a session of its own: CRIU wants its leader in the dump
    stdio: "ignore",
    cwd: "/",
  });
  try {
    await once(child, "spawn", { signal });
    await waitUntilStopped(child.pid!, signal);
    await using worker = await CriuWorker.start({ signal });
    await worker.dump({
      pid: child.pid!,
      imagesDir: directory,
      logFile: "dump.log",
      leaveRunning: true,
    });
    return { status: "ok", summary: "works" };
  } catch (error) {
    signal.throwIfAborted();
    if ((error as NodeJS.ErrnoException).code === "ENOENT")
      return { status: "absent", summary: "there is no bash to try it with" };
    const log = await explainCriuLog(join(directory, "dump.log")).catch(() => undefined); // CRIU came to no log
    return {
      status: "failed",
      summary: log?.firstError ?? messageOf(error),
      advice: log?.cause?.advice ?? "run `criu check`, and look whether CRIU 4.2 or newer is installed",
    };
  } finally {
    child.kill("SIGKILL");
    await rm(directory, { recursive: true, force: true });
  }
}

async function waitUntilStopped(pid: number, signal: AbortSignal): Promise<void> {
  const deadline = Date.now() + READY_TIMEOUT_MS;
  while (processStat(pid)?.state !== "T") {
    if (Date.now() > deadline)
      throw new TimedOut(`a process to try a dump with is not ready within ${READY_TIMEOUT_MS} ms`);
    await setTimeout(5, undefined, { signal });
  }
}
