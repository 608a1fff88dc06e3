import { containerd, timestampFromNs } from "../proto/index.ts";
import { encodeFrame, encodeRequest, frameType } from "../ttrpc/index.ts";
import type { Task } from "./task.ts";

/** A containerd event: its topic, and the message in the form of a `google.protobuf.Any`. */
export interface Event {
  topic: string;
  typeUrl: string;
  value: Uint8Array;
}

const { events } = containerd;
const SERVICE = "containerd.services.events.ttrpc.v1.Events";
const METHOD = "Forward";
/** How long containerd may take to accept an event. */
const FORWARD_TIMEOUT_MS = 5_000;

/**
 * The event as a TTRPC request to containerd's event service. The keeper sends it, and puts in the stream id: an event must
 * neither be lost nor doubled when cedanad dies between sending and remembering that it has sent.
 */
export function forwardFrame(namespace: string, event: Event, atNs: bigint): Buffer {
  const payload = containerd.services.events.ttrpc.v1.ForwardRequest.encode({
    envelope: {
      timestamp: timestampFromNs(atNs),
      namespace,
      topic: event.topic,
      event: { typeUrl: event.typeUrl, value: event.value },
    },
  }).finish();
  const request = encodeRequest({ service: SERVICE, method: METHOD, payload, timeoutMs: FORWARD_TIMEOUT_MS });
  return encodeFrame({ streamId: 1, type: frameType.request, flags: 0 }, request);
}

export function taskCreate(task: Task, rootfs: { type: string; source: string; options: string[] }[]): Event {
  const { stdin, stdout, stderr, terminal } = task.init.stdio;
  const value = events.TaskCreate.encode({
    containerId: task.id,
    bundle: task.bundle,
    rootfs,
    io: { stdin, stdout, stderr, terminal },
    checkpoint: task.restoreFrom ?? "",
    pid: task.init.pid,
  }).finish();
  return { topic: "/tasks/create", typeUrl: "containerd.events.TaskCreate", value };
}

export function taskStart(containerId: string, pid: number): Event {
  const value = events.TaskStart.encode({ containerId, pid }).finish();
  return { topic: "/tasks/start", typeUrl: "containerd.events.TaskStart", value };
}

export function taskExit(containerId: string, id: string, pid: number, exitStatus: number, atNs: bigint): Event {
  const value = events.TaskExit.encode({
    containerId,
    id,
    pid,
    exitStatus,
    exitedAt: timestampFromNs(atNs),
  }).finish();
  return { topic: "/tasks/exit", typeUrl: "containerd.events.TaskExit", value };
}

export function taskDelete(containerId: string, pid: number, exitStatus: number, atNs: bigint): Event {
  const value = events.TaskDelete.encode({
    containerId,
    pid,
    exitStatus,
    exitedAt: timestampFromNs(atNs),
  }).finish();
  return { topic: "/tasks/delete", typeUrl: "containerd.events.TaskDelete", value };
}

export function taskOom(containerId: string): Event {
  return { topic: "/tasks/oom", typeUrl: "containerd.events.TaskOOM", value: events.TaskOOM.encode({ containerId }).finish() };
}

export function execAdded(containerId: string, execId: string): Event {
  const value = events.TaskExecAdded.encode({ containerId, execId }).finish();
  return { topic: "/tasks/exec-added", typeUrl: "containerd.events.TaskExecAdded", value };
}

export function execStarted(containerId: string, execId: string, pid: number): Event {
  const value = events.TaskExecStarted.encode({ containerId, execId, pid }).finish();
  return { topic: "/tasks/exec-started", typeUrl: "containerd.events.TaskExecStarted", value };
}

export function taskPaused(containerId: string): Event {
  const value = events.TaskPaused.encode({ containerId }).finish();
  return { topic: "/tasks/paused", typeUrl: "containerd.events.TaskPaused", value };
}

export function taskResumed(containerId: string): Event {
  const value = events.TaskResumed.encode({ containerId }).finish();
  return { topic: "/tasks/resumed", typeUrl: "containerd.events.TaskResumed", value };
}

export function taskCheckpointed(containerId: string, checkpoint: string): Event {
  const value = events.TaskCheckpointed.encode({ containerId, checkpoint }).finish();
  return { topic: "/tasks/checkpointed", typeUrl: "containerd.events.TaskCheckpointed", value };
}
