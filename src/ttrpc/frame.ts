/**
 * TTRPC frame header: 10 bytes, big-endian, then `length` bytes of payload.
 *   at  size  field
 *   0   4     length    payload only; more than 4 MiB is refused
 *   4   4     streamId  odd when the client opened it
 *   8   1     type      1 request · 2 response · 3 data
 *   9   1     flags     1 remote closed · 2 remote open · 4 no data; a unary call has none
 *
 * Too long: skip the payload, answer RESOURCE_EXHAUSTED on that stream, go on. End of file inside a frame: fatal.
 * Source: containerd/ttrpc PROTOCOL.md (version 1.2).
 */
export const HEADER_BYTES = 10;
export const MAX_MESSAGE_BYTES = 4 * 1024 * 1024;

/** A payload's buffer starts with this much: what a header announces costs memory only as it really comes. */
const FIRST_BUFFER_BYTES = 16 * 1024;

export const frameType = { request: 1, response: 2, data: 3 } as const;
export const frameFlag = { remoteClosed: 1, remoteOpen: 2, noData: 4 } as const;

export interface FrameHeader {
  streamId: number;
  type: number;
  flags: number;
}

export interface Frame extends FrameHeader {
  /** absent when it was longer than allowed and has been skipped; may be a view of the bytes that it came in */
  payload: Uint8Array | undefined;
  /** as announced in the header */
  length: number;
}

/** @throws RangeError for a payload that no peer would take */
export function encodeFrame(header: FrameHeader, payload: Uint8Array): Buffer {
  if (payload.length > MAX_MESSAGE_BYTES)
    throw new RangeError(`a payload of ${payload.length} bytes is over the limit of ${MAX_MESSAGE_BYTES}`);
  const frame = Buffer.allocUnsafe(HEADER_BYTES + payload.length);
  frame.writeUInt32BE(payload.length, 0);
  frame.writeUInt32BE(header.streamId, 4);
  frame.writeUInt8(header.type, 8);
  frame.writeUInt8(header.flags, 9);
  frame.set(payload, HEADER_BYTES);
  return frame;
}

/**
 * One whole frame, or the header alone of one that was too long.
 * @throws RangeError for anything else, which is a fault of whoever cut the stream into frames
 */
export function decodeFrame(bytes: Uint8Array): Frame {
  if (bytes.length < HEADER_BYTES) throw new RangeError(`a frame of ${bytes.length} bytes has no header`);
  const header = decodeHeader(Buffer.from(bytes.buffer, bytes.byteOffset, HEADER_BYTES));
  if (header.length > MAX_MESSAGE_BYTES) return { ...header, payload: undefined };
  if (bytes.length !== HEADER_BYTES + header.length)
    throw new RangeError(`a frame of ${header.length} bytes came with ${bytes.length - HEADER_BYTES}`);
  return { ...header, payload: bytes.subarray(HEADER_BYTES) };
}

function decodeHeader(bytes: Buffer): FrameHeader & { length: number } {
  return {
    length: bytes.readUInt32BE(0),
    streamId: bytes.readUInt32BE(4),
    type: bytes.readUInt8(8),
    flags: bytes.readUInt8(9),
  };
}

/**
 * Cuts a byte stream into frames, whatever the pieces it comes in. Holds at most what has come of one frame; the payload of
 * one that is too long is dropped as it comes, and the frame is given without it, once, when its header is known.
 */
export class FrameReader {
  readonly #header = Buffer.alloc(HEADER_BYTES);
  #headerBytes = 0;
  /** of the frame whose payload is coming */
  #current: (FrameHeader & { length: number }) | undefined;
  #payload = Buffer.alloc(0);
  #payloadBytes = 0;
  #toSkip = 0;

  /** Whether the stream may end here. */
  get atFrameEnd(): boolean {
    return this.#headerBytes === 0 && this.#current === undefined && this.#toSkip === 0;
  }

  /** The frames that end in this chunk. All of them must be taken before the next chunk is pushed. */
  *push(chunk: Uint8Array): Generator<Frame> {
    let at = 0;
    for (;;) {
      if (this.#toSkip > 0) {
        const skipped = Math.min(this.#toSkip, chunk.length - at);
        this.#toSkip -= skipped;
        at += skipped;
      }
      if (!this.#current) {
        if (at === chunk.length) return;
        const part = chunk.subarray(at, at + HEADER_BYTES - this.#headerBytes);
        this.#header.set(part, this.#headerBytes);
        this.#headerBytes += part.length;
        at += part.length;
        if (this.#headerBytes < HEADER_BYTES) return;
        this.#headerBytes = 0;
        const header = decodeHeader(this.#header);
        if (header.length > MAX_MESSAGE_BYTES) {
          this.#toSkip = header.length;
          yield { ...header, payload: undefined };
          continue;
        }
        this.#current = header;
      }
      const header = this.#current;
      const missing = header.length - this.#payloadBytes;
      if (chunk.length - at < missing) {
        this.#keep(chunk.subarray(at), header.length);
        return;
      }
      let payload = chunk.subarray(at, at + missing);
      if (this.#payloadBytes > 0) {
        this.#keep(payload, header.length);
        payload = this.#payload.subarray(0, header.length);
      }
      at += missing;
      this.#current = undefined;
      this.#payload = Buffer.alloc(0);
      this.#payloadBytes = 0;
      yield { ...header, payload };
    }
  }

  #keep(part: Uint8Array, length: number): void {
    const needed = this.#payloadBytes + part.length;
    if (needed > this.#payload.length) {
      const size = Math.max(needed, Math.min(length, Math.max(FIRST_BUFFER_BYTES, this.#payload.length * 2)));
      const bigger = Buffer.allocUnsafe(size);
      bigger.set(this.#payload.subarray(0, this.#payloadBytes));
      this.#payload = bigger;
    }
    this.#payload.set(part, this.#payloadBytes);
    this.#payloadBytes = needed;
  }
}
