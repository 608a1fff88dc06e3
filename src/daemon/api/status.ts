import {
  AlreadyExists,
  BrokenImage,
  Cancelled,
  CedanaError,
  CrashedTwice,
  CriuFailed,
  InvalidRequest,
  NotFound,
  PermissionDenied,
  RemoteFailed,
  ResourceExhausted,
  RuntimeFailed,
  SyscallFailed,
  statusCode,
  TimedOut,
  toStatus,
  Unavailable,
  Unsupported,
  WrongState,
} from "../../errors/index.ts";
import { ErrorDetail } from "../../proto/generated/cedana_api.ts";
import { Status } from "../../proto/generated/rpc_status.ts";
import { isOfType, pack, unpack } from "../../proto/wellknown.ts";

/** Errors across the API: the status that their class has, and in its details what the class knows besides. */

/** The trailer in which every gRPC library looks for google.rpc.Status. */
export const STATUS_DETAILS_KEY = "grpc-status-details-bin";

/** HTTP/2 peers commonly refuse 16 KiB of headers; a status and its details, in base64, are headers. */
const MAX_LOG_BYTES = 4 * 1024;
const MAX_MESSAGE_BYTES = 2 * 1024;

/** A subclass before what it is a subclass of. */
const plain = {
  InvalidRequest,
  NotFound,
  AlreadyExists,
  PermissionDenied,
  ResourceExhausted,
  WrongState,
  Unsupported,
  Unavailable,
  TimedOut,
  Cancelled,
  BrokenImage,
  CrashedTwice,
  CedanaError,
} as const;

export function toDetailedStatus(error: unknown): { code: number; message: string; details: Buffer } {
  const { code, message: whole } = toStatus(error);
  const message = cut(whole, MAX_MESSAGE_BYTES);
  const detail = ErrorDetail.encode({
    kind: kindOf(error),
    ...(error instanceof CedanaError && { step: error.step }),
    ...((error instanceof CriuFailed || error instanceof RuntimeFailed) && {
      exitStatus: error.exitStatus,
      log: error.log && cut(error.log, MAX_LOG_BYTES),
    }),
    ...(error instanceof SyscallFailed && { errno: error.errno, code: error.code, syscall: error.syscall }),
  });
  const status = Status.encode({
    code,
    message,
    details: [{ ...pack(ErrorDetail, {}), value: detail }],
  });
  return { code, message, details: Buffer.from(status) };
}

/** The error that a status was made of; without details that we know, one that carries the status. */
export function fromDetailedStatus(
  code: number,
  message: string,
  details: Uint8Array | undefined,
): CedanaError {
  const detail = details && detailIn(details);
  // A step is in the message already.
  return (detail && errorOf(detail, message)) ?? withoutDetails(code, message);
}

/** From gRPC itself: the connection is lost, the deadline has passed. */
function withoutDetails(code: number, message: string): CedanaError {
  if (code === statusCode.UNAVAILABLE) return new Unavailable(`ask cedanad: ${message}`);
  if (code === statusCode.CANCELLED) return new Cancelled(`the call of cedanad was cancelled: ${message}`);
  if (code === statusCode.DEADLINE_EXCEEDED) return new TimedOut(`ask cedanad: ${message}`);
  return new RemoteFailed(message, { code });
}

function kindOf(error: unknown): string {
  for (const Kind of [CriuFailed, RuntimeFailed, SyscallFailed, RemoteFailed])
    if (error instanceof Kind) return error.name; // a class's own name may be the bundler's
  const found = Object.entries(plain).find(([, Kind]) => error instanceof Kind);
  return found ? found[0] : "";
}

function detailIn(bytes: Uint8Array): ErrorDetail | undefined {
  const found = Status.decode(bytes).details.find((any) => isOfType(any, ErrorDetail));
  return found && unpack(found, ErrorDetail);
}

function errorOf(detail: ErrorDetail, message: string): CedanaError | undefined {
  const { kind, exitStatus, log, errno, code, syscall } = detail;
  if (kind === "CriuFailed") return new CriuFailed(message, { exitStatus, log });
  if (kind === "RuntimeFailed") return new RuntimeFailed(message, { exitStatus, log });
  if (kind === "SyscallFailed") return new SyscallFailed(message, { errno, code, syscall });
  const Kind = plain[kind as keyof typeof plain];
  return Kind && new Kind(message);
}

/** Its end often says why. */
function cut(text: string, bytes: number): string {
  if (text.length <= bytes) return text;
  return `${text.slice(0, bytes / 2)} […] ${text.slice(-bytes / 2)}`;
}
