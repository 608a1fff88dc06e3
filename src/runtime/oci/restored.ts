import { execFile } from "node:child_process";
import { readdir, rm } from "node:fs/promises";
import { constants } from "node:os";
import { join, resolve } from "node:path";
import { promisify } from "node:util";
import { beginClaim, returnClaim } from "../../checkpoint/resume.ts";
import { readOne } from "../../criu/image/index.ts";
import { InvalidRequest, NotFound, Unsupported } from "../../errors/index.ts";
import { Cgroup } from "../../linux/cgroup.ts";
import { isAlive, pidsInNamespaces, processStat, startTime } from "../../linux/proc.ts";
import { type AnnotatedCheckpoint, annotatedCheckpoint, maySetAside } from "../annotated-checkpoint.ts";
import { engineName } from "../engine.ts";
import { hookOf } from "../hooks.ts";
import { cedanaAnnotations, cgroupName, type OciSpec, readSpec } from "../spec.ts";
import { asGiven, type Conversation, isSet, type OciAnswer, type OciCall, ownGlobalArgv } from "./call.ts";
import { scratchOf } from "./checkpoint.ts";
import { generationOf } from "./generation.ts";
import { runHook } from "./hooks.ts";
import { isUnstarted, type Marker, readMarker, writeMarker } from "./marker.ts";
import { restore } from "./restore.ts";
import { containerState, namespaceOf, parseState } from "./state.ts";

/*
 * Containers that are restored where their caller creates them, because their annotations ask for it.
 *
 * Callers keep the pid that they read after `create`, so the restore is done then, and what was restored stands still until `start`: CRIU
 * leaves every process stopped by SIGSTOP, and start continues those that were not stopped when the images were taken. To the engine such
 * a container runs; to its caller it is created, as `state` says, and what is done to a created one is done to it.
 */

const { SIGCONT, SIGKILL, SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGABRT } = constants.signals;
/** A container that hasn't run yet has nothing to finish: these end it. */
const ending = new Set([SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGABRT, SIGKILL]);
/** CRIU's number of the state that SIGSTOP leaves. Source: criu/include/pid.h, TASK_STOPPED. */
const TASK_STOPPED = 3;
const patienceMs = 10_000;

/** Options of `create` and `run` of runc and of crun, and whether they take a value. */
const options: Readonly<Record<string, "value" | "flag">> = {
  bundle: "value",
  "console-socket": "value",
  "pidfd-socket": "value",
  "pid-file": "value",
  "preserve-fds": "value",
  config: "value",
  "no-pivot": "flag",
  "no-new-keyring": "flag",
  "no-subreaper": "flag",
  detach: "flag",
  keep: "flag",
};
const shorts: Readonly<Record<string, string>> = { b: "bundle", d: "detach", f: "config" };

/**
 * What `create` and `run` are told, by the options' long names.
 * @param unknown  what becomes of an option that neither engine is known to have
 * @throws InvalidRequest
 */
export function createOptions(
  argv: readonly string[],
  unknown: "refuse" | "skip" = "skip",
): Map<string, string | true> {
  const found = new Map<string, string | true>();
  for (let at = 0; at < argv.length; at++) {
    const argument = argv[at]!;
    if (argument === "--") break;
    if (!argument.startsWith("-") || argument === "-") continue;
    const [, given = "", attached] = /^--?([^=]*)(?:=(.*))?$/s.exec(argument)!;
    const name = shorts[given] ?? given;
    const kind = options[name];
    if (kind === undefined && unknown === "skip") continue;
    if (kind === undefined)
      throw new InvalidRequest(
        `flag provided but not defined: -${given}: a restored container can't have it`,
      );
    if (kind === "flag") {
      if (isSet(attached)) found.set(name, true);
      else found.delete(name);
      continue;
    }
    const value = attached ?? argv[++at];
    if (value === undefined) throw new InvalidRequest(`flag needs an argument: -${given}`);
    found.set(name, value);
  }
  return found;
}

