import { messageOf } from "../errors/index.ts";

/*
 * How a command ends when it doesn't succeed (docs/cli.md): one line on stderr that says what failed, on what and why, and an exit code.
 *
 *   1   it failed. The engine's own exit code is not passed on: 2 has a meaning of ours
 *   2   the answer is no (a command says so by `exit(2)`)
 *   64  what was written makes no sense: sysexits.h's EX_USAGE
 */

const FAILED = 1;
const USAGE = 64;

/** What oclif's errors carry. */
interface OclifError extends Error {
  oclif?: { exit?: number };
  code?: string;
}

/** What was written on the command line makes no sense. */
export class WrongUsage extends Error {
  override name = "WrongUsage";
}

/** oclif's report of arguments and flags that it can't understand has several lines, of which the last says how to ask for help. */
export function wrongUsage(command: string, cause: Error): WrongUsage {
  const words = cause.message
    .replace(/^The following errors? occurred:/, "")
    .replace(/\n?See more help with --help\s*$/, "")
    .replace(/^Parsing (--\S+)\s*/, "$1: ")
    .replaceAll(/\s+/g, " ")
    .trim();
  const name = command.replaceAll(":", " ");
  return new WrongUsage(`${name}: ${words}; see \`cedana ${name} --help\``, { cause });
}

/** Empty for an end that is no failure, or of which all is said. */
export function messageForPeople(error: unknown): string {
  if (isAskedFor(error)) return "";
  if (error instanceof WrongUsage) return error.message;
  const unknown = unknownCommand(error);
  if (unknown === undefined) return messageOf(error).replaceAll(/\n\s*/g, "; ");
  return `there is no command "${unknown}"; see \`cedana --help\``;
}

export function exitCodeOf(error: unknown): number {
  if (isAskedFor(error)) return (error as OclifError).oclif?.exit ?? 0;
  return error instanceof WrongUsage || unknownCommand(error) !== undefined ? USAGE : FAILED;
}

/** A command has called `exit`. */
function isAskedFor(error: unknown): boolean {
  return (error as OclifError).code === "EEXIT";
}

function unknownCommand(error: unknown): string | undefined {
  const { oclif, message } = error as OclifError;
  return oclif === undefined
    ? undefined
    : /^command (.+) not found$/.exec(message)?.[1]?.replaceAll(":", " ");
}
