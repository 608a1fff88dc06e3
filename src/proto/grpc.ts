import type { MessageType } from "./wire.ts";

/** A service as scripts/proto.mjs writes it. */
export interface Service {
  readonly name: string;
  readonly methods: Readonly<Record<string, Method>>;
}

export interface Method {
  // biome-ignore lint/suspicious/noExplicitAny: a message is whatever its type says
  readonly request: MessageType<any, any>;
  // biome-ignore lint/suspicious/noExplicitAny: as above
  readonly response: MessageType<any, any>;
  readonly requestStream: boolean;
  readonly responseStream: boolean;
}

/** What decoding gives, and what encoding takes. */
export type Decoded<M> = M extends MessageType<infer T, infer _> ? T : never;
export type Encodable<M> = M extends MessageType<infer _, infer I> ? I : never;

/** A service as @grpc/grpc-js wants it, for its servers and clients; our codecs instead of a loader that parses .proto files. */
export function grpcDefinition(service: Service): Record<string, GrpcMethod> {
  return Object.fromEntries(
    Object.entries(service.methods).map(([name, { request, response, requestStream, responseStream }]) => [
      name,
      {
        path: `/${service.name}/${name}`,
        originalName: name,
        requestStream,
        responseStream,
        requestSerialize: (message) => asBuffer(request.encode(message)),
        requestDeserialize: (bytes) => request.decode(bytes),
        responseSerialize: (message) => asBuffer(response.encode(message)),
        responseDeserialize: (bytes) => response.decode(bytes),
      } satisfies GrpcMethod,
    ]),
  );
}

export interface GrpcMethod {
  path: string;
  originalName: string;
  requestStream: boolean;
  responseStream: boolean;
  requestSerialize(message: unknown): Buffer;
  requestDeserialize(bytes: Buffer): unknown;
  responseSerialize(message: unknown): Buffer;
  responseDeserialize(bytes: Buffer): unknown;
}

function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** gRPC takes 50 ms and 17 MB to load: only who is about to serve or call asks for it. */
export async function loadGrpc(): Promise<typeof import("@grpc/grpc-js")> {
  const module = await import("@grpc/grpc-js");
  // CommonJS: bundled, all of it is the default export.
  return (module as unknown as { default?: typeof module }).default ?? module;
}

/**
 * One call of a method that has one response.
 * @param options.signal  cancels it
 * @throws ServiceError of grpc-js
 */
export function callUnary<M extends Method>(
  client: import("@grpc/grpc-js").Client,
  path: string,
  { request, response }: M,
  message: Encodable<M["request"]>,
  options: { signal?: AbortSignal | undefined } = {},
): Promise<Decoded<M["response"]>> {
  const { promise, resolve, reject } = Promise.withResolvers<Decoded<M["response"]>>();
  const serialize = (one: Encodable<M["request"]>) => asBuffer(request.encode(one));
  const deserialize = (bytes: Buffer) => response.decode(bytes) as Decoded<M["response"]>;
  const done = (error: Error | null, answer?: Decoded<M["response"]>) => {
    if (error) reject(error);
    else resolve(answer!);
  };
  const call = client.makeUnaryRequest(path, serialize, deserialize, message, done);
  options.signal?.addEventListener("abort", () => call.cancel(), { once: true });
  if (options.signal?.aborted) call.cancel();
  return promise;
}
