/**
 * What can go wrong, as classes that say what happened. The number that containerd sees is picked in `toStatus`, the exit
 * code of a command in `toExitCode`, and nowhere else.
 *
 * | class | status |
 * |---|---|
 * | InvalidRequest | INVALID_ARGUMENT |
 * | NotFound | NOT_FOUND |
 * | AlreadyExists | ALREADY_EXISTS |
 * | PermissionDenied | PERMISSION_DENIED |
 * | ResourceExhausted | RESOURCE_EXHAUSTED |
 * | WrongState | FAILED_PRECONDITION |
 * | Unsupported | UNIMPLEMENTED |
 * | Unavailable | UNAVAILABLE |
 * | TimedOut, Cancelled | DEADLINE_EXCEEDED, CANCELLED |
 * | BrokenImage | DATA_LOSS |
 * | CriuFailed, RuntimeFailed, SyscallFailed, CrashedTwice, CedanaError | INTERNAL |
 * | RemoteFailed | the status that the other side gave |
 * | an abort of Node's (AbortError, TimeoutError) | CANCELLED, DEADLINE_EXCEEDED |
 * | anything else | UNKNOWN |
 */

/** Status codes of gRPC and TTRPC. Source: google/rpc/code.proto. */
export const statusCode = {
  OK: 0,
  CANCELLED: 1,
  UNKNOWN: 2,
  INVALID_ARGUMENT: 3,
  DEADLINE_EXCEEDED: 4,
  NOT_FOUND: 5,
  ALREADY_EXISTS: 6,
  PERMISSION_DENIED: 7,
  RESOURCE_EXHAUSTED: 8,
  FAILED_PRECONDITION: 9,
  ABORTED: 10,
  OUT_OF_RANGE: 11,
  UNIMPLEMENTED: 12,
  INTERNAL: 13,
  UNAVAILABLE: 14,
  DATA_LOSS: 15,
  UNAUTHENTICATED: 16,
} as const;

// Names are written out: a bundler may rename a class.

export class CedanaError extends Error {
  override name = "CedanaError";
  /** the step of a chain in which it happened */
  step?: string;
}

/**
 * Notes in which step of a chain an error happened; the innermost one stays. An error that isn't ours becomes the cause of one that
 * is, so that there is always a place for the note.
 */
export function inStep(error: unknown, step: string): Error {
  const ours = error instanceof CedanaError ? error : new CedanaError(messageOf(error), { cause: error });
  ours.step ??= step;
  return ours;
}

export class InvalidRequest extends CedanaError {
  override name = "InvalidRequest";
}

export class NotFound extends CedanaError {
  override name = "NotFound";
}

export class AlreadyExists extends CedanaError {
  override name = "AlreadyExists";
}

export class PermissionDenied extends CedanaError {
  override name = "PermissionDenied";
}

export class ResourceExhausted extends CedanaError {
  override name = "ResourceExhausted";
}

export class WrongState extends CedanaError {
  override name = "WrongState";
}

export class Unsupported extends CedanaError {
  override name = "Unsupported";
}

export class Unavailable extends CedanaError {
  override name = "Unavailable";
}

export class TimedOut extends CedanaError {
  override name = "TimedOut";
}

export class Cancelled extends CedanaError {
  override name = "Cancelled";
}

export class BrokenImage extends CedanaError {
  override name = "BrokenImage";
}

/** A request that was in work when cedanad ended, twice. */
export class CrashedTwice extends CedanaError {
  override name = "CrashedTwice";
}

interface FailureOptions extends ErrorOptions {
  /** Of the program; undefined: it was killed, or its end was not observed. */
  exitStatus?: number | undefined;
  /** The last of what the program logged. Not part of the message: whoever throws puts there what people should read. */
  log?: string | undefined;
}

export class CriuFailed extends CedanaError {
  override name = "CriuFailed";
  readonly exitStatus: number | undefined;
  readonly log: string | undefined;

  constructor(message: string, options: FailureOptions = {}) {
    super(message, options);
    this.exitStatus = options.exitStatus;
    this.log = options.log;
  }
}

/** runc, crun, or another shim that we left the work to. */
export class RuntimeFailed extends CedanaError {
  override name = "RuntimeFailed";
  readonly exitStatus: number | undefined;
  readonly log: string | undefined;

  constructor(message: string, options: FailureOptions = {}) {
    super(message, options);
    this.exitStatus = options.exitStatus;
    this.log = options.log;
  }
}

