import type { Socket } from "node:net";
import type {
  ConnectionInjector,
  ServerUnaryCall,
  ServerWritableStream,
  ServiceDefinition,
  sendUnaryData,
  UntypedHandleCall,
} from "@grpc/grpc-js";
import { Cancelled, messageOf } from "../../errors/index.ts";
import { Management } from "../../proto/generated/cedana_api.ts";
import { grpcDefinition, loadGrpc } from "../../proto/grpc.ts";
import type { ApiCall, ApiContext } from "./context.ts";
import { methods } from "./methods.ts";
import { STATUS_DETAILS_KEY, toDetailedStatus } from "./status.ts";

type Grpc = typeof import("@grpc/grpc-js");

/** Nothing that a client sends is long. */
const MAX_REQUEST_BYTES = 1024 * 1024;
const MAX_CALLS_OF_A_CONNECTION = 32;
/** A connection on which nothing goes on, also one that never said anything. */
const MAX_IDLE_MS = 5 * 60 * 1000;

let injector: Promise<ConnectionInjector> | undefined;

/** Lets gRPC serve a connection that we have accepted, from a peer that has been checked. */
export async function acceptConnection(socket: Socket, context: ApiContext): Promise<void> {
  injector ??= startServer(context).catch((error) => {
    injector = undefined; // the next connection tries again
    throw error;
  });
  (await injector).injectConnection(socket);
}

async function startServer(context: ApiContext): Promise<ConnectionInjector> {
  const grpc = await loadGrpc();
  const server = new grpc.Server({
    "grpc.enable_channelz": 0, // would keep a record of every connection, for a service that we don't offer
    "grpc.max_receive_message_length": MAX_REQUEST_BYTES,
    "grpc.max_concurrent_streams": MAX_CALLS_OF_A_CONNECTION,
    "grpc.max_connection_idle_ms": MAX_IDLE_MS,
  });
  const definition = grpcDefinition(Management) as ServiceDefinition;
  const handlers = Object.entries(Management.methods).map(([name, { responseStream }]) => [
    name,
    responseStream ? streamHandler(grpc, name, context) : unaryHandler(grpc, name, context),
  ]);
  server.addService(definition, Object.fromEntries(handlers) as Record<string, UntypedHandleCall>);
  return server.createConnectionInjector(grpc.ServerCredentials.createInsecure());
}

type AnyMethod = (
  request: unknown,
  call: ApiCall,
  send: (message: unknown) => Promise<void>,
) => Promise<unknown>;

function unaryHandler(grpc: Grpc, name: string, context: ApiContext) {
  const nothingToSend = () => Promise.reject(new TypeError(`${name} has one response`));
  return (call: ServerUnaryCall<unknown, unknown>, done: sendUnaryData<unknown>) => {
    run(name, call, apiCall(name, call, context), nothingToSend).then(
      (response) => done(null, response),
      (error) => done(statusObject(grpc, name, error, context)),
    );
  };
}

function streamHandler(grpc: Grpc, name: string, context: ApiContext) {
  return (stream: ServerWritableStream<unknown, unknown>) => {
    const call = apiCall(name, stream, context);
    const send = async (message: unknown) => {
      call.signal.throwIfAborted();
      if (!stream.write(message)) await drained(stream, call.signal);
    };
    // Writing to a client that has gone; its `cancelled` has told us.
    stream.on("error", (error) =>
      context.log.debug({ err: error, method: name }, "a stream of the API failed"),
    );
    run(name, stream, call, send).then(
      () => stream.end(),
      // An event, not `destroy`: grpc-js makes the call's status of it.
      (error) =>
        stream.emit(
          "error",
          Object.assign(new Error(messageOf(error)), statusObject(grpc, name, error, context)),
        ),
    );
  };
}

async function run(
  name: string,
  { request }: { request: unknown },
  call: ApiCall,
  send: (message: unknown) => Promise<void>,
): Promise<unknown> {
  const method = methods[name as keyof typeof methods] as AnyMethod;
  call.calls.active++;
  try {
    return await method(request, call, send);
  } finally {
    call.calls.active--;
  }
}

function drained(stream: ServerWritableStream<unknown, unknown>, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const stop = () => {
      stream.off("drain", go);
      reject(signal.reason);
    };
    const go = () => {
      signal.removeEventListener("abort", stop);
      resolve();
    };
    stream.once("drain", go);
    signal.addEventListener("abort", stop, { once: true });
  });
}

function apiCall(
  name: string,
  call: ServerUnaryCall<unknown, unknown> | ServerWritableStream<unknown, unknown>,
  context: ApiContext,
): ApiCall {
  const gone = new AbortController();
  call.on("cancelled", () =>
    gone.abort(new Cancelled(`the client of ${name} has gone, or its time has passed`)),
  );
  return { ...context, log: context.log.child({ method: name }), signal: gone.signal };
}

function statusObject(grpc: Grpc, name: string, error: unknown, { log }: ApiContext) {
  const { code, message, details } = toDetailedStatus(error);
  log.info({ err: error, method: name }, "a call of the API failed");
  const metadata = new grpc.Metadata();
  metadata.set(STATUS_DETAILS_KEY, details);
  return { code, details: message, metadata };
}
