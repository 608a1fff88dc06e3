import { createHash } from "node:crypto";
import { copyFile, mkdir, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { release } from "node:os";
import { isAbsolute, join, relative } from "node:path";
import { type CheckpointManifest, writeManifest } from "../checkpoint/manifest.ts";
import { explainCriuLog } from "../criu/log.ts";
import { criuVersion } from "../criu/version.ts";
import { CriuFailed, InvalidRequest, NotFound, SyscallFailed, WrongState } from "../errors/index.ts";
import { hostCgroupVersion, parseMembership } from "../linux/cgroup.ts";
import { type CheckpointCommand, Engine, engineFailure, engineVersion } from "../runtime/engine.ts";
import type { CheckpointRequestOptions } from "../runtime/options.ts";
import type { OciSpec } from "../runtime/spec.ts";
import { type CriuPolicy, criuConfigFile, dumpPolicy, policyOptions } from "./criu-policy.ts";
import type { Task, Work } from "./task.ts";

/** Dump as containerd's Task API asks for it, by way of the engine's own `checkpoint`. */

export interface CheckpointRequest {
  /** absolute; made when missing */
  imagePath: string;
  options: CheckpointRequestOptions;
}

/**
 * Dumps a running or paused task into `request.imagePath`. When it fails, the container is as it was and the files of the
 * attempt are gone; CRIU's log is kept as `criu-dump.log` in the bundle.
 */
export async function dump(task: Task, work: Work, request: CheckpointRequest): Promise<void> {
  const startedAt = Date.now();
  const { imagePath, options } = request;
  if (imagePath === "") throw new InvalidRequest(`checkpoint of task ${task.id} names no image path`);
  if (!isAbsolute(imagePath)) throw new InvalidRequest(`image path ${imagePath} is not an absolute path`);
  const spec = await task.spec();
  const policy = dumpPolicy(options, spec);
  // The engines want it as CRIU's link will have it.
  const parentPath = isAbsolute(options.parentPath)
    ? relative(imagePath, options.parentPath)
    : options.parentPath;
  if (parentPath && !(await stat(join(imagePath, parentPath, "inventory.img")).catch(() => undefined)))
    throw new NotFound(`parent ${options.parentPath} of checkpoint ${imagePath} holds no images`);
  const paused = task.init.state === "paused";
  const engine = await withFeatures(task);
  const criu = criuVersion();
  const attempt = await beginAttempt(task, work, imagePath);
  const workPath = options.workPath || join(task.bundle, "criu-work"); // crun fails when it isn't there
  const logFile = join(task.bundle, "checkpoint.log.json");
  const outputPath = join(task.bundle, "checkpoint.out");
  let ended = false;
  try {
    await mkdir(workPath, { recursive: true, mode: 0o700 }).catch((error) => {
      throw pathFailure(`make CRIU's work path ${workPath}`, error);
    });
    const command = engine.checkpoint({
      id: task.id,
      logFile,
      imagePath,
      workPath,
      parentPath: parentPath || undefined,
      leaveRunning: !options.exit,
      ...policyOptions(policy),
      ...(await criuConfigFile(task.bundle, "dump", {
        tcpClose: policy.tcp === "close",
        skipInFlight: policy.tcp === "skip-in-flight",
        cgroupRoots: await foreignHierarchies(task.init.pid),
      })),
    } satisfies CheckpointCommand);
    const exit = await task.pod.keeper.run(work.tag("checkpoint"), { argv: command.argv, outputPath });
    if (exit.exitStatus !== 0) {
      const failure = await engineFailure("checkpoint", task.id, exit.exitStatus, logFile, outputPath);
      throw failure instanceof WrongState
        ? failure
        : await criuFailure(`dump of task ${task.id}`, failure, workPath, "dump.log");
    }
    ended = options.exit;
    const manifest = await manifestOf(task, spec, engine, policy, { ...options, parentPath }, startedAt);
    await writeManifest(imagePath, { ...manifest, ...criuField(await criu) });
  } catch (error) {
    await keepLog(join(workPath, "dump.log"), join(task.bundle, "criu-dump.log"));
    // The processes are in the images alone now: whatever failed after, these stay.
    if (ended)
      throw new CriuFailed(
        `task ${task.id} was dumped into ${imagePath} and has ended, but the manifest could not be written: ${(error as Error).message}. The images are whole; options that a restore needs must be given by annotations`,
        { cause: error },
      );
    await removeAttempt(imagePath, attempt);
    throw error;
  } finally {
    if (!task.init.exit) await restoreFreezer(task, paused && !ended);
    if (!options.workPath) await rm(workPath, { recursive: true, force: true });
    await rm(join(task.bundle, "criu-dump.conf"), { force: true });
    await rm(attemptFile(task), { force: true });
  }
}

/**
 * Version 1 hierarchies of a host whose containers have cgroups of version 2 (a hybrid host seen without them). The container
 * is in somebody else's cgroup there, and CRIU would take that with everything below it into the images, make what is missing
 * at the restore, and give it the limits of then. Told that a file is where to look, it finds no cgroup.
 */
async function foreignHierarchies(pid: number): Promise<[controller: string, path: string][]> {
  if (pid === 0 || (await hostCgroupVersion()) !== 2) return [];
  const text = await readFile(`/proc/${pid}/cgroup`, "utf8").catch(() => ""); // it has ended: the engine says so
  const controllers = [...parseMembership(text).keys()].filter((controller) => controller !== "");
  return controllers.map((controller) => [controller, "/cgroup.procs"]);
}

/** What was there before, so that a failure removes no more than it made; on record, for whoever goes on after a crash. */
interface Attempt {
  request: number;
  /** the topmost directory that was made for it */
  made?: string | undefined;
  /** names in the image path that were there */
  before: string[];
}

async function beginAttempt(task: Task, work: Work, imagePath: string): Promise<Attempt> {
  if (work.repeated) {
    const text = await readFile(attemptFile(task), "utf8").catch(() => undefined); // the crash came before it
    const earlier = text ? (JSON.parse(text) as Attempt) : undefined;
    if (earlier?.request === work.request) return earlier;
  }
  const made = await mkdir(imagePath, { recursive: true, mode: 0o700 }).catch((error) => {
    throw pathFailure(`make image path ${imagePath}`, error);
  });
  const before = made ? [] : await listDirectory(imagePath);
  const attempt: Attempt = { request: work.request, made, before };
  await writeFile(`${attemptFile(task)}.new`, JSON.stringify(attempt), { mode: 0o600 });
  await rename(`${attemptFile(task)}.new`, attemptFile(task));
  return attempt;
}

function attemptFile(task: Task): string {
  return join(task.bundle, "checkpoint-attempt.json");
}

/** The caller's path is at fault, unless it is the machine. */
function pathFailure(what: string, error: NodeJS.ErrnoException): Error {
  if (["ENOSPC", "EIO", "EDQUOT", "EMFILE"].includes(error.code ?? "")) return SyscallFailed.from(error);
  return new InvalidRequest(`${what}: ${error.message}`, { cause: error });
}

function criuField(criuVersion: string | undefined): { criuVersion?: string } {
  return criuVersion === undefined ? {} : { criuVersion };
}

async function manifestOf(
  task: Task,
  spec: OciSpec,
  engine: Engine,
  policy: CriuPolicy,
  options: CheckpointRequestOptions,
  startedAt: number,
): Promise<Omit<CheckpointManifest, "version" | "files">> {
  return {
    createdAt: new Date(startedAt).toISOString(),
    containerId: task.id,
    namespace: task.namespace,
    terminal: task.init.stdio.terminal,
    kernel: release(),
    ...(process.env.CEDANA_BUILD && { cedanaVersion: process.env.CEDANA_BUILD }),
    engine: { name: engine.name, version: engine.features.version, path: engine.binary },
    options: {
      ...(policy.tcp && { tcp: policy.tcp }),
      fileLocks: policy.fileLocks,
      extUnix: policy.extUnix,
      shellJob: policy.shellJob,
      emptyNamespaces: policy.emptyNamespaces,
      ...(policy.cgroupsMode && { cgroupsMode: policy.cgroupsMode }),
      leaveRunning: !options.exit,
      ...(options.parentPath && { parentPath: options.parentPath }),
    },
    specDigest: createHash("sha256").update(JSON.stringify(spec)).digest("hex"),
    timings: { totalMs: Date.now() - startedAt },
  };
}

export async function withFeatures(task: Task): Promise<Engine> {
  return new Engine({
    binary: task.options.binaryName,
    root: task.options.root,
    systemdCgroup: task.options.systemdCgroup,
    namespace: task.namespace,
    features: await engineVersion(task.options.binaryName || "runc"),
  });
}

/** CRIU's freezing and the engine's must leave the container as it was: paused if it was, running if it was. */
async function restoreFreezer(task: Task, paused: boolean): Promise<void> {
  try {
    const cgroup = await task.cgroup();
    const frozen = await cgroup.isFrozen();
    if (frozen && !paused) await cgroup.thaw();
    if (!frozen && paused) await cgroup.freeze();
  } catch (error) {
    task.log.warn({ err: error }, "put the freezer back after a dump"); // the container may be gone: exit follows
  }
}

/** The engine's words, then what CRIU's log says was the reason. */
export async function criuFailure(
  what: string,
  failure: Error,
  workPath: string,
  logName: string,
): Promise<Error> {
  const path = join(workPath, logName);
  const summary = await explainCriuLog(path).catch(() => undefined); // no log: CRIU was not even started
  if (!summary || summary.errors.length === 0) return failure;
  const lines = [...new Set([summary.firstError, ...summary.errors.slice(-5)])].join("; ");
  const advice = summary.cause ? `. ${summary.cause.advice}` : "";
  return new CriuFailed(`${what} failed in the engine's step (${failure.message}): CRIU: ${lines}${advice}`, {
    cause: failure,
  });
}

export async function keepLog(from: string, to: string): Promise<void> {
  await copyFile(from, to).catch(() => undefined); // ENOENT: CRIU was not started
}

/** Half a checkpoint is none: what this attempt made goes. */
async function removeAttempt(imagePath: string, { made, before }: Attempt): Promise<void> {
  if (made) {
    await rm(made, { recursive: true, force: true });
    return;
  }
  for (const name of await listDirectory(imagePath))
    if (!before.includes(name)) await rm(join(imagePath, name), { recursive: true, force: true });
}

async function listDirectory(path: string): Promise<string[]> {
  try {
    return await readdir(path);
  } catch (error) {
    throw new InvalidRequest(`image path ${path} is not a directory that can be read`, { cause: error });
  }
}
