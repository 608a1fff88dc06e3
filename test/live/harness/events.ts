// What containerd told its subscribers, in the order in which it did.

import type { ContainerdClient, Envelope } from "./client.ts";
import { type Any, anyJson, decode } from "./proto.ts";
import { until } from "./until.ts";

export interface TaskEvent {
  /** `create`, `start`, `exit`, `delete`, `exec-added`, `exec-started`, `oom`, `paused`, `resumed`, `checkpointed` */
  topic: string;
  containerId: string;
  /** the exec process, or empty for the container's init */
  execId: string;
  pid: number;
  exitStatus: number;
  bundle: string;
}

interface Decoded {
  containerId: string;
  id?: string;
  execId?: string;
  pid?: number;
  exitStatus?: number;
  bundle?: string;
}

/** A task event as it is in an envelope. */
export function decodeEvent(topic: string, { typeUrl, value }: Any): TaskEvent {
  const event = decode<Decoded>(typeUrl.replace(/^.*\//, ""), value);
  const id = event.execId ?? event.id ?? "";
  return {
    topic: topic.slice("/tasks/".length),
    containerId: event.containerId,
    execId: id === event.containerId ? "" : id,
    pid: event.pid ?? 0,
    exitStatus: event.exitStatus ?? 0,
    bundle: event.bundle ?? "",
  };
}

const READY = "/live/ready";

export class EventLog {
  readonly all: TaskEvent[] = [];
  #client: ContainerdClient;
  #cancel: (() => void) | undefined;
  #ready = 0;
  #closed = false;

  constructor(client: ContainerdClient) {
    this.#client = client;
  }

  /** Subscribes, and returns when events really arrive: the server answers nothing to a subscription. */
  async open(): Promise<void> {
    this.#cancel?.();
    const before = this.#ready;
    this.#cancel = this.#client.subscribe(
      [`namespace==${this.#client.namespace}`],
      (envelope) => this.#take(envelope),
      () => {}, // containerd went away; whoever starts it again opens the log again
    );
    const deadline = Date.now() + 10_000;
    while (this.#ready === before && !this.#closed) {
      if (Date.now() > deadline) throw new Error("no event arrived in 10 s after subscribing");
      await this.#client.publish(READY, anyJson("live.ready", {}));
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }

  close(): void {
    this.#closed = true;
    this.#cancel?.();
  }

  #take(envelope: Envelope): void {
    if (envelope.topic === READY) {
      this.#ready++;
      return;
    }
    if (!envelope.topic.startsWith("/tasks/")) return;
    this.all.push(decodeEvent(envelope.topic, envelope.event));
  }

  of(containerId: string): TaskEvent[] {
    return this.all.filter((event) => event.containerId === containerId);
  }

  /** `create`, `start`, `exec-added e1`, `exit e1 3`, `exit 0` …: short enough to compare as a list. */
  summary(containerId: string): string[] {
    return this.of(containerId).map((event) =>
      [event.topic, event.execId, event.topic === "exit" ? String(event.exitStatus) : ""]
        .filter(Boolean)
        .join(" "),
    );
  }

  async waitFor(
    containerId: string,
    topic: string,
    { execId = "", count = 1, timeoutMs = 20_000 } = {},
  ): Promise<TaskEvent> {
    const found = () =>
      this.of(containerId).filter((event) => event.topic === topic && event.execId === execId)[count - 1];
    return await until(found, {
      timeoutMs,
      what: () => `event ${topic} ${execId} of ${containerId}; seen: ${this.summary(containerId).join(", ")}`,
    });
  }
}
