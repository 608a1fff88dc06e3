import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { deviceSlot } from "../checkpoint/device-slot.ts";
import { freezeMarker, hookNote, thawNoted } from "../checkpoint/freeze-marker.ts";
import { gateBelow } from "../criu/gate.ts";
import { learnVersionAnswer } from "../criu/version-answer.ts";
import {
  AlreadyExists,
  BrokenImage,
  NotFound,
  SyscallFailed,
  Unavailable,
  WrongState,
} from "../errors/index.ts";
import { Cgroup, hostCgroupVersion, removeCgroup } from "../linux/cgroup.ts";
import { unpackDirectory } from "../runtime/configuration.ts";
import { Engine, type EngineCommand, engineFailure, type RestoreCommand } from "../runtime/engine.ts";
import { execKillPolicy, type KillPolicy, killPolicy, planKill } from "../runtime/kill-policy.ts";
import { decodeOptions, type RuntimeOptions } from "../runtime/options.ts";
import {
  asksForCheckpoints,
  cedanaAnnotations,
  cgroupName,
  cgroupPathV2,
  hasOurAnnotations,
  type OciProcess,
  type OciSpec,
  readSpec,
  sharesPidNamespace,
} from "../runtime/spec.ts";
import type { CheckpointRequest } from "./checkpoint.ts";
import { Ending } from "./ending.ts";
import { Escalations } from "./escalation.ts";
import * as events from "./events.ts";
import {
  type ExecRecord,
  MAX_ANSWERS,
  type TaskRecord,
  writeEngineNote,
  writeTaskRecord,
} from "./journal.ts";
import { type AdoptedExit, ALL_PIPES, stdioKind, type Tag } from "./keeper.ts";
import { LazyMemory } from "./lazy-memory.ts";
import { mountAll } from "./mounts.ts";
import type { Pod } from "./pod.ts";
import { type Exit, Process, type ProcessStdio, refusal } from "./process.ts";
import type { RestoreSource } from "./restore-source.ts";
import { planStdio } from "./stdio.ts";
import { type TaskLogger, taskLogger } from "./task-log.ts";

const SIGKILL = 9;
/** How long Delete waits for output that a background child may hold open: as the Go shim, unless a test is in a hurry. */
const DRAIN_LIMIT_MS = Number(process.env.CEDANA_DRAIN_LIMIT_MS) || 10_000;
/** The counter of OOM kills may rise a little after the notification (cgroups version 1). */
const OOM_COUNTER_ATTEMPTS = 10;
const OOM_COUNTER_INTERVAL_MS = 20;
/** How long a restore whose page daemon has ended may go on: it fails within milliseconds where it can. */
const ABANDONED_RESTORE_MS = 3_000;

/** In the bundle while a checkpoint is taken that containerd hasn't asked for. */
export const TRIGGERED_DIRECTORY = "cedana-dump";

/** The call on whose behalf something is done: gives its operations tags that a repetition derives again. */
export interface Work {
  /** the keeper's number of the request */
  readonly request: number;
  /** the request was delivered to a cedanad before us */
  readonly repeated: boolean;
  /** when the request arrived at the keeper, nanoseconds since 1970 */
  readonly sinceNs: bigint;
  tag(step: string): Tag;
}

export interface RootfsMount {
  type: string;
  source: string;
  /** below the root file system; empty: the root itself */
  target: string;
  options: string[];
}

export interface CreateRequest {
  id: string;
  bundle: string;
  rootfs: RootfsMount[];
  stdio: ProcessStdio;
  /** directory of images to restore from, "" for a fresh start */
  checkpoint: string;
  parentCheckpoint: string;
  options: { typeUrl: string; value: Uint8Array } | undefined;
}

export interface ExecRequest {
  execId: string;
  stdio: ProcessStdio;
  /** the OCI process, JSON */
  spec: string;
}

/**
 * A container under containerd, from Create to Delete: its init, its exec'd processes, its rootfs, and the record in the
 * bundle from which the next cedanad continues.
 *
 * Each verb does its work by operations of the keeper, whose tags come from the request. A verb that is run again after a
 * crash therefore takes the same way, finds what is done already done, and gives the same answer.
 */
export class Task {
  readonly id: string;
  readonly bundle: string;
  readonly init: Process;
  readonly engine: Engine;
  readonly options: RuntimeOptions;
  readonly execs = new Map<string, Process>();
  /** how many restores the container has behind it */
  generation = 0;
  readonly memory: LazyMemory;
  readonly #pod: Pod;
  readonly #log: TaskLogger;
  /** of each exec: what tells its files from those of another of its name, and what of its OCI process signals depend on */
  readonly #execFacts = new Map<string, { serial: number; process: OciProcess }>();
  #answers: TaskRecord["answers"] = [];
  #spec: OciSpec | undefined;
  #cgroup: Cgroup | undefined;
  #rootfsMounted = false;
  #restoreSource: RestoreSource | undefined;
  /** the lock on its checkpoint, until it is restored */
  #use: Disposable | undefined;
  /** a failed restore is given up: its files are (reset), or are to be, as before it */
  #afresh: "begun" | "reset" | undefined;
  /** no container of the engine's is left of a restore that failed */
  #isDeleted = true;
  /** what was mounted at the rootfs, where it may have to be mounted again */
  #rootfs: RootfsMount[] = [];
  #parentCheckpoint: string | undefined;
  #oomKills = 0;
  readonly #ending: Ending;
  readonly #escalations: Escalations;

