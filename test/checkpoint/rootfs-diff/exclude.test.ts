import { describe, expect, it } from "vitest";
import { excluder } from "../../../src/checkpoint/rootfs-diff/exclude.ts";
import { rawName } from "../../../src/checkpoint/tar/format.ts";

const isExcluded = (pattern: string, path: string) => excluder([pattern])(rawName(path));

describe("an exclude pattern", () => {
  it.each([
    ["/var/cache", ["var/cache"], ["var", "var/cache2", "srv/var/cache"]],
    ["var/cache/", ["var/cache", "srv/var/cache"], ["xvar/cache"]],
    ["*.log", ["a.log", "var/log/b.log", ".log"], ["a.log2", "a.log/b"]],
    ["/srv/cache-?", ["srv/cache-1"], ["srv/cache-", "srv/cache-12", "srv/cache-/"]],
    ["/a/**/z", ["a/z", "a/b/z", "a/b/c/z"], ["az", "a/bz", "a/z/b"]],
    ["/a/**", ["a/b", "a/b/c", "a/"], ["a", "b/a"]],
    ["/**/b", ["b", "a/b", "a/a/b"], ["ab", "a/ab"]],
    ["a**b", ["ab", "a/x/b", "x/ab"], ["xab"]],
    ["[x].(y)+$", ["[x].(y)+$"], ["x.y"]],
    ["é?", ["éx"], ["é"]],
  ])("%s means what it says", (pattern, these, not) => {
    for (const path of these) expect(isExcluded(pattern, path), path).toBe(true);
    for (const path of not) expect(isExcluded(pattern, path), path).toBe(false);
  });

  it("means what a regular expression of its parts would, whatever they are", () => {
    let state = 7;
    const random = (below: number) => {
      state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
      return (state >>> 8) % below;
    };
    const text = (alphabet: readonly string[], length: number) =>
      Array.from({ length }, () => alphabet[random(alphabet.length)]).join("");
    const globs: Record<string, string> = { "**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]" };
    for (let round = 0; round < 20_000; round++) {
      const pattern = `${random(2) ? "/" : ""}${text(["a", "b", "/", "*", "**", "?", "**/"], 1 + random(6))}`;
      const trimmed = pattern.replace(/\/+$/, "");
      if (trimmed === "") continue;
      const source = trimmed.replace(/^\/+/, "").replace(/\*\*\/|\*\*|\*|\?/g, (glob) => globs[glob]!);
      const expression = new RegExp(`^${trimmed.startsWith("/") ? "" : "(?:.*/)?"}${source}$`, "s");
      const path = text(["a", "b", "/", "c"], random(8));
      expect(isExcluded(pattern, path), `${pattern} for ${path}`).toBe(expression.test(path));
    }
  });

  it("that would keep a regular expression busy for ever is as quick as any", () => {
    const path = `${"a".repeat(250)}/${"a".repeat(250)}`;
    for (const pattern of [`${"*a".repeat(31)}b`, `${"**/".repeat(30)}b`, `${"**a".repeat(31)}b`])
      expect(isExcluded(pattern, path)).toBe(false);
  });

  it("that names nothing, or asks too much, is refused", () => {
    for (const pattern of ["", "/", "a/../b", "..", "./a", "a\0"])
      expect(() => excluder([pattern]), pattern).toThrow(/names nothing below the root/);
    expect(() => excluder(["*a".repeat(33)])).toThrow(/more than 32 wildcards/);
    expect(() => excluder(["a".repeat(5000)])).toThrow(/longer than 4096 bytes/);
    expect(() => excluder(Array(257).fill("a"))).toThrow(/257 exclude patterns are more than 256/);
  });
});
