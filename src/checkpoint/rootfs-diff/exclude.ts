import { InvalidRequest } from "../../errors/index.ts";
import { type RawName, rawName } from "../tar/format.ts";

/**
 * Patterns of paths that are left out, each with everything below it. One that begins with a slash is from the container's root, any
 * other matches at any depth: `/var/cache`, `*.log`, `/srv/cache-?`. `*` and `?` don't match a slash, `**` does.
 * @returns whether a path (without its leading slash) is left out by itself; its parents are asked before
 */
export function excluder(patterns: readonly string[]): (path: RawName) => boolean {
  const rules = patterns.map((pattern) => {
    const trimmed = pattern.replace(/\/+$/, "");
    if (trimmed === "" || /(^|\/)\.\.?(\/|$)/.test(trimmed) || trimmed.includes("\0"))
      throw new InvalidRequest(`exclude pattern ${JSON.stringify(pattern)} names nothing below the root`);
    const anchored = trimmed.startsWith("/");
    const source = rawName(trimmed.replace(/^\/+/, ""))
      .replace(/[.+^${}()|[\]\\]/g, "\\$&")
      .replace(/\*\*\/|\*\*|\*|\?/g, (glob) => globs[glob]!);
    return new RegExp(`^${anchored ? "" : "(?:.*/)?"}${source}$`, "s");
  });
  return (path) => rules.some((rule) => rule.test(path));
}

const globs: Readonly<Record<string, string>> = { "**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]" };