  private constructor(
    pod: Pod,
    id: string,
    bundle: string,
    options: RuntimeOptions,
    init: Process,
    restore: RestoreSource | undefined,
  ) {
    this.#pod = pod;
    this.id = id;
    this.bundle = bundle;
    this.options = options;
    this.init = init;
    this.#restoreSource = restore;
    this.engine = new Engine({
      binary: options.binaryName,
      root: options.root,
      systemdCgroup: options.systemdCgroup,
      namespace: pod.namespace,
    });
    this.#log = taskLogger(pod.log, bundle, id);
    this.memory = new LazyMemory({
      signal: (pid, signal) => pod.keeper.signal(pod.keeper.ownTag("lazy-pages"), pid, signal),
      log: this.#log,
      changed: () => this.record(),
      filled: () => this.discardRestore(),
      kill: () => this.#killWithoutMemory(),
    });
    this.#ending = new Ending({
      what: `task ${id}`,
      log: this.#log,
      init,
      changed: () => this.record(),
      checkpoint: async (signal) => {
        const { checkpointAtEnd } = await import("./triggered.ts");
        await checkpointAtEnd(this, signal);
      },
      send: async (signal, escalation) => {
        await this.undo("send the signal", this.#signal(pod.keeper.ownTag("signal"), init, signal));
        this.#escalations.begin("", escalation);
      },
      over: () => this.#releaseHeldExits(),
    });
    this.#escalations = new Escalations({
      send: async (execId, signal) =>
        await this.#signal(pod.keeper.ownTag("escalate"), this.process(execId), signal),
      changed: () => this.record(),
      log: this.#log,
    });
  }

  get namespace(): string {
    return this.#pod.namespace;
  }

  get log(): TaskLogger {
    return this.#log;
  }

  get pod(): Pod {
    return this.#pod;
  }

  get restoreFrom(): string | undefined {
    return this.#restoreSource?.path;
  }

  /** Who chose what it is restored from. */
  get restoreAsked(): RestoreSource["why"] {
    return this.#restoreSource?.why ?? "caller";
  }

  /**
   * Containerd's Create: rootfs, stdio, and the engine's `create`, or everything but that when it will be restored.
   * @param answer  what the call will be answered, for the record: without one on disk there is no task
   */
  static async create(
    pod: Pod,
    work: Work,
    request: CreateRequest,
    answer: (task: Task) => Uint8Array,
  ): Promise<Task> {
    const [options, spec] = await Promise.all([decodeOptions(request.options), readSpec(request.bundle)]);
    killPolicy(spec); // a signal that doesn't exist is refused now, not when it is needed
    execKillPolicy(spec, {});
    if (hasOurAnnotations(spec)) await (await import("../runtime/hooks.ts")).checkHooks(spec);
    const restore = await restoreSourceOf(pod, request, options, spec);
    const state = restore ? "createdFromCheckpoint" : "created";
    const init = new Process("", request.id, request.stdio, state);
    const task = new Task(pod, request.id, request.bundle, options, init, restore);
    task.#spec = spec;
    if (options.warnings.length > 0) task.#log.warn({ warnings: options.warnings }, "runtime options");
    task.#parentCheckpoint = request.parentCheckpoint || undefined;
    if (restore?.onFailure === "fresh") task.#rootfs = request.rootfs;
    init.starting = true; // an exit waits until the create event is out
    pod.creating.add(task);
    try {
      writeEngineNote(task.bundle, task.engine.binary, task.engine.root, task.id);
      await task.#useCheckpoint();
      const stdio = {
        ...planStdio(init.io, init.stdio, task.id, pod.namespace, options),
        ...(restore && { flags: ALL_PIPES }),
      };
      await task.#mountRootfs(work, request.rootfs);
      await pod.keeper.ioOpen(work.tag("io"), stdio);
      if (!restore) await task.#createContainer(work);
      task.#remember(work, answer(task));
      task.#writeRecord();
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
  published(work: Work, rootfs: RootfsMount[]): void {
    this.publish(`create:${work.request}`, events.taskCreate(this, rootfs));
    this.#tellKeeper();
  }

  /** The task as the cedanad before us left it. */
  static revive(pod: Pod, record: TaskRecord): Task {
    const stdio = {
      terminal: record.terminal,
      stdin: record.stdin,
      stdout: record.stdout,
      stderr: record.stderr,
    };
    const init = new Process("", record.id, stdio, record.state as never);
    const task = new Task(
      pod,
      record.id,
      record.bundle,
      record.options as RuntimeOptions,
      init,
      record.restoreFrom === undefined
        ? undefined
        : {
            path: record.restoreFrom,
            onFailure: record.onRestoreFailure ?? "fail",
            why: record.restoreAsked ?? "caller",
            claim: record.claim,
          },
    );
    task.generation = record.generation ?? 0;
    init.pid = record.pid;
    if (record.exit) init.markExited({ status: record.exit.status, atNs: BigInt(record.exit.atNs) });
    task.#rootfsMounted = record.rootfsMounted;
    task.#rootfs = record.rootfs ?? [];
    task.#afresh = record.afresh;
    task.#parentCheckpoint = record.parentCheckpoint;
    task.#oomKills = record.oomKills;
    task.#ending.revive(record.ending);
    task.#answers = record.answers;
    for (const exec of record.execs) {
      const process = new Process(
        exec.execId,
        execIo(record.id, exec.serial),
        { terminal: exec.terminal, stdin: exec.stdin, stdout: exec.stdout, stderr: exec.stderr },
        exec.state as never,
      );
      process.pid = exec.pid;
      if (exec.exit) process.markExited({ status: exec.exit.status, atNs: BigInt(exec.exit.atNs) });
      task.execs.set(exec.execId, process);
      task.#execFacts.set(exec.execId, { serial: exec.serial, process: task.#revivedProcess(exec) });
    }
    task.#escalations.revive(record.escalations ?? []);
    if (record.lazy) void task.memory.revive(record.lazy, record.state !== "createdFromCheckpoint");
    return task;
  }

  /** What a record doesn't hold is found again. */
  async revived(): Promise<void> {
    await this.undo("lock the checkpoint that a task is to be restored from", this.#useCheckpoint());
    if (this.init.state === "running") await this.discardRestore(); // a crash may have come between the record and this
    if (this.init.pid === 0 || this.init.exit) return;
    try {
      this.#spec = await readSpec(this.bundle);
      this.#cgroup = await Cgroup.of(
        this.init.pid,
        this.#spec && cgroupName(this.#spec, this.id, this.engine.name),
      );
      void this.outOfMemory(1); // the keeper's notice may have gone to nobody
      if (this.init.state === "running") this.#scheduleCheckpoints(true);
    } catch (error) {
      this.#log.warn({ err: error }, "revive the task: its exit is expected");
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

  /**
   * Writes the record, and tells the keeper which pids it may answer with alone.
   * @returns false when it can't be written (a full disk). What has happened has happened, so the call goes on; only a cedanad that
   *   ends before the next record is written makes a difference.
   */
  record(): boolean {
    this.#tellKeeper();
    try {
      this.#writeRecord();
      return true;
    } catch (error) {
      this.#log.error({ err: error }, "write the task's record: an end of cedanad now would lose this step");
      return false;
    }
  }

  #tellKeeper(): void {
    const alive = (process: Process) => process.pid !== 0 && !process.exit;
    const execPids = [...this.execs.values()].filter(alive).map((process) => process.pid);
    this.#pod.keeper.task(this.id, this.bundle, alive(this.init) ? this.init.pid : 0, execPids);
  }

  #writeRecord(): void {
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
      ...(this.#restoreSource && {
        restoreFrom: this.#restoreSource.path,
        onRestoreFailure: this.#restoreSource.onFailure,
        restoreAsked: this.#restoreSource.why,
        ...(this.#restoreSource.claim && { claim: this.#restoreSource.claim }),
      }),
      ...(this.#ending.record && { ending: this.#ending.record }),
      ...(this.#rootfs.length > 0 && { rootfs: this.#rootfs }),
      ...(this.#afresh && { afresh: this.#afresh }),
      ...(this.#parentCheckpoint && { parentCheckpoint: this.#parentCheckpoint }),
      ...(this.generation > 0 && { generation: this.generation }),
      oomKills: this.#oomKills,
      ...exitRecord(this.init.exit),
      execs: [...this.execs.values()].map((process): ExecRecord => {
        return {
          execId: process.execId,
          serial: this.#execFacts.get(process.execId)!.serial,
          state: process.state,
          pid: process.pid,
          ...process.stdio,
          ...exitRecord(process.exit),
        };
      }),
      ...(this.memory.record && { lazy: this.memory.record }),
      ...(this.#escalations.pending && { escalations: this.#escalations.records() }),
      answers: this.#answers,
    });
  }

  // ---- start -------------------------------------------------------------------------------------------------------

  /** Starts the init: the engine's `start`, or `restore` for a task created from a checkpoint. @returns its pid */
  async start(work: Work): Promise<number> {
    const restoring = this.init.state === "createdFromCheckpoint";
    this.init.check("start");
    this.init.starting = true;
    try {
      if (restoring) await this.#restore(work);
      else
        await this.#runEngine(
          work.tag("start"),
          "start",
          this.engine.start({ id: this.id, logFile: this.#logFile("start") }),
        );
      this.init.move("start");
    } catch (error) {
      this.started(this.init);
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

  /** The start is on record: an exit that came meanwhile may be told. */
  started(process: Process): void {
    process.starting = false;
    this.#releaseHeldExits();
  }

  async #restore(work: Work): Promise<void> {
    const source = this.#restoreSource!;
    const { restore } = await import("./restore.ts");
    const mayBeginAnew = source.onFailure === "fresh" || cedanaAnnotations(await this.spec()).lazy === true;
    await using _held = await this.#holdOutputs(work, mayBeginAnew);
    if (this.#afresh) {
      await this.#startAfresh(work); // as a cedanad before us had begun to
      return;
    }
    if (source.claim) {
      const { beginClaim } = await import("../checkpoint/resume.ts");
      await beginClaim(source.claim); // its processes may run from here on: it is nobody else's any more, whatever crashes
    }
    try {
      await restore(this, work, source);
    } catch (error) {
      if (source.onFailure !== "fresh") {
        // The task must be deletable: it has ended without having lived.
        this.init.markExited({ status: 255, atNs: nowNs() });
        this.record();
        if (this.#isUndone) await this.#giveClaimBack();
        throw error;
      }
      this.#log.warn(
        { err: error },
        "restore failed; as cedana.io/on-restore-failure says, it starts afresh",
      );
      this.generation = 0;
      this.#afresh = "begun"; // on record: a repetition must not restore into a container that runs
      this.#writeRecord();
      if (this.#isUndone) await this.#giveClaimBack();
      await this.#startAfresh(work);
    }
  }

  /** Whether a failed restore has left nothing that runs. Without a keeper its engine may be at work still, and end well. */
  get #isUndone(): boolean {
    return this.#pod.keeper.connected && this.#isDeleted;
  }

  /** The engine's part of a restore. When it returns, the container runs and the init's pid is known. */
  async engineRestore(
    work: Work,
    engine: Engine,
    options: Omit<RestoreCommand, "id" | "bundle" | "pidFile" | "logFile">,
  ): Promise<void> {
    const consoleSocket = this.init.stdio.terminal ? this.#pod.consoleSocketPath(this.init.io) : undefined;
    const pidFile = join(this.bundle, "init.pid");
    const logFile = this.#logFile("restore");
    const { argv, env = [] } = engine.restore({
      ...options,
      id: this.id,
      bundle: this.bundle,
      pidFile,
      logFile,
      consoleSocket,
      detach: true,
      noPivot: this.options.noPivotRoot,
    });
    const step = options.lazyPages ? "restore-lazily" : "restore"; // the one may follow on the other
    const { keeper } = this.#pod;
    const { path } = await gateBelow(keeper.pid);
    env.push(`PATH=${path}`);
    const exit = await keeper.run(work.tag(step), { argv, env, io: this.init.io, consoleSocket });
    if (exit.exitStatus !== 0) throw await engineFailure("restore", this.id, exit.exitStatus, logFile);
    learnVersionAnswer(path, this.#log);
    this.#adopt(work, this.init, readPidFile(pidFile));
    await this.#attachCgroup(work);
  }

  /** Nothing of a container whose restore has failed may stay, its init included, where it was there already. */
  async undoEngineRestore(work: Work, lazy: boolean): Promise<void> {
    const { init } = this;
    const tag = work.tag(lazy ? "undo-restore-lazily" : "undo-restore");
    this.#isDeleted = await this.undo("delete what a failed restore left", this.#engineDelete(tag, true));
    if (lazy) await this.#reopenStdio(work, "lazily"); // an eager one may follow
    if (init.pid === 0) return;
    if (init.heldExit) this.#pod.keeper.acknowledge(init.heldExit.sequence); // told to nobody
    init.heldExit = undefined;
    init.pid = 0;
  }

  /** The page daemon has ended too early: nothing may go on with what it has left out. */
  async #killWithoutMemory(): Promise<void> {
    const { init } = this;
    const { keeper } = this.#pod;
    const lost = () => this.memory.record?.state === "lost"; // not so when an eager restore follows on the lazy one
    // A restore under way fails by itself, unless a process of it waits for memory already: then its engine does so for ever.
    const limit = performance.now() + ABANDONED_RESTORE_MS;
    while (lost() && init.pid === 0 && !init.exit && performance.now() < limit) await delay(20);
    if (!lost() || init.exit || init.heldExit) return;
    if (init.pid === 0) {
      const [{ killCriu }, { defaultWorkPath }] = await Promise.all([
        import("../criu/leftovers.ts"),
        import("../checkpoint/restore.ts"),
      ]);
      await killCriu(this.options.criuWorkPath || defaultWorkPath(this.bundle), keeper.pid);
    } else
      await this.#signal(keeper.ownTag("kill-without-memory"), init, SIGKILL).catch((error) => {
        if (!(error instanceof NotFound)) throw error; // it has just ended
      });
  }

  async #useCheckpoint(): Promise<void> {
    if (this.init.state !== "createdFromCheckpoint") return;
    const { CheckpointUse } = await import("../checkpoint/use.ts");
    this.#use = await CheckpointUse.use(this.#restoreSource!.path);
  }

  /** The start is on record, or the task goes: a restore won't be repeated. */
  async discardRestore(): Promise<void> {
    if (!this.#restoreSource) return;
    this.#use?.[Symbol.dispose]();
    this.memory.started();
    if (this.memory.record?.state === "filling") return; // from there again, when it has been filled
    const { discardRestore } = await import("../checkpoint/restore.ts");
    await this.undo("remove what a restore has left", discardRestore(this.bundle, unpackDirectory()));
  }

  /** A checkpoint that it has not run from is there for the next one. */
  async #giveClaimBack(): Promise<void> {
    const claim = this.#restoreSource?.claim;
    if (!claim) return;
    const { returnClaim } = await import("../checkpoint/resume.ts");
    await this.undo("give back the claim on a checkpoint", returnClaim(claim));
  }

  /** Waits for something that may fail without anybody's call failing: it is logged then. @returns whether it succeeded */
  async undo(what: string, action: Promise<unknown>): Promise<boolean> {
    try {
      await action;
      return true;
    } catch (cause) {
      this.#log.warn({ err: cause }, what);
      return false;
    }
  }

  /**
   * Holds the FIFOs of stdout and stderr open: a failed restore closes its ends of them, which their readers would take for the end of
   * a container that is yet to start afresh, or to be restored eagerly. A log program is not held: it ends, and another is started.
   */
  async #holdOutputs(work: Work, wanted: boolean): Promise<AsyncDisposable> {
    const { keeper } = this.#pod;
    const io = `${this.init.io}/hold`;
    const stdio = { ...this.init.stdio, stdin: "", terminal: false };
    const plan = planStdio(io, stdio, this.id, this.namespace, this.options);
    const held = wanted && plan.stdoutKind !== stdioKind.logProgram;
    if (held) await keeper.ioOpen(work.tag("io-hold"), plan);
    return {
      [Symbol.asyncDispose]: async () => {
        // Unavailable: the keeper took it along.
        if (held) await keeper.ioFree(work.tag("io-free-hold"), io).catch(() => {});
      },
    };
  }

  /** A failed restore's stdio was given away with it. */
  async #reopenStdio(work: Work, after: "lazily" | "afresh"): Promise<void> {
    await this.#pod.keeper.ioFree(work.tag(`io-free-${after}`), this.init.io);
    const stdio = planStdio(this.init.io, this.init.stdio, this.id, this.namespace, this.options);
    const flags = after === "lazily" ? ALL_PIPES : 0;
    await this.#pod.keeper.ioOpen(work.tag(`io-${after}`), { ...stdio, flags });
  }

  /** After a failed restore has been undone. */
  async #startAfresh(work: Work): Promise<void> {
    try {
      if (this.#afresh === "begun") {
        await this.#resetRootfs(work);
        this.#afresh = "reset";
        this.#writeRecord();
      }
      await this.#reopenStdio(work, "afresh");
      await this.#createContainer(work);
      const command = this.engine.start({ id: this.id, logFile: this.#logFile("start") });
      await this.#runEngine(work.tag("start-afresh"), "start", command);
    } catch (error) {
      await this.#engineDelete(work.tag("undo-afresh"), true).catch((cause) =>
        this.#log.warn({ err: cause }, "delete what a failed start left"),
      );
      if (!this.init.exit) this.init.markExited({ status: 255, atNs: nowNs() });
      this.record();
      throw error;
    }
  }

  /** Before the record says that the files are back nothing runs on them, so a repetition may do this again. */
  async #resetRootfs(work: Work): Promise<void> {
    const { takeFilesBack } = await import("./restore.ts");
    await takeFilesBack(this.bundle, async (empty) => {
      await this.#pod.keeper.unmount(work.tag("unmount-restore"), join(this.bundle, "rootfs"));
      await empty();
      await this.#mountRootfs(work, this.#rootfs, "remount");
    });
  }

  /** Starts an exec'd process. @returns its pid */
  async startExec(work: Work, process: Process): Promise<number> {
    process.check("start");
    this.#checkExec(process.execId);
    const { serial } = this.#execFacts.get(process.execId)!;
    const file = (suffix: string) => this.#execFile(serial, suffix);
    const consoleSocket = process.stdio.terminal ? this.#pod.consoleSocketPath(process.io) : undefined;
    process.starting = true;
    try {
      const stdio = planStdio(process.io, process.stdio, this.id, this.namespace, this.options);
      try {
        await this.#interceptExec(file("json"));
        // Spawned without waiting for the answer: the keeper takes both in order, and spawns nothing without the io object.
        const opened = this.#pod.keeper.ioOpen(work.tag("io"), stdio);
        opened.catch(() => {}); // looked at below, if we get there
        if (stdio.stdoutKind === stdioKind.logProgram) await opened; // it takes until the program is ready
        const command = this.engine.exec({
          id: this.id,
          processFile: file("json"),
          pidFile: file("pid"),
          logFile: file("log"),
          consoleSocket,
          detach: true,
        });
        const ran = this.#pod.keeper.run(work.tag("exec"), {
          argv: command.argv,
          io: process.io,
          consoleSocket,
        });
        const [, exit] = await Promise.all([opened, ran]);
        if (exit.exitStatus !== 0) throw await engineFailure("exec", this.id, exit.exitStatus, file("log"));
        this.#adopt(work, process, readPidFile(file("pid")));
      } catch (error) {
        await this.#pod.keeper.ioFree(work.tag("undo-io"), process.io);
        throw error;
      }
      process.move("start");
    } catch (error) {
      this.started(process);
      throw error;
    }
    this.publish(`exec-started:${work.request}`, events.execStarted(this.id, process.execId, process.pid));
    return process.pid;
  }

  async #interceptExec(path: string): Promise<void> {
    if (!this.#spec || !hasOurAnnotations(this.#spec)) return;
    const { withInterception } = await import("../runtime/gpu-injection.ts");
    const process = await readFile(path, "utf8");
    const changed = withInterception(process, this.#spec);
    if (changed !== process) await writeFile(path, changed, { mode: 0o600 });
  }

  /** Its OCI process lies in a file, which the record of a cedanad of before had in itself. */
  #revivedProcess({ serial, spec }: ExecRecord): OciProcess {
    const path = this.#execFile(serial, "json");
    try {
      if (spec !== undefined) writeFileSync(path, spec, { mode: 0o600 });
      return processOf(readFileSync(path, "utf8"));
    } catch (error) {
      this.#log.warn({ err: error }, "read the process of an exec: its start will fail"); // deleted in the moment of a crash
      return {};
    }
  }

  /** Registers an exec'd process; it runs at its Start. */
  addExec(work: Work, request: ExecRequest): void {
    if (this.execs.has(request.execId))
      throw new AlreadyExists(`exec ${request.execId} of task ${this.id} already exists`);
    this.#checkExec(request.execId);
    const facts = { serial: work.request, process: processOf(request.spec) };
    execKillPolicy({}, facts.process);
    // Not in the record, which is written again at each transition. Some KB on a tmpfs: less than a trip through the thread pool.
    writeFileSync(this.#execFile(facts.serial, "json"), request.spec, { mode: 0o600 });
    const process = new Process(request.execId, execIo(this.id, facts.serial), request.stdio, "created");
    this.execs.set(request.execId, process);
    this.#execFacts.set(request.execId, facts);
    this.publish(`exec-added:${work.request}`, events.execAdded(this.id, request.execId));
  }

  /** A process may be added to a container that is only created, too. @throws WrongState */
  #checkExec(execId: string): void {
    const { state, exit } = this.init;
    if (!exit && (state === "created" || state === "running")) return;
    throw new WrongState(`${refusal("exec", exit ? "stopped" : state)}: exec ${execId} of task ${this.id}`);
  }

  /** The process has a pid now; it may have ended already. */
  #adopt(work: Work, process: Process, pid: number): void {
    process.pid = pid;
    const early = this.#pod.takeUnclaimedExit(pid, work.sinceNs);
    if (early) this.processEnded(process, early);
  }

  // ---- exits -------------------------------------------------------------------------------------------------------

  /** A process of ours has ended. Held back while its Start is under way, and an init's until its execs have ended. */
  processEnded(process: Process, exit: AdoptedExit): void {
    process.heldExit = { status: exit.exitStatus, atNs: exit.atNs, sequence: exit.sequence };
    // Asked for now, so that Delete needn't wait for the answer. An init's is drained while the engine deletes it.
    if (!process.isInit) {
      const { keeper } = this.#pod;
      process.drained = keeper.ioDrain(keeper.ownTag("drain"), process.io, DRAIN_LIMIT_MS).catch(() => false);
    }
    if (process.isInit && this.#sharesPidNamespace()) void this.#killRemaining();
    this.#releaseHeldExits();
  }

  #releaseHeldExits(): void {
    for (const exec of this.execs.values()) if (exec.heldExit && !exec.starting) this.#publishExit(exec);
    const execsLeft = [...this.execs.values()].some(
      (exec) => exec.state === "running" || (exec.starting && exec.pid !== 0),
    );
    if (this.init.heldExit && !this.init.starting && !execsLeft && !this.#ending.isUnderWay)
      void this.#publishInitExit();
  }

  async #publishInitExit(): Promise<void> {
    // A kill for want of memory comes before the exit that it causes, also where the keeper can't watch for it.
    const held = this.init.heldExit;
    await this.outOfMemory(1);
    if (this.init.heldExit === held && held) this.#publishExit(this.init);
  }

  #publishExit(process: Process): void {
    const { atNs, sequence } = process.heldExit!;
    const status = process.isInit
      ? this.#ending.statusOf(process.heldExit!.status)
      : process.heldExit!.status;
    process.markExited({ status, atNs });
    this.#escalations.end(process.execId);
    if (process.isInit)
      void this.undo("end the page daemon of a container that has ended", this.memory.end());
    this.#publishExitEvent(process, sequence);
    if (this.record()) this.#pod.keeper.acknowledge(sequence); // else the keeper keeps it for the next cedanad
  }

  /** An exit that is on record, told again by the keeper: we ended before its acknowledgement, perhaps before its event. */
  exitRepeated(process: Process, sequence: number): void {
    this.#publishExitEvent(process, sequence);
    this.#pod.keeper.acknowledge(sequence);
  }

  #publishExitEvent(process: Process, sequence: number): void {
    const { status, atNs } = process.exit!;
    const id = process.isInit ? this.id : process.execId;
    this.publish(`exit:${sequence}`, events.taskExit(this.id, id, process.pid, status, atNs));
  }

  #sharesPidNamespace(): boolean {
    return this.#spec !== undefined && sharesPidNamespace(this.#spec);
  }

  /** In a shared pid namespace, the end of init ends nobody else: what is left in the cgroup goes with it. */
  async #killRemaining(): Promise<void> {
    try {
      await this.#cgroup?.kill();
    } catch (error) {
      this.#log.warn({ err: error }, "kill what is left of a container whose init has ended");
    }
  }

  /** Publishes OOM kills that the cgroup counts and we haven't told of. */
  async outOfMemory(attempts = OOM_COUNTER_ATTEMPTS): Promise<void> {
    for (let attempt = 0; attempt < attempts && this.#cgroup; attempt++) {
      const count = await this.#cgroup.oomKills().catch(() => 0); // no such file: the cgroup is gone with its counters
      if (count > this.#oomKills) {
        this.#oomKills = count;
        this.publish(`oom:${count}`, events.taskOom(this.id));
        this.record();
        return;
      }
      if (attempt + 1 < attempts)
        await new Promise((resolve) => setTimeout(resolve, OOM_COUNTER_INTERVAL_MS));
    }
  }

  // ---- signals, freezer, files ---------------------------------------------------------------------------------------

  /** A signal as the container wants it: TERM may become another one, and others may follow it. */
  async kill(work: Work, process: Process, sent: number, all: boolean): Promise<void> {
    if (process.pid === 0) {
      if (process.isInit) throw this.#goneError(process);
      throw new WrongState(`process not created: ${process.name} of task ${this.id} has not been started`);
    }
    if (process.exit && !work.repeated) throw this.#goneError(process);
    const { signal, escalation, checkpoint } = planKill(await this.#killPolicy(process), sent);
    if (checkpoint && process.isInit && this.#ending.begin({ signal, escalation, status: 128 + sent }))
      return;
    if (sent === SIGKILL && process.isInit) this.#ending.giveUp();
    if (all && process.isInit) {
      const command = this.engine.kill({ id: this.id, signal, all: true, logFile: this.#logFile("kill") });
      await this.#runEngine(work.tag("kill-all"), "kill", command);
    } else await this.#signal(work.tag("kill"), process, signal);
    if (!process.exit) this.#escalations.begin(process.execId, escalation);
  }

  async #killPolicy(process: Process): Promise<KillPolicy | undefined> {
    const spec = await this.spec();
    if (process.isInit) return killPolicy(spec);
    return execKillPolicy(spec, this.#execFacts.get(process.execId)!.process);
  }

  #goneError(process: Process): NotFound {
    return new NotFound(`${process.name} of task ${this.id} has already ended: process already finished`);
  }

  async #signal(tag: Tag, process: Process, signal: number): Promise<void> {
    try {
      await this.#pod.keeper.signal(tag, process.pid, signal);
    } catch (error) {
      if (error instanceof SyscallFailed && error.code === "ESRCH") throw this.#goneError(process);
      throw error;
    }
    // A frozen process of cgroups version 1 doesn't even die.
    const stands = this.init.state === "paused" || this.#ending.isUnderWay;
    if (signal === SIGKILL && stands && this.#cgroup?.version === 1) {
      await this.#cgroup.thaw();
      if (!this.init.exit && this.init.state === "paused") this.init.move("resume");
    }
  }

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
      const command = this.engine.update({
        id: this.id,
        resourcesFile: file,
        logFile: this.#logFile("update"),
      });
      await this.#runEngine(work.tag("update"), "update", command);
    } finally {
      await rm(file, { force: true });
    }
  }

  /** @throws NotFound once the container has no cgroup */
  async cgroup(): Promise<Cgroup> {
    if (!this.#cgroup) {
      if (this.init.pid === 0 || this.init.exit)
        throw new NotFound(`task ${this.id} has no cgroup: it is not running`);
      this.#cgroup = await Cgroup.of(
        this.init.pid,
        this.#spec && cgroupName(this.#spec, this.id, this.engine.name),
      );
    }
    return this.#cgroup;
  }

  async spec(): Promise<OciSpec> {
    this.#spec ??= await readSpec(this.bundle);
    return this.#spec;
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

  /** A cedanad before us may have ended in the middle of a dump whose caller has gone: the container must not stay frozen. */
  async thawLeftover(): Promise<void> {
    await this.#pauseLeftover();
    this.#recoverDevices();
    const marker = freezeMarker(this.bundle);
    if (!existsSync(marker)) return;
    try {
      if (this.init.state === "running" && !this.init.exit) await (await this.cgroup()).thaw();
      else if (this.init.exit) await thawNoted(this.bundle);
      await rm(marker, { force: true });
      const { abandonAttempt } = await import("../checkpoint/dump.ts");
      const kept = await abandonAttempt(this.bundle, async () => this.init.exit !== undefined);
      if (kept !== undefined) this.#log.warn({ kept }, "kept the images of a dump that a crash cut off");
      this.#log.warn("thawed: it had been frozen for a dump that a crash cut off");
    } catch (error) {
      this.#log.error({ err: error }, "thaw a container that a dump cut off by a crash had frozen");
    }
  }

  /** … or in the hook of a paused one, which ran for it: what its owner has paused must not go on. */
  async #pauseLeftover(): Promise<void> {
    const note = hookNote(this.bundle);
    if (!existsSync(note)) return;
    try {
      if (this.init.state === "paused" && !this.init.exit) await (await this.cgroup()).freeze();
      await rm(note, { force: true });
    } catch (error) {
      this.#log.error({ err: error }, "pause a container again that ran for its hook when cedanad ended");
    }
  }

  #recoverDevices(): void {
    const { id, bundle, init } = this;
    if (init.pid === 0 || init.exit) return;
    deviceSlot()?.recover({
      what: `task ${id}`,
      initPid: init.pid,
      directory: bundle,
      log: this.#log,
      cgroup: () => this.cgroup(),
      get paused() {
        return init.state === "paused";
      },
      get hasEnded() {
        return init.exit !== undefined;
      },
    });
  }

  /**
   * A cedanad before us may have ended in the middle of a checkpoint of its own will: gone on with, before any call of containerd's
   * changes the container.
   */
  resumeCheckpoint(): void {
    let resumed: Promise<void> | undefined;
    if (existsSync(join(this.bundle, TRIGGERED_DIRECTORY))) {
      const turn = Promise.withResolvers<void>();
      void this.init.inTurn(() => turn.promise);
      resumed = import("./triggered.ts")
        .then(({ resumeCheckpoint }) => resumeCheckpoint(this, turn.resolve))
        .finally(turn.resolve);
    }
    if (!this.init.exit) this.#ending.resume(resumed);
  }

  async resizePty(work: Work, process: Process, width: number, height: number): Promise<void> {
    if (!process.stdio.terminal || process.pid === 0 || process.exit) return; // as the Go shim: nothing to resize is no error
    await this.#pod.keeper.ioResize(work.tag("resize"), process.io, width, height);
  }

  async closeStdin(work: Work, process: Process): Promise<void> {
    if (process.stdio.stdin === "" || process.exit) return;
    await this.#pod.keeper.ioCloseStdin(work.tag("close-stdin"), process.io);
  }

  // ---- delete --------------------------------------------------------------------------------------------------------

  /** Removes the container: drains and closes its stdio, the engine's `delete`, unmounts the rootfs. @returns init's exit */
  async delete(work: Work): Promise<{ pid: number; exit: Exit | undefined }> {
    const { init } = this;
    const neverRan = init.state === "created" || init.state === "createdFromCheckpoint";
    if (init.state === "createdFromCheckpoint") await this.#giveClaimBack();
    if (init.state === "deleted")
      throw new NotFound(`task ${this.id} has been deleted: container not created`);
    init.check("delete");
    const { keeper } = this.#pod;
    // The engine's part and the output of a process that has ended have nothing to do with each other.
    const drained = neverRan ? undefined : this.#drain(work, init);
    await Promise.all([this.#engineDelete(work.tag("delete"), neverRan), drained]);
    await this.memory.end();
    if (neverRan && init.pid !== 0 && !init.exit) await Promise.race([init.waitForExit(), delay(2_000)]);
    await Promise.all([
      ...[...this.execs.values()].map((exec) => keeper.ioFree(work.tag(`io-free:${exec.io}`), exec.io)),
      keeper.ioFree(work.tag("io-free"), init.io),
      this.#rootfsMounted && keeper.unmount(work.tag("unmount"), join(this.bundle, "rootfs")),
      this.removeCgroup(),
      this.discardRestore(),
    ]);
    this.#rootfsMounted = false;
    init.move("delete");
    if (init.pid === 0) init.neverRan();
    const exit = init.exit ?? { status: 0, atNs: nowNs() };
    this.publish(`delete:${work.request}`, events.taskDelete(this.id, init.pid, exit.status, exit.atNs));
    return { pid: init.pid, exit };
  }

  async deleteExec(work: Work, process: Process): Promise<{ pid: number; exit: Exit | undefined }> {
    if (process.state === "deleted")
      throw new NotFound(
        `process does not exist ${process.execId}: it has been deleted from task ${this.id}`,
      );
    process.check("delete");
    if (process.exit && !(await process.drained)) await this.#drain(work, process);
    // Not waited for: it can't fail, and the keeper takes it up before our answer.
    this.#pod.keeper.ioFree(work.tag("io-free"), process.io).catch(() => {}); // Unavailable: the keeper took all along
    process.move("delete");
    if (process.pid === 0) process.neverRan();
    this.execs.delete(process.execId);
    const { serial } = this.#execFacts.get(process.execId)!;
    this.#pod.afterResponse(work.request, () => {
      for (const suffix of ["json", "pid", "log"]) rmSync(this.#execFile(serial, suffix), { force: true });
    });
    this.#execFacts.delete(process.execId);
    return { pid: process.pid, exit: process.exit };
  }

  /**
   * After containerd has given the task up (its `delete` call while we still hold it): everything of it ends, whatever state
   * it is in.
   */
  async destroy(): Promise<Exit> {
    const { keeper } = this.#pod;
    // Of one that is being restored, its start knows.
    if (this.init.state === "createdFromCheckpoint" && !this.init.starting) await this.#giveClaimBack();
    if (this.init.state !== "deleted") {
      await this.#engineDelete(keeper.ownTag("destroy"), true).catch((error) =>
        this.#log.warn({ err: error }, "delete the container of an abandoned task"),
      );
      await this.undo("end the page daemon of an abandoned task", this.memory.end());
      for (const process of this.processes()) await keeper.ioFree(keeper.ownTag("io-free"), process.io);
      await this.removeCgroup();
      await this.discardRestore();
      if (this.#rootfsMounted) await keeper.unmount(keeper.ownTag("unmount"), join(this.bundle, "rootfs"));
    }
    return this.init.exit ?? { status: 128 + SIGKILL, atNs: nowNs() };
  }

  /** Cgroups that the engine left behind. */
  async removeCgroup(): Promise<void> {
    if (this.#cgroup) {
      const left = await this.#cgroup.removeLeft();
      if (left.length > 0) this.#log.warn({ left }, "cgroups of a deleted container are still busy");
      return;
    }
    // crun forgets the cgroup of a container that it failed to make. What is busy, or of version 1, is not touched.
    if ((await hostCgroupVersion()) !== 2) return;
    const spec = await this.spec().catch(() => undefined); // a bundle that is broken, or gone, must still be deletable
    const path = spec && cgroupPathV2(spec, this.id, this.options.systemdCgroup);
    if (path !== undefined) await removeCgroup(path);
  }

  async #drain(work: Work, process: Process): Promise<void> {
    if (!(await this.#pod.keeper.ioDrain(work.tag("drain"), process.io, DRAIN_LIMIT_MS)))
      this.#log.warn(
        { process: process.name },
        `output still open ${DRAIN_LIMIT_MS} ms after the end of the process: closed`,
      );
  }

  // ---- parts ---------------------------------------------------------------------------------------------------------

  async #mountRootfs(work: Work, mounts: CreateRequest["rootfs"], step = "mount"): Promise<void> {
    if (mounts.length === 0) return;
    this.#rootfsMounted = true;
    await mountAll(this.#pod.keeper, mounts, join(this.bundle, "rootfs"), (at) => work.tag(`${step}:${at}`));
  }

  async #createContainer(work: Work): Promise<void> {
    const spec = await this.spec();
    if (hasOurAnnotations(spec)) {
      const { injectGpu } = await import("../runtime/gpu-injection.ts");
      this.#spec = (await injectGpu(this.bundle, spec, this)) ?? spec;
    }
    const consoleSocket = this.init.stdio.terminal ? this.#pod.consoleSocketPath(this.init.io) : undefined;
    const pidFile = join(this.bundle, "init.pid");
    const command = this.engine.create({
      id: this.id,
      bundle: this.bundle,
      pidFile,
      logFile: this.#logFile("create"),
      consoleSocket,
      noPivot: this.options.noPivotRoot,
      noNewKeyring: this.options.noNewKeyring,
    });
    const exit = await this.#pod.keeper.run(work.tag("create"), {
      argv: command.argv,
      io: this.init.io,
      consoleSocket,
    });
    if (exit.exitStatus !== 0)
      throw await engineFailure("create", this.id, exit.exitStatus, this.#logFile("create"));
    this.#adopt(work, this.init, readPidFile(pidFile));
    await this.#attachCgroup(work);
  }

  async #attachCgroup(work: Work): Promise<void> {
    try {
      this.#cgroup = await Cgroup.of(
        this.init.pid,
        this.#spec && cgroupName(this.#spec, this.id, this.engine.name),
      );
    } catch (error) {
      this.#log.warn({ err: error }, "find the cgroup of a new container"); // it may have ended already; nothing to watch then
      return;
    }
    const watch = this.#cgroup.oomWatchPath;
    // Not waited for: the keeper takes it up before our answer.
    if (watch)
      this.#pod.keeper
        .watchOom(work.tag("oom"), this.id, watch.path, watch.flags)
        .catch((error) => this.#log.warn({ err: error }, "watch for out-of-memory kills"));
  }

  async #undoCreate(work: Work): Promise<void> {
    const undo = async (what: string, action: Promise<unknown>): Promise<boolean> => {
      try {
        await action;
        return true;
      } catch (error) {
        if (!(error instanceof Unavailable)) this.#log.error({ err: error }, `undo a failed create: ${what}`);
        return false;
      }
    };
    this.#use?.[Symbol.dispose]();
    await this.#giveClaimBack();
    const deleted = await undo("delete", this.#engineDelete(work.tag("undo-create"), true));
    await undo("remove the cgroup", this.removeCgroup());
    await undo("close stdio", this.#pod.keeper.ioFree(work.tag("undo-io"), this.init.io));
    if (this.#rootfsMounted)
      await undo("unmount", this.#pod.keeper.unmount(work.tag("undo-mount"), join(this.bundle, "rootfs")));
    await undo("remove what was unpacked", this.discardRestore());
    // Where the keeper has gone, the launcher's `delete` finds the container by it.
    if (deleted) await rm(join(this.bundle, "cedana-engine"), { force: true });
    this.#pod.keeper.taskGone(this.id); // it may watch for out-of-memory kills
    if (this.init.heldExit) this.#pod.keeper.acknowledge(this.init.heldExit.sequence); // told to nobody
  }

  /** The engine's `delete`. A container that it doesn't know is deleted. */
  async #engineDelete(tag: Tag, force: boolean): Promise<void> {
    try {
      await this.#runEngine(
        tag,
        "delete",
        this.engine.delete({ id: this.id, force, logFile: this.#logFile("delete") }),
      );
    } catch (error) {
      if (!(error instanceof NotFound)) throw error;
    }
  }

  async #runEngine(tag: Tag, action: string, command: EngineCommand): Promise<void> {
    const exit = await this.#pod.keeper.run(tag, { argv: command.argv });
    if (exit.exitStatus !== 0)
      throw await engineFailure(action, this.id, exit.exitStatus, this.#logFile(action));
  }

  /** Each action has a log of its own, so that an old error is never taken for a new one. */
  #logFile(action: string): string {
    return join(this.bundle, `${action}.log.json`);
  }

  #execFile(serial: number, suffix: string): string {
    return join(this.bundle, `exec-${serial}.${suffix}`);
  }

  publish(key: string, event: events.Event): void {
    this.#pod.publish(this.id, key, event);
  }
}

/** Most containers aren't restored, and don't load what it takes. */
async function restoreSourceOf(
  pod: Pod,
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

function execIo(id: string, serial: number): string {
  return `${id}/${serial}`;
}

/** What signals depend on in an exec's OCI process. One that is none is the engine's to refuse, in its own words. */
function processOf(spec: string): OciProcess {
  try {
    const { env } = (JSON.parse(spec) as OciProcess | null) ?? {};
    return Array.isArray(env) ? { env: env.filter((entry) => String(entry).startsWith("CEDANA_KILL_")) } : {};
  } catch {
    return {};
  }
}

function exitRecord(exit: Exit | undefined): { exit?: { status: number; atNs: string } } {
  return exit ? { exit: { status: exit.status, atNs: exit.atNs.toString() } } : {};
}

function readPidFile(path: string): number {
  const text = readFileSync(path, "utf8");
  const pid = Number(text);
  if (!Number.isSafeInteger(pid) || pid <= 0)
    throw new BrokenImage(`pid file ${path} holds ${JSON.stringify(text)}`);
  return pid;
}

function nowNs(): bigint {
  return BigInt(Date.now()) * 1_000_000n;
}

function delay(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
