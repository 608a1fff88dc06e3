import { rmSync } from "node:fs";
import { mkdir, readdir, rm, rmdir, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { forgetReads, wasRead } from "../../criu/config-file.ts";
import { Gate, isPassed, removeGate, unbar } from "../../criu/gate.ts";
import { unlockNetwork, waitForCriu } from "../../criu/leftovers.ts";
import { CriuFailed, InvalidRequest, RuntimeFailed, SyscallFailed, WrongState } from "../../errors/index.ts";
import { cgroupYard } from "../../linux/cgroup-hierarchy.ts";
import { isOlder } from "../../linux/versions.ts";
import { criuFailure, keepLog } from "../criu-failure.ts";
import { findGpuMounts } from "../gpu-mounts.ts";
import { isCriuFile } from "../staging.ts";
import { type DumpContext, imagesIn, inHundredths, noteAttempt } from "./context.ts";
import { lastWord } from "./last-word.ts";
import { manifestDraft } from "./manifest.ts";
import { beginTracking, trackedSince } from "./parent.ts";
import { noteFreeze } from "./standstill.ts";
import type { EngineDump } from "./target.ts";

// The engine and its CRIU: started early and stopped at the gate, let go on the frozen container, and waited for to the end.

const CRIU_LOG = "dump.log";

export async function openWorkPath(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request } = context;
  context.workPath = request.workPath || join(target.directory, "criu-work");
  await mkdir(context.workPath, { recursive: true, mode: 0o700 }).catch((error) => {
    throw pathFailure(`make CRIU's work path ${context.workPath}`, error); // crun fails when it isn't there
  });
  // In a directory of the caller's, of an earlier dump: its last word is not this one's.
  if (request.workPath && !request.repeated) await removeLog(context.workPath);
  try {
    await next();
    if (request.digests === "afterwards") context.criuFrozenMs = await criuFrozenMs(context.workPath);
  } catch (error) {
    await keepLog(join(context.workPath, CRIU_LOG), join(target.directory, "criu-dump.log"));
    throw error;
  } finally {
    if (!request.workPath) rmSync(context.workPath, { recursive: true, force: true }); // a handful of files
  }
}

async function removeLog(workPath: string): Promise<void> {
  const path = join(workPath, CRIU_LOG);
  await rm(path, { force: true }).catch(async () => {
    // A crash of ours may have left what barred CRIU's way there.
    await rmdir(path).catch((error) => {
      throw pathFailure(`remove ${path}, in whose place CRIU writes its log`, error);
    });
  });
}

/** How long CRIU held the container by its own count: the part of the standstill that is not ours. */
async function criuFrozenMs(workPath: string): Promise<number | undefined> {
  const { readDumpStats } = await import("../../criu/stats.ts");
  const stats = await readDumpStats(workPath).catch(() => undefined); // what can't be read is left out: nobody needs it to restore
  return stats && inHundredths((stats.freezingUs + stats.frozenUs) / 1000);
}

/** The caller's path is at fault, unless it is the machine. */
function pathFailure(what: string, error: NodeJS.ErrnoException): Error {
  if (["ENOSPC", "EIO", "EDQUOT", "EMFILE"].includes(error.code ?? "")) return SyscallFailed.from(error);
  return new InvalidRequest(`${what}: ${error.message}`, { cause: error });
}

/**
 * Starts the engine early, where its CRIU can be stopped. A repetition after a crash looks what has become of the one that was: CRIU
 * went through, and the engine goes on or has come to its end; or it was sent away with the end of its cedanad, and one without a
 * gate follows.
 */
export async function startEngine(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { request, attempt } = context;
  try {
    if (attempt.phase === "begun") {
      if (request.repeated) await findEngine(context);
      else await startAtGate(context);
    }
    await next();
  } finally {
    const { gate, end } = context.engine ?? {};
    gate?.[Symbol.dispose]();
    await end?.catch(() => {}); // told where CRIU is waited for, or sent away
    if (attempt.gate) removeGate(attempt.gate);
  }
}

async function startAtGate(context: DumpContext): Promise<void> {
  const { target } = context;
  const options = target.hasEnded ? undefined : await target.gate?.();
  if (!options) return;
  context.enginePath = options.path;
  const gate = await Gate.forDump(target.directory, options, join(context.workPath, CRIU_LOG));
  try {
    noteAttempt(context, { gate: gate.directory });
  } catch (error) {
    gate[Symbol.dispose]();
    throw error;
  }
  const end = target.engineCheckpoint({ ...engineDump(context), atGate: true, env: gate.env });
  end.catch(() => {}); // looked at where CRIU is waited for
  context.engine = { gate, end };
}