/** The arguments of the `restore` that stands for a create or run. @throws Unsupported naming what a restore can't do */
function restoreArguments(call: OciCall, imagePath: string): string[] {
  const given = createOptions(call.argv, "refuse");
  for (const name of ["pidfd-socket", "keep"])
    if (given.has(name)) throw new Unsupported(`restore by annotation with --${name}`);
  if (given.has("config") && given.get("config") !== "config.json")
    throw new Unsupported("restore by annotation with another --config than the bundle's config.json");
  given.delete("config");
  if (given.get("preserve-fds") === "0") given.delete("preserve-fds");
  if (call.command === "create") given.set("detach", true);
  given.set("image-path", imagePath);
  const argv = [...given].map(([name, value]) => (value === true ? `--${name}` : `--${name}=${value}`));
  return [...argv, "--", call.id];
}

/**
 * Creates a container from the checkpoint that its annotations name.
 * @param marker  of it, written already
 * @returns undefined when it is to start afresh
 * @throws what is wrong with annotations or checkpoint, where the container may not start afresh
 */
export async function createRestored(
  call: OciCall,
  wrapper: Conversation,
  spec: OciSpec,
  marker: Marker & { bundle: string },
): Promise<OciAnswer | undefined> {
  const fresh = (cedanaAnnotations(spec).onRestoreFailure ?? "fail") === "fresh";
  let source: AnnotatedCheckpoint | undefined;
  const setAside = async (why: unknown) => {
    if (source?.claim) await returnClaim(source.claim);
    wrapper.log.warn({ err: why }, "not restored, as cedana.io/on-restore-failure allows: it starts afresh");
    await forget(call, wrapper);
    writeMarker(call.marker, marker);
  };
  try {
    const asking = { id: call.id, namespace: namespaceOf(call.root), bundle: marker.bundle };
    source = await annotatedCheckpoint(spec, asking);
    if (source === undefined) return undefined;
    const answer = await restoreAsCreated(call, wrapper, marker, source);
    if (answer.message === undefined) return answer;
    if (!fresh) {
      if (source.claim) await returnClaim(source.claim);
      return answer;
    }
    await setAside(new Error(answer.message));
  } catch (error) {
    if (!fresh || !maySetAside(error)) {
      if (source?.claim) await returnClaim(source.claim);
      throw error;
    }
    await setAside(error);
  }
  return undefined;
}

async function restoreAsCreated(
  call: OciCall,
  wrapper: Conversation,
  marker: Marker & { bundle: string },
  { path, claim }: AnnotatedCheckpoint,
): Promise<OciAnswer> {
  const standsStill = call.command === "create";
  const restoring = { ...call, command: "restore", argv: restoreArguments(call, path) };
  // Whoever deletes it after a crash gives the claim back, until its processes may run.
  writeMarker(call.marker, { ...marker, claim });
  if (claim && !standsStill) {
    await beginClaim(claim);
    writeMarker(call.marker, marker);
  }
  let stopped: readonly number[] = [];
  const answer = await restore(restoring, wrapper, {
    byAnnotation: true,
    standsStill,
    ...(standsStill && { criuConfig: ["leave-stopped"] }),
    beforeEngine: async (imagePath) => {
      if (standsStill) stopped = await stoppedTasks(imagePath);
    },
  });
  if (answer.message !== undefined) return answer;
  if (!standsStill) {
    // Unlike `run`, crun's `restore` in the foreground leaves what has ended.
    if (!createOptions(call.argv).has("detach")) await forget(call, wrapper);
    return answer;
  }
  // What the restore has noted itself, of a copied bundle, stays.
  const noted = readMarker(call.marker) ?? { ...marker, claim };
  const state = await containerState(call);
  const started = state && state.pid > 0 ? startTime(state.pid) : undefined;
  if (state === undefined || started === undefined)
    throw new NotFound(`container ${call.id} ended while it was being restored from ${path}`);
  writeMarker(call.marker, { ...noted, restored: { pid: state.pid, startTime: started, stopped } });
  return answer;
}

/** Pids, as the container has them, of processes that were stopped when the images were taken. */
async function stoppedTasks(imagePath: string): Promise<number[]> {
  const stopped: number[] = [];
  for (const name of await readdir(imagePath)) {
    const pid = /^core-(\d+)\.img$/.exec(name)?.[1];
    if (pid === undefined) continue;
    const { tc } = (await readOne(join(imagePath, name), "CORE")) as { tc?: { task_state?: unknown } }; // threads have none
    if (Number(tc?.task_state) === TASK_STOPPED) stopped.push(Number(pid));
  }
  return stopped;
}

