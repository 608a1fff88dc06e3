/**
 * TTRPC frame header: 10 bytes, big-endian, then `length` bytes of payload.
 *   at  size  field
 *   0   4     length    payload only; more than 4 MiB is refused
 *   4   4     streamId  odd when the client opened it
 *   8   1     type      1 request · 2 response · 3 data
 *   9   1     flags     1 remote closed · 2 remote open · 4 no data
 *
 * Too long: skip the payload, answer RESOURCE_EXHAUSTED on that stream, go on. End of file inside a frame: fatal.
 * Source: containerd/ttrpc PROTOCOL.md.
 */
export const HEADER_BYTES = 10;
export const MAX_MESSAGE_BYTES = 4 * 1024 * 1024;

export const frameType = { request: 1, response: 2, data: 3 } as const;
export const frameFlag = { remoteClosed: 1, remoteOpen: 2, noData: 4 } as const;

export interface FrameHeader {
  streamId: number;
  type: number;
  flags: number;
}

export interface Frame extends FrameHeader {
  /** absent when it was longer than allowed and has been skipped */
  payload: Uint8Array | undefined;
  /** as announced in the header */
  length: number;
}

export function encodeFrame(header: FrameHeader, payload: Uint8Array): Buffer {
  const frame = Buffer.allocUnsafe(HEADER_BYTES + payload.length);
  frame.writeUInt32BE(payload.length, 0);
  frame.writeUInt32BE(header.streamId, 4);
  frame.writeUInt8(header.type, 8);
  frame.writeUInt8(header.flags, 9);
  frame.set(payload, HEADER_BYTES);
  return frame;
}

/** One whole frame, or the header alone of one that was too long. */
export function decodeFrame(bytes: Uint8Array): Frame {
  const frame = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (frame.length < HEADER_BYTES) throw new RangeError(`a frame of ${frame.length} bytes has no header`);
  const length = frame.readUInt32BE(0);
  const header = {
    streamId: frame.readUInt32BE(4),
    type: frame.readUInt8(8),
    flags: frame.readUInt8(9),
    length,
  };
  if (length > MAX_MESSAGE_BYTES) return { ...header, payload: undefined };
  if (frame.length !== HEADER_BYTES + length)
    throw new RangeError(`a frame of ${length} bytes came with ${frame.length - HEADER_BYTES}`);
  return { ...header, payload: frame.subarray(HEADER_BYTES) };
}

/**
 * Cuts a byte stream into frames. Holds at most one frame; the payload of one that is too long is dropped as it comes, and
 * the frame is yielded without it.
 */
export class FrameReader {
  readonly #header = Buffer.alloc(HEADER_BYTES);
  #headerBytes = 0;
  #payload: Buffer | undefined;
  #payloadBytes = 0;
  #toSkip = 0;

  /** Whether the stream may end here. */
  get atFrameEnd(): boolean {
    return this.#headerBytes === 0 && this.#toSkip === 0;
  }

  *push(chunk: Uint8Array): Generator<Frame> {
    let at = 0;
    for (;;) {
      if (this.#toSkip > 0) {
        const skipped = Math.min(this.#toSkip, chunk.length - at);
        this.#toSkip -= skipped;
        at += skipped;
      }
      if (at === chunk.length) return;
      if (this.#headerBytes < HEADER_BYTES) {
        const part = chunk.subarray(at, at + HEADER_BYTES - this.#headerBytes);
        this.#header.set(part, this.#headerBytes);
        this.#headerBytes += part.length;
        at += part.length;
        if (this.#headerBytes < HEADER_BYTES) return;
        const length = this.#header.readUInt32BE(0);
        if (length > MAX_MESSAGE_BYTES) {
          this.#toSkip = length;
          this.#headerBytes = 0;
          yield decodeFrame(this.#header);
          continue;
        }
        this.#payload = Buffer.allocUnsafe(length);
        this.#payloadBytes = 0;
      }
      const payload = this.#payload!;
      const part = chunk.subarray(at, at + payload.length - this.#payloadBytes);
      payload.set(part, this.#payloadBytes);
      this.#payloadBytes += part.length;
      at += part.length;
      if (this.#payloadBytes < payload.length) return;
      this.#headerBytes = 0;
      this.#payload = undefined;
      yield {
        length: payload.length,
        streamId: this.#header.readUInt32BE(4),
        type: this.#header.readUInt8(8),
        flags: this.#header.readUInt8(9),
        payload,
      };
    }
  }
}
