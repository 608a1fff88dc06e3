// As much of JSON Schema as our schemas use. A keyword that is not here is an error, so that none is silently ignored.

export interface Schema {
  readonly $schema?: string;
  readonly title?: string;
  readonly description?: string;
  readonly type?: string;
  readonly const?: unknown;
  readonly enum?: readonly unknown[];
  readonly pattern?: string;
  readonly minLength?: number;
  readonly minimum?: number;
  readonly items?: Schema;
  readonly required?: readonly string[];
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly additionalProperties?: Schema;
}

const keywords = new Set(
  "$schema title description type const enum pattern minLength minimum items required properties additionalProperties".split(
    " ",
  ),
);

/** The first thing that is wrong with a value, as "options.tcp is 5, not one of …"; undefined: nothing is. */
export function findFault(value: unknown, schema: Schema, at = ""): string | undefined {
  const unknown = Object.keys(schema).find((keyword) => !keywords.has(keyword));
  if (unknown) throw new Error(`the schema's keyword ${unknown} is not supported`);
  const name = at || "it";
  const shown = () => `${name} is ${JSON.stringify(value)?.slice(0, 60)}`;
  if (schema.type !== undefined && !hasType(value, schema.type))
    return `${shown()}, not of type ${schema.type}`;
  if (schema.const !== undefined && value !== schema.const)
    return `${shown()}, not ${JSON.stringify(schema.const)}`;
  if (schema.enum && !schema.enum.includes(value)) return `${shown()}, not one of ${schema.enum.join(", ")}`;
  if (typeof value === "string") {
    if (value.length < (schema.minLength ?? 0)) return `${name} is too short`;
    if (schema.pattern !== undefined && !new RegExp(schema.pattern, "u").test(value))
      return `${shown()}, which is not allowed`;
  }
  if (typeof value === "number" && value < (schema.minimum ?? value))
    return `${shown()}, less than ${schema.minimum}`;
  if (Array.isArray(value) && schema.items)
    return first(value, (item, i) => findFault(item, schema.items!, `${at}[${i}]`));
  if (isObject(value)) return findFaultInside(value, schema, at);
  return undefined;
}

function findFaultInside(value: Record<string, unknown>, schema: Schema, at: string): string | undefined {
  const path = (key: string) => (at ? `${at}.${key}` : key);
  const missing = schema.required?.find((key) => !Object.hasOwn(value, key));
  if (missing !== undefined) return `${path(missing)} is missing`;
  return first(Object.entries(value), ([key, member]) => {
    const known =
      schema.properties && Object.hasOwn(schema.properties, key) ? schema.properties[key] : undefined;
    const rule = known ?? schema.additionalProperties;
    return rule && findFault(member, rule, path(key));
  });
}

function first<T>(
  items: readonly T[],
  fault: (item: T, index: number) => string | undefined,
): string | undefined {
  for (const [index, item] of items.entries()) {
    const found = fault(item, index);
    if (found !== undefined) return found;
  }
  return undefined;
}

function hasType(value: unknown, type: string): boolean {
  if (type === "array") return Array.isArray(value);
  if (type === "object") return isObject(value);
  if (type === "integer") return Number.isSafeInteger(value);
  return typeof value === type; // string, number, boolean
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
