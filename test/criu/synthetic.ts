// Images of every type with random contents, so that what no program makes CRIU write is tested, too.

import { IMG_COMMON, IMG_SERVICE, type ImageFormat, isService } from "../../src/criu/image/format.ts";
import { encodeMessage } from "../../src/criu/image/message.ts";
import type { Message, Value } from "../../src/criu/image/value.ts";
import { enums, type Field, messages } from "../../src/proto/generated/criu_images.ts";

/** Repeatable: a failure names its seed. */
export function randomSource(seed: number): (below: number) => number {
  let state = seed >>> 0 || 1;
  return (below) => {
    // xorshift32
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state % below;
  };
}

type Random = ReturnType<typeof randomSource>;

const edges32 = [0, 1, 127, 128, 16383, 16384, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];
const edges64 = [0n, 1n, 0x7fn, 0x80n, 1n << 35n, (1n << 53n) + 1n, (1n << 63n) - 1n, (1n << 64n) - 1n];
const words = ["", "a", "/bin/sh", "ünïcödé ✓", "x".repeat(300), 'quote " and \\ and \n'];

export function randomMessage(name: string, random: Random, depth = 0): Message {
  const message: Message = {};
  for (const field of messages[name]!) {
    const [, fieldName, type, label] = field;
    if (type in messages && depth > 3 && label !== "required") continue;
    if (label === "repeated") {
      const count = random(4);
      if (count > 0)
        message[fieldName] = Array.from({ length: count }, () => randomValue(field, random, depth));
    } else if (label === "required" || random(2) === 0)
      message[fieldName] = randomValue(field, random, depth);
  }
  return message;
}

function randomValue([, , type, , text]: Field, random: Random, depth: number): Value {
  const pick = <T>(list: readonly T[]): T => list[random(list.length)]!;
  const wide = () => (BigInt(random(2 ** 32)) << 32n) | BigInt(random(2 ** 32));
  switch (type) {
    case "uint32":
      return random(2) ? pick(edges32) : random(2 ** 32);
    case "int32":
    case "sint32":
      return (random(2) ? pick(edges32) : random(2 ** 32)) | 0;
    case "uint64":
    case "fixed64":
      return random(2) ? pick(edges64) : wide();
    case "int64":
    case "sint64":
      return BigInt.asIntN(64, random(2) ? pick(edges64) : wide());
    case "bool":
      return random(2) === 0;
    case "string":
      return pick(words);
    case "bytes":
      if (text === "quoted-printable") return pick(["", "=00abstract", "/run/a=3Db", "=E9"]);
      return Buffer.from(randomBytes(random, random(200)))
        .toString("base64")
        .replace(/.{1,76}/g, "$&\n");
    default:
      return type in messages ? randomMessage(type, random, depth + 1) : pick(Object.keys(enums[type]!));
  }
}

export function randomBytes(random: Random, length: number): Buffer {
  return Buffer.from(Array.from({ length }, () => random(256)));
}

const word = (value: number) => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
};
export const sized = (bytes: Uint8Array) => Buffer.concat([word(bytes.length), bytes]);
const padded = (bytes: Buffer, multiple: number) =>
  Buffer.concat([bytes, Buffer.alloc((multiple - (bytes.length % multiple)) % multiple)]);

export function imageWords(format: ImageFormat, version: "1.0" | "1.1"): Buffer {
  if (format.name === "INVENTORY" || version === "1.0") return word(format.magic);
  return Buffer.concat([word(isService(format) ? IMG_SERVICE : IMG_COMMON), word(format.magic)]);
}

/** The bytes of an image with some entries. */
export function randomImage(format: ImageFormat, random: Random, version: "1.0" | "1.1" = "1.1"): Buffer {
  const parts = [imageWords(format, version)];
  const entries = format.extra?.kind === "ghost" ? 1 : 1 + random(4);
  for (let i = 0; i < entries; i++) {
    const name = i === 0 ? (format.head ?? format.message) : format.message;
    const message = randomMessage(name, random);
    const extra = randomExtra(format, message, random);
    parts.push(sized(encodeMessage(name, message)), ...extra);
  }
  return Buffer.concat(parts);
}

/** Data behind a message, whose fields are set to its length. */
function randomExtra(format: ImageFormat, message: Message, random: Random): Buffer[] {
  const { extra } = format;
  switch (extra?.kind) {
    case undefined:
      return [];
    case "blob":
    case "queues":
      return extra.sizes.map((field) => {
        const bytes = randomBytes(random, random(300));
        message[field] = bytes.length;
        return bytes;
      });
    case "semaphores":
      message.nsems = random(7);
      return [padded(randomBytes(random, 2 * message.nsems), 8)];
    case "segment": {
      delete message.in_pagemaps; // crit reads on as if it weren't there
      const bytes = randomBytes(random, random(50));
      message.size = BigInt(bytes.length);
      return [padded(bytes, 4)];
    }
    case "messages": {
      message.qnum = random(4);
      return Array.from({ length: message.qnum }, () => {
        const text = randomBytes(random, random(30));
        const head = encodeMessage("ipc_msg", { mtype: BigInt(random(9)), msize: text.length });
        return Buffer.concat([sized(head), padded(text, 8)]);
      });
    }
    case "ghost": {
      message.chunks = random(2) === 0;
      if (!message.chunks) return [randomBytes(random, random(500))];
      return Array.from({ length: random(3) }, () => {
        const bytes = randomBytes(random, 1 + random(500));
        const chunk = encodeMessage("ghost_chunk_entry", {
          len: BigInt(bytes.length),
          off: BigInt(random(1 << 20)),
        });
        return Buffer.concat([sized(chunk), bytes]);
      });
    }
  }
}
