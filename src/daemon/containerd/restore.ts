import { isAbsolute } from "node:path";
import { AlreadyExists, InvalidRequest, NotFound, Unsupported, WrongState } from "../../errors/index.ts";
import { type Container, Containers } from "../../proto/generated/containerd_containers.ts";
import { Snapshots } from "../../proto/generated/containerd_snapshots.ts";
import { Status, Tasks } from "../../proto/generated/containerd_tasks.ts";
import { Options } from "../../proto/generated/runc_options.ts";
import type { Mount } from "../../proto/generated/types.ts";
import { isOfType, pack, unpack } from "../../proto/wellknown.ts";
import type { Containerd } from "../../shim/containerd.ts";
import { logFileUri } from "../../shim/stdio.ts";

/*
 * A checkpoint as a container of containerd's, by containerd's own calls: it makes the bundle and mounts the root file system, our shim
 * restores. The checkpoint's path travels in the options of the task's Create, so the container's record needs no trace of it.
 *
 * A container that is there, without a running task, is taken as it is, with the files that it has. A new one is like an existing one: its
 * configuration, image and runtime, and a new snapshot of the same image, into which the restore puts the checkpoint's changed files.
 */

export interface ContainerRestore {
  /** directory of the checkpoint, or an archive */
  readonly checkpoint: string;
  readonly id: string;
  /** whom a new container is like */
  readonly like: string;
  /** a file for stdout and stderr */
  readonly output: string | undefined;
  readonly signal: AbortSignal;
  readonly onStep: (step: string) => Promise<void>;
  /** what an undo could not undo */
  readonly onLeftover: (what: string, error: unknown) => void;
}

/** What is to be undone when something later fails, the last first. */
type Undo = [what: string, undo: () => Promise<unknown>];

/**
 * @returns the pid of the restored container; it runs
 * @throws NotFound, WrongState when it has a task, Unsupported, RemoteFailed with what the shim said
 */
export async function restoreInContainerd(
  containerd: Containerd,
  restore: ContainerRestore,
): Promise<{ pid: number; created: boolean }> {
  const { checkpoint, id, output, onStep, signal } = restore;
  if (output !== undefined && !isAbsolute(output))
    throw new InvalidRequest(`output ${output} is not an absolute path`);
  const undos: Undo[] = [];
  try {
    const there = await find(containerd, id, signal);
    await onStep(there ? `preparing container ${id}` : `making container ${id}`);
    const container = there ?? (await make(containerd, restore, undos));
    if (there) await removeStoppedTask(containerd, id, signal);
    const options = optionsFor(container, checkpoint);
    const rootfs = await mountsOf(containerd, container, signal);
    await onStep("restoring");
    const stdio = output === undefined ? "" : logFileUri(output);
    const request = { containerId: id, rootfs, stdout: stdio, stderr: stdio, options };
    undos.push(["task", () => containerd.call(Tasks, "Delete", { containerId: id })]);
    signal.throwIfAborted();
    // Not cancelled from here on: half a restore would have to be looked for.
    await containerd.call(Tasks, "Create", request).catch((error) => {
      if (error instanceof AlreadyExists) undos.pop(); // somebody else's, who was quicker
      throw error;
    });
    const { pid } = await containerd.call(Tasks, "Start", { containerId: id });
    return { pid, created: !there };
  } catch (error) {
    for (const [what, undo] of undos.reverse())
      await undo().catch((failure) => {
        // The task whose Create failed: containerd has none.
        if (!(failure instanceof NotFound)) restore.onLeftover(`${what} ${id}`, failure);
      });
    throw error;
  }
}

async function find(containerd: Containerd, id: string, signal: AbortSignal): Promise<Container | undefined> {
  try {
    return (await containerd.call(Containers, "Get", { id }, { signal })).container;
  } catch (error) {
    if (error instanceof NotFound) return undefined;
    throw error;
  }
}