/** After a crash. */
async function findEngine(context: DumpContext): Promise<void> {
  const { target, attempt } = context;
  if (!attempt.gate) await rmdir(join(context.workPath, CRIU_LOG)).catch(() => {}); // ENOENT, ENOTDIR: none was even begun
  if (!attempt.gate || attempt.pastGate) return;
  const env = { CRIU_CONFIG_FILE: join(attempt.gate, "criu.conf") };
  const end = target.engineCheckpoint({ ...engineDump(context), atGate: true, env });
  if (isPassed(attempt.gate)) {
    end.catch(() => {}); // looked at where CRIU is waited for
    context.engine = { gate: undefined, end };
    return;
  }
  const failure = await end.then(
    () => undefined,
    (error: Error) => error, // nobody lets it go any more
  );
  if (failure === undefined) await wentPast(context);
  else unbar(attempt.gate); // one without a gate follows
}

/** An engine that finds CRIU past the gate fails, as a rule, and is started once more when the container stands still. */
export async function meetCriu(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { engine, target } = context;
  if (engine?.gate) {
    const { gate, end } = engine;
    const met = await Promise.race([
      gate.arrived.then(() => "criu" as const),
      end.then(
        () => "success" as const,
        (error: Error) => error,
      ),
    ]);
    if (met === "success") {
      gate[Symbol.dispose]();
      await wentPast(context);
    } else if (met !== "criu") {
      // It may have asked for the version by PATH, and have CRIU elsewhere for the dump.
      const isCrius = !gate.isSeen || /criu/i.test(met.message);
      if (!isCrius || !(met instanceof RuntimeFailed)) throw met;
      gate[Symbol.dispose]();
      gate.unbar();
      context.engine = undefined;
      target.log.warn(
        { err: met },
        `the engine did not come to CRIU through cedana's gate: started again without. ${KEEP_ENVIRONMENT}`,
      );
    }
  }
  await next();
}

const KEEP_ENVIRONMENT =
  "If it is a script that calls the real one, let it leave PATH, CRIU_CONFIG_FILE and CEDANA_CRIU_GATE as they are";
const END_OF_DUMPED_MS = 10_000;

/**
 * The engine has dumped though CRIU never came through the gate, and not even what bars the way past it has stopped it: the container
 * ran meanwhile, so that nothing of its files and devices that is taken from here on would be of the moment of its memory. One that runs
 * on is dumped once more, standing still; what was made is thrown away. One that has ended with the dump has changed nothing since.
 */
async function wentPast(context: DumpContext): Promise<void> {
  const { target, request, attempt, workPath } = context;
  context.engine = undefined;
  if (request.leaveRunning) {
    const images = imagesIn(context);
    for (const name of await readdir(images))
      if (isCriuFile(name)) await rm(join(images, name), { recursive: true, force: true });
    for (const name of [CRIU_LOG, "stats-dump"])
      await rm(join(workPath, name), { recursive: true, force: true });
    if (attempt.gate) removeGate(attempt.gate);
    noteAttempt(context, { gate: undefined });
    if (context.parentPath) {
      beginTracking(target.tracking); // anew, by what was thrown away: the parent is no longer the latest
      noteAttempt(context, { withoutParent: true });
      context.parentPath = undefined;
      context.parentDigests = [];
    }
    target.log.warn(
      `the engine dumped ${target.what} past cedana's gate, while it ran: thrown away, and dumped again without. ${KEEP_ENVIRONMENT}`,
    );
    return;
  }
  for (const until = Date.now() + END_OF_DUMPED_MS; !target.hasEnded; await sleep(5))
    if (Date.now() > until)
      throw new CriuFailed(
        `the engine dumped ${target.what} past cedana's gate and said that it had ended, but it runs: nothing is kept of the dump. ${KEEP_ENVIRONMENT}`,
      );
  context.ended = true;
  if (context.devices)
    throw new CriuFailed(
      `the engine dumped ${target.what} past cedana's gate, while it ran: what is on its devices is not in the images. ${KEEP_ENVIRONMENT}`,
    );
  noteAttempt(context, { pastGate: true });
  target.log.warn(
    `the engine dumped ${target.what} past cedana's gate: changed files are taken as they are at its end. ${KEEP_ENVIRONMENT}`,
  );
}

function engineDump(context: DumpContext): Omit<EngineDump, "atGate" | "env"> {
  const { request, workPath, parentPath } = context;
  const { leaveRunning, policy } = request;
  return { imagePath: imagesIn(context), workPath, parentPath, leaveRunning, policy };
}

