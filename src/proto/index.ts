// The messages we speak, one namespace for each file of proto/. `npm run build` (or
// `node scripts/build.mjs --only proto`) makes the modules in generated/.
//
//   import { task, pack } from "../proto/index.ts";
//   const request = task.StateRequest.decode(payload);   // plain object, every field set
//   return task.StateResponse.encode({ id, pid });       // what is left out has its default
//
// int64 and uint64 are `bigint` when decoded; encoding takes `bigint` or `number`. `bytes` are views.
// The cgroup metrics are not here: they are big and few calls need them. Import them where Stats is answered:
//   await import("../proto/generated/cgroups_v2.ts")

export * as bootstrap from "./generated/bootstrap.ts";
export * as events from "./generated/events.ts";
export * as eventsService from "./generated/events_service.ts";
export type { Any, Timestamp } from "./generated/google.ts";
export * as google from "./generated/google.ts";
export * as runcOptions from "./generated/runc_options.ts";
export * as runtimeOptions from "./generated/runtimeoptions.ts";
export * as task from "./generated/task.ts";
export * as taskTypes from "./generated/task_types.ts";
export * as types from "./generated/types.ts";
export { isOfType, nsFromTimestamp, pack, timestampFromNs, typeName, unpack } from "./wellknown.ts";
export { type MessageType, Reader, WireError, Writer } from "./wire.ts";
