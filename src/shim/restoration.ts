import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { NotFound } from "../errors/index.ts";
import type { Mount } from "../proto/generated/types.ts";
import { unpackDirectory } from "../runtime/configuration.ts";
import type { Engine, RestoreCommand } from "../runtime/engine.ts";
import { cedanaAnnotations } from "../runtime/spec.ts";
import type { Container } from "./container.ts";
import type { ContainerCgroup } from "./container-cgroup.ts";
import type { EngineCalls } from "./engine-calls.ts";
import type { Exits } from "./exits.ts";
import type { RestorationRecord } from "./journal.ts";
import { ALL_PIPES, stdioKind, type Work } from "./keeper.ts";
import { nowNs } from "./process.ts";
import type { RestoreSource } from "./restore-source.ts";
import { planStdio } from "./stdio.ts";

/** How long a restore whose page daemon has ended may go on: it fails within milliseconds where it can. */
const ABANDONED_RESTORE_MS = 3_000;

/** The task, as far as its restore depends on it. */
export interface RestoredTask extends Container {
  readonly containerCgroup: ContainerCgroup;
  readonly engineCalls: EngineCalls;
  readonly exits: Exits;
  /** As `record`. @throws SyscallFailed when it can't be written, Unavailable without the keeper */
  writeRecord(): void;
}

/** What the task does for it. */
interface Actions {
  /** the chain of a restore: see `restore.ts` */
  restore(work: Work): Promise<void>;
  /** makes the container by the engine's `create` */
  create(work: Work): Promise<void>;
  /** @param step  begins the names of its operations */
  mountRootfs(work: Work, mounts: readonly Mount[], step: string): Promise<void>;
  /** SIGKILL to the init. @throws NotFound when it has ended */
  kill(): Promise<void>;
}

/** What is on record of a task that was created from a checkpoint. */
export interface RestorationState {
  readonly source: RestoreSource;
  /** what is mounted at the rootfs, where it may have to be mounted again */
  readonly rootfs: Mount[];
  /** a failed restore is given up: its files are (reset), or are to be (begun), as before it */
  afresh: RestorationRecord["afresh"];
}

/**
 * The start of a task that was created from a checkpoint: its restore, or, where that fails and `cedana.io/on-restore-failure` says so,
 * a start afresh. It has the lock on the checkpoint until the start is on record, and the claim that makes it the only one who continues
 * from it.
 */
export class Restoration {
  readonly #owner: RestoredTask;
  readonly #actions: Actions;
  readonly #state: RestorationState;
  /** the lock on its checkpoint */
  #use: Disposable | undefined;
  /** no container of the engine's is left of a restore that failed */
  #isDeleted = true;

  constructor(owner: RestoredTask, state: RestorationState, actions: Actions) {
    this.#owner = owner;
    this.#state = state;
    this.#actions = actions;
  }

  get source(): RestoreSource {
    return this.#state.source;
  }

  /** As a task's record has it; undefined for a task that wasn't created from a checkpoint. */
  static stateOf(record: Partial<RestorationRecord>): RestorationState | undefined {
    if (record.restoreFrom === undefined) return undefined;
    return {
      source: {
        path: record.restoreFrom,
        onFailure: record.onRestoreFailure ?? "fail",
        why: record.restoreAsked ?? "caller",
        claim: record.claim,
      },
      rootfs: record.rootfs ?? [],
      afresh: record.afresh,
    };
  }

  /** For the task's record. */
  get record(): RestorationRecord {
    const { source, rootfs, afresh } = this.#state;
    return {
      restoreFrom: source.path,
      onRestoreFailure: source.onFailure,
      restoreAsked: source.why,
      ...(source.claim && { claim: source.claim }),
      ...(rootfs.length > 0 && { rootfs }),
      ...(afresh && { afresh }),
    };
  }

  // ---- the checkpoint ------------------------------------------------------------------------------------------------

