import { describe, expect, it } from "vitest";
import { lastBefore } from "../../src/checkpoint/restore/ids.ts";

const max = 32_768;

describe("where the kernel goes on with ids", () => {
  it("is past all of the checkpoint's, and past those that CRIU may take beside them", () => {
    expect(lastBefore([7, 8, 9], { last: 7, max })).toBe(303);
    expect(lastBefore([7, 1000], { last: 20, max })).toBe(1000);
    expect(lastBefore([7, 3000], { last: 350, max })).toBe(3000);
    expect(lastBefore([5000], { last: 4999, max })).toBe(5000);
  });

  it("stays where it is when it comes to none of them for long", () => {
    expect(lastBefore([7, 8, 9], { last: 1000, max })).toBeUndefined();
    expect(lastBefore([7, 20_000], { last: 400, max })).toBeUndefined();
    expect(lastBefore([7, 500], { last: 350, max: 512 })).toBeUndefined();
    expect(lastBefore([7, 30_000], { last: 25_000, max })).toBeUndefined();
  });

  it("is back at the beginning when the last ones are near, for then they begin anew", () => {
    expect(lastBefore([400, 401], { last: 32_000, max })).toBe(401);
  });

  it("is in the largest gap between ids, wherever a checkpoint has them", () => {
    expect(lastBefore([7, max - 1], { last: 7, max })).toBe(302);
    expect(lastBefore([1000, 4_194_303], { last: 999, max })).toBe(1000);
    expect(lastBefore([2000, 4_194_303, 2 ** 31 - 1], { last: 1000, max })).toBe(2000);
    const everywhere = Array.from({ length: max - 1 }, (_, index) => index + 1);
    expect(lastBefore(everywhere, { last: 7, max })).toBeUndefined();
  });
});
