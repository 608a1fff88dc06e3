import { InvalidRequest } from "../../errors/index.ts";

// JSON with integers of 64 bits, and lists that are too long for memory. Node's own JSON does the work, one piece at a time.

/** ES2025; TypeScript's library doesn't have it yet. */
const json = JSON as unknown as {
  parse(
    text: string,
    reviver: (key: string, value: unknown, context: { source?: string }) => unknown,
  ): unknown;
};

/**
 * `bigint` as a number with all its digits; members that are undefined are left out. By hand, because with a replacer JSON.stringify is
 * four times slower.
 */
export function stringify(value: unknown): string {
  if (typeof value === "bigint") return `${value}`;
  if (typeof value !== "object" || value === null) return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map(stringify).join(",")}]`;
  let text = "";
  for (const [key, member] of Object.entries(value))
    if (member !== undefined) text += `${text ? "," : ""}${JSON.stringify(key)}:${stringify(member)}`;
  return `{${text}}`;
}

/** Integers beyond 2^53 become `bigint`. @throws SyntaxError */
export function parse(text: string): unknown {
  if (!/\d{16}/.test(text)) return JSON.parse(text); // a reviver makes it five times slower
  return json.parse(text, (_, value, { source }) =>
    typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(source ?? "")
      ? BigInt(source!)
      : value,
  );
}

export type JsonPiece =
  | { readonly key: string; readonly value: unknown }
  /** an element of the list under this key, parsed */
  | { readonly listKey: string; readonly value: unknown };

/** No element of ours is longer; V8 has no strings beyond 512 MiB. */
const MAX_PIECE_CHARS = 500_000_000;

/**
 * Takes an object's members apart as they come; those of one key, a list, element by element. Needs the memory of one of them.
 * @throws InvalidRequest for text that isn't JSON, or no object
 */
export async function* piecesOf(
  text: AsyncIterable<string | Uint8Array>,
  listKey: string,
): AsyncGenerator<JsonPiece> {
  const scanner = new Scanner(listKey);
  const utf8 = new TextDecoder("utf-8", { fatal: true });
  for await (const chunk of text)
    yield* scanner.push(typeof chunk === "string" ? chunk : utf8.decode(chunk, { stream: true }));
  scanner.end();
}

/**
 * Where in the text we are: depth 0 outside of the object, 1 among its members, 2 among the list's elements. Everything deeper,
 * and every other member's value, is collected as text and parsed as a whole.
 */
class Scanner {
  readonly #listKey: string;
  #depth = 0;
  #inString = false;
  #escaped = false;
  #inList = false;
  #ended = false;
  #key: string | undefined;
  #parts: string[] = [];
  #chars = 0;

  constructor(listKey: string) {
    this.#listKey = listKey;
  }

  *push(chunk: string): Generator<JsonPiece> {
    let start = 0; // of what of this chunk belongs to the piece that is being collected
    const collect = (end: number) => {
      if (end <= start) return;
      this.#chars += end - start;
      if (this.#chars > MAX_PIECE_CHARS)
        throw new InvalidRequest("one entry of the JSON is longer than 500 MB");
      this.#parts.push(chunk.slice(start, end));
    };
    for (let at = 0; at < chunk.length; at++) {
      const char = chunk[at]!;
      if (this.#inString) {
        if (this.#escaped) this.#escaped = false;
        else if (char === "\\") this.#escaped = true;
        else if (char === '"') this.#inString = false;
        continue;
      }
      if (char === '"') {
        if (this.#depth === 0) throw new InvalidRequest("the JSON is not an object");
        this.#inString = true;
      } else if (char === "{" || char === "[") {
        const opensObject = this.#depth === 0;
        const opensList = this.#depth === 1 && this.#key === this.#listKey && char === "[";
        if (opensObject && (char !== "{" || this.#ended))
          throw new InvalidRequest("the JSON is not one object");
        this.#depth++;
        if (opensObject || opensList) {
          this.#inList = opensList;
          start = at + 1;
          this.#clear();
        }
      } else if (char === "}" || char === "]") {
        this.#depth--;
        if (this.#depth < 0) throw new InvalidRequest("the JSON closes more than it opens");
        if (this.#inList && this.#depth === 1) {
          collect(at);
          yield* this.#piece();
          this.#inList = false;
          this.#key = undefined;
          start = at + 1;
        } else if (this.#depth === 0) {
          collect(at);
          yield* this.#piece();
          this.#ended = true;
          start = at + 1;
        }
      } else if (char === ":" && this.#depth === 1 && this.#key === undefined) {
        collect(at);
        this.#key = String(parseOrRefuse(this.#text()));
        start = at + 1;
      } else if (char === "," && (this.#depth === 1 || (this.#inList && this.#depth === 2))) {
        collect(at);
        yield* this.#piece();
        if (!this.#inList) this.#key = undefined;
        start = at + 1;
      } else if (this.#depth === 0 && !/\s/.test(char))
        throw new InvalidRequest("the JSON is not one object");
    }
    if (this.#depth > 0) collect(chunk.length);
  }

  end(): void {
    if (!this.#ended) throw new InvalidRequest("the JSON ends too early");
  }

  *#piece(): Generator<JsonPiece> {
    const text = this.#text();
    if (text.trim() === "") return; // an empty list, or what follows the list's end
    const value = parseOrRefuse(text);
    if (this.#key === undefined) throw new InvalidRequest("the JSON has a member without a name");
    yield this.#inList ? { listKey: this.#key, value } : { key: this.#key, value };
  }

  #text(): string {
    const text = this.#parts.join("");
    this.#clear();
    return text;
  }

  #clear(): void {
    this.#parts = [];
    this.#chars = 0;
  }
}

function parseOrRefuse(text: string): unknown {
  try {
    return parse(text);
  } catch (error) {
    throw new InvalidRequest(`not JSON: ${(error as Error).message}`, { cause: error });
  }
}