  /** Nobody removes the checkpoint before it is restored. */
  async lock(): Promise<void> {
    if (this.#owner.init.state !== "createdFromCheckpoint") return;
    const { CheckpointUse } = await import("../checkpoint/use.ts");
    this.#use = await CheckpointUse.use(this.source.path);
    if (!this.#owner.pod.keeper.connected) this.unlock(); // it has gone meanwhile
  }

  /** It may be removed again. */
  unlock(): void {
    this.#use?.[Symbol.dispose]();
  }

  /** A checkpoint that it has not run from is there for the next one. */
  async giveClaimBack(): Promise<void> {
    const { claim } = this.source;
    if (!claim) return;
    const { returnClaim } = await import("../checkpoint/resume.ts");
    await this.#owner.logFailure("give back the claim on a checkpoint", returnClaim(claim));
  }

  /** The start is on record, or the task goes: a restore won't be repeated. */
  async discard(): Promise<void> {
    const { bundle, memory } = this.#owner;
    this.unlock();
    memory.started();
    if (memory.record?.state === "filling") return; // called again when it has been filled
    const { discardRestore } = await import("../checkpoint/restore.ts");
    await this.#owner.logFailure("remove what a restore has left", discardRestore(bundle, unpackDirectory()));
  }

  // ---- the start -----------------------------------------------------------------------------------------------------

  /** When it returns, the container runs, restored or afresh. */
  async start(work: Work): Promise<void> {
    const { source } = this;
    const mayBeginAnew =
      source.onFailure === "fresh" || cedanaAnnotations(await this.#owner.spec()).lazy === true;
    await using _held = await this.#holdOutputs(work, mayBeginAnew);
    if (this.#state.afresh) {
      await this.#startAfresh(work); // as a cedanad before us had begun to
      return;
    }
    if (source.claim) {
      const { beginClaim } = await import("../checkpoint/resume.ts");
      await beginClaim(source.claim); // its processes may run from here on: it is nobody else's any more, whatever crashes
    }
    try {
      await this.#actions.restore(work);
    } catch (error) {
      const { init, log } = this.#owner;
      if (source.onFailure !== "fresh") {
        // The task must be deletable: it has ended without having lived.
        init.markExited({ status: 255, atNs: nowNs() });
        this.#owner.record();
        if (this.#isUndone) await this.giveClaimBack();
        throw error;
      }
      log.warn({ err: error }, "restore failed; as cedana.io/on-restore-failure says, it starts afresh");
      this.#owner.generation = 0;
      this.#state.afresh = "begun"; // on record: a repetition must not restore into a container that runs
      this.#owner.writeRecord();
      if (this.#isUndone) await this.giveClaimBack();
      await this.#startAfresh(work);
    }
  }

  /** Whether a failed restore has left nothing that runs. Without a keeper its engine may be at work still, and end well. */
  get #isUndone(): boolean {
    return this.#owner.pod.keeper.connected && this.#isDeleted;
  }

  /** The engine's part of a restore. When it returns, the container runs and the init's pid is known. */
  async engineRestore(
    work: Work,
    engine: Engine,
    options: Omit<RestoreCommand, "id" | "bundle" | "pidFile" | "logFile">,
  ): Promise<void> {
    const { containerCgroup, engineCalls, exits, init } = this.#owner;
    exits.adopt(work, init, await engineCalls.restore(work, engine, options));
    await containerCgroup.attach(work);
  }

  /** Nothing of a container whose restore has failed may stay, its init included, where it was there already. */
  async undoEngineRestore(work: Work, lazy: boolean): Promise<void> {
    const { engineCalls, exits, init } = this.#owner;
    const tag = work.tag(lazy ? "undo-restore-lazily" : "undo-restore");
    this.#isDeleted = await this.#owner.logFailure(
      "delete what a failed restore left",
      engineCalls.delete(tag, true),
    );
    if (lazy) await this.#reopenStdio(work, "lazily"); // an eager one may follow
    if (init.pid === 0) return;
    exits.forget(init);
    init.pid = 0;
  }

  /** The page daemon has ended too early: nothing may go on with what it has left out. */
  async killWithoutMemory(): Promise<void> {
    const { bundle, init, memory, options, pod } = this.#owner;
    const lost = () => memory.record?.state === "lost"; // not so when an eager restore follows on the lazy one
    // A restore under way fails by itself, unless a process of it waits for memory already: then its engine does so for ever.
    const limit = performance.now() + ABANDONED_RESTORE_MS;
    while (lost() && init.pid === 0 && !init.exit && performance.now() < limit) await sleep(20);
    if (!lost() || init.exit || init.heldExit) return;
    if (init.pid === 0) {
      const [{ killCriu }, { defaultWorkPath }] = await Promise.all([
        import("../criu/leftovers.ts"),
        import("../checkpoint/restore.ts"),
      ]);
      await killCriu(options.criuWorkPath || defaultWorkPath(bundle), pod.keeper.pid);
    } else
      await this.#actions.kill().catch((error) => {
        if (!(error instanceof NotFound)) throw error; // it has just ended
      });
  }

  // ---- afresh --------------------------------------------------------------------------------------------------------

  /** After a failed restore has been undone. */
  async #startAfresh(work: Work): Promise<void> {
    const { engineCalls, init, log } = this.#owner;
    try {
      if (this.#state.afresh === "begun") {
        await this.#resetRootfs(work);
        this.#state.afresh = "reset";
        this.#owner.writeRecord();
      }
      await this.#reopenStdio(work, "afresh");
      await this.#actions.create(work);
      await engineCalls.start(work.tag("start-afresh"));
    } catch (error) {
      await engineCalls
        .delete(work.tag("undo-afresh"), true)
        .catch((cause) => log.warn({ err: cause }, "delete what a failed start left"));
      if (!init.exit) init.markExited({ status: 255, atNs: nowNs() });
      this.#owner.record();
      throw error;
    }
  }

