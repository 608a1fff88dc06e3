// containerd's gRPC API, as far as the tests need it: statuses arrive as they are, nothing is smoothed over.

import grpc from "@grpc/grpc-js";
import { type Any, decode, encode, type Message } from "./proto.ts";

export type StatusName =
  | "OK"
  | "CANCELLED"
  | "UNKNOWN"
  | "INVALID_ARGUMENT"
  | "DEADLINE_EXCEEDED"
  | "NOT_FOUND"
  | "ALREADY_EXISTS"
  | "PERMISSION_DENIED"
  | "RESOURCE_EXHAUSTED"
  | "FAILED_PRECONDITION"
  | "ABORTED"
  | "OUT_OF_RANGE"
  | "UNIMPLEMENTED"
  | "INTERNAL"
  | "UNAVAILABLE"
  | "DATA_LOSS"
  | "UNAUTHENTICATED";

/** What containerd answered instead of a result. */
export class CallFailed extends Error {
  readonly status: StatusName;
  readonly details: string;
  readonly call: string;
  constructor(call: string, status: StatusName, details: string) {
    super(`${call}: ${status}: ${details}`);
    this.name = "CallFailed";
    this.call = call;
    this.status = status;
    this.details = details;
  }
}

export interface Mount {
  type: string;
  source: string;
  target: string;
  options: string[];
}
export interface Descriptor {
  mediaType: string;
  digest: string;
  size: number;
  annotations?: Record<string, string>;
}
export type TaskStatus = "UNKNOWN" | "CREATED" | "RUNNING" | "STOPPED" | "PAUSED" | "PAUSING";
export interface Timestamp {
  seconds: number;
  nanos: number;
}
export interface ProcessState {
  containerId: string;
  id: string;
  pid: number;
  status: TaskStatus;
  stdin: string;
  stdout: string;
  stderr: string;
  terminal: boolean;
  exitStatus: number;
  exitedAt?: Timestamp;
}
export interface ExitState {
  exitStatus: number;
  exitedAt: Timestamp;
}
export interface Envelope {
  namespace: string;
  topic: string;
  event: Any;
}

const TASKS = "containerd.services.tasks.v1";
const DEADLINE_MS = 60_000;

export class ContainerdClient {
  readonly namespace: string;
  #client: grpc.Client;

