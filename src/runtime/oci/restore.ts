import { mkdir, rm, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import { readManifest } from "../../checkpoint/manifest.ts";
import { BrokenImage, NotFound } from "../../errors/index.ts";
import { engineVersion } from "../engine.ts";
import { killPolicy } from "../kill-policy.ts";
import { readSpec } from "../spec.ts";
import { type Conversation, type OciAnswer, type OciCall, Options } from "./call.ts";
import { engineError, scratchOf } from "./checkpoint.ts";
import { criuConfigFile, engineArguments, restorePolicy } from "./criu-options.ts";
import { readMarker, removeMarker, writeMarker } from "./marker.ts";
import { restoreCgroup } from "./restore-cgroup.ts";

/*
 * `restore`: the engine's own, run by the wrapper with the caller's stdio, so that the restored init is a descendant of conmon or the
 * shim; with the options that the images were taken with. In the foreground it lasts as long as the container does, and ends with its
 * status.
 */
export async function restore(call: OciCall, wrapper: Conversation): Promise<OciAnswer> {
  const options = new Options(call.argv);
  const bundle = resolve(call.cwd, options.value("bundle") ?? ".");
  const imagePath = resolve(call.cwd, options.value("image-path") ?? "checkpoint");
  const [features, spec] = [await engineVersion(call.engine), await readSpec(bundle)];
  await checkImages(imagePath);
  const policy = restorePolicy(options, spec, await readManifest(imagePath));
  const { argv, criuConfig } = engineArguments("restore", features, options, policy, [
    "image-path",
    "work-path",
    "bundle",
  ]);
  const scratch = scratchOf(call);
  const workPath = resolve(call.cwd, options.value("work-path") ?? join(scratch, "work"));
  const cgroup = await restoreCgroup(spec, policy.cgroupsMode, call.pid); // refuses a senseless path before anything is noted
  await mkdir(scratch, { recursive: true, mode: 0o700 });
  const known = readMarker(call.marker);
  const kill = killPolicy(spec);
  const { id, root, engine, globalArgv } = call;
  // The marker first: a kill right after restore must find it.
  if (kill && known === undefined)
    writeMarker(call.marker, { version: 1, id, root, engine, globalArgv, kill });
  try {
    await mkdir(workPath, { recursive: true, mode: 0o700 });
    const since = Date.now();
    const env = await criuConfigFile(join(scratch, "criu.conf"), [...criuConfig, ...cgroup.lines]);
    const command = [
      engine,
      ...globalArgv,
      "restore",
      `--bundle=${bundle}`,
      `--image-path=${imagePath}`,
      `--work-path=${workPath}`,
    ];
    const status = await wrapper.run([...command, ...argv, id], { env });
    const detached = options.has("detach");
    if (known === undefined && (status !== 0 || !detached)) removeMarker(call.marker);
    if (status === 0) return { status };
    await cgroup.remove();
    // In the foreground a status may be the container's: CRIU's log of this attempt says whether it was ever restored.
    const log = join(workPath, "restore.log");
    const written = await stat(log).catch(() => undefined); // ENOENT: CRIU was not even started
    const failure = await engineError(
      `restore of container ${id} from ${imagePath}`,
      status,
      undefined,
      written && written.mtimeMs >= since - 1000 ? log : undefined,
    );
    const restored = !detached && failure.name === "RuntimeFailed"; // no error of CRIU's: then it is the container's own end
    return { status, message: restored ? undefined : failure.message };
  } catch (error) {
    if (known === undefined) removeMarker(call.marker);
    await cgroup.remove();
    throw error;
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
}

async function checkImages(imagePath: string): Promise<void> {
  if (await stat(join(imagePath, "inventory.img")).catch(() => undefined)) return;
  if (!(await stat(imagePath).catch(() => undefined)))
    throw new NotFound(`checkpoint ${imagePath} does not exist`);
  throw new BrokenImage(`${imagePath} is not a checkpoint: it holds no inventory.img`);
}
