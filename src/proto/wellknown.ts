// Any and Timestamp, as the rest of the code wants them.

import type { Any, AnyInit, Timestamp } from "./generated/google.ts";
import { type MessageType, WireError } from "./wire.ts";

const nsPerSecond = 1_000_000_000n;

/**
 * Nanoseconds since 1970 as a Timestamp, whose nanos are never negative.
 * Source: google/protobuf/timestamp.proto.
 */
export function timestampFromNs(ns: bigint): Timestamp {
  const nanos = ((ns % nsPerSecond) + nsPerSecond) % nsPerSecond;
  return { seconds: (ns - nanos) / nsPerSecond, nanos: Number(nanos) };
}

export function nsFromTimestamp(timestamp: Timestamp): bigint {
  return timestamp.seconds * nsPerSecond + BigInt(timestamp.nanos);
}

/** An Any as containerd writes it: the type URL is the bare name, without a host. */
export function pack<T, I>(type: MessageType<T, I>, message: I): Any {
  return { typeUrl: type.name, value: type.encode(message) };
}

/** The name in a type URL, with or without `type.googleapis.com/`. */
export function typeName(any: Pick<AnyInit, "typeUrl">): string {
  const url = any.typeUrl ?? "";
  return url.slice(url.lastIndexOf("/") + 1);
}

export function isOfType<T, I>(any: AnyInit | undefined, type: MessageType<T, I>): boolean {
  return any !== undefined && typeName(any) === type.name;
}

/** @throws WireError when the Any holds another type, or bytes that are not a message of this one */
export function unpack<T, I>(any: AnyInit, type: MessageType<T, I>): T {
  if (!isOfType(any, type))
    throw new WireError(`${type.name} is expected, not ${any.typeUrl || "an empty type"}`);
  return type.decode(any.value ?? new Uint8Array(0));
}
