import type { Client, Metadata, ServiceError } from "@grpc/grpc-js";
import { NotFound, RemoteFailed, statusCode, Unavailable } from "../../errors/index.ts";
import { callUnary, type Decoded, type Encodable, loadGrpc, type Service } from "../../proto/grpc.ts";

export const CONTAINERD_SOCKET = "/run/containerd/containerd.sock";

/** containerd's own API, of which we are a client like any other. */
export class Containerd implements Disposable {
  readonly #client: Client;
  readonly #metadata: Metadata;
  readonly #address: string;

  private constructor(client: Client, metadata: Metadata, address: string) {
    this.#client = client;
    this.#metadata = metadata;
    this.#address = address;
  }

  static async open(address: string, namespace: string): Promise<Containerd> {
    const grpc = await loadGrpc();
    const metadata = new grpc.Metadata();
    metadata.set("containerd-namespace", namespace);
    const client = new grpc.Client(`unix:${address}`, grpc.credentials.createInsecure(), {
      "grpc.enable_channelz": 0,
      "grpc.enable_http_proxy": 0,
      // Specs and lists of mounts are long where images have many layers.
      "grpc.max_receive_message_length": 16 * 1024 * 1024,
    });
    return new Containerd(client, metadata, address);
  }

  /** @throws NotFound, Unavailable, RemoteFailed with containerd's own status */
  async call<S extends Service, N extends keyof S["methods"] & string>(
    service: S,
    name: N,
    request: Encodable<S["methods"][N]["request"]>,
    signal?: AbortSignal,
  ): Promise<Decoded<S["methods"][N]["response"]>> {
    const method = service.methods[name] as S["methods"][N];
    try {
      return await callUnary(this.#client, `/${service.name}/${name}`, method, request, {
        metadata: this.#metadata,
        signal,
      });
    } catch (error) {
      const { code, details } = error as ServiceError;
      const what = `containerd (${this.#address}): ${name}: ${details}`;
      if (code === statusCode.NOT_FOUND) throw new NotFound(what, { cause: error });
      if (code === statusCode.UNAVAILABLE) throw new Unavailable(what, { cause: error });
      throw new RemoteFailed(what, { code, cause: error });
    }
  }

  [Symbol.dispose](): void {
    this.#client.close();
  }
}
