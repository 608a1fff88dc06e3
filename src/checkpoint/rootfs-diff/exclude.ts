import { InvalidRequest } from "../../errors/index.ts";
import { type RawName, rawName } from "../tar/format.ts";

/** Of one pattern. Whoever annotates a container writes them, and each file is held against all while it stands still. */
const MAX_WILDCARDS = 32;
const MAX_PATTERN_BYTES = 4096;
const MAX_PATTERNS = 256;

/**
 * Patterns of paths that are left out, each with everything below it. One that begins with a slash is from the container's root, any
 * other matches at any depth: `/var/cache`, `*.log`, `/srv/cache-?`. `*` and `?` don't match a slash, `**` does.
 * @returns whether a path (without its leading slash) is left out by itself; its parents are asked before
 * @throws InvalidRequest for a pattern that names nothing, or asks too much
 */
export function excluder(patterns: readonly string[]): (path: RawName) => boolean {
  if (patterns.length > MAX_PATTERNS)
    throw new InvalidRequest(`${patterns.length} exclude patterns are more than ${MAX_PATTERNS}`);
  const rules = patterns.map(tokensOf);
  return (path) => rules.some((tokens) => matches(tokens, path));
}

/** A character, or what stands for some: `**\/` is nothing, or all up to a slash. */
type Token = { one: string } | { any: "?" | "*" | "**" | "**/" };

function tokensOf(pattern: string): Token[] {
  const shown = JSON.stringify(pattern.slice(0, 100));
  const trimmed = pattern.replace(/\/+$/, "");
  if (trimmed === "" || /(^|\/)\.\.?(\/|$)/.test(trimmed) || trimmed.includes("\0"))
    throw new InvalidRequest(`exclude pattern ${shown} names nothing below the root`);
  const raw = rawName(trimmed.replace(/^\/+/, ""));
  if (raw.length > MAX_PATTERN_BYTES)
    throw new InvalidRequest(`exclude pattern ${shown} is longer than ${MAX_PATTERN_BYTES} bytes`);
  const tokens: Token[] = trimmed.startsWith("/") ? [] : [{ any: "**/" }];
  for (const [text] of raw.matchAll(/\*\*\/|\*\*|\*|\?|[^*?]/gs))
    tokens.push(/[*?]/.test(text) ? { any: text as "?" | "*" | "**" | "**/" } : { one: text });
  if (tokens.filter((token) => "any" in token).length > MAX_WILDCARDS)
    throw new InvalidRequest(`exclude pattern ${shown} has more than ${MAX_WILDCARDS} wildcards`);
  return tokens;
}

/**
 * Goes through the path once, with all places of the pattern at which it may be: a regular expression would try them one after the
 * other, which for `*a*a*a*a*b` takes longer than anybody waits.
 */
function matches(tokens: readonly Token[], path: RawName): boolean {
  let places = new Set<number>();
  const enter = (place: number, into: Set<number>) => {
    for (let at = place; !into.has(at); at++) {
      into.add(at);
      const token = tokens[at];
      if (!token || "one" in token || token.any === "?") return; // it takes a character
    }
  };
  enter(0, places);
  for (const character of path) {
    const next = new Set<number>();
    for (const place of places) {
      const at = place < 0 ? ~place : place;
      const token = tokens[at];
      if (!token) continue; // the pattern has ended, the path hasn't
      if ("one" in token) {
        if (token.one === character) enter(at + 1, next);
      } else if (token.any === "?") {
        if (character !== "/") enter(at + 1, next);
      } else if (token.any === "**/") {
        next.add(~at); // in the middle of it, where it isn't nothing any more
        if (character === "/") enter(at + 1, next);
      } else if (token.any === "**" || character !== "/") enter(at, next);
    }
    if (next.size === 0) return false;
    places = next;
  }
  return places.has(tokens.length);
}
