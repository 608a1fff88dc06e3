// From samples to rows: medians, the ratio, and whether the aim is reached.

import type { EngineName } from "../test/live/harness/live.ts";
import { type Aim, median, type Row } from "./bench.ts";

export interface Result {
  row: string;
  unit: string;
  ours?: number;
  theirs?: number;
  ratio?: number;
  aim?: string;
  /** undefined: there is no aim, or nothing to hold against it */
  reached?: boolean;
  samples: { ours: number[]; theirs: number[] };
}

export function resultOf(
  row: Row,
  engine: EngineName,
  samples: { ours: number[]; theirs: number[] },
): Result {
  const ours = samples.ours.length > 0 ? median(samples.ours) : undefined;
  const theirs = samples.theirs.length > 0 ? median(samples.theirs) : undefined;
  const ratio = ours !== undefined && theirs !== undefined ? ours / theirs : undefined;
  const aim = row.aim && ("of" in row.aim ? row.aim : row.aim[engine]);
  const value = aim?.of === "ratio" ? ratio : ours;
  return {
    row: row.name,
    unit: row.unit,
    ...(ours !== undefined && { ours }),
    ...(theirs !== undefined && { theirs }),
    ...(ratio !== undefined && { ratio }),
    ...(aim && { aim: describe(aim, row.unit) }),
    ...(aim && value !== undefined && { reached: isReached(aim, value) }),
    samples,
  };
}

function isReached({ atMost = Infinity, atLeast = -Infinity }: Aim, value: number): boolean {
  return value <= atMost && value >= atLeast;
}

function describe({ of, atMost, atLeast }: Aim, unit: string): string {
  const bound = atMost !== undefined ? `≤ ${atMost}` : `≥ ${atLeast}`;
  return of === "ratio" ? bound : `${bound} ${unit}`;
}

/** As a table for people, which is Markdown too. */
export function table(results: Result[]): string {
  const lines = [
    ["", "unit", "n", "ours", "runc's shim", "ratio", "aim", ""],
    ...results.map(({ row, unit, ours, theirs, ratio, aim, reached, samples }) => [
      row,
      unit,
      String(Math.max(samples.ours.length, samples.theirs.length)),
      figure(ours),
      figure(theirs),
      ratio === undefined ? "n/a" : ratio.toFixed(2),
      aim ?? "",
      reached === undefined ? "" : reached ? "reached" : "MISSED",
    ]),
  ];
  const widths = lines[0]!.map((_, column) => Math.max(3, ...lines.map((line) => line[column]!.length)));
  const isText = (column: number) => column < 2 || column > 5;
  const text = lines.map(
    (line) =>
      `| ${line.map((cell, at) => (isText(at) ? cell.padEnd(widths[at]!) : cell.padStart(widths[at]!))).join(" | ")} |`,
  );
  const rule = `|${widths.map((width, at) => (isText(at) ? "-".repeat(width + 2) : `${"-".repeat(width + 1)}:`)).join("|")}|`;
  return [text[0], rule, ...text.slice(1)].join("\n");
}

function figure(value: number | undefined): string {
  if (value === undefined) return "n/a";
  return Math.abs(value) >= 1000
    ? Math.round(value).toLocaleString("en").replaceAll(",", " ")
    : value.toPrecision(3);
}
