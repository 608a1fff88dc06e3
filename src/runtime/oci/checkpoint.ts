import { createHash } from "node:crypto";
import { mkdir, readdir, readFile, rm } from "node:fs/promises";
import { release } from "node:os";
import { basename, dirname, isAbsolute, join, resolve } from "node:path";
import { writeManifest } from "../../checkpoint/manifest.ts";
import { explainCriuLog } from "../../criu/log.ts";
import { CriuFailed, InvalidRequest, RuntimeFailed, SyscallFailed } from "../../errors/index.ts";
import { Cgroup } from "../../linux/cgroup.ts";
import { isAlive, startTime } from "../../linux/proc.ts";
import { type EngineFeatures, engineVersion, lastErrorIn } from "../engine.ts";
import { cgroupName, type OciSpec, readSpec } from "../spec.ts";
import { type Conversation, type OciAnswer, type OciCall, Options } from "./call.ts";
import { criuConfigFile, dumpPolicy, engineArguments, type Policy } from "./criu-options.ts";
import { whileFrozen } from "./frozen.ts";
import { containerState } from "./state.ts";

/*
 * `checkpoint`: the engine's own, run by the wrapper, on a cgroup that we have frozen (CRIU's freezer of cgroups version 1 waits in
 * steps of 100 ms), with the options that the container's annotations ask for, and a manifest beside the images from which a
 * restore takes them again. When it fails the container is as it was, and what the attempt made is gone.
 */

interface Dump {
  readonly call: OciCall;
  readonly options: Options;
  readonly features: EngineFeatures;
  readonly spec: OciSpec;
  readonly policy: Policy;
  readonly imagePath: string;
  readonly leaveRunning: boolean;
}

export async function checkpoint(call: OciCall, wrapper: Conversation): Promise<OciAnswer | undefined> {
  const options = new Options(call.argv);
  const [features, state] = await Promise.all([engineVersion(call.engine), containerState(call)]);
  if (state === undefined || !["running", "paused"].includes(state.status)) {
    wrapper.become([call.engine, ...call.globalArgv, "checkpoint", call.id]); // the engine has the words
    return undefined;
  }
  const spec = await readSpec(state.bundle);
  const parentPath = options.value("parent-path");
  if (parentPath && isAbsolute(parentPath))
    throw new InvalidRequest(`--parent-path ${parentPath} must be relative to the image path`);
  const preDump = options.has("pre-dump");
  const dump: Dump = {
    call,
    options,
    features,
    spec,
    policy: dumpPolicy(options, spec),
    imagePath: resolve(call.cwd, options.value("image-path") ?? "checkpoint"),
    leaveRunning: preDump || options.has("leave-running"),
  };
  const startedAt = Date.now();
  const run = async () => await runEngine(dump, wrapper);
  await withImagePath(dump.imagePath, async () => {
    // A pre-dump stops the processes for a moment only, which CRIU does by itself.
    if (preDump) return await run();
    const { pid } = state;
    const started = startTime(pid);
    const cgroup = await Cgroup.of(pid, cgroupName(spec, call.id));
    await whileFrozen(call.marker, cgroup, state.status === "paused", wrapper.log, async () => {
      await run();
      if (!dump.leaveRunning) await waitForEnd(pid, started);
      return !dump.leaveRunning;
    });
  });
  if (!preDump) await recordDump(dump, startedAt);
  return { status: 0 };
}

