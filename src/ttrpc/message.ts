import * as ttrpc from "../proto/generated/ttrpc.ts";

/** What a request frame holds. */
export interface Request {
  service: string;
  method: string;
  payload: Uint8Array;
  /** how long the client waits, milliseconds; undefined: without end */
  timeoutMs?: number | undefined;
  metadata?: ReadonlyMap<string, readonly string[]> | undefined;
}

export interface Status {
  code: number;
  message: string;
}

export function encodeRequest(request: Request): Uint8Array {
  return ttrpc.Request.encode({
    service: request.service,
    method: request.method,
    payload: request.payload,
    timeoutNano: BigInt(Math.round((request.timeoutMs ?? 0) * 1e6)),
    metadata: [...(request.metadata ?? [])].flatMap(([key, values]) =>
      values.map((value) => ({ key, value })),
    ),
  });
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
  return {
    service,
    method,
    payload,
    timeoutMs: timeoutNano > 0n ? Number(timeoutNano) / 1e6 : undefined,
    metadata: lists,
  };
}

export function encodeResponse(response: { status?: Status; payload?: Uint8Array }): Uint8Array {
  return ttrpc.Response.encode(response);
}

/** @throws WireError for bytes that are no response */
export function decodeResponse(bytes: Uint8Array): { status: Status; payload: Uint8Array } {
  const { status, payload } = ttrpc.Response.decode(bytes);
  return { status: { code: status?.code ?? 0, message: status?.message ?? "" }, payload };
}
