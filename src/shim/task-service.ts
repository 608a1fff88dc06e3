import { AlreadyExists, CrashedTwice, InvalidRequest, NotFound } from "../errors/index.ts";
import { encodeMetrics } from "../linux/stats.ts";
import { task as api, type MessageType, runcOptions, taskTypes, timestampFromNs } from "../proto/index.ts";
import { decodeCheckpointOptions } from "../runtime/options.ts";
import type { Call, Handler } from "../ttrpc/index.ts";
import { ExecProcess } from "./execs.ts";
import { crashIfTold } from "./fault.ts";
import type { Work } from "./keeper.ts";
import type { CallContext, Pod } from "./pod.ts";
import type { Exit, Process, ProcessState } from "./process.ts";
import { Task } from "./task.ts";

const status = taskTypes.Status;

/** Both versions of the service have the same calls and messages. */
export const serviceNames = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

const EMPTY = new Uint8Array();
/** What containerd and every file name that we make of an id allow. */
const ID_PATTERN = /^[A-Za-z0-9][A-Za-z0-9_.-]{0,254}$/;
/** After a dump that ends the task, its exit is a matter of reaping. */
const EXIT_AFTER_DUMP_MS = 10_000;

const statusOf: Record<ProcessState, number> = {
  created: status.CREATED,
  createdFromCheckpoint: status.CREATED,
  running: status.RUNNING,
  paused: status.PAUSED,
  stopped: status.STOPPED,
  deleted: status.STOPPED,
};

type Message<T> = Pick<MessageType<T>, "decode">;

/** A call that changes something: answered from the record when it was answered before a crash. */
function effect<T extends { id: string }>(
  type: Message<T>,
  handle: (request: T, task: Task, work: Work, call: Call<CallContext>) => Promise<Uint8Array>,
): Handler<CallContext> {
  return async (payload, call) => {
    const request = decode(type, payload, call);
    const { pod, work } = call.context;
    refusePoison(call);
    crashIfTold(call.method);
    const task = findTask(pod, request.id);
    const answered = task.answerTo(work.request);
    if (!answered) return await handle(request, task, work, call);
    if (task.init.state === "deleted") forget(task, call.context); // its Delete came so far
    return answered;
  };
}

/** A task that is deleted, when the response is on its way. */
function forget(task: Task, { pod, work }: CallContext): void {
  pod.afterResponse(work.request, () => {
    pod.tasks.delete(task.id);
    pod.keeper.taskGone(task.id);
  });
}

/** A call that only reads. */
function query<T extends { id: string }>(
  type: Message<T>,
  handle: (request: T, task: Task, call: Call<CallContext>) => Promise<Uint8Array>,
): Handler<CallContext> {
  return async (payload, call) => {
    const request = decode(type, payload, call);
    refusePoison(call);
    crashIfTold(call.method);
    return await handle(request, findTask(call.context.pod, request.id), call);
  };
}

/** A call that starts a process, whose exit may come before its pid is known. */
function starts(handle: Handler<CallContext>): Handler<CallContext> {
  return async (payload, call) => await call.context.pod.starting(async () => await handle(payload, call));
}

