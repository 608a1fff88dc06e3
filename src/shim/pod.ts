import { createHash } from "node:crypto";
import { join } from "node:path";
import type { Logger } from "pino";
import { BrokenImage } from "../errors/index.ts";
import type { Dispatcher } from "../ttrpc/index.ts";
import type { Culprit } from "./culprit.ts";
import { type Event, forwardFrame } from "./events.ts";
import { readTaskRecord } from "./journal.ts";
import type { AdoptedExit, Keeper, Tag, Work } from "./keeper.ts";
import { exitStatusOf, type Message } from "./keeper-protocol.ts";
import { nowNs } from "./process.ts";
import { resumeCheckpoint, undoLeftovers } from "./recovery.ts";
import { Task } from "./task.ts";

/** A request that was in work at two crashes is not tried a third time. */
const MAX_CRASHES = 2;

/** What a call of the task service knows of where it came from. */
export interface CallContext {
  readonly pod: Pod;
  readonly work: Work;
  /** refuse instead of executing: two cedanads have died over it */
  readonly poisonous: boolean;
  /** the call only waits from now on */
  park(): void;
}

/**
 * The tasks of one keeper: a container, or the containers of a Kubernetes pod. Takes the keeper's reports to the task they
 * belong to, and requests to the task service.
 */
export class Pod implements Culprit {
  readonly keeper: Keeper;
  readonly namespace: string;
  /** containerd's own API; empty: unknown */
  readonly containerdAddress: string;
  readonly log: Logger;
  readonly tasks = new Map<string, Task>();
  /** tasks whose Create is under way: nobody sees them yet but their processes' exits */
  readonly creating = new Set<Task>();
  readonly #runDirectory: string;
  readonly #dispatcher: Dispatcher<CallContext>;
  /** exits of pids that no task has, or not yet: Create, Start and Exec learn their pid from a file */
  readonly #unclaimed = new Map<number, AdoptedExit>();
  readonly #calls = new Map<number, { connection: number; abort: AbortController }>();
  readonly #served = new Set<Promise<void>>();
  readonly #welcomedMs = Date.now();
  #startsUnderWay = 0;
  /** Until END, reports of a keeper that came back are only collected: requests must be running again before exits are told. */
  #arriving: { exits: Message[]; requests: Message[] } | undefined = { exits: [], requests: [] };

  constructor(options: {
    keeper: Keeper;
    namespace: string;
    containerdAddress: string;
    runDirectory: string;
    log: Logger;
    dispatcher: Dispatcher<CallContext>;
  }) {
    this.keeper = options.keeper;
    this.namespace = options.namespace;
    this.containerdAddress = options.containerdAddress;
    this.log = options.log;
    this.#runDirectory = options.runDirectory;
    this.#dispatcher = options.dispatcher;
  }