export class SyscallFailed extends CedanaError {
  override name = "SyscallFailed";
  /** positive */
  readonly errno: number;
  /** name of the errno: "ENOENT" */
  readonly code: string;
  readonly syscall: string;

  constructor(message: string, options: ErrorOptions & { errno: number; code: string; syscall: string }) {
    super(message, options);
    this.errno = options.errno;
    this.code = options.code;
    this.syscall = options.syscall;
  }

  /** An error of Node's fs or of the addon; anything else stays what it is. */
  static from(error: unknown): Error {
    if (!(error instanceof Error)) return new CedanaError(String(error));
    const { errno, code, syscall } = error as NodeJS.ErrnoException;
    if (error instanceof CedanaError || code === undefined || errno === undefined) return error;
    return new SyscallFailed(error.message, {
      cause: error,
      errno: Math.abs(errno),
      code,
      syscall: syscall ?? "",
    });
  }
}

/** Another service answered a call of ours with a status; passed on as it came. */
export class RemoteFailed extends CedanaError {
  override name = "RemoteFailed";
  /** one of `statusCode`, or a number that is not in that table */
  readonly code: number;

  constructor(message: string, options: ErrorOptions & { code: number }) {
    super(message, options);
    this.code = options.code;
  }
}

const statuses: readonly (readonly [type: abstract new (...args: never[]) => Error, code: number])[] = [
  [InvalidRequest, statusCode.INVALID_ARGUMENT],
  [NotFound, statusCode.NOT_FOUND],
  [AlreadyExists, statusCode.ALREADY_EXISTS],
  [PermissionDenied, statusCode.PERMISSION_DENIED],
  [ResourceExhausted, statusCode.RESOURCE_EXHAUSTED],
  [WrongState, statusCode.FAILED_PRECONDITION],
  [Unsupported, statusCode.UNIMPLEMENTED],
  [Unavailable, statusCode.UNAVAILABLE],
  [TimedOut, statusCode.DEADLINE_EXCEEDED],
  [Cancelled, statusCode.CANCELLED],
  [BrokenImage, statusCode.DATA_LOSS],
  [CedanaError, statusCode.INTERNAL],
];

/** Longer messages are cut in the middle: a status must fit in a frame, and its end often says why. */
const maxStatusMessage = 16 * 1024;

/** The status that containerd's client sees. */
export function toStatus(error: unknown): { code: number; message: string } {
  return { code: codeOf(error), message: shorten(messageOf(error)) };
}

function codeOf(error: unknown): number {
  if (error instanceof RemoteFailed) return error.code;
  const found = statuses.find(([type]) => error instanceof type);
  if (found) return found[1];
  const name = error instanceof Error ? error.name : undefined;
  if (name === "AbortError") return statusCode.CANCELLED;
  if (name === "TimeoutError") return statusCode.DEADLINE_EXCEEDED;
  return statusCode.UNKNOWN;
}

function shorten(text: string): string {
  if (text.length <= maxStatusMessage) return text;
  const half = maxStatusMessage / 2;
  return `${text.slice(0, half)} […] ${text.slice(-half)}`;
}

/** The exit code of a command line: 1, as the engines'; an engine's own where there is one. */
export function toExitCode(error: unknown): number {
  const status = error instanceof RuntimeFailed ? error.exitStatus : undefined;
  return status !== undefined && status > 0 && status < 256 ? status : 1;
}

/** An error's message and those of its causes, outermost first, without what is said twice. Never empty, never throws. */
export function messageOf(error: unknown): string {
  let text = ownMessage(error);
  let cause = causeOf(error);
  // The bound is for a cycle of causes.
  for (let depth = 0; cause !== undefined && depth < 8; depth++, cause = causeOf(cause)) {
    const words = ownMessage(cause);
    if (!text.includes(words)) text += `: ${words}`;
  }
  return text;
}

function causeOf(error: unknown): unknown {
  return error instanceof Error ? (error.cause ?? undefined) : undefined;
}

function ownMessage(error: unknown): string {
  if (error instanceof AggregateError && error.message === "")
    return error.errors.map(messageOf).join("; ") || error.name;
  if (error instanceof Error) {
    const words = error.message || error.name || "Error";
    return error instanceof CedanaError && error.step !== undefined ? `${words} (step ${error.step})` : words;
  }
  try {
    return String(error) || "an error without a message";
  } catch {
    return "an error that can't be printed"; // an object whose toString throws, or that has none
  }
}
