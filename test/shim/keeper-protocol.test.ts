import { describe, expect, it } from "vitest";
import { InvalidRequest } from "../../src/errors/index.ts";
import {
  encodeMessage,
  exitStatusOf,
  MAX_PAYLOAD_BYTES,
  Message,
  MessageReader,
  messageType,
} from "../../src/shim/keeper-protocol.ts";

const read = (...chunks: Buffer[]) => {
  const reader = new MessageReader();
  return chunks.flatMap((chunk) => [...reader.push(chunk)]);
};

describe("the keeper's protocol", () => {
  it("has these bytes for a signal", () => {
    const bytes = encodeMessage(messageType.SIGNAL, { request: 7, step: "kill", pid: 300, signal: 15 });
    expect(bytes.toString("hex")).toBe(
      [
        "3c000000 1100 0000", // 60 bytes of fields, SIGNAL
        "1200 0000 08000000 0700000000000000", // request
        "1700 0000 04000000 6b696c6c", // step "kill"
        "0400 0000 08000000 2c01000000000000", // pid
        "2600 0000 08000000 0f00000000000000", // signal
      ]
        .join("")
        .replaceAll(" ", ""),
    );
  });

  it("takes no string with a NUL, but for a message to people", () => {
    expect(() => encodeMessage(messageType.SPAWN, { argv: ["runc", "a\0b"] })).toThrow(InvalidRequest);
    const [message] = read(encodeMessage(messageType.RUNTIME_ANSWER, { message: "a\0b" }));
    expect(message!.string("message")).toBe("a\ufffdb");
  });

  it("reads back what it writes, however the stream is cut", () => {
    const bytes = Buffer.concat([
      encodeMessage(messageType.SPAWN, {
        request: 1,
        step: "create",
        argv: ["runc", "", "é"],
        env: [],
        cwd: undefined,
      }),
      encodeMessage(messageType.EXIT, { sequence: 2 ** 40, atNs: 1_700_000_000_123_456_789n, pid: -1 }),
    ]);
    for (let cut = 0; cut <= bytes.length; cut++) {
      const [spawn, exit] = read(bytes.subarray(0, cut), bytes.subarray(cut));
      expect(spawn?.type).toBe(messageType.SPAWN);
      expect([spawn?.string("step"), spawn?.int("request"), spawn?.has("env"), spawn?.has("cwd")]).toEqual([
        "create",
        1,
        false,
        false,
      ]);
      expect([exit?.int("sequence"), exit?.bigint("atNs"), exit?.int("pid")]).toEqual([
        2 ** 40,
        1_700_000_000_123_456_789n,
        -1,
      ]);
    }
  });

  it("skips fields and types that it does not know", () => {
    const field = Buffer.from("e7030000 03000000 616263".replaceAll(" ", ""), "hex"); // key 999
    const header = Buffer.from("00000000 0f27 0000".replaceAll(" ", ""), "hex"); // type 9999
    header.writeUInt32LE(field.length, 0);
    const [message] = read(Buffer.concat([header, field]));
    expect(message?.type).toBe(9999);
    expect(message?.int("pid")).toBe(0);
  });

  it("refuses a frame that is too long before its bytes have come", () => {
    const header = Buffer.alloc(8);
    header.writeUInt32LE(MAX_PAYLOAD_BYTES + 1, 0);
    expect(() => read(header)).toThrow(/longer than allowed/);
  });

  it("refuses fields that reach over the frame's end", () => {
    expect(() => new Message(1, Buffer.from("0100000009000000", "hex"))).toThrow(/cut short/);
    expect(() => new Message(1, Buffer.from("010000", "hex"))).toThrow(/ends inside/);
  });

  it("decodes wait statuses as shells do", () => {
    expect([0, 42 << 8, 9, 15 | 0x80, 255 << 8].map(exitStatusOf)).toEqual([0, 42, 137, 143, 255]);
  });
});
