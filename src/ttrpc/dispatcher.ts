import { InvalidRequest, ResourceExhausted, TimedOut, toStatus, Unsupported } from "../errors/index.ts";
import { decodeFrame, encodeFrame, type Frame, frameFlag, frameType, MAX_MESSAGE_BYTES } from "./frame.ts";
import { decodeRequest, encodeResponse, type Request } from "./message.ts";

/** A call as its handler sees it. `C`: what the transport knows of where it came from. */
export interface Call<C = undefined> {
  service: string;
  method: string;
  metadata: ReadonlyMap<string, readonly string[]>;
  /** as the client said it; undefined: it waits without end */
  timeoutMs: number | undefined;
  /** when that is over, as Date.now() counts; undefined: never */
  deadline: number | undefined;
  /** aborted when the client's time is over, or the transport says that the client has gone */
  signal: AbortSignal;
  context: C;
}

/** Takes the encoded request message, gives the encoded response message. What it throws becomes the status. */
export type Handler<C = undefined> = (payload: Uint8Array, call: Call<C>) => Promise<Uint8Array> | Uint8Array;

/** What a timer of Node can count: 24 days. */
const MAX_TIMER_MS = 2 ** 31 - 1;

/**
 * Frames in, frames out: the server's half of TTRPC without a transport. Never rejects for what a client sends:
 *
 *   response frame, also one that is too long     nothing: we are no client here
 *   even stream, unknown type, not a Request      INVALID_ARGUMENT
 *   longer than 4 MiB, either way                 RESOURCE_EXHAUSTED
 *   data frame, request that says more will come  UNIMPLEMENTED: calls are unary
 *   unknown service or method                     UNIMPLEMENTED
 *   the handler takes longer than the client      DEADLINE_EXCEEDED; its signal is aborted, what it does is not awaited
 *
 * A request whose flag says "no more data" is served: to the client of a unary method that is the same.
 */
export class Dispatcher<C = undefined> {
  readonly #services = new Map<string, ReadonlyMap<string, Handler<C>>>();

  /** @param service  full name, as "containerd.task.v2.Task"; registered again, it is replaced */
  register(service: string, methods: Readonly<Record<string, Handler<C>>>): this {
    this.#services.set(service, new Map(Object.entries(methods)));
    return this;
  }

  /**
   * @param bytes   a frame with its header; the header alone for one that was too long
   * @param ageMs   how long the frame has waited for us: the client's time began with it
   * @returns the response frame; null where none is due
   * @throws RangeError when `bytes` are not one frame
   */
  async dispatch(bytes: Uint8Array, context: C, signal?: AbortSignal, ageMs = 0): Promise<Buffer | null> {
    return await this.dispatchFrame(decodeFrame(bytes), context, signal, ageMs);
  }

  async dispatchFrame(frame: Frame, context: C, signal?: AbortSignal, ageMs = 0): Promise<Buffer | null> {
    const { streamId } = frame;
    if (frame.type === frameType.response) return null;
    const header = { streamId, type: frameType.response, flags: 0 };
    try {
      if (streamId % 2 !== 1)
        throw new InvalidRequest(`stream ${streamId} is even: a client's streams are odd`);
      if (frame.payload === undefined)
        throw new ResourceExhausted(
          `message of ${frame.length} bytes is over the limit of ${MAX_MESSAGE_BYTES}`,
        );
      if (frame.type === frameType.data)
        throw new Unsupported(`stream ${streamId}: streaming calls are not served`);
      if (frame.type !== frameType.request)
        throw new InvalidRequest(`frames of type ${frame.type} are unknown`);
      if (frame.flags & frameFlag.remoteOpen) throw new Unsupported("streaming calls are not served");
      const payload = await this.#call(readRequest(frame.payload), context, signal, ageMs);
      const response = encodeResponse({ payload });
      if (response.length > MAX_MESSAGE_BYTES)
        throw new ResourceExhausted(
          `response of ${response.length} bytes is over the limit of ${MAX_MESSAGE_BYTES}`,
        );
      return encodeFrame(header, response);
    } catch (error) {
      return encodeFrame(header, encodeResponse({ status: toStatus(error) }));
    }
  }

  async #call(
    request: Request,
    context: C,
    outer: AbortSignal | undefined,
    ageMs: number,
  ): Promise<Uint8Array> {
    const { service, method, timeoutMs } = request;
    const methods = this.#services.get(service);
    if (!methods) throw new Unsupported(`service ${service} is not served`);
    const handler = methods.get(method);
    if (!handler) throw new Unsupported(`service ${service} has no method ${method}`);
    const abort = new AbortController();
    const forward = () => abort.abort(outer!.reason);
    if (outer?.aborted) forward();
    else outer?.addEventListener("abort", forward, { once: true });
    const leftMs = timeoutMs === undefined ? undefined : Math.max(0, timeoutMs - ageMs);
    const call: Call<C> = {
      service,
      method,
      metadata: request.metadata ?? new Map(),
      timeoutMs,
      deadline: leftMs === undefined ? undefined : Date.now() + leftMs,
      signal: abort.signal,
      context,
    };
    try {
      if (leftMs === undefined) return await handler(request.payload, call);
      return await withDeadline(handler, request.payload, call, leftMs, abort);
    } finally {
      outer?.removeEventListener("abort", forward);
    }
  }
}

/** Past its time a call is answered, and its signal aborted; the handler may still be finishing. */
async function withDeadline<C>(
  handler: Handler<C>,
  payload: Uint8Array,
  call: Call<C>,
  leftMs: number,
  abort: AbortController,
): Promise<Uint8Array> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(
      () => {
        const error = new TimedOut(`${call.method} was not done within ${call.timeoutMs} ms`);
        abort.abort(error);
        reject(error);
      },
      Math.min(Math.ceil(leftMs), MAX_TIMER_MS),
    );
  });
  try {
    return await Promise.race([handler(payload, call), late]);
  } finally {
    clearTimeout(timer);
  }
}

function readRequest(bytes: Uint8Array): Request {
  try {
    return decodeRequest(bytes);
  } catch (error) {
    throw new InvalidRequest("the request can't be decoded", { cause: error });
  }
}
