import type { ApiMethods } from "./context.ts";

/** The methods of proto/cedana_api.proto. Each loads what it needs: a cedanad that is asked for its status has no use for archives. */
export const methods: ApiMethods = {
  Status: async (_request, { shim }) => {
    const { pods, ...daemon } = shim.status();
    return {
      ...daemon,
      pods: pods.map(({ keeper, tasks, ...pod }) => ({
        ...pod,
        keeperPid: keeper,
        tasks: tasks.map(({ execs, ...task }) => ({
          ...task,
          execs: execs.map(({ execId, ...exec }) => ({ ...exec, id: execId })),
        })),
      })),
    };
  },
  DumpContainer: async (request, call, send) =>
    await (await import("./dump.ts")).dumpContainer(request, call, send),
  ListCheckpoints: async (request, call) =>
    await (await import("./checkpoints.ts")).listCheckpoints(request, call),
  InspectCheckpoint: async (request) => await (await import("./checkpoints.ts")).inspectCheckpoint(request),
  RestoreContainer: async (request, call, send) =>
    await (await import("./restore.ts")).restoreContainer(request, call, send),
  FreezeContainer: async (request, call) =>
    await (await import("./containers.ts")).freezeContainer(request, call),
  UnfreezeContainer: async (request, call) =>
    await (await import("./containers.ts")).unfreezeContainer(request, call),
  KillContainer: async (request, call) =>
    await (await import("./containers.ts")).killContainer(request, call),
  QueryContainers: async (request, call) =>
    await (await import("./containers.ts")).queryContainers(request, call),
  ListPlugins: async () => await (await import("./plugins.ts")).listPlugins(),
  Check: async (request, call, send) => await (await import("./plugins.ts")).check(request, call, send),
  VerifyCheckpoint: async (request, call, send) =>
    await (await import("./checkpoints.ts")).verifyCheckpoint(request, call, send),
};