async function runEngine(
  { call, options, features, policy, imagePath }: Dump,
  wrapper: Conversation,
): Promise<void> {
  const scratch = scratchOf(call);
  const workPath = resolve(call.cwd, options.value("work-path") ?? join(scratch, "work"));
  const { argv, criuConfig } = engineArguments("checkpoint", features, options, policy, [
    "image-path",
    "work-path",
  ]);
  await mkdir(scratch, { recursive: true, mode: 0o700 });
  try {
    await mkdir(workPath, { recursive: true, mode: 0o700 }); // crun fails when it isn't there
    const env = await criuConfigFile(join(scratch, "criu.conf"), criuConfig);
    const outputPath = join(scratch, "output");
    const command = [
      call.engine,
      ...call.globalArgv,
      "checkpoint",
      `--image-path=${imagePath}`,
      `--work-path=${workPath}`,
    ];
    const status = await wrapper.run([...command, ...argv, call.id], { env, outputPath });
    if (status === 0) return;
    const words = lastErrorIn(await readFile(outputPath, "utf8").catch(() => "")); // ENOENT: it was killed before it could write
    const log = preferred(await logsIn([workPath, imagePath], "dump.log"));
    throw await engineError(`checkpoint of container ${call.id}`, status, words, log);
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
}

/** A directory of this call's own, on the run directory's file system. */
export function scratchOf(call: OciCall): string {
  return join(dirname(dirname(call.marker)), "c", `oci-${basename(call.marker).slice(0, 16)}-${call.pid}`);
}

/** CRIU's logs that there are, in the order of the places. crun ignores a work path at times. */
async function logsIn(directories: readonly string[], name: string): Promise<string[]> {
  const found = await Promise.all(
    directories.map(async (directory) =>
      (await readdir(directory).catch((): string[] => [])).includes(name) ? [join(directory, name)] : [],
    ),
  );
  return found.flat();
}
const preferred = (paths: readonly string[]): string | undefined => paths[0];

/** The engine's words, then what CRIU's log says was the reason. */
export async function engineError(
  what: string,
  status: number,
  words: string | undefined,
  criuLog: string | undefined,
): Promise<Error> {
  const engineWords = words ?? `the engine ended with status ${status} and said nothing`;
  const summary = criuLog && (await explainCriuLog(criuLog).catch(() => undefined)); // ENOENT: CRIU was not even started
  if (!summary || summary.errors.length === 0)
    return new RuntimeFailed(`${what}: ${engineWords}`, { exitStatus: status });
  const lines = [...new Set([summary.firstError, ...summary.errors.slice(-5)])].join("; ");
  return new CriuFailed(
    `${what}: ${engineWords}: CRIU: ${lines}${summary.cause ? `. ${summary.cause.advice}` : ""}`,
    {
      exitStatus: status,
    },
  );
}

// ---- parts ----

/** Half a checkpoint is none: after a failure, what was not there before is removed. */
async function withImagePath(imagePath: string, work: () => Promise<void>): Promise<void> {
  let made: string | undefined;
  let before: string[] = [];
  try {
    made = await mkdir(imagePath, { recursive: true, mode: 0o700 });
    if (!made) before = await readdir(imagePath);
  } catch (error) {
    throw SyscallFailed.from(error);
  }
  try {
    await work();
  } catch (error) {
    if (made) await rm(made, { recursive: true, force: true });
    else
      for (const name of await readdir(imagePath))
        if (!before.includes(name)) await rm(join(imagePath, name), { recursive: true, force: true });
    throw error;
  }
}

/** The engine reports success when CRIU does; the processes' end is the kernel's, a moment later. */
async function waitForEnd(pid: number, started: number | undefined): Promise<void> {
  for (let attempt = 0; isAlive(pid, started) && attempt < 100; attempt++)
    await new Promise((resolve) => setTimeout(resolve, 10));
}

/** The images are whole, and perhaps all that there is of the container: they stay, whatever happens to the manifest. */
async function recordDump(dump: Dump, startedAt: number): Promise<void> {
  try {
    await writeManifest(dump.imagePath, manifestOf(dump, startedAt));
  } catch (error) {
    throw new CriuFailed(
      `container ${dump.call.id} was dumped into ${dump.imagePath}, but the manifest could not be written: ${(error as Error).message}. The images are whole; options that a restore needs must be given to it`,
      { cause: error },
    );
  }
}

function manifestOf(dump: Dump, startedAt: number): Parameters<typeof writeManifest>[1] {
  const { call, options, features, spec, policy, leaveRunning } = dump;
  const parentPath = options.value("parent-path");
  return {
    createdAt: new Date(startedAt).toISOString(),
    containerId: call.id,
    namespace: "",
    terminal: spec.process?.terminal ?? false,
    kernel: release(),
    engine: { name: features.name, version: features.version, path: call.engine },
    options: {
      ...(policy.tcp && { tcp: policy.tcp }),
      fileLocks: policy.fileLocks,
      extUnix: policy.extUnix,
      shellJob: policy.shellJob,
      emptyNamespaces: [...policy.emptyNamespaces],
      ...(policy.cgroupsMode && { cgroupsMode: policy.cgroupsMode }),
      leaveRunning,
      ...(parentPath && { parentPath }),
    },
    specDigest: createHash("sha256").update(JSON.stringify(spec)).digest("hex"),
    timings: { totalMs: Date.now() - startedAt },
  };
}
