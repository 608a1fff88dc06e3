/**
 * What can go wrong, as classes that say what happened. Numbers for containerd are picked in `toStatus`, and nowhere else.
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
 * | CriuFailed, RuntimeFailed, SyscallFailed, CrashedTwice | INTERNAL |
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

export class CedanaError extends Error {
  override get name(): string {
    return this.constructor.name;
  }
}

export class InvalidRequest extends CedanaError {}
export class NotFound extends CedanaError {}
export class AlreadyExists extends CedanaError {}
export class PermissionDenied extends CedanaError {}
export class ResourceExhausted extends CedanaError {}
export class WrongState extends CedanaError {}
export class Unsupported extends CedanaError {}
export class Unavailable extends CedanaError {}
export class TimedOut extends CedanaError {}
export class Cancelled extends CedanaError {}
export class BrokenImage extends CedanaError {}
export class CriuFailed extends CedanaError {}
/** A request that was in work when cedanad ended, twice. */
export class CrashedTwice extends CedanaError {}

export class RuntimeFailed extends CedanaError {
  readonly exitStatus: number;

  constructor(message: string, options: ErrorOptions & { exitStatus: number }) {
    super(message, options);
    this.exitStatus = options.exitStatus;
  }
}

export class SyscallFailed extends CedanaError {
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

/** The status that containerd's client sees. */
export function toStatus(error: unknown): { code: number; message: string } {
  const found = statuses.find(([type]) => error instanceof type);
  return { code: found?.[1] ?? statusCode.UNKNOWN, message: messageOf(error) };
}

/** The exit code of a command line: 1, as the engines'; an engine's own where there is one. */
export function toExitCode(error: unknown): number {
  return error instanceof RuntimeFailed && error.exitStatus > 0 && error.exitStatus < 256
    ? error.exitStatus
    : 1;
}

/** An error's message and those of its causes, without what is said twice. */
export function messageOf(error: unknown): string {
  let text = error instanceof Error ? error.message : String(error);
  let cause = error instanceof Error ? error.cause : undefined;
  for (let depth = 0; cause instanceof Error && depth < 8; depth++, cause = cause.cause)
    if (cause.message !== "" && !text.includes(cause.message)) text += `: ${cause.message}`;
  return text;
}