/** The 17 calls, with the Go shim's meaning, states and errors. */
export const taskService: Record<string, Handler<CallContext>> = {
  Create: starts(async (payload, call) => {
    const request = decode(api.CreateTaskRequest, payload, call);
    const { pod, work } = call.context;
    refusePoison(call);
    crashIfTold(call.method);
    if (!ID_PATTERN.test(request.id))
      throw new InvalidRequest(`container id ${JSON.stringify(request.id)} is not valid`);
    if (!request.bundle.startsWith("/"))
      throw new InvalidRequest(`bundle ${request.bundle} is not an absolute path`);
    const known = pod.tasks.get(request.id);
    const rootfs = request.rootfs.map(({ type, source, target, options }) => ({
      type,
      source,
      target,
      options,
    }));
    const answered = known?.answerTo(work.request);
    if (known && answered) {
      known.published(work, rootfs);
      return answered;
    }
    if (known || [...pod.creating].some((task) => task.id === request.id))
      throw new AlreadyExists(`task ${request.id} already exists`);
    const encodeAnswer = (task: Task) => api.CreateTaskResponse.encode({ pid: task.init.pid });
    const create = {
      id: request.id,
      bundle: request.bundle,
      rootfs,
      stdio: {
        terminal: request.terminal,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
      },
      checkpoint: request.checkpoint,
      options: request.options ?? undefined,
    };
    const task = await Task.create(pod, work, create, encodeAnswer);
    pod.tasks.set(task.id, task);
    task.exits.started(task.init);
    return encodeAnswer(task);
  }),

  Start: starts(
    effect(api.StartRequest, async (request, task, work) => {
      const process = task.process(request.execId);
      return await process.inTurn(async () => {
        if (process instanceof ExecProcess) await task.execs.start(work, process);
        else await task.start(work);
        const answer = api.StartResponse.encode({ pid: process.pid });
        task.commit(work, answer);
        task.exits.started(process);
        if (process.isInit) await task.restoration?.discard();
        return answer;
      });
    }),
  ),

  Delete: effect(api.DeleteRequest, async (request, task, work, call) => {
    const process = task.process(request.execId);
    return await process.inTurn(async () => {
      const isExec = process instanceof ExecProcess;
      const exit = isExec ? await task.execs.delete(work, process) : await task.delete(work);
      const answer = api.DeleteResponse.encode({ pid: process.pid, ...exitFields(exit) });
      task.commit(work, answer);
      if (process.isInit) forget(task, call.context);
      return answer;
    });
  }),

  Exec: effect(api.ExecProcessRequest, async (request, task, work) => {
    if (!ID_PATTERN.test(request.execId))
      throw new InvalidRequest(`exec id ${JSON.stringify(request.execId)} is not valid`);
    const spec = Buffer.from(request.spec?.value ?? EMPTY).toString("utf8");
    if (spec === "")
      throw new InvalidRequest(`exec ${request.execId} of task ${task.id} has no process spec`);
    try {
      JSON.parse(spec);
    } catch (cause) {
      throw new InvalidRequest(`the process spec of exec ${request.execId} of task ${task.id} is not JSON`, {
        cause,
      });
    }
    const { terminal, stdin, stdout, stderr } = request;
    task.execs.add(work, { execId: request.execId, stdio: { terminal, stdin, stdout, stderr }, spec });
    task.commit(work, EMPTY);
    return EMPTY;
  }),

  Kill: effect(api.KillRequest, async (request, task, work) => {
    await task.signals.kill(work, task.process(request.execId), request.signal, request.all);
    task.commit(work, EMPTY);
    return EMPTY;
  }),

  Pause: effect(api.PauseRequest, async (_request, task, work) => {
    return await task.init.inTurn(async () => {
      await task.pause(work);
      task.commit(work, EMPTY);
      return EMPTY;
    });
  }),

  Resume: effect(api.ResumeRequest, async (_request, task, work) => {
    return await task.init.inTurn(async () => {
      await task.resume(work);
      task.commit(work, EMPTY);
      return EMPTY;
    });
  }),

  Checkpoint: effect(api.CheckpointTaskRequest, async (request, task, work) => {
    return await task.init.inTurn(async () => {
      const told = decodeCheckpointOptions(request.options ?? undefined);
      const exit = request.options?.typeUrl ? told.exit : await task.endsWithCheckpoint();
      const options = { ...told, exit };
      await task.checkpoint(work, { imagePath: options.imagePath || request.path, options });
      if (options.exit)
        await Promise.race([
          task.init.waitForExit(),
          new Promise((resolve) => setTimeout(resolve, EXIT_AFTER_DUMP_MS).unref()),
        ]);
      task.commit(work, EMPTY);
      return EMPTY;
    });
  }),

  Update: effect(api.UpdateTaskRequest, async (request, task, work) => {
    if (!request.resources) throw new InvalidRequest(`update of task ${task.id} names no resources`);
    await task.update(work, request.resources.value);
    task.commit(work, EMPTY);
    return EMPTY;
  }),

  ResizePty: effect(api.ResizePtyRequest, async (request, task, work) => {
    await task.resizePty(work, task.process(request.execId), request.width, request.height);
    return EMPTY;
  }),

  CloseIO: effect(api.CloseIORequest, async (request, task, work) => {
    const process = task.process(request.execId);
    if (request.stdin) await task.closeStdin(work, process);
    return EMPTY;
  }),

  State: query(api.StateRequest, async (request, task) => {
    const process = task.process(request.execId);
    const paused = !process.isInit && process.state === "running" && task.init.state === "paused";
    return api.StateResponse.encode({
      id: task.id,
      bundle: task.bundle,
      pid: process.pid,
      status: paused ? status.PAUSED : statusOf[process.state],
      ...process.stdio,
      ...exitFields(process.exit),
      execId: request.execId,
    });
  }),

  Pids: query(api.PidsRequest, async (_request, task) => {
    if (task.init.pid === 0 || task.init.exit) return api.PidsResponse.encode({ processes: [] });
    const pids = await (await task.cgroup()).pids();
    const execs = new Map<number, Process>();
    for (const exec of task.execs.values()) if (exec.pid !== 0 && !exec.exit) execs.set(exec.pid, exec);
    const processes = pids.map((pid) => {
      const exec = execs.get(pid);
      if (!exec) return { pid };
      const value = runcOptions.ProcessDetails.encode({ execId: exec.execId });
      return { pid, info: { typeUrl: runcOptions.ProcessDetails.name, value } };
    });
    return api.PidsResponse.encode({ processes });
  }),

  Wait: query(api.WaitRequest, async (request, task, call) => {
    const process = task.process(request.execId);
    if (!process.exit) call.context.park();
    const exit = process.exit ?? (await untilAborted(process.waitForExit(), call.signal));
    return api.WaitResponse.encode(exitFields(exit));
  }),

  Stats: query(api.StatsRequest, async (_request, task) => {
    const stats = await encodeMetrics(await task.cgroup());
    return api.StatsResponse.encode({ stats });
  }),

  async Connect(payload, call) {
    const request = decode(api.ConnectRequest, payload, call);
    const { pod } = call.context;
    const task = pod.tasks.get(request.id);
    return api.ConnectResponse.encode({
      shimPid: pod.keeper.pid,
      taskPid: task?.init.pid ?? 0,
      version: "cedana",
    });
  },

  async Shutdown(payload, call) {
    decode(api.ShutdownRequest, payload, call);
    const { pod, work } = call.context;
    if (pod.tasks.size === 0 && pod.creating.size === 0)
      pod.afterResponse(work.request, () => {
        // A Create may have come meanwhile: the keeper of a pod serves them all.
        if (pod.tasks.size === 0 && pod.creating.size === 0) pod.keeper.leave();
      });
    return EMPTY;
  },
};

function findTask(pod: Pod, id: string): Task {
  const task = pod.tasks.get(id);
  if (!task) throw new NotFound(`task ${id} does not exist: container not created`);
  return task;
}

function decode<T>(type: Message<T>, payload: Uint8Array, call: Call<CallContext>): T {
  try {
    return type.decode(payload);
  } catch (error) {
    throw new InvalidRequest(`${call.method}: the request can't be decoded`, { cause: error });
  }
}

function refusePoison(call: Call<CallContext>): void {
  if (call.context.poisonous)
    throw new CrashedTwice(
      `${call.method} was in work when cedanad ended, twice: not tried again. See cedanad's log`,
    );
}

function exitFields(exit: Exit | undefined) {
  return exit ? { exitStatus: exit.status, exitedAt: timestampFromNs(exit.atNs) } : {};
}

function untilAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const abort = () => reject(signal.reason as Error);
    if (signal.aborted) abort();
    signal.addEventListener("abort", abort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
  });
}