  /** A path short enough for a unix socket, whatever the bundle's path is. */
  consoleSocketPath(io: string): string {
    const name = createHash("sha256")
      .update(`${this.namespace}/${this.keeper.pid}/${io}`)
      .digest("hex")
      .slice(0, 24);
    return join(this.#runDirectory, "c", name);
  }

  publish(containerId: string, key: string, event: Event): void {
    this.keeper.event(containerId, key, forwardFrame(this.namespace, event, nowNs()));
  }

  /** The exit of a process that ended before we knew its pid; one from before `sinceNs` was another process. */
  takeUnclaimedExit(pid: number, sinceNs: bigint): AdoptedExit | undefined {
    const exit = this.#unclaimed.get(pid);
    if (!exit || exit.atNs < sinceNs) return undefined;
    this.#unclaimed.delete(pid);
    return exit;
  }

  // ---- what the keeper says ------------------------------------------------------------------------------------------

  /**
   * TASK of a keeper that came back: read the record that the cedanad before us left.
   * @throws what hinders us now and may not hinder the next one (EMFILE, EIO): to forget the task for it would end its container
   */
  taskKnown(message: Message): void {
    const [id, bundle] = [message.string("id"), message.string("bundle")];
    if (bundle === "") return; // its Create is under way and will be repeated: there is no record yet
    try {
      const record = readTaskRecord(bundle);
      if (record && record.id === id) {
        this.tasks.set(id, Task.revive(this, record));
        return;
      }
      this.log.info({ task: id }, "the record is gone with the bundle: the task was deleted");
    } catch (error) {
      if (!(error instanceof BrokenImage)) throw error;
      this.log.error({ task: id, err: error }, "read the task's record");
    }
    this.keeper.taskGone(id);
  }

  exited(message: Message): void {
    if (this.#arriving) {
      this.#arriving.exits.push(message);
      return;
    }
    const exit: AdoptedExit = {
      sequence: message.int("sequence"),
      pid: message.int("pid"),
      exitStatus: exitStatusOf(message.int("waitStatus")),
      atNs: message.bigint("atNs"),
    };
    for (const task of [...this.tasks.values(), ...this.creating])
      for (const process of task.processes()) {
        if (process.pid !== exit.pid) continue;
        if (process.exit?.atNs === exit.atNs) task.exits.repeated(process, exit.sequence);
        else if (!process.exit && !process.heldExit) task.exits.ended(process, exit);
        else continue; // an earlier process of this pid
        return;
      }
    this.#unclaimed.set(exit.pid, exit);
    this.#forgetOrphans();
  }

  requested(message: Message): void {
    if (this.#arriving) this.#arriving.requests.push(message);
    else void this.#begin(message);
  }

  #begin(message: Message): Promise<void> {
    const served = this.#serve(message).finally(() => this.#served.delete(served));
    this.#served.add(served);
    return served;
  }

  connectionClosed(connection: number): void {
    for (const call of this.#calls.values()) if (call.connection === connection) call.abort.abort();
  }

  outOfMemory(containerId: string): void {
    void this.tasks.get(containerId)?.containerCgroup.noticeOutOfMemory();
  }

  eventRefused(containerId: string, key: string, why: string): void {
    this.log.error({ task: containerId, event: key }, `containerd refused an event: ${why}`);
  }

  /** END: everything that the keeper had to say of the past has come. */
  async arrived(): Promise<void> {
    // Collected until the tasks are whole again: what comes meanwhile belongs behind what came before.
    const { exits, requests } = this.#arriving ?? { exits: [], requests: [] };
    const isRepeated = (task: Task) => requests.some((request) => task.answerTo(request.int("request")));
    for (const [id, task] of this.tasks) {
      if (task.init.state === "deleted" && !isRepeated(task)) {
        this.tasks.delete(id); // its Delete was answered, only our TASK_GONE was not sent
        this.keeper.taskGone(id);
      } else await task.revived();
    }
    this.#arriving = undefined;
    for (const task of this.tasks.values()) resumeCheckpoint(task);
    const served = requests.map((request) => this.#begin(request)); // those that start something count from here on
    await new Promise((resolve) => setImmediate(resolve));
    for (const exit of exits) this.exited(exit);
    // What a dump had frozen is thawed, unless the same dump goes on.
    void Promise.allSettled(served.filter((_, index) => isCheckpoint(requests[index]!))).then(() =>
      Promise.all([...this.tasks.values()].map(undoLeftovers)),
    );
  }

  get what(): string {
    return `the pod of keeper ${this.keeper.pid} (${[...this.tasks.keys()].join(", ") || "no task"})`;
  }

  fail(): void {
    this.keeper.disconnect();
  }

  /** After the end of the connection: no call is at work any more. */
  async settled(): Promise<void> {
    while (this.#served.size > 0) await Promise.allSettled(this.#served);
  }

  lost(): void {
    for (const call of this.#calls.values()) call.abort.abort();
    this.keeper.lost();
    void this.settled().then(() => {
      for (const { restoration } of this.tasks.values()) restoration?.unlock(); // a keeper that comes back has it locked anew
    });
  }

  async #serve(message: Message): Promise<void> {
    const request = message.int("request");
    const connection = message.int("connection");
    const deliveries = message.int("deliveries");
    // An older keeper doesn't know who began it, only who was sent it.
    const begun = message.has("taken") ? message.int("taken") : deliveries - 1;
    this.keeper.taken(request);
    const abort = new AbortController();
    if (message.int("closed") === 1) abort.abort();
    this.#calls.set(request, { connection, abort });
    // What a cedanad before us began may have ended at any time since the request arrived. Its age is of when the keeper sent it
    // to us: not before our welcome, and long ago when we have been slow.
    const sentMs = deliveries > 1 ? this.#welcomedMs : Date.now();
    const sinceNs = BigInt(sentMs - message.int("ageMs") - 1) * 1_000_000n;
    const work: Work = {
      request,
      repeated: deliveries > 1,
      sinceNs,
      tag: (step: string): Tag => ({ request, step }),
    };
    try {
      const frame = await this.#dispatcher.dispatch(
        message.bytes("frame"),
        { pod: this, work, poisonous: begun >= MAX_CRASHES, park: () => this.keeper.parked(request) },
        abort.signal,
        message.int("ageMs"),
      );
      this.keeper.respond(request, frame ?? new Uint8Array());
    } catch (error) {
      this.log.error({ err: error, request }, "a call of the task service failed outside its handler");
      this.keeper.respond(request, new Uint8Array());
    } finally {
      this.#calls.delete(request);
      this.#afterResponse(request);
    }
  }

  /**
   * For a call that starts a process and learns its pid from a file. Until its work is done, and that may be long after its caller was told
   * that the time is over, no exit is an orphan's.
   */
  async starting<T>(work: () => Promise<T>): Promise<T> {
    this.#startsUnderWay += 1;
    try {
      return await work();
    } finally {
      this.#startsUnderWay -= 1;
      this.#forgetOrphans();
    }
  }

  readonly #afterwards = new Map<number, () => void>();

  /** Runs when the response to the request is on its way: at once for a call that was answered when its time was over. */
  afterResponse(request: number, action: () => void): void {
    if (this.#calls.has(request)) this.#afterwards.set(request, action);
    else action();
  }

  #afterResponse(request: number): void {
    const action = this.#afterwards.get(request);
    this.#afterwards.delete(request);
    try {
      action?.();
    } catch (error) {
      this.log.error({ err: error, request }, "what follows the response to a call failed");
    }
  }

  /** While no call is under way that may yet learn its pid, an unclaimed exit is that of somebody's orphan. */
  #forgetOrphans(): void {
    if (this.#startsUnderWay > 0) return;
    for (const exit of this.#unclaimed.values()) this.keeper.acknowledge(exit.sequence);
    this.#unclaimed.clear();
  }
}

/** Judged by the method's field in the request: cheap, and never fails. */
function isCheckpoint(message: Message): boolean {
  return message.bytes("frame").subarray(10, 160).includes("\x12\x0aCheckpoint", 0, "latin1");
}
