import type { Socket } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import type { Logger } from "pino";
import { toStatus } from "../errors/index.ts";
import { SealedEngines } from "../runtime/sealed-engines.ts";
import { Dispatcher } from "../ttrpc/index.ts";
import { answerStart } from "./bootstrap.ts";
import { inNameOf } from "./culprit.ts";
import { runtimeInfo } from "./info.ts";
import { Keeper } from "./keeper.ts";
import {
  encodeMessage,
  type FieldValues,
  type Message,
  MessageReader,
  type MessageType,
  messageType,
  PROTOCOL_VERSION_MAX,
  PROTOCOL_VERSION_MIN,
} from "./keeper-protocol.ts";
import { type CallContext, Pod } from "./pod.ts";
import { serviceNames, taskService } from "./task-service.ts";

const EPROTO = 71;
/** A keeper takes a cedanad that doesn't welcome it within 10 s for one that hangs. */
const SETTLE_MS = 5_000;

const deleteFlags = { ended: 1, unknown: 2 } as const;

/** A call of cedana-runtime that is under way on a connection. */
export interface WrapperCall {
  /** RUNTIME_ENDED */
  ended(message: Message): void;
  /** the connection has closed */
  lost(): void;
}

/**
 * cedanad's side of the connections that launchers and keepers open. A launcher's connection becomes its keeper's when the
 * launcher turns into one.
 */
export class ShimServer {
  readonly pods = new Set<Pod>();
  readonly #log: Logger;
  readonly #runDirectory: string;
  readonly #build: string;
  readonly #versionMax: number;
  readonly #dispatcher = new Dispatcher<CallContext>();
  readonly #engines: SealedEngines;
  readonly #beginRuntime: (socket: Socket, message: Message) => WrapperCall;
  /** by pid: keepers whose connections have ended and whose calls are still at work */
  readonly #leaving = new Map<number, Promise<void>>();

  constructor(options: {
    log: Logger;
    runDirectory: string;
    build: string;
    versionMax?: number | undefined;
    /** takes up a call of cedana-runtime */
    beginRuntime: (socket: Socket, message: Message) => WrapperCall;
  }) {
    this.#log = options.log;
    this.#engines = new SealedEngines(options.log);
    this.#runDirectory = options.runDirectory;
    this.#build = options.build;
    this.#beginRuntime = options.beginRuntime;
    this.#versionMax = Math.min(options.versionMax ?? PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MAX);
    for (const name of serviceNames) this.#dispatcher.register(name, taskService);
  }

  get taskCount(): number {
    let count = 0;
    for (const pod of this.pods) count += pod.tasks.size;
    return count;
  }

  /** Takes over an accepted connection, from a peer that has been checked. */
  accept(socket: Socket): void {
    const reader = new MessageReader();
    const connection: Connection = { socket, pod: undefined, runtime: undefined, waiting: undefined };
    socket.on("data", (chunk: Buffer) => {
      try {
        for (const message of reader.push(chunk)) this.#take(connection, message);
      } catch (error) {
        this.#unusable(connection, error);
      }
    });
    socket.on("error", (error) => this.#log.warn({ err: error }, "a keeper's connection failed")); // close follows
    socket.on("close", () => {
      const { pod } = connection;
      connection.runtime?.lost();
      if (!pod) return;
      this.pods.delete(pod);
      pod.lost();
      this.#waitFor(pod);
      this.#log.info({ keeper: pod.keeper.pid, tasks: [...pod.tasks.keys()] }, "a keeper has gone");
    });
  }

  #unusable({ pod, socket }: Connection, error: unknown): void {
    this.#log.error({ err: error, keeper: pod?.keeper.pid }, "a keeper's connection is unusable");
    socket.destroy();
  }

  #take(connection: Connection, message: Message): void {
    const { pod, waiting } = connection;
    if (waiting) waiting.push(message);
    else if (pod) inNameOf(pod, () => this.#handle(connection, message));
    else this.#handle(connection, message);
  }

  /** A keeper that comes back while calls of its last connection are still at work would have them done twice at the same time. */
  #waitFor(pod: Pod): void {
    const { pid } = pod.keeper;
    const settled = Promise.race([pod.settled(), sleep(SETTLE_MS, undefined, { ref: false })]).then(() => {
      if (this.#leaving.get(pid) === settled) this.#leaving.delete(pid);
    });
    this.#leaving.set(pid, settled);
  }

