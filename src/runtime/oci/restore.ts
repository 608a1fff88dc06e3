import { mkdirSync } from "node:fs";
import { mkdir, readFile, stat, writeFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { isThere } from "../../checkpoint/open.ts";
import {
  type EarlyRestore,
  type RestoreTarget,
  restore as restoreContainer,
  undoEngine,
} from "../../checkpoint/restore.ts";
import { criuBelow } from "../../criu/gate.ts";
import { criuProcesses, killCriu, kill as killProcess, whileWatchingCriu } from "../../criu/leftovers.ts";
import { explainCriuLog } from "../../criu/log.ts";
import { criuLines } from "../../criu/option-file.ts";
import { toldPluginDirectory } from "../../criu/plugins.ts";
import { learnVersionAnswer } from "../../criu/version-answer.ts";
import { NotFound, TimedOut, Unsupported } from "../../errors/index.ts";
import { readApart } from "../../linux/apart.ts";
import { Cgroup } from "../../linux/cgroup.ts";
import { commandLineOf, isFromHere } from "../../linux/command-line.ts";
import { unmountLazily } from "../../linux/mount-options.ts";
import { isAlive, processStat, startTime } from "../../linux/proc.ts";
import { allowedAnnotations } from "../annotated-checkpoint.ts";
import { engineVersion } from "../engine.ts";
import { lastErrorIn } from "../engine-failure.ts";
import { hookOf } from "../hooks.ts";
import { killPolicy } from "../kill-policy.ts";
import { RestoreCgroup } from "../restore-cgroup.ts";
import { configForRestore } from "../restore-configuration.ts";
import { restoreSettings } from "../restore-settings.ts";
import { restoredContainer } from "../restored-container.ts";
import {
  cedanaAnnotations,
  cgroupName,
  identityOf,
  movedFrom,
  readSpec,
  sharedPidNamespace,
} from "../spec.ts";
import {
  type Conversation,
  type OciAnswer,
  type OciCall,
  Options,
  ownGlobalArgv,
  usesSystemd,
} from "./call.ts";
import { engineError, scratchOf } from "./checkpoint.ts";
import { engineArguments, restorePolicy } from "./criu-options.ts";
import { dropScratch } from "./frozen.ts";
import { noteGeneration } from "./generation.ts";
import { runHook } from "./hooks.ts";
import { bundleCopyOf, type Marker, readMarker, removeMarker, writeMarker } from "./marker.ts";
import { runEngineHere } from "./own-engine.ts";
import { CgroupOfRestore } from "./restore-cgroup.ts";
import { alreadyExists, RestoreEngine } from "./restore-engine.ts";
import { containerState, namespaceOf } from "./state.ts";
import { inTurn } from "./turns.ts";

export interface RestoreExtra {
  /** more lines for CRIU's configuration file */
  readonly criuConfig?: readonly string[];
  /** called with the directory of CRIU's images before they are used */
  readonly beforeEngine?: (imagePath: string) => Promise<void>;
  /** its annotations chose the checkpoint: the caller knows of no restore, and hasn't put back the files that the container had changed */
  readonly byAnnotation?: boolean;
  /** its processes don't run yet, so neither does its hook */
  readonly standsStill?: boolean;
}

/*
 * `restore`: the chain of src/checkpoint with a container for its target. The engine's own restore is run by the wrapper with the
 * caller's stdio, so that the restored init is a descendant of conmon or the shim; with the options that the images were taken with. In
 * the foreground it lasts as long as the container does, and ends with its status.
 *
 * The caller has made the rest ready: the network namespace, and (but for a restore by annotation) the files of the root file system.
 */
export async function restore(
  call: OciCall,
  wrapper: Conversation,
  extra: RestoreExtra = {},
): Promise<OciAnswer> {
  // Before anything is made: what fails later is undone, and one that is there is another's.
  if (underWay.has(call.marker) || (await isThere(join(call.root, call.id)))) throw alreadyExists(call);
  underWay.set(call.marker, call);
  try {
    return await restoreNew(call, wrapper, extra);
  } finally {
    isOver(call);
  }
}

/** Restores, by the containers' markers. */
const underWay = new Map<string, OciCall>();

/** The next of the same id may come meanwhile. */
function isOver(call: OciCall): void {
  if (underWay.get(call.marker) === call) underWay.delete(call.marker);
}

async function restoreNew(call: OciCall, wrapper: Conversation, extra: RestoreExtra): Promise<OciAnswer> {
  const options = new Options(call.argv);
  const bundle = resolve(call.cwd, options.value("bundle") ?? ".");
  const path = resolve(call.cwd, options.value("image-path") ?? "checkpoint");
  const [features, spec, settings] = await Promise.all([
    engineVersion(call.engine),
    readSpec(bundle),
    restoreSettings(),
  ]);
  await allowedAnnotations(spec);
  const rootfs = resolve(bundle, spec.root?.path ?? "rootfs");
  const scratch = scratchOf(call);
  const workPath = options.value("work-path");
  const systemd = usesSystemd(call.globalArgv);
  const parent = call.pid;
  const { id, root, engine, globalArgv } = call;
  const program = await wrapper.program();
  const configFile = join(bundle, "config.json");
  const configText = readFile(configFile, "utf8").then((text) =>
    configForRestore(spec, text, { bundle, path: configFile, engine: features.name, program }),
  );
  configText.catch(() => {}); // waited for below
  const [cgroup, within, hook] = await Promise.all([
    RestoreCgroup.of({ spec, id, engine: features.name, systemd, parent }),
    CgroupOfRestore.before(spec, id, systemd),
    extra.standsStill ? undefined : hookOf(spec, "post-restore"),
  ]);
  const cgroupRoots = criuLines({ cgroupRoots: cgroup.roots }); // refuses a senseless path before anything is noted
  if (readMarker(call.marker)?.endedAtMs !== undefined) removeMarker(call.marker); // of what its checkpoint has ended
  const known = readMarker(call.marker);
  const kill = killPolicy(spec);
  const detached = options.has("detach");
  if (hook && !detached)
    throw new Unsupported(
      `${hook.from} at a restore in the foreground, which lasts as long as the container: restore it with --detach`,
    );
  const answersAtOnce = detached && !extra.byAnnotation; // after a create by annotation, its caller has more to do
  const afterwards: (() => Promise<void>)[] = [];
  let status = 0;
  let init = { pid: 0, started: undefined as number | undefined };
  let engineBundle = bundle;
  const marker = (): Marker =>
    readMarker(call.marker) ?? { version: 1, id, root, engine, globalArgv, kill, bundle };

  const pidNamespace = sharedPidNamespace(spec, parent);
  const gate = await criuBelow(parent, program);
  const restoreEngine = new RestoreEngine(call, wrapper, gate, scratch);
  const engineCommand = ({ imagePath, workPath, policy }: EarlyRestore) => {
    const handled = ["image-path", "work-path", "bundle"];
    const { tcp } = policy;
    const { argv, criuConfig } = engineArguments("restore", features, options, { ...policy, tcp }, handled);
    const paths = [`--bundle=${engineBundle}`, `--image-path=${imagePath}`, `--work-path=${workPath}`];
    return { command: [engine, ...globalArgv, "restore", ...paths, ...argv, id], criuConfig };
  };
  let configured: Promise<boolean> | undefined;
  const configuration = () => (configured ??= configure());
  const configure = async () => {
    const text = await configText;
    if (text === undefined) return false;
    engineBundle = await copyOfBundle(call, bundle, text);
    return true;
  };
  const target: RestoreTarget = {
    what: `container ${id}`,
    directory: scratch,
    container: restoredContainer(spec, bundle, features, { rootfs }),
    ...(extra.byAnnotation && { rootfs }),
    log: wrapper.log,
    identity: identityOf(spec, id, namespaceOf(root)),
    why: extra.byAnnotation ? "annotation" : "caller",
    get initPid() {
      return init.pid;
    },
    get hasEnded() {
      return init.started === undefined || !isAlive(init.pid, init.started);
    },
    postRestoreHook:
      hook && ((env) => runHook({ call, wrapper }, { initPid: init.pid, bundle, spec }, hook, env, scratch)),
    ...(answersAtOnce && { afterwards: (work: () => Promise<void>) => void afterwards.push(work) }),
    setGeneration: async (generation) => {
      if (init.pid > 0) noteGeneration(call, init.pid, generation);
    },
    policy: (manifest) => {
      const policy = restorePolicy(options, spec, manifest);
      return {
        ...policy,
        emptyNamespaces: [...policy.emptyNamespaces],
        cgroupsMode: policy.cgroupsMode ?? "",
      };
    },
    startEngine: async (restore) => {
      // In the foreground it is the container's; conmon takes the end of a connection to its console socket for a failure; and in a pid
      // namespace of others it would have ids that are to be kept free.
      if (!detached || options.has("console-socket") || pidNamespace !== undefined) return;
      let command: string[];
      try {
        await configuration();
        ({ command } = engineCommand(restore));
      } catch {
        return; // said where the engine is to run: what is wrong with the checkpoint comes first
      }
      await restoreEngine.startEarly(command);
    },
    dropEngine: async () => (await restoreEngine.drop()) !== "nothing",
    prepareConfiguration: async () => {
      if (await configuration()) writeMarker(call.marker, { ...marker(), bundle, copied: true });
    },
    putConfigurationBack: async () => {}, // the copy goes with the container
    prepareCgroup: ({ cgroupsMode }) => cgroup.make(cgroupsMode),
    removeCgroup: () => cgroup.remove(),
    sharedPids: pidNamespace === undefined ? undefined : { path: pidNamespace, program },
    hasOtherHierarchies: cgroup.hasOtherHierarchies,
    deviceMap: cedanaAnnotations(spec).gpuMap,
    inForeground: !detached,
    cgroup: async () => {
      const state = await containerState(call);
      if (state === undefined) throw new NotFound(`container ${id} has ended`);
      return await Cgroup.of(state.pid, cgroupName(spec, id, features.name));
    },
    engineRestore: async ({ imagePath, workPath: work, policy, externalMounts, withoutPlugins }) => {
      const { command, criuConfig } = engineCommand({ imagePath, workPath: work, policy });
      // The marker first: a kill right after restore must find it.
      if (kill && known === undefined) writeMarker(call.marker, marker());
      await extra.beforeEngine?.(imagePath);
      const since = Date.now();
      const config = [
        ...criuConfig,
        ...cgroupRoots,
        ...(extra.criuConfig ?? []),
        ...criuLines({ externalMounts, pluginDirectory: withoutPlugins ? work : toldPluginDirectory() }),
      ];
      const undo = async () => await undoEngine(target, work, false);
      const run = async () => await restoreEngine.run(command, config, undo);
      const onDeath = async (pids: number[]) => {
        for (const pid of pids) killProcess(pid);
        await killCriu(work, call.pid);
      };
      // An engine in the foreground lives as long as the container, and is not watched.
      status = detached
        ? await whileWatchingCriu({ parent: call.pid, workPath: work, onDeath, log: wrapper.log }, run)
        : await run();
      if (status === 0) {
        learnVersionAnswer(gate.path, wrapper.log);
        const pid = detached ? await restoredPid(call, options) : 0; // in the foreground it is over
        init = { pid, started: startTime(pid) };
        return;
      }
      // In the foreground a status may be the container's: CRIU's log of this attempt says whether it was ever restored.
      const log = join(work, "restore.log");
      const written = await stat(log).catch(() => undefined); // ENOENT: CRIU was not even started
      const ofThis = written !== undefined && written.mtimeMs >= since - 1000;
      if (!detached && ofThis && (await explainCriuLog(log)).outcome === "finished") {
        await cgroup.remove();
        return;
      }
      throw await engineError(
        `restore of container ${id} from ${imagePath}`,
        status,
        undefined,
        ofThis ? log : undefined,
      );
    },
    // A directory of the caller's may have another CRIU at work in it.
    endCriu: async (work) => {
      if (workPath === undefined) await killCriu(work);
      else await killOrphans(work, engine);
    },
    get criuRoots() {
      return [join(engineBundle, "criu-root"), join(bundle, "criu-root"), join(root, id, "criu-root")];
    },
    undoEngineRestore: async () => {
      if (restoreEngine.isAnothers) return; // with the cgroup, as the same configuration names it
      // One that failed has undone what it did, but not one that was killed.
      if (restoreEngine.ownsState) {
        // By ourselves: the wrapper may be what was killed.
        const outputPath = join(scratch, "output");
        const deleted = await runEngineHere([engine, ...ownGlobalArgv(call), "delete", "--force", id], {
          outputPath,
        });
        const words = lastErrorIn(await readFile(outputPath, "utf8").catch(() => "")); // ENOENT: it was not even started
        if (deleted !== 0)
          wrapper.log.error({ status: deleted, words }, "delete what a failed restore has left");
      }
      await within.empty();
    },
    unmount: unmountLazily, // we are in the caller's mount namespace
  };

  if (cedanaAnnotations(spec).lazy)
    wrapper.log.warn(
      "restored eagerly, though cedana.io/lazy asks for a lazy restore: cedana-runtime has nobody to look after a page daemon",
    );
  mkdirSync(scratch, { recursive: true, mode: 0o700 });
  let failed = true;
  try {
    await restoreContainer(
      target,
      {
        key: call.marker,
        repeated: false,
        path,
        ...settings,
        unpack: undefined, // the caller extracts archives, with the files of the container in them
        workPath: workPath && resolve(call.cwd, workPath),
      },
      { signal: wrapper.signal },
    );
    failed = status !== 0;
    if (!failed && answersAtOnce) {
      // Before a checkpoint that the caller asks for next; his going is no reason to leave it.
      const done = inTurn(call.marker, new AbortController().signal, async () => {
        for (const work of afterwards) await work();
      });
      isOver(call); // the engine's state keeps the id from now on
      wrapper.answer({ status });
      await done;
    }
  } catch (error) {
    if (status === 0) throw error;
    return { status, message: (error as Error).message };
  } finally {
    const isOurs = !failed || !restoreEngine.isAnothers;
    if (known === undefined && (failed || !detached) && isOurs) removeMarker(call.marker);
    await dropScratch(scratch, failed, wrapper.log);
  }
  return { status };
}

/** A bundle for the engine's restore alone: the caller's stays as it is. @param text  of its config.json */
async function copyOfBundle(call: OciCall, bundle: string, text: string): Promise<string> {
  const copy = bundleCopyOf(call.marker);
  await mkdir(copy, { recursive: true, mode: 0o700 });
  await writeFile(join(copy, "config.json"), movedFrom(bundle, text), { mode: 0o600 });
  return copy;
}

/** Of the init; 0 when it has ended. The engine has just written it where its caller wants it. */
async function restoredPid(call: OciCall, options: Options): Promise<number> {
  const file = options.value("pid-file");
  const pid = file === undefined ? 0 : Number(await readApart(resolve(call.cwd, file), 64).catch(() => "")); // a FIFO's reader has it
  return pid > 0 ? pid : ((await containerState(call))?.pid ?? 0);
}

const ORPHANS_END_MS = 5_000;

/** CRIUs at work in a directory whose engine has been killed. */
async function killOrphans(workPath: string, engine: string): Promise<void> {
  const hasEngine = async (pid: number): Promise<boolean> => {
    let at = processStat(pid);
    while (at && /^criu/.test(at.comm)) at = processStat(at.parentPid);
    return at !== undefined && isFromHere(at.pid) && (await commandLineOf(at.pid)).startsWith(`${engine}\0`);
  };
  for (const until = Date.now() + ORPHANS_END_MS; ; await new Promise((resolve) => setTimeout(resolve, 20))) {
    const left: number[] = [];
    for (const pid of await criuProcesses(workPath)) if (!(await hasEngine(pid))) left.push(pid);
    if (left.length === 0) return;
    if (Date.now() >= until) throw new TimedOut(`CRIU (pids ${left}) of a failed restore doesn't end`);
    for (const pid of left) killProcess(pid);
  }
}
