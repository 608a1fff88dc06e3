import * as ttrpc from "../proto/generated/ttrpc.ts";

/** What a request frame holds. */
export interface Request {
  service: string;
  method: string;
  payload: Uint8Array;
  /** how long the client waits, milliseconds; undefined: without end */
  timeoutMs?: number | undefined;
  /** names as they came; their case has no meaning that is agreed on */
  metadata?: ReadonlyMap<string, readonly string[]> | undefined;
}

export interface Status {
  /** gRPC's number; 0: success */
  code: number;
  message: string;
}

const MAX_INT64 = 2n ** 63n - 1n;

export function encodeRequest(request: Request): Uint8Array {
  return ttrpc.Request.encode({
    service: request.service,
    method: request.method,
    payload: request.payload,
    timeoutNano: nanoseconds(request.timeoutMs),
    metadata: [...(request.metadata ?? [])].flatMap(([key, values]) =>
      values.map((value) => ({ key, value })),
    ),
  });
}

/** 0 says "without end" on the wire, so the shortest timeout is a nanosecond and an endless one is none. */
function nanoseconds(timeoutMs: number | undefined): bigint {
  if (timeoutMs === undefined || Number.isNaN(timeoutMs)) return 0n;
  const nanos = Math.max(1, Math.round(timeoutMs * 1e6));
  return nanos < Number(MAX_INT64) ? BigInt(nanos) : 0n;
}

/** @throws WireError for bytes that are no request */
export function decodeRequest(bytes: Uint8Array): Request {
  const { service, method, payload, timeoutNano, metadata } = ttrpc.Request.decode(bytes);
  const lists = new Map<string, string[]>();
  for (const { key, value } of metadata) {
    const known = lists.get(key);
    if (known) known.push(value);
    else lists.set(key, [value]);
  }
  const timeoutMs = timeoutNano > 0n ? Number(timeoutNano) / 1e6 : undefined;
  return { service, method, payload, timeoutMs, metadata: lists };
}

export function encodeResponse(response: { status?: Status; payload?: Uint8Array }): Uint8Array {
  return ttrpc.Response.encode(response);
}

/** @throws WireError for bytes that are no response */
export function decodeResponse(bytes: Uint8Array): { status: Status; payload: Uint8Array } {
  const { status, payload } = ttrpc.Response.decode(bytes);
  return { status: { code: status?.code ?? 0, message: status?.message ?? "" }, payload };
}
