import { copyFile } from "node:fs/promises";
import { join } from "node:path";
import { explainCriuLog } from "../criu/log.ts";
import { CriuFailed } from "../errors/index.ts";

/** The engine's words, then what CRIU's log says was the reason. */
export async function criuFailure(
  what: string,
  failure: Error,
  workPath: string,
  logName: string,
): Promise<Error> {
  if (failure instanceof CriuFailed) return failure; // its owner has looked there
  const summary = await explainCriuLog(join(workPath, logName)).catch(() => undefined); // no log: CRIU was not even started
  if (!summary) return failure;
  if (summary.outcome === undefined && summary.cause === undefined)
    return new CriuFailed(
      `${what} failed in the engine's step (${failure.message}): CRIU was killed: its log is cut off`,
      {
        cause: failure,
      },
    );
  if (summary.errors.length === 0) return failure;
  const lines = [...new Set([summary.firstError, ...summary.errors.slice(-5)])].join("; ");
  const advice = summary.cause ? `. ${summary.cause.advice}` : "";
  return new CriuFailed(`${what} failed in the engine's step (${failure.message}): CRIU: ${lines}${advice}`, {
    cause: failure,
  });
}

/** CRIU's log, for whoever looks after a failure. */
export async function keepLog(from: string, to: string): Promise<void> {
  await copyFile(from, to).catch(() => undefined); // ENOENT: CRIU was not started
}
