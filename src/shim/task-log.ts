import { closeSync, constants, openSync, writeSync } from "node:fs";
import { join } from "node:path";
import type { Logger } from "pino";
import { messageOf } from "../errors/index.ts";

/** As logrus spells the levels, in whose text form containerd reads the lines. */
const levels = { info: "info", warn: "warning", error: "error" } as const;

/** What a task logs goes into cedanad's log and, from `info` up, into the bundle's `log` FIFO, which ends in containerd's log. */
export type TaskLogger = Pick<Logger, keyof typeof levels>;

export function taskLogger(log: Logger, bundle: string, id: string): TaskLogger {
  const child = log.child({ task: id });
  const logAt = (level: keyof typeof levels) => (fields: object | string, message?: string) => {
    if (typeof fields === "string") child[level](fields);
    else child[level](fields, message);
    const [text, values] = typeof fields === "string" ? [fields, {}] : [message ?? "", fields];
    writeTaskLog(bundle, formatTaskLog(levels[level], text, { task: id, ...values }));
  };
  return { info: logAt("info"), warn: logAt("warn"), error: logAt("error") };
}

/** A line in logrus' text form: `time="…" level=warning msg="…" key="…"`. An error (`err`) is told with its causes. */
export function formatTaskLog(level: string, message: string, fields: object, at = new Date()): string {
  const parts = [`time=${quote(at.toISOString())}`, `level=${level}`, `msg=${quote(message)}`];
  for (const [key, value] of Object.entries(fields)) {
    const name = key === "err" ? "error" : key;
    const text =
      value instanceof Error ? messageOf(value) : typeof value === "string" ? value : JSON.stringify(value);
    parts.push(`${name}=${quote(text ?? "")}`);
  }
  return `${parts.join(" ")}\n`;
}

function quote(text: string): string {
  return JSON.stringify(text);
}

/** So long a line arrives whole: more than PIPE_BUF may be cut, or mixed with another's. */
const MAX_LINE_BYTES = 4096;

/**
 * Opened for each line and without waiting: where nobody reads (ENXIO), or the FIFO is full (EAGAIN), the line is only in
 * cedanad's log. Lines here are rare: what failed.
 */
function writeTaskLog(bundle: string, line: string): void {
  let fd: number;
  try {
    fd = openSync(join(bundle, "log"), constants.O_WRONLY | constants.O_NONBLOCK);
  } catch {
    return; // no reader, or no such FIFO: see above
  }
  try {
    const bytes = Buffer.from(line);
    writeSync(
      fd,
      bytes.length <= MAX_LINE_BYTES
        ? bytes
        : Buffer.concat([bytes.subarray(0, MAX_LINE_BYTES - 1), Buffer.from("\n")]),
    );
  } catch {
    // full: see above
  } finally {
    closeSync(fd);
  }
}
