import { createHash } from "node:crypto";
import { copyFile, mkdir, readdir, rm, stat, writeFile } from "node:fs/promises";
import { release } from "node:os";
import { isAbsolute, join } from "node:path";
import { type CheckpointManifest, readManifest, writeManifest } from "../checkpoint/manifest.ts";
import { explainCriuLog } from "../criu/log.ts";
import { BrokenImage, CriuFailed, InvalidRequest, NotFound, WrongState } from "../errors/index.ts";
import {
  type CheckpointCommand,
  criuConfig,
  Engine,
  engineFailure,
  engineVersion,
  type RestoreCommand,
} from "../runtime/engine.ts";
import type { CheckpointRequestOptions } from "../runtime/options.ts";
import { cedanaAnnotations, type OciSpec, type TcpPolicy } from "../runtime/spec.ts";
import type { Task, Work } from "./task.ts";

/**
 * Dump and restore as containerd's Task API asks for them, by way of the engine's own `checkpoint` and `restore`.
 *
 * Options come from three places: containerd's CheckpointOptions, the container's `cedana.io/…` annotations for what those
 * can't carry, and, at a restore, the manifest beside the images, because images restore only with the options that they were
 * taken with. An annotation of the container that is restored has the last word.
 */

export interface CheckpointRequest {
  /** absolute; made when missing */
  imagePath: string;
  options: CheckpointRequestOptions;
}

/** What CRIU is to do about the things that it can't decide alone. */
interface Policy {
  tcp?: TcpPolicy | undefined;
  fileLocks: boolean;
  extUnix: boolean;
  shellJob: boolean;
  emptyNamespaces: string[];
  cgroupsMode: string;
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
  const paused = task.init.state === "paused";
  const engine = await withFeatures(task);
  const made = await mkdir(imagePath, { recursive: true, mode: 0o700 }).catch((error) => {
    throw new InvalidRequest(`make image path ${imagePath}: ${(error as Error).message}`, { cause: error });
  });
  const before = made ? new Set<string>() : new Set(await listDirectory(imagePath));
  const workPath = options.workPath || join(task.bundle, "criu-work"); // crun fails when it isn't there
  await mkdir(workPath, { recursive: true, mode: 0o700 });
  const logFile = join(task.bundle, "checkpoint.log.json");
  try {
    const command = engine.checkpoint({
      id: task.id,
      logFile,
      imagePath,
      workPath,
      parentPath: options.parentPath || undefined,
      leaveRunning: !options.exit,
      ...policyOptions(policy),
      ...(await criuConfigFile(task, "dump", {
        tcpClose: policy.tcp === "close",
        skipInFlight: policy.tcp === "skip-in-flight",
      })),
    } satisfies CheckpointCommand);
    const exit = await task.pod.keeper.run(work.tag("checkpoint"), {
      argv: command.argv,
      outputPath: join(task.bundle, "checkpoint.out"),
    });
    if (exit.exitStatus !== 0) {
      const failure = await engineFailure("checkpoint", task.id, exit.exitStatus, logFile);
      throw failure instanceof WrongState
        ? failure
        : await criuFailure(`dump of task ${task.id}`, failure, workPath, "dump.log");
    }
    await writeManifest(imagePath, await manifestOf(task, spec, engine, policy, options, startedAt));
  } catch (error) {
    await keepLog(join(workPath, "dump.log"), join(task.bundle, "criu-dump.log"));
    await removeAttempt(imagePath, made, before, work.repeated);
    throw error;
  } finally {
    if (!task.init.exit) await restoreFreezer(task, paused && !task.init.exit, options.exit);
    if (!options.workPath) await rm(workPath, { recursive: true, force: true });
    await rm(join(task.bundle, "criu-dump.conf"), { force: true });
  }
}

export interface RestorePlan {
  options: Omit<RestoreCommand, "id" | "bundle" | "pidFile" | "logFile">;
  engine: Engine;
  /** The engine's failure with what CRIU's log says. */
  explain(failure: Error): Promise<Error>;
  /** Removes what only the restore needed. */
  done(failed: boolean): Promise<void>;
}

/**
 * What the engine's `restore` needs for these images; looks before anything is made.
 * @throws NotFound, BrokenImage, InvalidRequest
 */
export async function planRestore(task: Task, spec: OciSpec, path: string): Promise<RestorePlan> {
  const imagePath = await findImages(path);
  const manifest =
    (await readManifest(imagePath)) ?? (imagePath === path ? undefined : await readManifest(path));
  if (manifest && manifest.terminal !== task.init.stdio.terminal)
    throw new InvalidRequest(
      manifest.terminal
        ? `checkpoint ${path} is of a container with a terminal: create the new one with a terminal`
        : `checkpoint ${path} is of a container without a terminal: create the new one without`,
    );
  const policy = restorePolicy(manifest, spec);
  const workPath = task.options.criuWorkPath || join(task.bundle, "criu-restore");
  return {
    engine: await withFeatures(task),
    options: {
      imagePath,
      workPath,
      ...policyOptions(policy),
      tcpClose: policy.tcp === "close",
      ...(await criuConfigFile(task, "restore", { tcpClose: policy.tcp === "close" })),
    },
    explain: (failure) =>
      criuFailure(`restore of task ${task.id} from ${path}`, failure, workPath, "restore.log"),
    done: async (failed) => {
      if (failed) await keepLog(join(workPath, "restore.log"), join(task.bundle, "criu-restore.log"));
      if (!task.options.criuWorkPath) await rm(workPath, { recursive: true, force: true });
      await rm(join(task.bundle, "criu-restore.conf"), { force: true });
    },
  };
}

