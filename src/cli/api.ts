import { execFile } from "node:child_process";
import { existsSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { promisify } from "node:util";
import type { Client, ServiceError } from "@grpc/grpc-js";
import { fromDetailedStatus, STATUS_DETAILS_KEY } from "../daemon/api/status.ts";
import { type CedanaError, Unavailable } from "../errors/index.ts";
import { Management } from "../proto/generated/cedana_api.ts";
import {
  callUnary,
  type Decoded,
  type Encodable,
  type GrpcMethod,
  grpcDefinition,
  loadGrpc,
} from "../proto/grpc.ts";
import { apiSocketName } from "../shim/socket-name.ts";
import { runDirectory } from "./daemon.ts";

type Methods = typeof Management.methods;
type Name = keyof Methods;
type Request<N extends Name> = Encodable<Methods[N]["request"]>;
type Response<N extends Name> = Decoded<Methods[N]["response"]>;
type Unary = { [N in Name]: Methods[N]["responseStream"] extends true ? never : N }[Name];
type Streaming = Exclude<Name, Unary>;

/** grpc-js takes 50 ms to load: import this module only where a command is about to call. */
export class Api implements Disposable {
  readonly #client: Client;
  readonly #definition: Record<string, GrpcMethod>;

  private constructor(client: Client) {
    this.#client = client;
    this.#definition = grpcDefinition(Management);
  }

  /**
   * Connects to cedanad, which is started when it isn't running.
   * @throws Unavailable when it can't be
   */
  static async open(): Promise<Api> {
    const path = join(runDirectory(), apiSocketName());
    if (!(await isListening(path))) await startDaemon(path);
    const grpc = await loadGrpc();
    return new Api(
      new grpc.Client(`unix:${path}`, grpc.credentials.createInsecure(), { "grpc.enable_channelz": 0 }),
    );
  }

  /** @throws the error that cedanad's method threw, or Unavailable */
  async call<N extends Unary>(name: N, request: Request<N>, signal?: AbortSignal): Promise<Response<N>> {
    try {
      const path = `/${Management.name}/${name}`;
      return (await callUnary(this.#client, path, Management.methods[name], request, {
        signal,
      })) as Response<N>;
    } catch (error) {
      throw errorOf(error as ServiceError);
    }
  }

  /** The events of a method that sends them as it goes. @throws as `call` */
  async *events<N extends Streaming>(
    name: N,
    request: Request<N>,
    signal?: AbortSignal,
  ): AsyncGenerator<Response<N>> {
    const { path, requestSerialize, responseDeserialize } = this.#definition[name]!;
    const call = this.#client.makeServerStreamRequest(
      path,
      requestSerialize,
      responseDeserialize,
      request as unknown,
    );
    signal?.addEventListener("abort", () => call.cancel(), { once: true });
    try {
      for await (const event of call) yield event as Response<N>;
    } catch (error) {
      throw errorOf(error as ServiceError);
    } finally {
      call.cancel(); // whoever stops listening doesn't want the rest
    }
  }

  [Symbol.dispose](): void {
    this.#client.close();
  }
}

function errorOf(error: ServiceError): CedanaError {
  const [details] = error.metadata?.get(STATUS_DETAILS_KEY) ?? [];
  return fromDetailedStatus(error.code, error.details, Buffer.isBuffer(details) ? details : undefined);
}

function isListening(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(path, () => {
      socket.destroy();
      resolve(true);
    });
    socket.on("error", () => resolve(false)); // why: the call says it
  });
}

/** As containerd would: by the launcher, or by systemd, if its socket unit is there. */
async function startDaemon(path: string): Promise<void> {
  const launcher = join(import.meta.dirname, "../bin/containerd-shim-cedana-v2");
  if (!existsSync(launcher))
    throw new Unavailable(`cedanad is not running, and ${launcher}, which would start it, is not there`);
  // What the answer says of an engine doesn't matter: whoever gave it is running.
  const asked = await promisify(execFile)(launcher, ["-info"], { timeout: 15_000 }).catch(
    (error: Error & { stderr?: string }) => error,
  );
  if (await isListening(path)) return;
  if (!(asked instanceof Error))
    throw new Unavailable(
      `cedanad can't be reached at ${path}: it has no management API; its log may say why`,
    );
  const words = asked.stderr?.trim().replace(/^containerd-shim-cedana-v2: (UNAVAILABLE: )?/, "");
  throw new Unavailable(`cedanad is not running, and could not be started: ${words || asked.message}`);
}