  async #welcomeLater(connection: Connection, hello: Message, leaving: Promise<void>): Promise<void> {
    connection.waiting = [];
    await leaving;
    const { waiting, socket } = connection;
    connection.waiting = undefined;
    if (socket.destroyed) return;
    try {
      for (const message of [hello, ...waiting]) this.#take(connection, message);
    } catch (error) {
      this.#unusable(connection, error);
    }
  }

  #handle(connection: Connection, message: Message): void {
    const { pod } = connection;
    switch (message.type) {
      case messageType.HELLO: {
        const leaving = this.#leaving.get(message.int("pid"));
        if (leaving) void this.#welcomeLater(connection, message, leaving);
        else this.#welcome(connection, message);
        return;
      }
      case messageType.START:
        this.#answer(connection, messageType.START_ANSWER, answerStart(message, this.#runDirectory));
        return;
      case messageType.DELETE:
        this.#answer(connection, messageType.DELETE_ANSWER, this.#answerDelete(message));
        return;
      case messageType.INFO:
        this.#answer(connection, messageType.INFO_ANSWER, runtimeInfo(message.bytes("options"), this.#build));
        return;
      case messageType.STATUS:
        this.#answer(connection, messageType.STATUS_ANSWER, this.#answerStatus());
        return;
      case messageType.RUNTIME:
        connection.runtime = this.#beginRuntime(connection.socket, message);
        return;
      case messageType.RUNTIME_ENDED:
        connection.runtime?.ended(message);
        return;
    }
    if (!pod) throw new Error(`message ${message.type} before HELLO`);
    switch (message.type) {
      case messageType.RESULT:
        pod.keeper.settle(message);
        return;
      case messageType.SPAWNED:
        pod.keeper.spawned(message);
        return;
      case messageType.REQUEST:
        pod.requested(message);
        return;
      case messageType.EXIT:
        pod.exited(message);
        return;
      case messageType.TASK:
        pod.taskKnown(message);
        return;
      case messageType.END:
        void pod.arrived().catch((error) => {
          this.#log.error({ err: error, keeper: pod.keeper.pid }, `take up ${pod.what}: it is tried again`);
          pod.fail();
        });
        return;
      case messageType.PING:
        pod.keeper.pong(message.int("nonce"));
        return;
      case messageType.OOM:
        pod.outOfMemory(message.string("id"));
        return;
      case messageType.CONNECTION_CLOSED:
        pod.connectionClosed(message.int("connection"));
        return;
      case messageType.EVENT_REFUSED:
        pod.eventRefused(message.string("id"), message.string("eventKey"), message.string("message"));
        return;
      default: // what newer keepers may say
        return;
    }
  }

  #welcome(connection: Connection, hello: Message): void {
    const version = Math.min(this.#versionMax, hello.int("versionMax"));
    if (version < Math.max(PROTOCOL_VERSION_MIN, hello.int("versionMin"))) {
      const ours = `${PROTOCOL_VERSION_MIN} to ${this.#versionMax}`;
      const theirs = `${hello.int("versionMin")} to ${hello.int("versionMax")}`;
      this.#log.error(
        { keeper: hello.int("pid"), ours, theirs },
        "a keeper speaks no version of the protocol that we do",
      );
      const message = `cedanad speaks versions ${ours}, the keeper ${theirs}`;
      connection.socket.end(encodeMessage(messageType.WELCOME, { errno: EPROTO, message }));
      return;
    }
    const keeper = new Keeper(connection.socket, hello.int("pid"), version, (program) =>
      this.#engines.of(program),
    );
    const namespace = hello.string("namespace");
    const log = this.#log.child({ namespace, keeper: keeper.pid });
    connection.pod = new Pod({
      keeper,
      namespace,
      containerdAddress: hello.string("containerdAddress"),
      runDirectory: this.#runDirectory,
      log,
      dispatcher: this.#dispatcher,
    });
    this.pods.add(connection.pod);
    keeper.welcome(this.#build);
    log.info({ id: hello.string("id"), version }, "a keeper has come");
  }

  #answer(connection: Connection, type: MessageType, answer: Promise<FieldValues>): void {
    answer
      .catch((error): FieldValues => {
        const { message } = toStatus(error);
        this.#log.error({ err: error }, "a launcher's question failed");
        return { errno: EPROTO, message };
      })
      .then((values) => connection.socket.write(encodeMessage(type, values)))
      .catch((error) => this.#unusable(connection, error));
  }

  /**
   * containerd's `delete`: after every normal Delete, and when it has lost the shim. What we still hold of the task ends here;
   * a keeper that is gone leaves the rest to the launcher.
   */
  async #answerDelete(message: Message): Promise<FieldValues> {
    const [namespace, id, bundle] = [
      message.string("namespace"),
      message.string("id"),
      message.string("bundle"),
    ];
    for (const pod of this.pods) {
      if (pod.namespace !== namespace) continue;
      const task = pod.tasks.get(id);
      if (!task || (bundle !== "" && task.bundle !== bundle)) continue;
      const exit = await task.destroy();
      pod.tasks.delete(id);
      pod.keeper.taskGone(id);
      if (pod.tasks.size === 0 && pod.creating.size === 0) pod.keeper.leave();
      return { flags: deleteFlags.ended, pid: task.init.pid, status: exit.status, atNs: exit.atNs };
    }
    return { flags: deleteFlags.unknown };
  }

  async #answerStatus(): Promise<FieldValues> {
    return { answer: Buffer.from(JSON.stringify(this.status())) };
  }

  status(): DaemonStatus {
    return {
      pid: process.pid,
      build: this.#build,
      uptimeMs: Math.round(process.uptime() * 1000),
      rssBytes: process.memoryUsage.rss(),
      pods: [...this.pods].map((pod) => ({
        keeper: pod.keeper.pid,
        protocol: pod.keeper.version,
        namespace: pod.namespace,
        tasks: [...pod.tasks.values()].map((task) => ({
          id: task.id,
          state: task.init.state,
          pid: task.init.pid,
          engine: task.engine.binary,
          bundle: task.bundle,
          ...(task.memory.record && {
            lazy: { state: task.memory.record.state, reason: task.memory.record.reason },
          }),
          execs: [...task.execs.values()].map(({ execId, state, pid }) => ({ execId, state, pid })),
        })),
      })),
    };
  }
}

/** What STATUS answers, as JSON. */
export interface DaemonStatus {
  pid: number;
  build: string;
  uptimeMs: number;
  rssBytes: number;
  pods: {
    keeper: number;
    protocol: number;
    namespace: string;
    tasks: {
      id: string;
      state: string;
      pid: number;
      engine: string;
      bundle: string;
      /** of a container that was, or was to be, restored lazily */
      lazy?: { state: string; reason?: string | undefined };
      execs: { execId: string; state: string; pid: number }[];
    }[];
  }[];
}

interface Connection {
  socket: Socket;
  pod: Pod | undefined;
  runtime: WrapperCall | undefined;
  /** what has come since a HELLO that isn't answered yet */
  waiting: Message[] | undefined;
}
