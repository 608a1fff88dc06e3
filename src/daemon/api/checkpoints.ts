import { isAbsolute } from "node:path";
import { findFaults, listProcesses, openContents } from "../../checkpoint/inspect.ts";
import { readManifest } from "../../checkpoint/manifest.ts";
import { CheckpointStore, type StoredCheckpoint, type StoreOwner } from "../../checkpoint/store.ts";
import { BrokenImage, InvalidRequest, messageOf } from "../../errors/index.ts";
import type {
  CheckpointInit,
  CheckpointRef,
  InspectCheckpointRequest,
  InspectCheckpointResponseInit,
  ListCheckpointsRequest,
  ListCheckpointsResponseInit,
  VerifyCheckpointEventInit,
  VerifyCheckpointRequest,
} from "../../proto/generated/cedana_api.ts";
import { readConfiguration } from "../../runtime/configuration.ts";
import type { ApiCall } from "./context.ts";

export async function openStore(): Promise<CheckpointStore> {
  return new CheckpointStore((await readConfiguration()).checkpoints.directory);
}

export function ownerOf(of: { namespace: string; podNamespace: string }): StoreOwner {
  return of.podNamespace === ""
    ? { namespace: of.namespace }
    : { namespace: of.namespace, podNamespace: of.podNamespace };
}

/** @throws InvalidRequest, NotFound */
export async function directoryOf(ref: CheckpointRef | undefined): Promise<string> {
  if (!ref || (ref.path === "") === (ref.name === ""))
    throw new InvalidRequest("name a checkpoint by its path, or by its owner's namespace and its name");
  if (ref.path !== "") {
    if (!isAbsolute(ref.path)) throw new InvalidRequest(`checkpoint ${ref.path} is not an absolute path`);
    return ref.path;
  }
  if (ref.namespace === "")
    throw new InvalidRequest(`checkpoint ${ref.name}: the owner's namespace is missing`);
  return (await (await openStore()).find(ownerOf(ref), ref.name)).path;
}

export async function listCheckpoints(
  request: ListCheckpointsRequest,
  { signal }: ApiCall,
): Promise<ListCheckpointsResponseInit> {
  const store = await openStore();
  const owners = request.namespace === "" ? await store.owners() : [ownerOf(request)];
  const checkpoints: CheckpointInit[] = [];
  for (const owner of owners) {
    signal.throwIfAborted();
    const found =
      request.name === "" ? await store.list(owner) : await store.generations(owner, request.name);
    for (const checkpoint of found) checkpoints.push(await describe(owner, checkpoint));
  }
  return { checkpoints };
}

async function describe(owner: StoreOwner, checkpoint: StoredCheckpoint): Promise<CheckpointInit> {
  const line = { ...checkpoint, ...owner };
  try {
    const manifest = await readManifest(checkpoint.path);
    if (!manifest) throw new BrokenImage("its manifest has gone");
    const { createdAt, containerId, engine, files } = manifest;
    const bytes = files.reduce((sum, { size }) => sum + size, 0);
    return { ...line, createdAt, containerId, engine: `${engine.name} ${engine.version}`, bytes };
  } catch (error) {
    return { ...line, fault: messageOf(error) }; // one broken checkpoint doesn't hide the others
  }
}

export async function inspectCheckpoint({
  checkpoint,
}: InspectCheckpointRequest): Promise<InspectCheckpointResponseInit> {
  const contents = await openContents(await directoryOf(checkpoint));
  const processes = await listProcesses(contents);
  return {
    path: contents.path,
    imagePath: contents.imagePath,
    manifestJson: contents.manifest && JSON.stringify(contents.manifest),
    processes,
    memoryBytes: processes.reduce((sum, { memoryBytes }) => sum + memoryBytes, 0),
  };
}

export async function verifyCheckpoint(
  { checkpoint, here }: VerifyCheckpointRequest,
  { signal }: ApiCall,
  send: (event: VerifyCheckpointEventInit) => Promise<void>,
): Promise<void> {
  const contents = await openContents(await directoryOf(checkpoint));
  const { findings, digests, bytes } = await findFaults(contents, {
    here,
    signal,
    onStep: (step) => send({ progress: { step } }),
  });
  const ok = !findings.some(({ severity }) => severity === "error");
  await send({ result: { ok, findings, digests, bytes } });
}
