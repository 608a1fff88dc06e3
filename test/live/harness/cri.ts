// What the kubelet says to containerd, as far as the tests go: pods in the node's network, or with a host name and an address of their own.

import { mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { type Live, liveRuntimes } from "./live.ts";
import type { Message } from "./proto.ts";
import { until } from "./until.ts";

const POD = 0;
const CONTAINER = 1;
const NODE = 2;
const states = ["CREATED", "RUNNING", "EXITED"] as const;

export interface PodOptions {
  /** gives the pod a network of its own, without which its name is the node's */
  hostname?: string;
  annotations?: Record<string, string>;
  /** the kubelet's shareProcessNamespace */
  sharesProcesses?: boolean;
  /** systemd's, in which its cgroups are */
  slice?: string;
}

export interface CriContainerOptions {
  annotations?: Record<string, string>;
  mounts?: { containerPath: string; hostPath: string }[];
  /** instead of the test image: a checkpoint's archive */
  image?: string;
}

function namespacesOf({ hostname, sharesProcesses }: PodOptions): Message {
  return { network: hostname ? POD : NODE, pid: sharesProcesses ? POD : CONTAINER };
}

/** A pod, as `crictl runp` makes one. */
export class Pod {
  readonly id: string;
  readonly #live: Live;
  readonly #config: Message;
  readonly #namespaces: Message;
  #containers = 0;

  private constructor(live: Live, id: string, config: Message, namespaces: Message) {
    this.#live = live;
    this.id = id;
    this.#config = config;
    this.#namespaces = namespaces;
  }

  static async run(live: Live, options: PodOptions = {}): Promise<Pod> {
    const name = live.newId("pod");
    const logs = join(live.dir, "logs", name);
    mkdirSync(logs, { recursive: true });
    const config = {
      metadata: { name, uid: `${live.namespace}-${name}`, namespace: "default" },
      logDirectory: logs,
      hostname: options.hostname ?? "",
      annotations: options.annotations ?? {},
      linux: {
        cgroupParent: `/${options.slice ?? live.namespace}`, // the latter is where the harness looks for what is left
        securityContext: { namespaceOptions: namespacesOf(options) },
      },
    };
    const { podSandboxId } = await live.client.unary<{ podSandboxId: string }>(
      "/runtime.v1.RuntimeService/RunPodSandbox",
      "runtime.v1.RunPodSandboxRequest",
      { config, runtimeHandler: liveRuntimes.cri },
      "runtime.v1.RunPodSandboxResponse",
    );
    return new Pod(live, podSandboxId, config, namespacesOf(options));
  }

  async create(args: string[], options: CriContainerOptions = {}): Promise<CriContainer> {
    const name = `c${++this.#containers}`;
    const live = this.#live;
    const { containerId } = await live.client.unary<{ containerId: string }>(
      "/runtime.v1.RuntimeService/CreateContainer",
      "runtime.v1.CreateContainerRequest",
      {
        podSandboxId: this.id,
        config: {
          metadata: { name },
          image: { image: options.image ?? live.image },
          args,
          mounts: [
            { containerPath: "/programs", hostPath: live.programs, readonly: true },
            ...(options.mounts ?? []),
          ],
          annotations: options.annotations ?? {},
          logPath: `${name}.log`,
          linux: { securityContext: { namespaceOptions: this.#namespaces } },
        },
        sandboxConfig: this.#config,
      },
      "runtime.v1.CreateContainerResponse",
    );
    return new CriContainer(live, containerId, join(String(this.#config.logDirectory), `${name}.log`));
  }

  async run(args: string[], options: CriContainerOptions = {}): Promise<CriContainer> {
    const container = await this.create(args, options);
    await container.start();
    return container;
  }

  /** Stops and removes the pod with everything in it. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const verb of ["StopPodSandbox", "RemovePodSandbox"])
      await this.#live.client.unary(
        `/runtime.v1.RuntimeService/${verb}`,
        "runtime.v1.PodSandboxRequest",
        { podSandboxId: this.id },
        "runtime.v1.Empty",
      );
  }
}

export class CriContainer {
  readonly id: string;
  readonly #live: Live;
  readonly #log: string;

  constructor(live: Live, id: string, log: string) {
    this.#live = live;
    this.id = id;
    this.#log = log;
  }

  #call<T = Message>(
    verb: string,
    request: string,
    message: Message,
    response = "Empty",
    timeoutMs?: number,
  ): Promise<T> {
    return this.#live.client.unary<T>(
      `/runtime.v1.RuntimeService/${verb}`,
      `runtime.v1.${request}`,
      { containerId: this.id, ...message },
      `runtime.v1.${response}`,
      timeoutMs === undefined ? {} : { timeoutMs },
    );
  }

  async start(): Promise<void> {
    await this.#call("StartContainer", "ContainerRequest", {});
  }

  async stop(timeoutS: number): Promise<void> {
    await this.#call("StopContainer", "StopContainerRequest", { timeout: timeoutS });
  }

  async remove(): Promise<void> {
    await this.#call("RemoveContainer", "ContainerRequest", {});
  }

  async exec(cmd: string[]): Promise<{ stdout: string; stderr: string; exitCode: number }> {
    const answer = await this.#call<{ stdout: Uint8Array; stderr: Uint8Array; exitCode: number }>(
      "ExecSync",
      "ExecSyncRequest",
      { cmd, timeout: 20 },
      "ExecSyncResponse",
    );
    const text = (bytes: Uint8Array) => Buffer.from(bytes).toString();
    return { stdout: text(answer.stdout), stderr: text(answer.stderr), exitCode: answer.exitCode };
  }

  async status(): Promise<{ state: (typeof states)[number]; exitCode: number; reason: string }> {
    const { status } = await this.#call<{ status: { state: number; exitCode: number; reason: string } }>(
      "ContainerStatus",
      "ContainerRequest",
      {},
      "ContainerStatusResponse",
    );
    return { ...status, state: states[status.state]! };
  }

  async checkpoint(location: string): Promise<void> {
    await this.#call(
      "CheckpointContainer",
      "CheckpointContainerRequest",
      { location, timeout: 60 },
      "Empty",
      60_000,
    );
  }

  /** The lines that the container has printed so far, without the log's own columns (time, stream, tag). */
  lines(): string[] {
    return readFileSync(this.#log, "utf8")
      .split("\n")
      .slice(0, -1)
      .map((line) => line.split(" ").slice(3).join(" "));
  }

  /** The last number that it has printed, once that is more than `after`. */
  async numberAfter(after: number): Promise<number> {
    let last = -1;
    await until(
      () => {
        last = Number(this.lines().at(-1) ?? -1);
        return last > after;
      },
      { what: () => `a number after ${after}; the last one is ${last}` },
    );
    return last;
  }

  async exited(): Promise<{ exitCode: number; reason: string }> {
    await until(async () => (await this.status()).state === "EXITED", {
      what: () => `the end of ${this.id}`,
    });
    return await this.status();
  }
}
