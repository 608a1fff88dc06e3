// The wire definitions of proto/, loaded once, and the packing of google.protobuf.Any.

import { join } from "node:path";
import protobuf from "protobufjs";

const root = new protobuf.Root();
root.resolvePath = (_origin, target) =>
  target.startsWith("google/") ? target : join(import.meta.dirname, "proto", target);
root.loadSync(
  [
    "types.proto",
    "tasks.proto",
    "services.proto",
    "events.proto",
    "options.proto",
    "runtimeoptions.proto",
    "metrics.proto",
    "ttrpc.proto",
    "cri.proto",
  ],
  { keepCase: false },
);

const types = new Map<string, protobuf.Type>();

/** The message type of this full name, as `containerd.runc.v1.Options`. */
export function messageType(name: string): protobuf.Type {
  let type = types.get(name);
  if (!type) {
    type = root.lookupType(name);
    types.set(name, type);
  }
  return type;
}

export type Message = Record<string, unknown>;
export interface Any {
  typeUrl: string;
  value: Uint8Array;
}

export function encode(name: string, message: Message): Buffer {
  const type = messageType(name);
  return Buffer.from(
    type.encode(type.fromObject(renameTypeUrl(message, "typeUrl", "type_url") as Message)).finish(),
  );
}

export function decode<T = Message>(name: string, bytes: Uint8Array): T {
  const type = messageType(name);
  const message = type.toObject(type.decode(bytes), {
    longs: Number,
    defaults: true,
    arrays: true,
    enums: String,
  });
  return renameTypeUrl(message, "type_url", "typeUrl") as T;
}

/** protobufjs's own google.protobuf.Any keeps the field's name as in the definition; everything else here is in camel case. */
function renameTypeUrl(value: unknown, from: string, to: string): unknown {
  if (Array.isArray(value)) return value.map((element) => renameTypeUrl(element, from, to));
  if (typeof value !== "object" || value === null || value instanceof Uint8Array) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, inner]) => [key === from ? to : key, renameTypeUrl(inner, from, to)]),
  );
}

/** containerd's type URLs are the bare name of the message, without a prefix. */
export function anyOf(name: string, message: Message): Any {
  return { typeUrl: name, value: encode(name, message) };
}

export function anyJson(typeUrl: string, value: unknown): Any {
  return { typeUrl, value: Buffer.from(JSON.stringify(value)) };
}
