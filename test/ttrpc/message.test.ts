import { describe, expect, it } from "vitest";
import { WireError } from "../../src/proto/index.ts";
import { decodeRequest, decodeResponse, encodeRequest, encodeResponse } from "../../src/ttrpc/index.ts";
import { Random } from "./random.ts";

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");
const noBytes = new Uint8Array(0);

describe("a request", () => {
  it("has these bytes", () => {
    const bytes = encodeRequest({
      service: "s.T",
      method: "Go",
      payload: Buffer.from([1, 2]),
      timeoutMs: 2000,
      metadata: new Map([["k", ["v", "w"]]]),
    });
    expect(hex(bytes)).toBe(
      [
        "0a03732e54",
        "1202476f",
        "1a020102",
        "2080a8d6b907", // 2e9 ns
        "2a060a016b120176",
        "2a060a016b120177",
      ].join(""),
    );
    expect(decodeRequest(bytes)).toEqual({
      service: "s.T",
      method: "Go",
      payload: Buffer.from([1, 2]),
      timeoutMs: 2000,
      metadata: new Map([["k", ["v", "w"]]]),
    });
  });

  it.each([
    [undefined, undefined],
    [1.5, 1.5],
    [0, 0.000001], // 0 on the wire would be "without end"
    [-5, 0.000001],
    [Number.POSITIVE_INFINITY, undefined],
    [Number.NaN, undefined],
    [1e300, undefined],
    [86_400_000, 86_400_000],
  ])("carries a timeout of %s ms as %s", (sent, received) => {
    const bytes = encodeRequest({ service: "s", method: "m", payload: noBytes, timeoutMs: sent });
    expect(decodeRequest(bytes).timeoutMs).toBe(received);
  });

  it("with a negative timeout has none", () => {
    const bytes = Buffer.from(`20${"ff".repeat(9)}01`, "hex"); // -1 ns
    expect(decodeRequest(bytes).timeoutMs).toBeUndefined();
  });

  it("may have fields that we don't know", () => {
    const known = encodeRequest({ service: "s", method: "m", payload: noBytes });
    const unknown = Buffer.from("9206020102" + "9d0601020304" + "980605" + "a30698060aa406", "hex");
    expect(decodeRequest(Buffer.concat([unknown, known, unknown]))).toMatchObject({
      service: "s",
      method: "m",
    });
  });

  it.each([
    ["a length past the end", "0a05616263"],
    ["a varint without end", `20${"ff".repeat(11)}`],
    ["a varint that is cut", "2080"],
    ["field number 0", "0201"],
    ["wire type 7", "0f"],
    ["an end without a group", "0c"],
    ["a group without end", "0b0801"],
    ["a service that is not UTF-8", "0a02c328"],
    ["groups nested without end", "0b".repeat(5000)],
  ])("with %s is refused", (_what, bytes) => {
    expect(() => decodeRequest(Buffer.from(bytes, "hex"))).toThrow(WireError);
  });

  it("never throws anything but WireError, whatever the bytes", () => {
    const random = new Random(42);
    const valid = encodeRequest({
      service: "service",
      method: "Method",
      payload: random.bytes(20),
      timeoutMs: 5,
    });
    for (let round = 0; round < 20_000; round++) {
      const bytes = round % 2 ? random.bytes(random.int(60)) : Buffer.from(valid);
      if (round % 2 === 0) bytes[random.int(bytes.length)] = random.int(256);
      try {
        decodeRequest(bytes);
        decodeResponse(bytes);
      } catch (error) {
        if (!(error instanceof WireError))
          throw new Error(`bytes ${bytes.toString("hex")}`, { cause: error });
      }
    }
  });
});

describe("a response", () => {
  it("has these bytes", () => {
    expect(hex(encodeResponse({ payload: Buffer.from("ok") }))).toBe("12026f6b");
    const failed = encodeResponse({ status: { code: 5, message: "no task" } });
    expect(hex(failed)).toBe(`0a0b08051207${hex(Buffer.from("no task"))}`);
    expect(decodeResponse(failed)).toEqual({ status: { code: 5, message: "no task" }, payload: noBytes });
    expect(decodeResponse(noBytes)).toEqual({ status: { code: 0, message: "" }, payload: noBytes });
  });
});
