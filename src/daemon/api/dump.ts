import { type Compression, compressions } from "../../checkpoint/archive/compressions.ts";
import { InvalidRequest, NotFound } from "../../errors/index.ts";
import type { DumpContainerEventInit, DumpContainerRequest } from "../../proto/generated/cedana_api.ts";
import type { ShimServer } from "../../shim/shim-server.ts";
import type { Task } from "../../shim/task.ts";
import { takeCheckpoint } from "../../shim/triggered.ts";
import type { ApiCall } from "./context.ts";

export async function dumpContainer(
  { id, namespace, name, exit, compression, secret }: DumpContainerRequest,
  { shim, signal, log }: ApiCall,
  send: (event: DumpContainerEventInit) => Promise<void>,
): Promise<void> {
  if (compression !== "" && !compressions.includes(compression as Compression))
    throw new InvalidRequest(`compression ${compression} is not one of ${compressions.join(", ")}`);
  const task = findTask(shim, id, namespace);
  const done = await takeCheckpoint(task, {
    trigger: "command",
    name: name || undefined,
    exit,
    compression: (compression as Compression) || undefined,
    secret: secret.length > 0 ? secret : undefined,
    signal,
    // Not waited for: the container may be standing still.
    onStep: (step) =>
      void send({ progress: { step } }).catch((error) => log.debug({ err: error }, "tell of progress")),
  });
  const { owner, generation, path, bytes, frozenMs, totalMs } = done;
  await send({
    result: {
      namespace: owner.namespace,
      podNamespace: owner.podNamespace,
      name: done.name,
      generation,
      path,
      bytes,
      frozenMs,
      totalMs,
    },
  });
}

/** @throws NotFound, InvalidRequest where several containers have the id */
export function findTask(shim: ShimServer, id: string, namespace: string): Task {
  const found = [...shim.pods]
    .filter((pod) => namespace === "" || pod.namespace === namespace)
    .flatMap((pod) => pod.tasks.get(id) ?? []);
  const [task] = found;
  if (!task)
    throw new NotFound(
      `cedanad has no container ${id}${namespace === "" ? "" : ` in namespace ${namespace}`}: \`cedana query containerd\` shows those it has`,
    );
  if (found.length > 1)
    throw new InvalidRequest(
      `container ${id} is in the namespaces ${found.map((one) => one.namespace).join(", ")}: name one`,
    );
  return task;
}
