import * as errors from "../../errors/index.ts";
import type { JobName } from "./jobs.ts";

/** What goes to a worker thread, one at a time, and what comes back. */
export interface JobRequest {
  name: JobName;
  input: unknown;
  /** one Int32: not 0 when the caller has given up. Shared, because a job in a loop reads no messages. */
  cancelled: SharedArrayBuffer;
}

export type JobAnswer = { output: unknown } | { error: SentError };

/** An error over the border of threads, where classes are lost. */
export interface SentError {
  name: string;
  message: string;
  errno?: number | undefined;
  code?: string | undefined;
  syscall?: string | undefined;
  cause?: SentError | undefined;
}

export function sendError(error: unknown, depth = 0): SentError {
  if (!(error instanceof Error)) return { name: "Error", message: String(error) };
  const { errno, code, syscall } = error as NodeJS.ErrnoException;
  const cause = error.cause === undefined || depth > 8 ? undefined : sendError(error.cause, depth + 1);
  return { name: error.name, message: error.message, errno, code, syscall, cause };
}

/** The classes that say what happened; those with more than a message are for programs, which threads don't run. */
const classes = {
  InvalidRequest: errors.InvalidRequest,
  NotFound: errors.NotFound,
  AlreadyExists: errors.AlreadyExists,
  PermissionDenied: errors.PermissionDenied,
  ResourceExhausted: errors.ResourceExhausted,
  WrongState: errors.WrongState,
  Unsupported: errors.Unsupported,
  Unavailable: errors.Unavailable,
  TimedOut: errors.TimedOut,
  Cancelled: errors.Cancelled,
  BrokenImage: errors.BrokenImage,
  CedanaError: errors.CedanaError,
} as const;

export function receiveError(sent: SentError): Error {
  const options = sent.cause ? { cause: receiveError(sent.cause) } : {};
  if (Object.hasOwn(classes, sent.name))
    return new classes[sent.name as keyof typeof classes](sent.message, options);
  const { errno, code, syscall = "" } = sent;
  if (errno !== undefined && code !== undefined)
    return new errors.SyscallFailed(sent.message, { ...options, errno: Math.abs(errno), code, syscall });
  const error = new Error(sent.message, options);
  error.name = sent.name;
  return error;
}
