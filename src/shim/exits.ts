import { sharesPidNamespace } from "../runtime/spec.ts";
import type { Container } from "./container.ts";
import type { ContainerCgroup } from "./container-cgroup.ts";
import type { Ending } from "./ending.ts";
import type { Escalations } from "./escalation.ts";
import * as events from "./events.ts";
import type { AdoptedExit, Work } from "./keeper.ts";
import type { Process } from "./process.ts";

/** How long Delete waits for output that a background child may hold open: as the Go shim, unless a test is in a hurry. */
const DRAIN_LIMIT_MS = Number(process.env.CEDANA_DRAIN_LIMIT_MS) || 10_000;

/** The task, as far as exits depend on it. */
interface Owner extends Container {
  readonly execs: { values(): Iterable<Process> };
  readonly containerCgroup: ContainerCgroup;
  readonly signals: { readonly ending: Ending; readonly escalations: Escalations };
}

/**
 * When the end of a task's process is told: after its start, an init's after those of its execs, and one of a container that is
 * checkpointed instead of being signalled when the checkpoint is in its place. Until then it is held. The keeper keeps an exit until it is
 * on record and its event handed over.
 */
export class Exits {
  readonly #owner: Owner;
  /** what an init has left behind in a shared pid namespace has ended */
  #rest: Promise<void> = Promise.resolve();

  constructor(owner: Owner) {
    this.#owner = owner;
  }

  /** The pid of a process is known now; it may have ended already. */
  adopt(work: Work, process: Process, pid: number): void {
    process.pid = pid;
    const early = this.#owner.pod.takeUnclaimedExit(pid, work.sinceNs);
    if (early) this.ended(process, early);
  }

  /** The start is on record, or has failed: an exit that came meanwhile may be told. */
  started(process: Process): void {
    process.starting = false;
    this.release();
  }

  /** The keeper says that a process has ended. */
  ended(process: Process, exit: AdoptedExit): void {
    process.heldExit = { status: exit.exitStatus, atNs: exit.atNs, sequence: exit.sequence };
    // Asked for now, so that Delete needn't wait for the answer. An init's is drained while the engine deletes it.
    if (!process.isInit) {
      const { keeper } = this.#owner.pod;
      process.drained = keeper.ioDrain(keeper.ownTag("drain"), process.io, DRAIN_LIMIT_MS);
      process.drained.catch(() => {}); // Unavailable: nobody may be left to delete it
    }
    // In a shared pid namespace, the end of init ends nobody else: what is left in the cgroup goes with it.
    const { knownSpec, containerCgroup } = this.#owner;
    if (process.isInit && knownSpec && sharesPidNamespace(knownSpec)) this.#rest = containerCgroup.kill();
    this.release();
  }

  /** An exit that is on record, said again by the keeper: we ended before its acknowledgement, perhaps before its event. */
  repeated(process: Process, sequence: number): void {
    this.#publishEvent(process, sequence);
    this.#owner.pod.keeper.acknowledge(sequence);
  }

  /** Tells the exits that nothing holds any more. */
  release(): void {
    const { init, signals } = this.#owner;
    const execs = [...this.#owner.execs.values()];
    for (const exec of execs) if (exec.heldExit && !exec.starting) this.#publish(exec);
    const execsLeft = execs.some((exec) => exec.state === "running" || (exec.starting && exec.pid !== 0));
    if (init.heldExit && !init.starting && !execsLeft && !signals.ending.isUnderWay) void this.#publishInit();
  }

  /** Drops an exit that nobody is told of: what its process belonged to is undone. */
  forget(process: Process): void {
    if (process.heldExit) this.#owner.pod.keeper.acknowledge(process.heldExit.sequence);
    process.heldExit = undefined;
  }

  /** Waits until the output of a process that has ended is delivered, at most as long as a background child may hold it open. */
  async drain(work: Work, process: Process): Promise<void> {
    const { pod, log } = this.#owner;
    if (!(await (process.drained ?? pod.keeper.ioDrain(work.tag("drain"), process.io, DRAIN_LIMIT_MS))))
      log.warn(
        { process: process.name },
        `output still open ${DRAIN_LIMIT_MS} ms after the end of the process: closed`,
      );
  }

  async #publishInit(): Promise<void> {
    const { init, containerCgroup } = this.#owner;
    const held = init.heldExit;
    await this.#rest; // it is frozen for it, which the engine's `delete`, which follows on the exit, takes for paused
    // A kill for want of memory comes before the exit that it causes, also where the keeper can't watch for it.
    await containerCgroup.outOfMemory();
    if (init.heldExit === held && held) this.#publish(init);
  }

  #publish(process: Process): void {
    const { memory, pod, signals } = this.#owner;
    const { status: ended, atNs, sequence } = process.heldExit!;
    const status = process.isInit ? signals.ending.statusOf(ended) : ended;
    process.markExited({ status, atNs });
    signals.escalations.end(process.execId);
    if (process.isInit)
      void this.#owner.logFailure("end the page daemon of a container that has ended", memory.end());
    this.#publishEvent(process, sequence);
    if (this.#owner.record()) pod.keeper.acknowledge(sequence); // else the keeper keeps it for the next cedanad
  }

  #publishEvent(process: Process, sequence: number): void {
    const { id: containerId } = this.#owner;
    const { status, atNs } = process.exit!;
    const id = process.isInit ? containerId : process.execId;
    this.#owner.publish(`exit:${sequence}`, events.taskExit(containerId, id, process.pid, status, atNs));
  }
}
