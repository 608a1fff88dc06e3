import type { Finding, OptionName } from "./catalogue.ts";
import type { PreflightFacts, PreflightReport } from "./preflight.ts";

/** The JSON of a preflight, described by preflight.schema.json; later versions only add. */
export interface PreflightDocument {
  readonly version: 1;
  readonly ok: boolean;
  readonly blockers: readonly Finding[];
  readonly requirements: readonly (Finding & { option: OptionName; met: boolean; value?: number })[];
  readonly notes: readonly Finding[];
  readonly facts: PreflightFacts;
}

export function toDocument({ ok, blockers, requirements, notes, facts }: PreflightReport): PreflightDocument {
  return { version: 1, ok, blockers, requirements, notes, facts };
}

/**
 * For people:
 *
 *   blocker  io-uring  process 4711 (12 in the container), nginx: fd 5: anon_inode:[io_uring]
 *            CRIU can't dump io_uring
 *            forbid io_uring: by the seccomp profile …
 *
 * @param name  how the container is called
 */
export function toText(name: string, report: PreflightReport): string {
  const { facts } = report;
  const missing = report.requirements.filter((requirement) => !requirement.met);
  const lines = [
    `${name}: ${verdict(report.blockers.length, missing.length)} (${counted(facts.processes, "process", "processes")}, ${counted(facts.openFiles, "open file")}, about ${inMib(facts.memoryBytes)} to be dumped${facts.freeBytes === undefined ? "" : `, ${inMib(facts.freeBytes)} free at the destination`})`,
  ];
  lines.push(...listOf("blocker", report.blockers), ...listOf("option", missing));
  const met = report.requirements.filter((requirement) => requirement.met);
  for (const [id, same] of Map.groupBy(met, (requirement) => requirement.id))
    lines.push(`is set   ${id}  ${counted(same.length, "time")}`);
  lines.push(...listOf("note", report.notes));
  return lines.join("\n");
}

/** The same in one line, as an error says it: what is in the way, and what to do about each. */
export function refusalOf(name: string, { blockers, requirements }: PreflightReport): string {
  const all = [...blockers, ...requirements.filter((requirement) => !requirement.met)];
  const parts = [...Map.groupBy(all, (finding) => finding.id)].map(([id, same]) => {
    const [first] = same as [Finding];
    const more = same.length > 1 ? `, and ${same.length - 1} more` : "";
    return `${id}: ${subject(first)}${more}: ${first.why} (${first.advice})`;
  });
  return `${name} can't be checkpointed as it is: ${parts.join("; ")}`;
}

/** A server may have a thousand connections: people get the first of each kind, a program reads the JSON. */
const shownOfEach = 5;

function listOf(label: string, findings: readonly Finding[]): string[] {
  const lines: string[] = [];
  for (const [id, same] of Map.groupBy(findings, (finding) => finding.id)) {
    for (const finding of same.slice(0, shownOfEach))
      lines.push(`${label.padEnd(8)} ${id}  ${subject(finding)}`);
    if (same.length > shownOfEach)
      lines.push(`${label.padEnd(8)} ${id}  and ${same.length - shownOfEach} more`);
    const [{ why, advice }] = same as [Finding];
    const values = same.flatMap((finding) => ("value" in finding ? [Number(finding.value)] : []));
    lines.push(
      indent + why,
      indent + advice + (values.length > 0 ? ` (at least ${Math.max(...values)})` : ""),
    );
  }
  return lines;
}

const indent = " ".repeat(9);

function verdict(blockers: number, missing: number): string {
  if (blockers === 0 && missing === 0) return "can be checkpointed";
  const parts = [
    ...(blockers > 0 ? [counted(blockers, "blocker")] : []),
    ...(missing > 0 ? [counted(missing, "option to be set", "options to be set")] : []),
  ];
  return `can't be checkpointed as it is: ${parts.join(", ")}`;
}

function subject({ process, alsoIn, what }: Finding): string {
  if (!process) return what;
  const inside =
    process.pidInContainer === process.pid ? "" : ` (${process.pidInContainer} in the container)`;
  const more = alsoIn ? `, and ${alsoIn} more` : "";
  return `process ${process.pid}${inside}, ${process.comm}: ${what}${more}`;
}

function counted(count: number, one: string, many = `${one}s`): string {
  return `${count} ${count === 1 ? one : many}`;
}

const inMib = (bytes: number) => `${Math.ceil(bytes / 2 ** 20)} MiB`;
