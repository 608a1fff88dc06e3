import { NotFound, SyscallFailed, WrongState } from "../errors/index.ts";
import { execKillPolicy, type KillPolicy, killPolicy, planKill } from "../runtime/kill-policy.ts";
import type { Container } from "./container.ts";
import type { ContainerCgroup } from "./container-cgroup.ts";
import { Ending } from "./ending.ts";
import type { EngineCalls } from "./engine-calls.ts";
import { Escalations } from "./escalation.ts";
import { ExecProcess } from "./execs.ts";
import type { TaskRecord } from "./journal.ts";
import type { Tag, Work } from "./keeper.ts";
import type { Process } from "./process.ts";

const SIGKILL = 9;

/** The task, as far as signals depend on it. */
interface Owner extends Container {
  readonly containerCgroup: ContainerCgroup;
  readonly engineCalls: EngineCalls;
  /** @throws NotFound */
  process(execId: string): Process;
}

/**
 * Signals to a task's processes, as the container wants them: TERM may become another one, others may follow it, or a checkpoint is
 * taken instead (src/runtime/kill-policy.ts).
 */
export class Signals {
  readonly #owner: Owner;
  /** a checkpoint in the place of a signal */
  readonly ending: Ending;
  /** what follows a signal */
  readonly escalations: Escalations;

  /**
   * @param checkpoint  takes one, with which the container ends
   * @param over        an exit need not be held for such a checkpoint any more
   */
  constructor(owner: Owner, checkpoint: (signal: AbortSignal) => Promise<void>, over: () => void) {
    const { id, init, log, pod } = owner;
    this.#owner = owner;
    this.ending = new Ending({
      what: `task ${id}`,
      log,
      init,
      keeper: pod.keeper,
      changed: () => owner.record(),
      checkpoint,
      send: async (signal, escalation) => {
        await owner.logFailure("send the signal", this.send(pod.keeper.ownTag("signal"), init, signal));
        this.escalations.begin("", escalation);
      },
      over,
    });
    this.escalations = new Escalations({
      send: async (execId, signal) =>
        await this.send(pod.keeper.ownTag("escalate"), owner.process(execId), signal),
      changed: () => owner.record(),
      log,
    });
  }

  /** For the task's record. */
  get record(): Pick<TaskRecord, "ending" | "escalations"> {
    return {
      ...(this.ending.record && { ending: this.ending.record }),
      ...(this.escalations.pending && { escalations: this.escalations.records() }),
    };
  }

  revive({ ending, escalations = [] }: Pick<TaskRecord, "ending" | "escalations">): void {
    this.ending.revive(ending);
    this.escalations.revive(escalations);
  }

  /** Containerd's Kill. @param all  to every process of the container, when it is for the init */
  async kill(
    work: Pick<Work, "repeated" | "tag">,
    process: Process,
    sent: number,
    all: boolean,
  ): Promise<void> {
    const { id, engineCalls } = this.#owner;
    if (process.pid === 0) {
      if (process.isInit) throw this.#goneError(process);
      throw new WrongState(`process not created: ${process.name} of task ${id} has not been started`);
    }
    if (process.exit && !work.repeated) throw this.#goneError(process);
    const { signal, escalation, checkpoint } = planKill(await this.#policy(process), sent);
    if (checkpoint && process.isInit && this.ending.begin({ signal, escalation, status: 128 + sent })) return;
    if (sent === SIGKILL && process.isInit) this.ending.giveUp();
    if (all && process.isInit) await engineCalls.killAll(work.tag("kill-all"), signal);
    else await this.send(work.tag("kill"), process, signal);
    if (!process.exit) this.escalations.begin(process.execId, escalation);
  }

  /** Sends it as it is. @throws NotFound when the process has ended */
  async send(tag: Tag, process: Process, signal: number): Promise<void> {
    const { containerCgroup, init, pod } = this.#owner;
    try {
      await pod.keeper.signal(tag, process.pid, signal);
    } catch (error) {
      if (error instanceof SyscallFailed && error.code === "ESRCH") throw this.#goneError(process);
      throw error;
    }
    // A frozen process of cgroups version 1 doesn't even die.
    const stands = init.state === "paused" || this.ending.isUnderWay;
    const cgroup = containerCgroup.known;
    if (signal === SIGKILL && stands && cgroup?.version === 1) {
      await cgroup.thaw();
      if (!init.exit && init.state === "paused") init.move("resume");
    }
  }

  async #policy(process: Process): Promise<KillPolicy | undefined> {
    const spec = await this.#owner.spec();
    return process instanceof ExecProcess ? execKillPolicy(spec, process.signalFacts) : killPolicy(spec);
  }

  #goneError(process: Process): NotFound {
    return new NotFound(
      `${process.name} of task ${this.#owner.id} has already ended: process already finished`,
    );
  }
}
