import {
  createCipheriv,
  createDecipheriv,
  createHmac,
  hkdfSync,
  randomBytes,
  scryptSync,
  timingSafeEqual,
} from "node:crypto";
import { BrokenImage, InvalidRequest, PermissionDenied, Unsupported } from "../../errors/index.ts";
import { ByteSource } from "../tar/reader.ts";

/**
 * Encryption of an archive as a stream, in the way of age and STREAM: chunks that are authenticated one by one, with their position and
 * whether they are the last, so that none can be changed, left out, repeated, reordered or cut off unseen. Nothing that isn't
 * authentic is handed on.
 *
 *   at   size  field
 *   0    16    "cedana-archive\0" and the version, 1
 *   16   1     how the key is made of the secret: 1, scrypt
 *   17   1     scrypt's log2(N), 14 to 18: N * r * 128 bytes of memory, so 256 MiB at most, whatever a stranger writes here
 *   18   1     scrypt's r: 8
 *   19   1     scrypt's p, 1 to 4
 *   20   16    salt, random: no two archives have the same keys
 *   36   4     zero
 *   40   32    HMAC-SHA-256 of all before, with the header key: tells a wrong secret from a broken archive, and commits to the key
 *   72   …     chunks: 262144 bytes encrypted and 16 bytes of tag; the last one is shorter, or whole
 *
 * master = scrypt(secret, salt, 32 bytes); header key = HKDF-SHA-256(master, info "header"), payload key the same with "payload".
 * Each chunk is AES-256-GCM with the nonce: 11 bytes big-endian number of the chunk, 1 byte: 1 for the last, else 0.
 */
const MAGIC = Buffer.from("cedana-archive\0\x01", "latin1");
const HEADER_BYTES = 72;
const CHUNK_BYTES = 256 * 1024;
const TAG_BYTES = 16;
const CIPHER = "aes-256-gcm";

/** 32 MiB of memory and a quarter of a second: OWASP's least for passphrases. */
const scryptDefault = { logN: 15, r: 8, p: 3 };
const MAX_SCRYPT_BYTES = 300 * 1024 * 1024;

/** Shorter ones are guessed. */
export const MIN_SECRET_BYTES = 8;

export function isEncrypted(first: Buffer): boolean {
  return first.subarray(0, MAGIC.length - 1).equals(MAGIC.subarray(0, -1));
}

/** @param secret  a passphrase's or a key file's bytes */
export async function* encrypt(chunks: AsyncIterable<Buffer>, secret: Uint8Array): AsyncGenerator<Buffer> {
  if (secret.length < MIN_SECRET_BYTES)
    throw new InvalidRequest(`the key has ${secret.length} bytes; at least ${MIN_SECRET_BYTES} are needed`);
  const { logN, r, p } = scryptDefault;
  const front = Buffer.concat([MAGIC, Buffer.from([1, logN, r, p]), randomBytes(16), Buffer.alloc(4)]);
  const keys = makeKeys(secret, front);
  yield Buffer.concat([front, mac(keys.header, front)]);
  const source = new ByteSource(chunks);
  // One is looked ahead, to know the last: two buffers, in turn.
  let [buffer, other] = [Buffer.allocUnsafeSlow(CHUNK_BYTES), Buffer.allocUnsafeSlow(CHUNK_BYTES)];
  let chunk = await source.upTo(CHUNK_BYTES, buffer);
  for (let number = 0; ; number++) {
    const next = await source.upTo(CHUNK_BYTES, other);
    const last = next.length === 0;
    const cipher = createCipheriv(CIPHER, keys.payload, nonce(number, last));
    yield cipher.update(chunk);
    yield Buffer.concat([cipher.final(), cipher.getAuthTag()]);
    if (last) return;
    chunk = next;
    [buffer, other] = [other, buffer];
  }
}

/**
 * @throws PermissionDenied for a wrong secret, Unsupported for parameters that we don't take, BrokenImage for what isn't as it was written
 */
export async function* decrypt(chunks: AsyncIterable<Buffer>, secret: Uint8Array): AsyncGenerator<Buffer> {
  const source = new ByteSource(chunks);
  try {
    const header = await source.upTo(HEADER_BYTES);
    if (header.length < HEADER_BYTES)
      throw new BrokenImage("the encrypted archive is truncated in its header");
    const front = header.subarray(0, 40);
    const keys = makeKeys(secret, front);
    if (!timingSafeEqual(mac(keys.header, front), header.subarray(40)))
      throw new PermissionDenied("the key doesn't open this archive, or its header was changed");
    const size = CHUNK_BYTES + TAG_BYTES;
    let [buffer, other] = [Buffer.allocUnsafeSlow(size), Buffer.allocUnsafeSlow(size)];
    let chunk = await source.upTo(size, buffer);
    for (let number = 0; ; number++) {
      const next = await source.upTo(size, other);
      const last = next.length === 0;
      const plain = open(chunk, keys.payload, nonce(number, last));
      if (!plain) throw new BrokenImage(`the encrypted archive was changed or cut off, in chunk ${number}`);
      if (plain.length > 0) yield plain;
      if (last) return;
      chunk = next;
      [buffer, other] = [other, buffer];
    }
  } finally {
    await source.close();
  }
}

function open(chunk: Buffer, key: Buffer, iv: Buffer): Buffer | undefined {
  if (chunk.length < TAG_BYTES) return undefined;
  const decipher = createDecipheriv(CIPHER, key, iv, { authTagLength: TAG_BYTES });
  decipher.setAuthTag(chunk.subarray(-TAG_BYTES));
  const plain = decipher.update(chunk.subarray(0, -TAG_BYTES));
  try {
    decipher.final();
    return plain;
  } catch {
    return undefined; // it only says that the tag is wrong
  }
}

function makeKeys(secret: Uint8Array, front: Buffer): { header: Buffer; payload: Buffer } {
  if (!front.subarray(0, MAGIC.length).equals(MAGIC))
    throw new Unsupported(`encrypted archive of version ${front[MAGIC.length - 1]}; this cedana knows 1`);
  const [kdf, logN, r, p] = front.subarray(16, 20) as unknown as [number, number, number, number];
  if (kdf !== 1 || logN < 14 || logN > 18 || r !== 8 || p < 1 || p > 4 || front.readUInt32BE(36) !== 0)
    throw new Unsupported(
      `encrypted archive with key parameters ${kdf}, ${logN}, ${r}, ${p}, which are not allowed`,
    );
  const salt = front.subarray(20, 36);
  const master = scryptSync(secret, salt, 32, { N: 2 ** logN, r, p, maxmem: MAX_SCRYPT_BYTES });
  const derive = (info: string) => Buffer.from(hkdfSync("sha256", master, Buffer.alloc(0), info, 32));
  return { header: derive("header"), payload: derive("payload") };
}

const mac = (key: Buffer, front: Buffer) => createHmac("sha256", key).update(front).digest();

function nonce(number: number, last: boolean): Buffer {
  const bytes = Buffer.alloc(12);
  bytes.writeUIntBE(number, 5, 6);
  bytes[11] = last ? 1 : 0;
  return bytes;
}
