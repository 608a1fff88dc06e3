import { describe, expect, it } from "vitest";
import { parseBytes, parseDuration, parseInterval } from "../../src/runtime/quantities.ts";

describe("a duration", () => {
  it.each([
    ["7", 7_000],
    ["0", 0],
    ["0s", 0],
    ["10s", 10_000],
    ["1.5s", 1_500],
    ["1.001s", 1_001],
    ["500ms", 500],
    ["1m30s", 90_000],
    ["2h", 7_200_000],
    ["1d", 86_400_000],
  ])("%s is %d ms", (text, ms) => expect(parseDuration(text)).toBe(ms));
  it.each(["", "s", "-1s", "1.5", "1 s", "1e3", "NaN", "1s ", "1w"])("is not %j", (text) =>
    expect(parseDuration(text)).toBeUndefined(),
  );
  it("that is an interval is more than nothing", () => {
    expect(parseInterval("1h30m")).toBe(5_400_000);
    for (const text of ["0", "0s", "0.1ms", "often"]) expect(parseInterval(text)).toBeUndefined();
  });
});

describe("a size", () => {
  it.each([
    ["0", 0],
    ["1000", 1_000],
    ["1K", 1_000],
    ["512Mi", 512 * 1024 ** 2],
    ["2G", 2e9],
    ["1Ti", 1024 ** 4],
  ])("%s is %d bytes", (text, bytes) => expect(parseBytes(text)).toBe(bytes));
  it.each(["", "Mi", "-1", "1.5G", "1 K", "1k", "1Ei", "9999999999Ti"])("is not %j", (text) =>
    expect(parseBytes(text)).toBeUndefined(),
  );
});
