import { open } from "node:fs/promises";

/** What a CRIU log says of a failure. */
export interface CriuLogSummary {
  /** usually the cause; the ones after it are consequences */
  firstError: string | undefined;
  /** the last error lines, oldest first, without time stamps */
  errors: string[];
  lastLines: string[];
}

/** A log of level 4 has some MB; what matters of it is at the end, and bounded. */
const TAIL_BYTES = 256 * 1024;
const MAX_ERRORS = 20;
const MAX_LAST_LINES = 10;

/** Reads dump.log or restore.log. @throws the error of open(2) */
export async function explainCriuLog(path: string): Promise<CriuLogSummary> {
  await using file = await open(path);
  const { size } = await file.stat();
  const length = Math.min(size, TAIL_BYTES);
  const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, size - length);
  return summarizeCriuLog(buffer.toString("utf8", 0, bytesRead));
}

/** Lines are `(00.012345) Error (criu/file.c:123): text` or `(00.012345)    42: Error (…): text`. */
export function summarizeCriuLog(text: string): CriuLogSummary {
  const lines = text.split("\n").filter((line) => line.trim() !== "");
  const errors = lines
    .map((line) => /^\(\d+\.\d+\)\s+(?:\d+: )?(Error .*)$/.exec(line)?.[1])
    .filter((line) => line !== undefined);
  return {
    firstError: errors[0],
    errors: errors.slice(-MAX_ERRORS),
    lastLines: lines.slice(-MAX_LAST_LINES),
  };
}
