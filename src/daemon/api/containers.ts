import { randomUUID } from "node:crypto";
import { CheckpointStore } from "../../checkpoint/store.ts";
import { InvalidRequest, messageOf, WrongState } from "../../errors/index.ts";
import { pidsInNamespaces, processTree } from "../../linux/proc.ts";
import { Slices } from "../../linux/slices.ts";
import type {
  FreezeContainerRequest,
  FreezeContainerResponseInit,
  KillContainerRequest,
  KillContainerResponseInit,
  QueriedContainerInit,
  QueriedProcessInit,
  QueryContainersRequest,
  QueryContainersResponseInit,
} from "../../proto/generated/cedana_api.ts";
import { readConfiguration } from "../../runtime/configuration.ts";
import { signalNumber } from "../../runtime/kill-policy.ts";
import { podNamespaceOf } from "../../runtime/spec.ts";
import type { Task } from "../../shim/task.ts";
import { checkpointNameOf } from "../../shim/triggered.ts";
import { describeCheckpoint } from "./checkpoints.ts";
import type { ApiCall } from "./context.ts";
import { findTask } from "./dump.ts";

export async function freezeContainer(
  { id, namespace }: FreezeContainerRequest,
  { shim }: ApiCall,
): Promise<FreezeContainerResponseInit> {
  const task = findTask(shim, id, namespace);
  return await task.init.inTurn(async () => {
    await task.pause({ request: `api-${randomUUID()}` });
    task.record();
    return { namespace: task.namespace, state: task.init.state };
  });
}

export async function unfreezeContainer(
  { id, namespace }: FreezeContainerRequest,
  { shim }: ApiCall,
): Promise<FreezeContainerResponseInit> {
  const task = findTask(shim, id, namespace);
  return await task.init.inTurn(async () => {
    if (task.init.state === "running") {
      // By somebody else, or by a cedanad that was killed before it could write down what it did.
      const cgroup = await task.cgroup();
      if (!(await cgroup.isFrozen())) throw new WrongState(`container ${id} is not frozen`);
      await cgroup.thaw();
    } else {
      await task.resume({ request: `api-${randomUUID()}` });
      task.record();
    }
    return { namespace: task.namespace, state: task.init.state };
  });
}

export async function killContainer(
  { id, namespace, execId, signal, all }: KillContainerRequest,
  { shim }: ApiCall,
): Promise<KillContainerResponseInit> {
  const task = findTask(shim, id, namespace);
  const number = signalNumber(signal || "TERM");
  if (number === undefined)
    throw new InvalidRequest(
      `${JSON.stringify(signal)} is no signal: give a name such as INT, SIGQUIT or RTMIN+3, or a number up to 64`,
    );
  const work = { repeated: false, tag: (step: string) => task.pod.keeper.ownTag(step) };
  await task.signals.kill(work, task.process(execId), number, all);
  task.record();
  return { namespace: task.namespace };
}

export async function queryContainers(
  { ids, namespace }: QueryContainersRequest,
  { shim, signal }: ApiCall,
): Promise<QueryContainersResponseInit> {
  const tasks = [...shim.pods]
    .filter((pod) => namespace === "" || pod.namespace === namespace)
    .flatMap((pod) => [...pod.tasks.values()])
    .filter(({ id }) => ids.length === 0 || ids.includes(id));
  const containers: QueriedContainerInit[] = [];
  for (const task of tasks) {
    signal.throwIfAborted();
    containers.push(await query(task));
  }
  return { containers, missing: ids.filter((id) => !tasks.some((task) => task.id === id)) };
}

async function query(task: Task): Promise<QueriedContainerInit> {
  const { state, pid } = task.init;
  return {
    namespace: task.namespace,
    id: task.id,
    state,
    pid,
    engine: task.engine.binary,
    bundle: task.bundle,
    processes: pid === 0 ? [] : await processesOf(pid),
    // One of which they can't be told doesn't hide the others.
    checkpoints: await checkpointsOf(task).catch((error) => [{ fault: messageOf(error) }]),
  };
}

/** What was exec'd in the container is the keeper's child, and not below init. */
async function processesOf(initPid: number): Promise<QueriedProcessInit[]> {
  const { breathe } = new Slices();
  const processes: QueriedProcessInit[] = [];
  for (const { pid, parentPid, comm, state } of await processTree(initPid, breathe)) {
    const pause = breathe();
    if (pause) await pause;
    const pidInContainer = pidsInNamespaces(pid).at(-1) ?? 0;
    processes.push({ pid, parentPid, pidInContainer, command: comm, state });
  }
  return processes;
}

async function checkpointsOf(task: Task) {
  const spec = await task.spec();
  const store = new CheckpointStore((await readConfiguration()).checkpoints.directory);
  const owner = { namespace: task.namespace, podNamespace: podNamespaceOf(spec) };
  const found = await store.generations(owner, checkpointNameOf(task, spec));
  return await Promise.all(found.map((checkpoint) => describeCheckpoint(owner, checkpoint)));
}
