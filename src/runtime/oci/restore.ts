import { mkdir, rm, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import { type RestoreTarget, restore as restoreContainer } from "../../checkpoint/restore.ts";
import { CriuFailed, Unsupported } from "../../errors/index.ts";
import { isAlive, startTime } from "../../linux/proc.ts";
import { criuConfig as criuSettings, engineVersion } from "../engine.ts";
import { hookOf } from "../hooks.ts";
import { killPolicy } from "../kill-policy.ts";
import { restoredContainer } from "../restored-container.ts";
import { identityOf, readSpec } from "../spec.ts";
import { type Conversation, type OciAnswer, type OciCall, Options } from "./call.ts";
import { engineError, scratchOf } from "./checkpoint.ts";
import { criuConfigFile, engineArguments, restorePolicy } from "./criu-options.ts";
import { noteGeneration } from "./generation.ts";
import { runHook } from "./hooks.ts";
import { readMarker, removeMarker, writeMarker } from "./marker.ts";
import { restoreCgroup } from "./restore-cgroup.ts";
import { containerState } from "./state.ts";

/*
 * `restore`: the chain of src/checkpoint with a container for its target. The engine's own restore is run by the wrapper with the
 * caller's stdio, so that the restored init is a descendant of conmon or the shim; with the options that the images were taken with. In
 * the foreground it lasts as long as the container does, and ends with its status.
 *
 * The caller has made the rest ready: the network namespace, and the files of the root file system.
 */
export async function restore(call: OciCall, wrapper: Conversation): Promise<OciAnswer> {
  const options = new Options(call.argv);
  const bundle = resolve(call.cwd, options.value("bundle") ?? ".");
  const path = resolve(call.cwd, options.value("image-path") ?? "checkpoint");
  const [features, spec] = [await engineVersion(call.engine), await readSpec(bundle)];
  const scratch = scratchOf(call);
  const workPath = options.value("work-path");
  const mode = options.value("manage-cgroups-mode");
  let cgroup = await restoreCgroup(spec, mode, call.pid); // refuses a senseless path before anything is noted
  const known = readMarker(call.marker);
  const kill = killPolicy(spec);
  const { id, root, engine, globalArgv } = call;
  const detached = options.has("detach");
  const hook = await hookOf(spec, "post-restore");
  if (hook && !detached)
    throw new Unsupported(
      `${hook.from} at a restore in the foreground, which lasts as long as the container: restore it with --detach`,
    );
  let status = 0;
  let init = { pid: 0, started: undefined as number | undefined };

  const target: RestoreTarget = {
    what: `container ${id}`,
    directory: scratch,
    container: restoredContainer(spec, bundle, features, {
      rootfs: resolve(bundle, spec.root?.path ?? "rootfs"),
    }),
    log: wrapper.log,
    identity: identityOf(spec, id, ""),
    why: "caller",
    get initPid() {
      return init.pid;
    },
    get hasEnded() {
      return init.pid === 0 || !isAlive(init.pid, init.started);
    },
    postRestoreHook:
      hook && ((env) => runHook({ call, wrapper }, { initPid: init.pid, bundle, spec }, hook, env, scratch)),
    setGeneration: async (generation) => {
      if (init.pid > 0) await noteGeneration(call, init.pid, generation);
    },
    policy: (manifest) => {
      const policy = restorePolicy(options, spec, manifest);
      return {
        ...policy,
        emptyNamespaces: [...policy.emptyNamespaces],
        cgroupsMode: policy.cgroupsMode ?? "",
      };
    },
    prepareNetwork: async () => {},
    putNetworkBack: async () => {},
    prepareCgroup: async (policy) => {
      if (policy.cgroupsMode !== (mode ?? ""))
        cgroup = await restoreCgroup(spec, policy.cgroupsMode || undefined, call.pid);
      await cgroup.make();
    },
    removeCgroup: () => cgroup.remove(),
    engineRestore: async ({ imagePath, workPath: work, policy, externalMounts }) => {
      const { argv, criuConfig } = engineArguments(
        "restore",
        features,
        options,
        { ...policy, tcp: policy.tcp },
        ["image-path", "work-path", "bundle"],
      );
      // The marker first: a kill right after restore must find it.
      if (kill && known === undefined)
        writeMarker(call.marker, { version: 1, id, root, engine, globalArgv, kill });
      const since = Date.now();
      const env = await criuConfigFile(join(scratch, "criu.conf"), [
        ...criuConfig,
        ...cgroup.lines,
        ...criuSettings({ externalMounts }).split("\n").filter(Boolean),
      ]);
      const command = [
        engine,
        ...globalArgv,
        "restore",
        `--bundle=${bundle}`,
        `--image-path=${imagePath}`,
        `--work-path=${work}`,
      ];
      status = await wrapper.run([...command, ...argv, id], { env });
      if (status === 0) {
        const pid = detached ? ((await containerState(call))?.pid ?? 0) : 0; // in the foreground it is over
        init = { pid, started: startTime(pid) };
        return;
      }
      // In the foreground a status may be the container's: CRIU's log of this attempt says whether it was ever restored.
      const log = join(work, "restore.log");
      const written = await stat(log).catch(() => undefined); // ENOENT: CRIU was not even started
      const failure = await engineError(
        `restore of container ${id} from ${imagePath}`,
        status,
        undefined,
        written && written.mtimeMs >= since - 1000 ? log : undefined,
      );
      const lived = !detached && !(failure instanceof CriuFailed); // then it is the container's own end
      if (!lived) throw failure;
      await cgroup.remove();
    },
    // What the engine failed to restore it has undone itself.
    undoEngineRestore: async () => {
      if (status !== 0) return;
      const outputPath = join(scratch, "output");
      await wrapper.run([engine, ...globalArgv, "delete", "--force", id], { outputPath });
    },
  };

  await mkdir(scratch, { recursive: true, mode: 0o700 });
  let failed = true;
  try {
    await restoreContainer(
      target,
      {
        key: call.marker,
        repeated: false,
        path,
        workPath: workPath && resolve(call.cwd, workPath),
      },
      { signal: wrapper.signal },
    );
    failed = status !== 0;
  } catch (error) {
    if (status === 0) throw error;
    return { status, message: (error as Error).message };
  } finally {
    if (known === undefined && (failed || !detached)) removeMarker(call.marker);
    await rm(scratch, { recursive: true, force: true });
  }
  return { status };
}
