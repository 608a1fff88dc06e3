import { type ClientHttp2Session, connect as connectHttp2, type OutgoingHttpHeaders } from "node:http2";
import { connect } from "node:net";
import {
  AlreadyExists,
  Cancelled,
  messageOf,
  NotFound,
  RemoteFailed,
  statusCode,
  TimedOut,
  Unavailable,
} from "../errors/index.ts";
import type { Decoded, Encodable, Method, Service } from "../proto/grpc.ts";

export const CONTAINERD_SOCKET = "/run/containerd/containerd.sock";

/** Specs and lists of mounts are long where images have many layers. */
const MAX_ANSWER_BYTES = 16 * 1024 * 1024;
/** Of gRPC: one byte that says whether the message is compressed, and its length (32 bits, big-endian). */
const PREFIX_BYTES = 5;

export interface CallOptions {
  /** cancels it */
  signal?: AbortSignal | undefined;
  /** default: as long as containerd lives */
  timeoutMs?: number | undefined;
  /** what containerd makes stays as long as this lease of its */
  lease?: string | undefined;
}

/**
 * containerd's own API, of which we are a client like any other: gRPC's unary calls over Node's HTTP/2. gRPC's library would take 50 ms
 * and 17 MB to load, in a process that most of the time has one small thing to ask.
 */
export class Containerd implements Disposable {
  readonly #address: string;
  readonly #namespace: string;
  readonly #session: ClientHttp2Session;
  /** why the connection isn't there; its calls only hear that it isn't */
  #lost: Error | undefined;

  constructor(address: string, namespace: string) {
    this.#address = address;
    this.#namespace = namespace;
    this.#session = connectHttp2("http://localhost", { createConnection: () => connect(address) });
    this.#session.on("error", (error) => {
      this.#lost = error;
    });
  }

  /** @throws NotFound, AlreadyExists, Unavailable, TimedOut, Cancelled, RemoteFailed with containerd's own status */
  async call<S extends Service, N extends keyof S["methods"] & string>(
    service: S,
    name: N,
    request: Encodable<S["methods"][N]["request"]>,
    options: CallOptions = {},
  ): Promise<Decoded<S["methods"][N]["response"]>> {
    const method = service.methods[name] as Method;
    const what = `containerd (${this.#address}): ${name}`;
    const answer = await this.#exchange(
      `/${service.name}/${name}`,
      method.request.encode(request),
      what,
      options,
    );
    return method.response.decode(answer) as Decoded<S["methods"][N]["response"]>;
  }

  async #exchange(
    path: string,
    request: Uint8Array,
    what: string,
    { signal, timeoutMs = 0, lease }: CallOptions,
  ): Promise<Buffer> {
    const headers: OutgoingHttpHeaders = {
      ":method": "POST",
      ":path": path,
      "content-type": "application/grpc",
      te: "trailers",
      "containerd-namespace": this.#namespace,
      ...(lease !== undefined && { "containerd-lease": lease }),
    };
    const chunks: Buffer[] = [];
    let bytes = 0;
    let status: { code: number; message: string } | undefined;
    let failure: Error | undefined;
    const note = (answered: Record<string, unknown>) => {
      if (answered["grpc-status"] === undefined) return;
      status = {
        code: Number(answered["grpc-status"]),
        message: decodeMessage(String(answered["grpc-message"] ?? "")),
      };
    };
    await new Promise<void>((resolve) => {
      const stream = this.#session.request(headers, signal && { signal });
      stream.on("response", note); // an error may come without a message before it
      stream.on("trailers", note);
      stream.on("data", (chunk: Buffer) => {
        bytes += chunk.length;
        if (bytes <= MAX_ANSWER_BYTES) chunks.push(chunk);
        else
          stream.destroy(
            new RemoteFailed(`${what}: its answer is too long`, { code: statusCode.RESOURCE_EXHAUSTED }),
          );
      });
      stream.setTimeout(timeoutMs, () =>
        stream.destroy(new TimedOut(`${what}: no answer for ${timeoutMs} ms`)),
      );
      stream.on("error", (error) => {
        failure = error;
      });
      stream.on("close", resolve);
      const prefix = Buffer.alloc(PREFIX_BYTES);
      prefix.writeUInt32BE(request.length, 1);
      stream.end(Buffer.concat([prefix, request]));
    }).catch((error: Error) => {
      failure = error; // the connection was lost before
    });
    if (signal?.aborted) throw new Cancelled(`${what}: cancelled`, { cause: signal.reason });
    if (status && status.code !== statusCode.OK) throw errorOf(status.code, `${what}: ${status.message}`);
    if (failure instanceof TimedOut || failure instanceof RemoteFailed) throw failure;
    if (!status) {
      const cause = this.#lost ?? failure;
      throw new Unavailable(`${what}: ${cause ? messageOf(cause) : "the connection was lost"}`, { cause });
    }
    return messageIn(Buffer.concat(chunks), what);
  }

  [Symbol.dispose](): void {
    this.#session.close();
  }
}

function errorOf(code: number, message: string): Error {
  if (code === statusCode.NOT_FOUND) return new NotFound(message);
  if (code === statusCode.ALREADY_EXISTS) return new AlreadyExists(message);
  if (code === statusCode.UNAVAILABLE) return new Unavailable(message);
  return new RemoteFailed(message, { code });
}

/** Percent-encoded; what isn't, stays as it is. */
function decodeMessage(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** The one message of an answer. */
function messageIn(answer: Buffer, what: string): Buffer {
  if (
    answer.length < PREFIX_BYTES ||
    answer[0] !== 0 ||
    answer.readUInt32BE(1) !== answer.length - PREFIX_BYTES
  )
    throw new RemoteFailed(`${what}: the answer is not one message of gRPC`, { code: statusCode.INTERNAL });
  return answer.subarray(PREFIX_BYTES);
}
