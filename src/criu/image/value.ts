/*
 * The messages of CRIU's images as plain objects, in the shape that crit gives them: field names as CRIU has them, absent fields
 * absent, enums by name, bytes as base64. 64-bit integers are `bigint`. Bytes that decode give the same bytes back:
 *
 *   __unknown   fields that our table lacks (a newer CRIU), as [{ field, bytes }], bytes being key and value in base64
 *   __raw       the whole message in base64, where writing it our way would give other bytes (an encoder that packs or orders
 *               otherwise than CRIU). Used by encode only while the other fields still say the same as it does.
 *   { "__bytes" }  in the place of a string that isn't UTF-8: a file's name may be anything
 *
 * crit has none of these: it drops unknown fields and fails on such names.
 */

export type Value = number | bigint | boolean | string | Message | Value[];
export interface Message {
  [field: string]: Value;
}
