import { stat } from "node:fs/promises";
import { isAbsolute } from "node:path";
import { isDirectory } from "../../checkpoint/archive/index.ts";
import { type CheckpointProcess, listProcesses } from "../../checkpoint/inspect.ts";
import { readManifest } from "../../checkpoint/manifest.ts";
import { openStored } from "../../checkpoint/open.ts";
import { CheckpointStore, type StoredCheckpoint, type StoreOwner } from "../../checkpoint/store.ts";
import { verifyCheckpoint as verify } from "../../checkpoint/verify.ts";
import { BrokenImage, InvalidRequest, messageOf, NotFound, SyscallFailed } from "../../errors/index.ts";
import { expectAnswer } from "../../linux/apart.ts";
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

async function openStore(): Promise<CheckpointStore> {
  return new CheckpointStore((await readConfiguration()).checkpoints.directory);
}

function ownerOf(of: { namespace: string; podNamespace: string }): StoreOwner {
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
    await expectAnswer(ref.path);
    await stat(ref.path).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== "ENOENT" && error.code !== "ENOTDIR") throw SyscallFailed.from(error);
      throw new NotFound(`checkpoint ${ref.path} does not exist`, { cause: error });
    });
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
    for (const checkpoint of found) checkpoints.push(await describeCheckpoint(owner, checkpoint));
  }
  return { checkpoints };
}

/** One that can't be read is described by its fault. */
export async function describeCheckpoint(
  owner: StoreOwner,
  checkpoint: StoredCheckpoint,
): Promise<CheckpointInit> {
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
  const path = await directoryOf(checkpoint);
  if (!(await isDirectory(path)))
    throw new InvalidRequest(
      `${path} is not a directory: of an archive, \`cedana archive show\` says what it is`,
    );
  // What is in an archive is known by its manifest; its processes only by unpacking it.
  const found = await openStored(path);
  if ("archive" in found) return { path, manifestJson: JSON.stringify(found.manifest) };
  const { imagePath, manifest } = found;
  const processes: CheckpointProcess[] = await listProcesses(imagePath);
  return {
    path,
    imagePath,
    manifestJson: manifest && JSON.stringify(manifest),
    processes,
    memoryBytes: processes.reduce((sum, { memoryBytes }) => sum + memoryBytes, 0),
  };
}

export async function verifyCheckpoint(
  { checkpoint, here, secret }: VerifyCheckpointRequest,
  { signal }: ApiCall,
  send: (event: VerifyCheckpointEventInit) => Promise<void>,
): Promise<void> {
  const path = await directoryOf(checkpoint);
  await send({ progress: { step: `reading ${path}` } });
  const { ok, findings, digests, manifest } = await verify(path, {
    ...(!here && { node: false }),
    ...(secret.length > 0 && { secret }),
    signal,
  });
  await send({
    result: {
      ok,
      findings,
      digests,
      bytes: (manifest?.files ?? []).reduce((sum, { size }) => sum + size, 0),
    },
  });
}
