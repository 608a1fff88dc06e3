// Times and sizes, as people write them in annotations and in the configuration.

const unitsMs: Readonly<Record<string, number>> = { ms: 1, s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 };

/** As Go writes durations, and with days: "1h30m", "1.5s", "500ms"; a number alone is seconds. @returns milliseconds, rounded */
export function parseDuration(text: string): number | undefined {
  if (/^\d{1,9}$/.test(text)) return Number(text) * 1_000;
  if (!/^(\d{1,9}(\.\d{1,9})?(ms|s|m|h|d))+$/.test(text)) return undefined;
  let ms = 0;
  for (const [, count, , unit] of text.matchAll(/(\d+(\.\d+)?)(ms|s|m|h|d)/g))
    ms += Number(count) * unitsMs[unit!]!;
  return Math.round(ms);
}

/** A duration of more than nothing. */
export function parseInterval(text: string): number | undefined {
  return parseDuration(text) || undefined;
}

/** As Kubernetes writes quantities of memory: "512Mi", "1G", "1000". */
export function parseBytes(text: string): number | undefined {
  const [, count, unit = "", binary] = /^(\d{1,15})(?:([KMGT])(i?))?$/.exec(text) ?? [];
  if (count === undefined) return undefined;
  const bytes = Number(count) * (binary ? 1024 : 1000) ** (unit === "" ? 0 : "KMGT".indexOf(unit) + 1);
  return Number.isSafeInteger(bytes) ? bytes : undefined;
}