  constructor(address: string, namespace: string) {
    this.namespace = namespace;
    this.#client = new grpc.Client(`unix:${address}`, grpc.credentials.createInsecure(), {
      // A containerd that is started again must be found at once.
      "grpc.initial_reconnect_backoff_ms": 50,
      "grpc.min_reconnect_backoff_ms": 50,
      "grpc.max_reconnect_backoff_ms": 200,
      "grpc.enable_http_proxy": 0,
      "grpc.max_receive_message_length": 64 << 20,
      // A channel of its own: nothing is shared with another client of the same address.
      "grpc.use_local_subchannel_pool": 1,
    });
  }

  close(): void {
    this.#client.close();
  }

  async waitForReady(timeoutMs: number): Promise<void> {
    await new Promise<void>((resolve, reject) =>
      this.#client.waitForReady(Date.now() + timeoutMs, (error) => (error ? reject(error) : resolve())),
    );
  }

  #metadata(): grpc.Metadata {
    const metadata = new grpc.Metadata();
    metadata.set("containerd-namespace", this.namespace);
    return metadata;
  }

  async unary<T>(
    path: string,
    requestType: string,
    request: Message,
    responseType: string,
    options: { timeoutMs?: number; signal?: AbortSignal } = {},
  ): Promise<T> {
    return await new Promise<T>((resolve, reject) => {
      const call = this.#client.makeUnaryRequest<Message, T>(
        path,
        (message) => encode(requestType, message),
        (bytes) => decode<T>(responseType, bytes),
        request,
        this.#metadata(),
        options.timeoutMs === 0 ? {} : { deadline: Date.now() + (options.timeoutMs ?? DEADLINE_MS) },
        (error, response) => {
          options.signal?.removeEventListener("abort", cancel);
          if (error)
            reject(
              new CallFailed(
                path.split("/").at(-1)!,
                grpc.status[error.code] as StatusName,
                error.details || error.message,
              ),
            );
          else resolve(response!);
        },
      );
      const cancel = () => call.cancel();
      options.signal?.addEventListener("abort", cancel);
    });
  }

  #task<T>(method: string, request: string, message: Message, response: string, timeoutMs?: number) {
    return this.unary<T>(
      `/${TASKS}.Tasks/${method}`,
      `${TASKS}.${request}`,
      message,
      response.includes(".") ? response : `${TASKS}.${response}`,
      timeoutMs === undefined ? {} : { timeoutMs },
    );
  }

  /** Task service, call by call. */
  readonly tasks = {
    create: (request: {
      containerId: string;
      rootfs: Mount[];
      stdin: string;
      stdout: string;
      stderr: string;
      terminal: boolean;
      checkpoint?: Descriptor;
      options?: Any;
      runtimePath?: string;
    }) =>
      this.#task<{ containerId: string; pid: number }>(
        "Create",
        "CreateTaskRequest",
        { ...request },
        "CreateTaskResponse",
      ),
    start: (containerId: string, execId = "") =>
      this.#task<{ pid: number }>("Start", "StartRequest", { containerId, execId }, "StartResponse"),
    delete: (containerId: string) =>
      this.#task<{ id: string; pid: number } & ExitState>(
        "Delete",
        "DeleteTaskRequest",
        { containerId },
        "DeleteResponse",
      ),
    deleteProcess: (containerId: string, execId: string) =>
      this.#task<{ id: string; pid: number } & ExitState>(
        "DeleteProcess",
        "DeleteProcessRequest",
        { containerId, execId },
        "DeleteResponse",
      ),
    get: async (containerId: string, execId = "") =>
      (
        await this.#task<{ process: ProcessState }>(
          "Get",
          "GetRequest",
          { containerId, execId },
          "GetResponse",
        )
      ).process,
    list: async () =>
      (await this.#task<{ tasks: ProcessState[] }>("List", "ListTasksRequest", {}, "ListTasksResponse"))
        .tasks,
    kill: (containerId: string, signal: number, { execId = "", all = false } = {}) =>
      this.#task<Message>(
        "Kill",
        "KillRequest",
        { containerId, execId, signal, all },
        "containerd.services.Empty",
      ),
    exec: (request: {
      containerId: string;
      execId: string;
      stdin: string;
      stdout: string;
      stderr: string;
      terminal: boolean;
      spec: Any;
    }) => this.#task<Message>("Exec", "ExecProcessRequest", { ...request }, "containerd.services.Empty"),
    resizePty: (containerId: string, execId: string, width: number, height: number) =>
      this.#task<Message>(
        "ResizePty",
        "ResizePtyRequest",
        { containerId, execId, width, height },
        "containerd.services.Empty",
      ),
    closeIO: (containerId: string, execId = "") =>
      this.#task<Message>(
        "CloseIO",
        "CloseIORequest",
        { containerId, execId, stdin: true },
        "containerd.services.Empty",
      ),
    pause: (containerId: string) =>
      this.#task<Message>("Pause", "PauseTaskRequest", { containerId }, "containerd.services.Empty"),
    resume: (containerId: string) =>
      this.#task<Message>("Resume", "ResumeTaskRequest", { containerId }, "containerd.services.Empty"),
    pids: async (containerId: string) =>
      (
        await this.#task<{ processes: { pid: number; info?: Any }[] }>(
          "ListPids",
          "ListPidsRequest",
          { containerId },
          "ListPidsResponse",
        )
      ).processes,
    checkpoint: (containerId: string, options?: Any) =>
      this.#task<{ descriptors: Descriptor[] }>(
        "Checkpoint",
        "CheckpointTaskRequest",
        { containerId, ...(options && { options }) },
        "CheckpointTaskResponse",
        120_000,
      ),
    update: (containerId: string, resources: Any, annotations: Record<string, string> = {}) =>
      this.#task<Message>(
        "Update",
        "UpdateTaskRequest",
        { containerId, resources, annotations },
        "containerd.services.Empty",
      ),
    metrics: async (containerId: string) =>
      (
        await this.#task<{ metrics: { id: string; data?: Any }[] }>(
          "Metrics",
          "MetricsRequest",
          { filters: [`id==${containerId}`] },
          "MetricsResponse",
        )
      ).metrics,
    /** No deadline: it waits as long as the process lives. */
    wait: (containerId: string, execId = "") =>
      this.#task<ExitState>("Wait", "WaitRequest", { containerId, execId }, "WaitResponse", 0),
  };

  readonly containers = {
    create: (container: {
      id: string;
      image: string;
      runtime: { name: string; options?: Any };
      spec: Any;
      snapshotter: string;
      snapshotKey: string;
      labels?: Record<string, string>;
    }) =>
      this.unary<Message>(
        "/containerd.services.containers.v1.Containers/Create",
        "containerd.services.CreateContainerRequest",
        { container },
        "containerd.services.CreateContainerResponse",
      ),
    delete: (id: string) =>
      this.unary<Message>(
        "/containerd.services.containers.v1.Containers/Delete",
        "containerd.services.DeleteContainerRequest",
        { id },
        "containerd.services.Empty",
      ),
  };

  readonly snapshots = {
    prepare: async (snapshotter: string, key: string, parent: string) =>
      (
        await this.unary<{ mounts: Mount[] }>(
          "/containerd.services.snapshots.v1.Snapshots/Prepare",
          "containerd.services.PrepareSnapshotRequest",
          { snapshotter, key, parent, labels: { "containerd.io/gc.root": "live" } },
          "containerd.services.MountsResponse",
        )
      ).mounts,
    mounts: async (snapshotter: string, key: string) =>
      (
        await this.unary<{ mounts: Mount[] }>(
          "/containerd.services.snapshots.v1.Snapshots/Mounts",
          "containerd.services.MountsRequest",
          { snapshotter, key },
          "containerd.services.MountsResponse",
        )
      ).mounts,
    remove: (snapshotter: string, key: string) =>
      this.unary<Message>(
        "/containerd.services.snapshots.v1.Snapshots/Remove",
        "containerd.services.RemoveSnapshotRequest",
        { snapshotter, key },
        "containerd.services.Empty",
      ),
  };

  readonly images = {
    get: async (name: string) =>
      (
        await this.unary<{ image: { name: string; target: Descriptor } }>(
          "/containerd.services.images.v1.Images/Get",
          "containerd.services.GetImageRequest",
          { name },
          "containerd.services.GetImageResponse",
        )
      ).image,
  };

  async readContent(digest: string): Promise<Buffer> {
    return await new Promise((resolve, reject) => {
      const chunks: Buffer[] = [];
      const stream = this.#client.makeServerStreamRequest<Message, { data: Uint8Array }>(
        "/containerd.services.content.v1.Content/Read",
        (message) => encode("containerd.services.ReadContentRequest", message),
        (bytes) => decode("containerd.services.ReadContentResponse", bytes),
        { digest },
        this.#metadata(),
      );
      stream.on("data", (part: { data: Uint8Array }) => chunks.push(Buffer.from(part.data)));
      stream.on("end", () => resolve(Buffer.concat(chunks)));
      stream.on("error", reject);
    });
  }

  /** Subscribes; `cancel()` ends it. The stream ends with an error when containerd goes away. */
  subscribe(
    filters: string[],
    onEnvelope: (envelope: Envelope) => void,
    onEnd: (error?: Error) => void,
  ): () => void {
    const stream = this.#client.makeServerStreamRequest<Message, Envelope>(
      "/containerd.services.events.v1.Events/Subscribe",
      (message) => encode("containerd.services.SubscribeRequest", message),
      (bytes) => decode<Envelope>("containerd.types.Envelope", bytes),
      { filters },
      this.#metadata(),
    );
    stream.on("data", onEnvelope);
    stream.on("error", (error: Error) => onEnd(error));
    stream.on("end", () => onEnd());
    return () => stream.cancel();
  }

  publish(topic: string, event: Any) {
    return this.unary<Message>(
      "/containerd.services.events.v1.Events/Publish",
      "containerd.services.PublishRequest",
      { topic, event },
      "containerd.services.Empty",
    );
  }

  version(timeoutMs: number) {
    return this.unary<{ version: string }>(
      "/containerd.services.version.v1.Version/Version",
      "containerd.services.Empty",
      {},
      "containerd.services.VersionResponse",
      { timeoutMs },
    );
  }
}