/** Nothing of a restore that failed is in the way of a fresh start. */
async function forget(call: OciCall, wrapper: Conversation): Promise<void> {
  if ((await containerState(call)) === undefined) return;
  await wrapper.run([call.engine, ...call.globalArgv, "delete", "--force", call.id], {
    outputPath: "/dev/null",
  });
}

// ---- what is done to it ----------------------------------------------------------------------------------------------

/** Its processes run from now on. */
export async function start(call: OciCall, wrapper: Conversation): Promise<OciAnswer | undefined> {
  const marker = readMarker(call.marker);
  if (!marker?.restored || !isAlive(marker.restored.pid, marker.restored.startTime)) {
    wrapper.become(asGiven(call)); // the engine has the words for one that has ended
    return undefined;
  }
  const { restored, claim, ...started } = marker;
  if (claim) await beginClaim(claim);
  const spec = await readSpec(marker.bundle!);
  const cgroup = await Cgroup.of(restored.pid, cgroupName(spec, call.id, engineName(call.engine)));
  for (const pid of await cgroup.pids()) {
    if (processStat(pid)?.state !== "T" || restored.stopped.includes(pidsInNamespaces(pid).at(-1) ?? 0))
      continue;
    continueProcess(pid);
  }
  writeMarker(call.marker, started);
  await postRestore(
    call,
    wrapper,
    { initPid: restored.pid, bundle: marker.bundle!, spec },
    restored.startTime,
  );
  return { status: 0 };
}

/** Its processes run now, so its hook can; a failure of it ends them, and is the start's. */
async function postRestore(
  call: OciCall,
  wrapper: Conversation,
  container: { initPid: number; bundle: string; spec: OciSpec },
  started: number,
): Promise<void> {
  const hook = await hookOf(container.spec, "post-restore");
  if (!hook) return;
  const scratch = scratchOf(call);
  try {
    const generation = generationOf(call, container.initPid);
    const env = [`CEDANA_GENERATION=${generation}`, "CEDANA_WHY=annotation"];
    await runHook({ call, wrapper }, container, hook, env, scratch);
  } catch (error) {
    if (!isAlive(container.initPid, started)) return; // what has ended has nothing more to do
    // Not deleted: that is for its caller, who has been told that it is there.
    await wrapper.run([call.engine, ...call.globalArgv, "kill", call.id, "KILL"], {
      outputPath: "/dev/null",
    });
    throw error;
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
}

function continueProcess(pid: number): void {
  try {
    process.kill(pid, SIGCONT);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error; // it has been killed meanwhile
  }
}

/** The engine's answer, but for what only we know: that it hasn't been started, and which bundle its caller gave. */
export async function state(call: OciCall, wrapper: Conversation): Promise<OciAnswer | undefined> {
  const marker = readMarker(call.marker);
  if (!marker?.restored && !marker?.copied) {
    wrapper.become(asGiven(call));
    return undefined;
  }
  const asked = await promisify(execFile)(call.engine, [...ownGlobalArgv(call), "state", call.id], {
    timeout: patienceMs,
    encoding: "utf8",
  }).catch(() => undefined); // it says why to the caller itself
  if (asked === undefined) {
    wrapper.become(asGiven(call));
    return undefined;
  }
  const told = parseState<Record<string, unknown>>(asked.stdout, call);
  if (marker.copied) told.bundle = marker.bundle;
  if (isUnstarted(marker) && told.status === "running") told.status = "created";
  return { status: 0, output: `${JSON.stringify(told, undefined, 2)}\n` };
}

/** What a signal becomes for a container that hasn't been started. */
export function signalOfUnstarted(signal: number): number {
  return ending.has(signal) ? SIGKILL : signal;
}

/** After its deletion: a checkpoint that it has not run from is there for the next one. */
export async function giveBack(marker: Marker | undefined): Promise<void> {
  if (marker?.claim) await returnClaim(marker.claim);
}

/** The bundle that a create or run names. */
export function bundleOf(call: OciCall): string {
  const bundle = createOptions(call.argv).get("bundle");
  return resolve(call.cwd, typeof bundle === "string" ? bundle : ".");
}
