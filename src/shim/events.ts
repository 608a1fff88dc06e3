import type { Mount } from "../proto/generated/types.ts";
import { events, eventsService, type MessageType, timestampFromNs } from "../proto/index.ts";
import { encodeFrame, encodeRequest, frameType } from "../ttrpc/index.ts";
import type { Process } from "./process.ts";

/** A containerd event: its topic, and the message in the form of a `google.protobuf.Any`. */
export interface Event {
  topic: string;
  typeUrl: string;
  value: Uint8Array;
}

const SERVICE = "containerd.services.events.ttrpc.v1.Events";
const METHOD = "Forward";
/** How long containerd may take to accept an event. */
const FORWARD_TIMEOUT_MS = 5_000;

/**
 * The event as a TTRPC request to containerd's event service. The keeper sends it, and puts in the stream id: an event must
 * neither be lost nor doubled when cedanad dies between sending and remembering that it has sent.
 */
export function forwardFrame(namespace: string, event: Event, atNs: bigint): Buffer {
  const payload = eventsService.ForwardRequest.encode({
    envelope: {
      timestamp: timestampFromNs(atNs),
      namespace,
      topic: event.topic,
      event: { typeUrl: event.typeUrl, value: event.value },
    },
  });
  const request = encodeRequest({ service: SERVICE, method: METHOD, payload, timeoutMs: FORWARD_TIMEOUT_MS });
  return encodeFrame({ streamId: 1, type: frameType.request, flags: 0 }, request);
}

function event<T, I>(topic: string, type: MessageType<T, I>, message: I): Event {
  return { topic, typeUrl: type.name, value: type.encode(message) };
}

/** @param restoreFrom  directory of the checkpoint that it will be restored from */
export function taskCreate(
  { id, bundle, init }: { readonly id: string; readonly bundle: string; readonly init: Process },
  rootfs: readonly Mount[],
  restoreFrom: string | undefined,
): Event {
  const { stdin, stdout, stderr, terminal } = init.stdio;
  return event("/tasks/create", events.TaskCreate, {
    containerId: id,
    bundle,
    rootfs,
    io: { stdin, stdout, stderr, terminal },
    checkpoint: restoreFrom ?? "",
    pid: init.pid,
  });
}

export function taskStart(containerId: string, pid: number): Event {
  return event("/tasks/start", events.TaskStart, { containerId, pid });
}

/** @param id  the exec's, or the container's own for its init */
export function taskExit(
  containerId: string,
  id: string,
  pid: number,
  exitStatus: number,
  atNs: bigint,
): Event {
  const exitedAt = timestampFromNs(atNs);
  return event("/tasks/exit", events.TaskExit, { containerId, id, pid, exitStatus, exitedAt });
}

export function taskDelete(containerId: string, pid: number, exitStatus: number, atNs: bigint): Event {
  const exitedAt = timestampFromNs(atNs);
  return event("/tasks/delete", events.TaskDelete, { containerId, pid, exitStatus, exitedAt });
}

export function taskOom(containerId: string): Event {
  return event("/tasks/oom", events.TaskOOM, { containerId });
}

export function execAdded(containerId: string, execId: string): Event {
  return event("/tasks/exec-added", events.TaskExecAdded, { containerId, execId });
}

export function execStarted(containerId: string, execId: string, pid: number): Event {
  return event("/tasks/exec-started", events.TaskExecStarted, { containerId, execId, pid });
}

export function taskPaused(containerId: string): Event {
  return event("/tasks/paused", events.TaskPaused, { containerId });
}

export function taskResumed(containerId: string): Event {
  return event("/tasks/resumed", events.TaskResumed, { containerId });
}

export function taskCheckpointed(containerId: string, checkpoint: string): Event {
  return event("/tasks/checkpointed", events.TaskCheckpointed, { containerId, checkpoint });
}
