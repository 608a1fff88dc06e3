import { existsSync } from "node:fs";
import { rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { NotFound, Unavailable, WrongState } from "../errors/index.ts";
import type { Cgroup } from "../linux/cgroup.ts";
import type { Mount } from "../proto/generated/types.ts";
import { Engine } from "../runtime/engine.ts";
import { execKillPolicy, killPolicy } from "../runtime/kill-policy.ts";
import { decodeOptions, type RuntimeOptions } from "../runtime/options.ts";
import {
  asksForCheckpoints,
  cedanaAnnotations,
  hasOurAnnotations,
  namesScope,
  type OciSpec,
  readSpec,
} from "../runtime/spec.ts";
import type { CheckpointRequest } from "./checkpoint.ts";
import type { Container, TaskPod } from "./container.ts";
import { ContainerCgroup } from "./container-cgroup.ts";
import { EngineCalls } from "./engine-calls.ts";
import * as events from "./events.ts";
import { Execs } from "./execs.ts";
import { Exits } from "./exits.ts";
import {
  exitOf,
  exitRecord,
  MAX_ANSWERS,
  type TaskRecord,
  writeEngineNote,
  writeTaskRecord,
} from "./journal.ts";
import { ALL_PIPES, type Work } from "./keeper.ts";
import { LazyMemory } from "./lazy-memory.ts";
import { mountAll } from "./mounts.ts";
import { type Exit, nowNs, Process, type ProcessState, type ProcessStdio, refusal } from "./process.ts";
import { Restoration, type RestorationState } from "./restoration.ts";
import type { RestoreSource } from "./restore-source.ts";
import { Signals } from "./signals.ts";
import { planStdio } from "./stdio.ts";
import { type TaskLogger, taskLogger } from "./task-log.ts";

const SIGKILL = 9;
/** How long the end of an init that never ran is waited for when its container is deleted. */
const END_BEFORE_START_MS = 2_000;

export interface CreateRequest {
  id: string;
  bundle: string;
  rootfs: Mount[];
  stdio: ProcessStdio;
  /** directory of images to restore from, "" for a fresh start */
  checkpoint: string;
  options: { typeUrl: string; value: Uint8Array } | undefined;
}

/** What a new task needs of its pod besides: exits of processes whose Create is under way come to the tasks in `creating`. */
type CreatingPod = TaskPod & { readonly creating: Set<Task> };

/**
 * A container under containerd, from Create to Delete: its init, its rootfs, and the record in the bundle from which the next cedanad
 * continues. Its parts know each a subject of its own: the engine's commands (`engine-calls.ts`), the processes that are added
 * (`execs.ts`), when an end is told (`exits.ts`), the cgroup (`container-cgroup.ts`), signals (`signals.ts`), the start by a restore (`restoration.ts`).
 *
 * Each verb does its work by operations of the keeper, whose tags come from the request. A verb that is run again after a
 * crash therefore takes the same way, finds what is done already done, and gives the same answer.
 */
export class Task implements Container {
  readonly id: string;
  readonly bundle: string;
  readonly namespace: string;
  readonly init: Process;
  readonly engine: Engine;
  readonly options: RuntimeOptions;
  readonly log: TaskLogger;
  readonly pod: TaskPod;
  readonly engineCalls: EngineCalls;
  readonly containerCgroup: ContainerCgroup;
  readonly exits: Exits;
  readonly execs: Execs;
  readonly memory: LazyMemory;
  readonly signals: Signals;
  /** of one that was created from a checkpoint */
  readonly restoration: Restoration | undefined;
  generation = 0;
  #answers: TaskRecord["answers"] = [];
  #spec: OciSpec | undefined;
  #rootfsMounted = false;

  private constructor(
    pod: TaskPod,
    id: string,
    bundle: string,
    options: RuntimeOptions,
    init: Process,
    restoration: RestorationState | undefined,
  ) {
    const { keeper } = pod;
    this.pod = pod;
    this.id = id;
    this.bundle = bundle;
    this.namespace = pod.namespace;
    this.options = options;
    this.init = init;
    this.engine = new Engine({
      binary: options.binaryName,
      root: options.root,
      systemdCgroup: options.systemdCgroup,
      namespace: pod.namespace,
    });
    this.log = taskLogger(pod.log, bundle, id);
    this.engineCalls = new EngineCalls(this);
    this.containerCgroup = new ContainerCgroup(this);
    this.exits = new Exits(this);
    this.execs = new Execs(this, this.exits);
    this.memory = new LazyMemory({
      signal: (pid, signal) => keeper.signal(keeper.ownTag("lazy-pages"), pid, signal),
      log: this.log,
      changed: () => this.record(),
      filled: async () => await this.restoration?.discard(),
      kill: async () => await this.restoration?.killWithoutMemory(),
    });
    this.signals = new Signals(
      this,
      async (signal) => {
        const { checkpointAtEnd } = await import("./triggered.ts");
        await checkpointAtEnd(this, signal);
      },
      () => this.exits.release(),
    );
    this.restoration =
      restoration &&
      new Restoration(this, restoration, {
        restore: async (work) => {
          const { restore } = await import("./restore.ts");
          await restore(this, this.restoration!, work);
        },
        create: async (work) => await this.#createContainer(work),
        mountRootfs: async (work, mounts, step) => await this.#mountRootfs(work, mounts, step),
        kill: async () => await this.signals.send(keeper.ownTag("kill-without-memory"), init, SIGKILL),
      });
  }

  /**
   * Containerd's Create: rootfs, stdio, and the engine's `create`, or everything but that when it will be restored.
   * @param answer  what the call will be answered, for the record: without one on disk there is no task
   */
  static async create(
    pod: CreatingPod,
    work: Work,
    request: CreateRequest,
    answer: (task: Task) => Uint8Array,
  ): Promise<Task> {
    const [given, spec] = await Promise.all([decodeOptions(request.options), readSpec(request.bundle)]);
    // Docker, with systemd for its cgroups, has no options for a shim that it doesn't know.
    const systemd = given.systemdCgroup || (namesScope(spec) && existsSync("/run/systemd/system"));
    const options = { ...given, systemdCgroup: systemd };
    killPolicy(spec); // a signal that doesn't exist is refused now, not when it is needed
    execKillPolicy(spec, {});
    if (hasOurAnnotations(spec)) await (await import("../runtime/hooks.ts")).checkHooks(spec);
    const source = await restoreSourceOf(pod, request, options, spec);
    const init = new Process("", request.id, request.stdio, source ? "createdFromCheckpoint" : "created");
    const task = new Task(
      pod,
      request.id,
      request.bundle,
      options,
      init,
      source && {
        source,
        rootfs: source.onFailure === "fresh" ? request.rootfs : [],
        afresh: undefined,
      },
    );
    task.#spec = spec;
    if (options.warnings.length > 0) task.log.warn({ warnings: options.warnings }, "runtime options");
    init.starting = true; // an exit waits until the create event is out
    pod.creating.add(task);
    try {
      writeEngineNote(task.bundle, task.engine.binary, task.engine.root, task.id);
      await task.restoration?.lock();
      const stdio = {
        ...planStdio(init.io, init.stdio, task.id, pod.namespace, options),
        ...(source && { flags: ALL_PIPES }),
      };
      await task.#mountRootfs(work, request.rootfs);
      await pod.keeper.ioOpen(work.tag("io"), stdio);
      if (!source) await task.#createContainer(work);
      task.#remember(work, answer(task));
      task.writeRecord();
    } catch (error) {
      await task.#undoCreate(work);
      throw error;
    } finally {
      pod.creating.delete(task);
    }
    task.published(work, request.rootfs);
    return task;
  }

  /** Tells of the creation, and the keeper of the task; again when we ended between the record and the event. */
  published(work: Work, rootfs: Mount[]): void {
    this.publish(`create:${work.request}`, events.taskCreate(this, rootfs, this.restoration?.source.path));
    this.#tellKeeper();
  }

  /** The task as the cedanad before us left it. */
  static revive(pod: TaskPod, record: TaskRecord): Task {
    const { terminal, stdin, stdout, stderr } = record;
    const init = new Process(
      "",
      record.id,
      { terminal, stdin, stdout, stderr },
      record.state as ProcessState,
    );
    const task = new Task(
      pod,
      record.id,
      record.bundle,
      record.options as RuntimeOptions,
      init,
      Restoration.stateOf(record),
    );
    task.generation = record.generation ?? 0;
    init.pid = record.pid;
    if (record.exit) init.markExited(exitOf(record.exit));
    task.#rootfsMounted = record.rootfsMounted;
    task.containerCgroup.revive(record.oomKills);
    task.signals.revive(record);
    task.#answers = record.answers;
    task.execs.revive(record.execs);
    if (record.lazy) void task.memory.revive(record.lazy, record.state !== "createdFromCheckpoint");
    return task;
  }

  /** What a record doesn't hold is found again. */
  async revived(): Promise<void> {
    if (this.restoration)
      await this.logFailure(
        "lock the checkpoint that a task is to be restored from",
        this.restoration.lock(),
      );
    if (this.init.state === "running") await this.restoration?.discard(); // a crash may have come between the record and this
    if (this.init.pid === 0 || this.init.exit) return;
    try {
      this.#spec = await readSpec(this.bundle);
      await this.containerCgroup.find();
      void this.containerCgroup.outOfMemory(); // the keeper's notice may have gone to nobody
      if (this.init.state === "running") this.#scheduleCheckpoints(true);
    } catch (error) {
      this.log.warn({ err: error }, "revive the task: its exit is expected");
    }
  }

  /** @throws NotFound */
  process(execId: string): Process {
    if (execId === "") return this.init;
    const process = this.execs.get(execId);
    if (!process) throw new NotFound(`process does not exist ${execId}: exec of task ${this.id}`);
    return process;
  }

  processes(): Process[] {
    return [this.init, ...this.execs.values()];
  }

  /** The answer given to this request before a crash, if it was. */
  answerTo(request: number): Uint8Array | undefined {
    const answer = this.#answers.find((one) => one.request === request);
    return answer && Buffer.from(answer.payload, "base64");
  }

  /** Records the state together with the answer that is about to go out. */
  commit(work: Work, answer: Uint8Array): void {
    this.#remember(work, answer);
    this.record();
  }

  #remember(work: Work, answer: Uint8Array): void {
    this.#answers.push({ request: work.request, payload: Buffer.from(answer).toString("base64") });
    if (this.#answers.length > MAX_ANSWERS) this.#answers.shift();
  }

  record(): boolean {
    if (!this.pod.keeper.connected) return false;
    this.#tellKeeper();
    try {
      this.writeRecord();
      return true;
    } catch (error) {
      this.log.error({ err: error }, "write the task's record: an end of cedanad now would lose this step");
      return false;
    }
  }

  #tellKeeper(): void {
    const alive = (process: Process) => process.pid !== 0 && !process.exit;
    const execPids = [...this.execs.values()].filter(alive).map((process) => process.pid);
    this.pod.keeper.task(this.id, this.bundle, alive(this.init) ? this.init.pid : 0, execPids);
  }

  /**
   * Writes the record. @throws SyscallFailed when it can't be written; Unavailable once the keeper's connection has ended: if it comes back, it
   * gets a task of its own from the record, as after a crash, and what fails here for want of it has not happened there
   */
  writeRecord(): void {
    const { keeper } = this.pod;
    if (!keeper.connected)
      throw new Unavailable(`record of task ${this.id}: the pod's keeper (pid ${keeper.pid}) is gone`);
    const stdio = this.init.stdio;
    writeTaskRecord({
      version: 1,
      id: this.id,
      namespace: this.namespace,
      bundle: this.bundle,
      state: this.init.state,
      pid: this.init.pid,
      ...stdio,
      options: this.options,
      rootfsMounted: this.#rootfsMounted,
      ...this.restoration?.record,
      ...this.signals.record,
      ...(this.generation > 0 && { generation: this.generation }),
      oomKills: this.containerCgroup.oomKills,
      ...exitRecord(this.init.exit),
      execs: this.execs.records(),
      ...(this.memory.record && { lazy: this.memory.record }),
      answers: this.#answers,
    });
  }

  publish(key: string, event: events.Event): void {
    this.pod.publish(this.id, key, event);
  }

  async logFailure(what: string, action: Promise<unknown>): Promise<boolean> {
    try {
      await action;
      return true;
    } catch (cause) {
      this.log.warn({ err: cause }, what);
      return false;
    }
  }

  get knownSpec(): OciSpec | undefined {
    return this.#spec;
  }

  async spec(): Promise<OciSpec> {
    this.#spec ??= await readSpec(this.bundle);
    return this.#spec;
  }

  async cgroup(): Promise<Cgroup> {
    return await this.containerCgroup.get();
  }

  // ---- start -------------------------------------------------------------------------------------------------------

  /** Starts the init: the engine's `start`, or `restore` for a task created from a checkpoint. @returns its pid */
  async start(work: Work): Promise<number> {
    const restoring = this.init.state === "createdFromCheckpoint";
    this.init.check("start");
    this.init.starting = true;
    try {
      if (restoring) await this.restoration!.start(work);
      else await this.engineCalls.start(work.tag("start"));
      this.init.move("start");
    } catch (error) {
      this.exits.started(this.init);
      throw error;
    }
    this.publish(`start:${work.request}`, events.taskStart(this.id, this.init.pid));
    this.#scheduleCheckpoints(false);
    return this.init.pid;
  }

  /** Few containers ask for it, and only they load what it takes. */
  #scheduleCheckpoints(revived: boolean): void {
    if (!this.#spec || !asksForCheckpoints(this.#spec)) return;
    void import("./schedule.ts").then(({ scheduleCheckpoints }) => scheduleCheckpoints(this, revived));
  }

  // ---- freezer, resources, checkpoint, stdio -------------------------------------------------------------------------

  /** @param work  its request tells this pause from another of the task's */
  async pause(work: { readonly request: number | string }): Promise<void> {
    this.init.check("pause");
    await (await this.cgroup()).freeze();
    this.init.move("pause");
    this.publish(`paused:${work.request}`, events.taskPaused(this.id));
  }

  async resume(work: { readonly request: number | string }): Promise<void> {
    this.init.check("resume");
    await (await this.cgroup()).thaw();
    this.init.move("resume");
    this.publish(`resumed:${work.request}`, events.taskResumed(this.id));
  }

  async update(work: Work, resources: Uint8Array): Promise<void> {
    if (this.init.state === "stopped" || this.init.state === "deleted" || this.init.pid === 0)
      throw new WrongState(`${refusal("update", this.init.state)}: task ${this.id}`);
    const file = join(this.bundle, `update-${work.request}.json`);
    await writeFile(file, resources, { mode: 0o600 });
    try {
      await this.engineCalls.update(work.tag("update"), file);
    } finally {
      await rm(file, { force: true });
    }
  }

  /** What a checkpoint does whose caller passes no options at all: Docker passes them to io.containerd.runc.v2 alone. */
  async endsWithCheckpoint(): Promise<boolean> {
    const spec = await this.spec();
    return hasOurAnnotations(spec) && (cedanaAnnotations(spec).checkpointExit ?? false);
  }

  async checkpoint(work: Work, request: CheckpointRequest): Promise<void> {
    // A dump that ended the task, repeated because we crashed before the answer: its steps are remembered by the keeper.
    if (!(work.repeated && this.init.state === "stopped")) this.init.check("checkpoint");
    // What only checkpoints and restores need is loaded with the first of them.
    const { dump } = await import("./checkpoint.ts");
    await dump(this, work, request);
    if (!request.options.exit)
      this.publish(`checkpointed:${work.request}`, events.taskCheckpointed(this.id, request.imagePath));
  }

  async resizePty(work: Work, process: Process, width: number, height: number): Promise<void> {
    if (!process.stdio.terminal || process.pid === 0 || process.exit) return; // as the Go shim: nothing to resize is no error
    await this.pod.keeper.ioResize(work.tag("resize"), process.io, width, height);
  }

  async closeStdin(work: Work, process: Process): Promise<void> {
    if (process.stdio.stdin === "" || process.exit) return;
    await this.pod.keeper.ioCloseStdin(work.tag("close-stdin"), process.io);
  }

  // ---- delete --------------------------------------------------------------------------------------------------------

  /** Removes the container: drains and closes its stdio, the engine's `delete`, unmounts the rootfs. @returns init's exit */
  async delete(work: Work): Promise<Exit> {
    const { init } = this;
    const neverRan = init.state === "created" || init.state === "createdFromCheckpoint";
    if (init.state === "createdFromCheckpoint") await this.restoration?.giveClaimBack();
    if (init.state === "deleted")
      throw new NotFound(`task ${this.id} has been deleted: container not created`);
    init.check("delete");
    const { keeper } = this.pod;
    // The engine's part and the output of a process that has ended have nothing to do with each other.
    const drained = neverRan ? undefined : this.exits.drain(work, init);
    await Promise.all([this.engineCalls.delete(work.tag("delete"), neverRan), drained]);
    await this.memory.end();
    if (neverRan && init.pid !== 0 && !init.exit)
      await Promise.race([init.waitForExit(), sleep(END_BEFORE_START_MS)]);
    await Promise.all([
      ...[...this.execs.values()].map((exec) => keeper.ioFree(work.tag(`io-free:${exec.io}`), exec.io)),
      keeper.ioFree(work.tag("io-free"), init.io),
      this.#rootfsMounted && keeper.unmount(work.tag("unmount"), join(this.bundle, "rootfs")),
      this.containerCgroup.remove(),
      this.restoration?.discard(),
    ]);
    this.#rootfsMounted = false;
    init.move("delete");
    if (init.pid === 0) init.neverRan();
    const exit = init.exit ?? { status: 0, atNs: nowNs() };
    this.publish(`delete:${work.request}`, events.taskDelete(this.id, init.pid, exit.status, exit.atNs));
    return exit;
  }

  /**
   * After containerd has given the task up (its `delete` call while we still hold it): everything of it ends, whatever state
   * it is in.
   */
  async destroy(): Promise<Exit> {
    const { keeper } = this.pod;
    // Of one that is being restored, its start knows.
    if (this.init.state === "createdFromCheckpoint" && !this.init.starting)
      await this.restoration?.giveClaimBack();
    if (this.init.state !== "deleted") {
      await this.logFailure(
        "delete the container of an abandoned task",
        this.engineCalls.delete(keeper.ownTag("destroy"), true),
      );
      await this.logFailure("end the page daemon of an abandoned task", this.memory.end());
      for (const process of this.processes()) await keeper.ioFree(keeper.ownTag("io-free"), process.io);
      await this.containerCgroup.remove();
      await this.restoration?.discard();
      if (this.#rootfsMounted) await keeper.unmount(keeper.ownTag("unmount"), join(this.bundle, "rootfs"));
    }
    return this.init.exit ?? { status: 128 + SIGKILL, atNs: nowNs() };
  }

  // ---- parts ---------------------------------------------------------------------------------------------------------

  async #mountRootfs(work: Work, mounts: readonly Mount[], step = "mount"): Promise<void> {
    if (mounts.length === 0) return;
    this.#rootfsMounted = true;
    await mountAll(this.pod.keeper, mounts, join(this.bundle, "rootfs"), (at) => work.tag(`${step}:${at}`));
  }

  async #createContainer(work: Work): Promise<void> {
    const spec = await this.spec();
    if (hasOurAnnotations(spec)) {
      const { injectGpu } = await import("../runtime/gpu-injection.ts");
      this.#spec = (await injectGpu(this.bundle, spec, this)) ?? spec;
    }
    this.exits.adopt(work, this.init, await this.engineCalls.create(work));
    await this.containerCgroup.attach(work);
  }

  async #undoCreate(work: Work): Promise<void> {
    const undo = async (what: string, action: Promise<unknown>): Promise<boolean> => {
      try {
        await action;
        return true;
      } catch (error) {
        if (!(error instanceof Unavailable)) this.log.error({ err: error }, `undo a failed create: ${what}`);
        return false;
      }
    };
    this.restoration?.unlock();
    await this.restoration?.giveClaimBack();
    const deleted = await undo("delete", this.engineCalls.delete(work.tag("undo-create"), true));
    await undo("remove the cgroup", this.containerCgroup.remove());
    await undo("close stdio", this.pod.keeper.ioFree(work.tag("undo-io"), this.init.io));
    if (this.#rootfsMounted)
      await undo("unmount", this.pod.keeper.unmount(work.tag("undo-mount"), join(this.bundle, "rootfs")));
    if (this.restoration) await undo("remove what was unpacked", this.restoration.discard());
    // Where the keeper has gone, the launcher's `delete` finds the container by it.
    if (deleted) await rm(join(this.bundle, "cedana-engine"), { force: true });
    this.pod.keeper.taskGone(this.id); // it may watch for out-of-memory kills
    this.exits.forget(this.init);
  }
}

/** Most containers aren't restored, and don't load what it takes. */
async function restoreSourceOf(
  pod: TaskPod,
  request: CreateRequest,
  { criuImagePath, binaryName }: RuntimeOptions,
  spec: OciSpec,
): Promise<RestoreSource | undefined> {
  const asked = request.checkpoint || criuImagePath || undefined;
  if (asked === undefined && !hasOurAnnotations(spec)) return undefined;
  const { chooseRestoreSource } = await import("./restore-source.ts");
  return await chooseRestoreSource(spec, asked, {
    id: request.id,
    bundle: request.bundle,
    engine: binaryName || "runc",
    namespace: pod.namespace,
    terminal: request.stdio.terminal,
    log: taskLogger(pod.log, request.bundle, request.id),
  });
}