/** The directory with CRIU's images: the path itself, or `checkpoint/` in it. */
async function findImages(path: string): Promise<string> {
  for (const directory of [path, join(path, "checkpoint")])
    if (await stat(join(directory, "inventory.img")).catch(() => undefined)) return directory;
  const found = await stat(path).catch(() => undefined);
  if (!found) throw new NotFound(`checkpoint ${path} does not exist`);
  if (!found.isDirectory()) throw new InvalidRequest(`checkpoint ${path} is not a directory`);
  throw new BrokenImage(`${path} is not a checkpoint: it holds no inventory.img`);
}

function dumpPolicy(options: CheckpointRequestOptions, spec: OciSpec): Policy {
  const annotations = cedanaAnnotations(spec);
  return {
    tcp: annotations.tcp ?? (options.openTcp ? "keep" : undefined),
    fileLocks: annotations.fileLocks ?? options.fileLocks,
    extUnix: annotations.extUnix ?? options.externalUnixSockets,
    shellJob: annotations.shellJob ?? options.terminal,
    emptyNamespaces: options.emptyNamespaces,
    cgroupsMode: options.cgroupsMode,
  };
}

function restorePolicy(manifest: CheckpointManifest | undefined, spec: OciSpec): Policy {
  const annotations = cedanaAnnotations(spec);
  const used = manifest?.options;
  return {
    // Connections that were dumped closed can't come back open.
    tcp: used?.tcp === "close" ? "close" : (annotations.tcp ?? used?.tcp),
    fileLocks: annotations.fileLocks ?? used?.fileLocks ?? false,
    extUnix: annotations.extUnix ?? used?.extUnix ?? false,
    shellJob: annotations.shellJob ?? used?.shellJob ?? false,
    emptyNamespaces: [...(used?.emptyNamespaces ?? [])],
    cgroupsMode: used?.cgroupsMode ?? "",
  };
}

/** The policy in the engine's options, as both commands have them. */
function policyOptions(policy: Policy) {
  return {
    tcpEstablished: policy.tcp === "keep" || policy.tcp === "skip-in-flight", // which alone still refuses established ones
    extUnixSockets: policy.extUnix,
    shellJob: policy.shellJob,
    fileLocks: policy.fileLocks,
    emptyNamespaces: policy.emptyNamespaces,
    cgroupsMode: policy.cgroupsMode || undefined,
  };
}

/** What the engine has no flag for goes to CRIU by a configuration file of its own. */
async function criuConfigFile(
  task: Task,
  action: "dump" | "restore",
  wanted: Parameters<typeof criuConfig>[0],
): Promise<{ criuConfigFile?: string }> {
  const text = criuConfig(wanted);
  if (text === "") return {};
  const path = join(task.bundle, `criu-${action}.conf`);
  await writeFile(path, text, { mode: 0o600 });
  return { criuConfigFile: path };
}

async function manifestOf(
  task: Task,
  spec: OciSpec,
  engine: Engine,
  policy: Policy,
  options: CheckpointRequestOptions,
  startedAt: number,
): Promise<Omit<CheckpointManifest, "version" | "files">> {
  return {
    createdAt: new Date(startedAt).toISOString(),
    containerId: task.id,
    namespace: task.namespace,
    terminal: task.init.stdio.terminal,
    kernel: release(),
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

async function withFeatures(task: Task): Promise<Engine> {
  return new Engine({
    binary: task.options.binaryName,
    root: task.options.root,
    systemdCgroup: task.options.systemdCgroup,
    namespace: task.namespace,
    features: await engineVersion(task.options.binaryName || "runc"),
  });
}

/** CRIU's freezing and the engine's must leave the container as it was asked to be: paused if it was, running if it was. */
async function restoreFreezer(task: Task, paused: boolean, exiting: boolean): Promise<void> {
  try {
    const cgroup = await task.cgroup();
    const frozen = await cgroup.isFrozen();
    if (frozen && !paused) await cgroup.thaw();
    if (!frozen && paused && !exiting) await cgroup.freeze();
  } catch (error) {
    task.log.warn({ err: error }, "put the freezer back after a dump"); // the container may be gone: exit follows
  }
}

/** The engine's words, then what CRIU's log says was the reason. */
async function criuFailure(what: string, failure: Error, workPath: string, logName: string): Promise<Error> {
  const path = join(workPath, logName);
  const summary = await explainCriuLog(path).catch(() => undefined); // no log: CRIU was not even started
  if (!summary || summary.errors.length === 0) return failure;
  const lines = [...new Set([summary.firstError, ...summary.errors.slice(-5)])].join("; ");
  const advice = summary.cause ? `. ${summary.cause.advice}` : "";
  return new CriuFailed(`${what} failed in the engine's step (${failure.message}): CRIU: ${lines}${advice}`, {
    cause: failure,
  });
}

async function keepLog(from: string, to: string): Promise<void> {
  await copyFile(from, to).catch(() => undefined); // ENOENT: CRIU was not started
}

/** Half a checkpoint is none: what this attempt wrote goes. A repeated attempt can't tell its files from older ones. */
async function removeAttempt(
  imagePath: string,
  made: string | undefined,
  before: Set<string>,
  repeated: boolean,
): Promise<void> {
  if (made) {
    await rm(made, { recursive: true, force: true });
    return;
  }
  if (repeated) return;
  for (const name of await listDirectory(imagePath))
    if (!before.has(name)) await rm(join(imagePath, name), { recursive: true, force: true });
}

async function listDirectory(path: string): Promise<string[]> {
  try {
    return await readdir(path);
  } catch (error) {
    throw new InvalidRequest(`image path ${path} is not a directory that can be read`, { cause: error });
  }
}
