import { isDirectory } from "../../checkpoint/archive/index.ts";
import { openStored } from "../../checkpoint/open.ts";
import { InvalidRequest } from "../../errors/index.ts";
import type { RestoreContainerEventInit, RestoreContainerRequest } from "../../proto/generated/cedana_api.ts";
import { CONTAINERD_SOCKET, Containerd } from "../../shim/containerd.ts";
import { restoreInContainerd } from "../containerd/restore.ts";
import { directoryOf } from "./checkpoints.ts";
import type { ApiCall } from "./context.ts";

export async function restoreContainer(
  request: RestoreContainerRequest,
  { signal, log }: ApiCall,
  send: (event: RestoreContainerEventInit) => Promise<void>,
): Promise<void> {
  const startedAt = Date.now();
  const namespace = request.namespace || "default";
  const checkpoint = await directoryOf(request.checkpoint);
  const dumped = await dumpedContainer(checkpoint);
  const id = request.id || dumped;
  if (id === undefined)
    throw new InvalidRequest(
      `checkpoint ${checkpoint} doesn't say of which container it is: name one (--id), and whom a new one is like (--like)`,
    );
  using containerd = new Containerd(request.address || CONTAINERD_SOCKET, namespace);
  const { pid, created } = await restoreInContainerd(containerd, {
    checkpoint,
    id,
    like: request.like || (dumped ?? id),
    output: request.output || undefined,
    signal,
    onStep: (step) => send({ progress: { step } }),
    onLeftover: (what, error) => log.error({ err: error, namespace }, `undo a restore: ${what} stays`),
  });
  await send({ result: { namespace, id, pid, checkpoint, created, totalMs: Date.now() - startedAt } });
}

/** undefined: another program took it, or it is a file that would have to be read to its end to know */
async function dumpedContainer(checkpoint: string): Promise<string | undefined> {
  if (!(await isDirectory(checkpoint))) return undefined;
  const { manifest } = await openStored(checkpoint);
  return manifest?.containerId;
}