export async function criuDump(context: DumpContext, next: () => Promise<void>): Promise<void> {
  const { target, request, workPath, networkLock, engine } = context;
  const { leaveRunning, policy } = request;
  if (context.attempt.phase !== "begun" || context.attempt.pastGate) {
    context.ended = !leaveRunning; // by a cedanad before us, or past the gate
    if (context.attempt.pastGate) noteAttempt(context, { phase: "dumped" });
    await next();
    return;
  }
  if (context.cgroup && !target.paused && !target.hasEnded) noteFreeze(context, context.cgroup, true);
  try {
    if (engine && !engine.gate) await engine.end;
    else {
      const gpuMounts = target.hasEnded ? [] : await findGpuMounts(target.initPid, target.mountPoints);
      const config = await target.criuConfig({
        workPath,
        policy,
        networkLock,
        externalMounts: gpuMounts.map(({ mountPoint, key }) => ({ key: mountPoint, source: key })),
        withoutPlugins: context.devices?.withoutCriuPlugins ?? false,
        cgroupYard: await yardOf(context),
      });
      if (!leaveRunning)
        noteAttempt(context, {
          whole: { draft: manifestDraft(context), workPath, withFiles: request.rootfs !== undefined },
        });
      if (context.parentPath) beginTracking(target.tracking);
      engine?.gate?.unbar();
      engine?.gate?.open(config);
      await (engine ? engine.end : runEngine(context, config));
      if (engine?.gate && !engine.gate.isPassed) {
        context.ended = !leaveRunning;
        throw new WentPast(
          `the engine dumped ${target.what} by another CRIU than the one at cedana's gate: whether its files are of the moment of its memory nobody knows. ${KEEP_ENVIRONMENT}`,
        );
      }
    }
  } catch (error) {
    if (error instanceof WrongState || error instanceof WentPast) throw error; // before CRIU was asked; after all
    if (engine?.gate && !engine.gate.isPassed) throw error; // killed in front of it
    // An engine that was killed leaves CRIU behind, which goes on: it may yet put the container to its end.
    if (!(await waitForCriu(workPath, CRIU_ALONE_MS)))
      target.log.error(
        { workPath },
        "CRIU goes on by itself after its engine has ended: not waited for any longer",
      );
    const last = await lastWord(workPath);
    if (last === undefined && networkLock !== "skip" && target.ownNetwork && !target.hasEnded)
      await unlockNetwork(target.initPid).catch((cause) =>
        target.log.warn({ err: cause }, "unlock the network of a container whose dump was cut off"),
      );
    if (last !== "finished")
      throw await criuFailure(`dump of ${target.what}`, error as Error, workPath, "dump.log");
    target.log.warn({ err: error }, "the engine has ended before it could say that CRIU's dump is whole");
  }
  context.ended = !leaveRunning;
  if (context.parentPath && leaveRunning) trackedSince(target.tracking, imagesIn(context));
  noteAttempt(context, { phase: "dumped" });
  await next();
}

class WentPast extends CriuFailed {}

const CGROUP_YARD_SINCE = "3.14";

async function yardOf({ target, criu }: DumpContext): Promise<string | undefined> {
  if (target.hasEnded || criu === undefined || isOlder(criu, CGROUP_YARD_SINCE)) return undefined;
  return await cgroupYard(target.initPid);
}

/** Without a gate. */
async function runEngine(context: DumpContext, config: string): Promise<void> {
  const { target } = context;
  const configFile = join(target.directory, "criu-dump.conf");
  await writeFile(configFile, config, { mode: 0o600 });
  forgetReads(configFile);
  const since = Date.now();
  try {
    const PATH = (await target.gate?.())?.path;
    const env = { CRIU_CONFIG_FILE: configFile, ...(PATH !== undefined && { PATH }) };
    await target.engineCheckpoint({ ...engineDump(context), atGate: false, env });
    if (await wasRead(configFile)) return;
    context.networkLock = "default";
    target.log.warn(`CRIU did not get what cedana had to tell it. ${KEEP_ENVIRONMENT}`);
  } catch (error) {
    const log = await stat(join(context.workPath, "dump.log")).catch(() => undefined); // ENOENT: the engine did not come as far as CRIU
    const criuRan = log !== undefined && log.mtimeMs >= since - 1000;
    if (error instanceof RuntimeFailed && criuRan && !(await wasRead(configFile)))
      error.message += `. CRIU did not get what cedana had to tell it. ${KEEP_ENVIRONMENT}`;
    throw error;
  } finally {
    await rm(configFile, { force: true });
  }
}

/** How long a CRIU without an engine may go on: it holds the processes, and has all of their memory to write. */
const CRIU_ALONE_MS = 10 * 60_000;