async function removeStoppedTask(containerd: Containerd, id: string, signal: AbortSignal): Promise<void> {
  try {
    const { process } = await containerd.call(Tasks, "Get", { containerId: id }, { signal });
    if (process && process.status !== Status.STOPPED)
      throw new WrongState(
        `container ${id} has a task, of pid ${process.pid}: end it first, or restore as another container (--id)`,
      );
  } catch (error) {
    if (error instanceof NotFound) return;
    throw error;
  }
  await containerd.call(Tasks, "Delete", { containerId: id }, { signal });
}

/** The record first: a snapshot that no container has would be garbage to containerd. */
async function make(containerd: Containerd, restore: ContainerRestore, undos: Undo[]): Promise<Container> {
  const { id, like, signal } = restore;
  const model = await find(containerd, like, signal);
  if (!model)
    throw new NotFound(
      `container ${id} is to be like ${like}, and containerd has none of that name: name another one (--like), or create the container with the annotation cedana.io/restore-from`,
    );
  optionsFor(model, restore.checkpoint); // what can't be restored is said before anything is made
  const { snapshotter } = model;
  const { info } = await containerd.call(
    Snapshots,
    "Stat",
    { snapshotter, key: model.snapshotKey },
    { signal },
  );
  const container: Container = { ...model, id, snapshotKey: id, spec: specFor(model, id) };
  await containerd.call(Containers, "Create", { container }, { signal });
  undos.push(["container", () => containerd.call(Containers, "Delete", { id })]);
  const parent = info?.parent ?? "";
  await containerd.call(Snapshots, "Prepare", { snapshotter, key: id, parent }, { signal });
  undos.push(["snapshot", () => containerd.call(Snapshots, "Remove", { snapshotter, key: id })]);
  return container;
}

/** The configuration with a cgroup of the new container's own. Clients end its path with the id. */
function specFor({ id, spec }: Container, newId: string): Container["spec"] {
  if (!spec) throw new Unsupported(`container ${id} has no configuration`);
  const json = JSON.parse(Buffer.from(spec.value).toString("utf8")) as { linux?: { cgroupsPath?: string } };
  const path = json.linux?.cgroupsPath;
  if (!path) return spec;
  if (!path.endsWith(id))
    throw new Unsupported(
      `container ${id} has the cgroup ${path}, which doesn't end with its id: what another container's is, can't be told`,
    );
  json.linux!.cgroupsPath = path.slice(0, -id.length) + newId;
  return { typeUrl: spec.typeUrl, value: Buffer.from(JSON.stringify(json)) };
}

/** containerd's CRI labels what is Kubernetes': the kubelet would not know of a container that we make. */
const CRI_LABEL = "io.cri-containerd.kind";

/** The runtime's options as the container has them, with the checkpoint. */
function optionsFor({ id, labels, runtime }: Container, checkpoint: string) {
  if (labels[CRI_LABEL] !== undefined)
    throw new Unsupported(
      `container ${id} is Kubernetes': restore it by the annotation cedana.io/restore-from of its pod`,
    );
  if (!runtime?.name.includes("cedana"))
    throw new Unsupported(
      `container ${id} runs under ${runtime?.name || "no runtime"}: only cedana's shim restores it from here`,
    );
  if (runtime.options && !isOfType(runtime.options, Options))
    throw new Unsupported(
      `container ${id} has runtime options of the type ${runtime.options.typeUrl}, which can't carry a checkpoint: restore it by the annotation cedana.io/restore-from`,
    );
  const given = runtime.options ? unpack(runtime.options, Options) : {};
  return pack(Options, { ...given, criuImagePath: checkpoint });
}

async function mountsOf(
  containerd: Containerd,
  { snapshotter, snapshotKey }: Container,
  signal: AbortSignal,
): Promise<Mount[]> {
  if (snapshotKey === "") return []; // a root file system of its own, named in the configuration
  return (await containerd.call(Snapshots, "Mounts", { snapshotter, key: snapshotKey }, { signal })).mounts;
}