  /** Before the record says that the files are back nothing runs on them, so a repetition may do this again. */
  async #resetRootfs(work: Work): Promise<void> {
    const { bundle, pod } = this.#owner;
    const { takeFilesBack } = await import("./fresh-upper.ts");
    await takeFilesBack(bundle, async (empty) => {
      await pod.keeper.unmount(work.tag("unmount-restore"), join(bundle, "rootfs"));
      await empty();
      await this.#actions.mountRootfs(work, this.#state.rootfs, "remount");
    });
  }

  // ---- stdio over a failed restore -----------------------------------------------------------------------------------

  /**
   * Holds the FIFOs of stdout and stderr open: a failed restore closes its ends of them, which their readers would take for the end of
   * a container that is yet to start afresh, or to be restored eagerly. Of logs nothing is held: who writes one ends, and another is started.
   */
  async #holdOutputs(work: Work, wanted: boolean): Promise<AsyncDisposable> {
    const { id, init, namespace, options, pod } = this.#owner;
    const io = `${init.io}/hold`;
    const plan = planStdio(io, { ...init.stdio, stdin: "", terminal: false }, id, namespace, options);
    const fifo = (kind: number) => (kind === stdioKind.fifo ? kind : stdioKind.none);
    const [stdoutKind, stderrKind] = [fifo(plan.stdoutKind), fifo(plan.stderrKind)];
    const held = wanted && (stdoutKind === stdioKind.fifo || stderrKind === stdioKind.fifo);
    if (held) await pod.keeper.ioOpen(work.tag("io-hold"), { ...plan, stdoutKind, stderrKind });
    return {
      [Symbol.asyncDispose]: async () => {
        // Unavailable: the keeper took it along.
        if (held) await pod.keeper.ioFree(work.tag("io-free-hold"), io).catch(() => {});
      },
    };
  }

  /** A failed restore's stdio was given away with it. */
  async #reopenStdio(work: Work, after: "lazily" | "afresh"): Promise<void> {
    const { id, init, namespace, options, pod } = this.#owner;
    await pod.keeper.ioFree(work.tag(`io-free-${after}`), init.io);
    const stdio = planStdio(init.io, init.stdio, id, namespace, options);
    const flags = after === "lazily" ? ALL_PIPES : 0;
    await pod.keeper.ioOpen(work.tag(`io-${after}`), { ...stdio, flags });
  }
}
