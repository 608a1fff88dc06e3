import { open, statfs } from "node:fs/promises";
import { dirname } from "node:path";
import { AlreadyExists, type CedanaError, NotFound, RuntimeFailed, WrongState } from "../errors/index.ts";

// What an engine's failure means: its last words, and which error they are.

// An engine writes a few lines; with --debug many, of which the last matter.
const logTailBytes = 64 * 1024;

/**
 * The last error in an engine's log, in JSON or text form.
 * @returns undefined when there is none
 */
export async function lastLogError(logFile: string): Promise<string | undefined> {
  return lastErrorIn(await tail(logFile, logTailBytes));
}

/** The end of a file, empty when there is none. */
async function tail(path: string, bytes: number): Promise<string> {
  const file = await open(path).catch(() => undefined);
  if (!file) return "";
  try {
    const { size } = await file.stat();
    const length = Math.min(size, bytes);
    const { bytesRead, buffer } = await file.read(Buffer.alloc(length), 0, length, size - length);
    return buffer.toString("utf8", 0, bytesRead);
  } catch {
    return ""; // a directory, or gone: then there is nothing to quote
  } finally {
    await file.close();
  }
}

/**
 * Last error of a log's text: `{"level":"error","msg":…}` of either engine, logrus' `level=error msg="…"`; and where no
 * line is of either form, the last line, which is what the engines print on stderr.
 */
export function lastErrorIn(text: string): string | undefined {
  let last: string | undefined;
  let plain: string | undefined;
  for (const line of text.split("\n")) {
    if (line.trim() === "") continue;
    const entry = parseLogLine(line);
    if (entry === undefined) plain = line.trim();
    else if (["error", "fatal", "panic"].includes(entry.level)) last = entry.message;
  }
  return last ?? plain;
}

function parseLogLine(line: string): { level: string; message: string } | undefined {
  if (line.startsWith("{")) {
    try {
      const { level, msg } = JSON.parse(line) as { level?: unknown; msg?: unknown };
      if (typeof msg === "string") return { level: String(level), message: msg };
    } catch {
      return undefined; // cut at the front by `tail`, or no JSON
    }
  }
  const [, level, quoted, bare] = /\blevel=(\w+)\b.*?\bmsg=(?:("(?:[^"\\]|\\.)*")|(\S+))/.exec(line) ?? [];
  if (level === undefined) return undefined;
  return { level, message: quoted ? unquote(quoted) : bare! };
}

function unquote(text: string): string {
  try {
    return JSON.parse(text) as string;
  } catch {
    return text.slice(1, -1); // an escape of Go's that JSON lacks
  }
}

// What a failure means to containerd. Texts are those of runc 1.1 to 1.3 and crun 1.8 to 1.21; the Go shim matches the
// same ones where it says NotFound, AlreadyExists or FailedPrecondition. The first that fits decides.
const meanings: readonly [
  pattern: RegExp,
  error: new (message: string, options?: ErrorOptions) => CedanaError,
][] = [
  // runc: "container does not exist". crun says which of its files is missing.
  [/container (?:"?\S+"? )?does not exist/i, NotFound],
  [
    /(?:error opening file|cannot open directory) [`'"]?[^`'"]*\/{ID}(?:\/status)?[`'"]?: No such file or directory/i,
    NotFound,
  ],
  // A signal for a process that has ended: runc 1.1 says that the container isn't running.
  [/process already finished|os: process already finished|no such process/i, NotFound],
  [/container with (?:given )?id (?:already )?exists|container `[^`]*` already exists/i, AlreadyExists],
  [/cannot exec in a stopped container|container not running|fail startup/i, WrongState],
  [/cannot exec in a paused container|container `[^`]*` is paused/i, WrongState],
  [/container not paused|cannot be (?:paused|resumed)/i, WrongState],
  [
    /cannot start an already running container|cannot start a container that has (?:stopped|run and stopped)/i,
    WrongState,
  ],
  [/cannot open `[^`]*\/exec\.fifo`: No such file or directory/i, WrongState],
  [/that is not stopped: |is not in `created` or `stopped` state/i, WrongState],
  [/cannot be checkpointed in \w+ state/i, WrongState],
];

/**
 * The error for an engine that failed: NotFound, AlreadyExists or WrongState where its words say so, else RuntimeFailed
 * with the words.
 * @param outputFile  where the engine's stdout and stderr went, for failures that it doesn't log (crun: a missing bundle)
 */
export async function engineFailure(
  action: string,
  id: string,
  exitStatus: number,
  logFile: string,
  outputFile?: string,
): Promise<CedanaError> {
  const words = (await lastLogError(logFile)) ?? (outputFile && (await lastLogError(outputFile)));
  return failureFrom(action, id, exitStatus, words || (await fullDisk(dirname(logFile))));
}

/** Why an engine may have been unable to say anything: no room for its log. */
async function fullDisk(directory: string): Promise<string | undefined> {
  const { bavail } = await statfs(directory).catch(() => ({ bavail: 1 })); // gone: then that isn't it
  return bavail === 0
    ? `no space left on device for ${directory}: the engine could not even say so`
    : undefined;
}

/** As `engineFailure`, with the engine's words at hand. */
export function failureFrom(
  action: string,
  id: string,
  exitStatus: number,
  words: string | undefined,
): CedanaError {
  const message = `${action} ${id}: ${words ?? `the engine ended with status ${exitStatus} and said nothing`}`;
  if (words === undefined) return new RuntimeFailed(message, { exitStatus });
  // A signal for a container that has ended is for nobody, and containerd takes NotFound for "already gone".
  if (action === "kill" && /container not running/i.test(words)) return new NotFound(message);
  const literally = id.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"); // crun takes nearly every id
  for (const [pattern, Meaning] of meanings) {
    const source = pattern.source.replace("{ID}", () => literally);
    if (new RegExp(source, pattern.flags).test(words)) return new Meaning(message);
  }
  return new RuntimeFailed(message, { exitStatus });
}
