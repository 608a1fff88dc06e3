import { constants } from "node:fs";
import { type FileHandle, open, rename, rm } from "node:fs/promises";
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { SyscallFailed, TimedOut, WrongState } from "../errors/index.ts";
import { flock } from "../linux/addon.ts";
import { bootId, isAlive } from "../linux/proc.ts";
import { readRecord } from "../linux/record-file.ts";
import {
  type CheckpointStore,
  claimSuffix,
  offerSuffix,
  type StoredCheckpoint,
  type StoreOwner,
} from "./store.ts";

/*
 * Checkpoints from which the next container of a key continues, once (`cedana.io/auto-resume`). A key is a name in the store. Beside a
 * generation lie two small files, synced when they are written:
 *
 *   <generation>.resume  it may be continued from: it was taken of a container instead of its end. Says which process that was:
 *                        nobody continues while it lives
 *   <generation>.claim   somebody continues from it: who, in which boot, and whether his processes may have run
 *
 * Who changes one holds a lock on the name's directory (flock(2)), which ends with its process. A claim is given back when its container
 * could not be restored, or was deleted before it ran. From the moment in which its processes may run it is used up for good, whatever
 * crashes. A claim of an earlier boot whose processes never ran is nobody's: no container survives a boot. One of this boot that a
 * crash has left without its container stays: better that nobody continues than two.
 */

interface Offer {
  pid: number;
  startTime: number;
  bootId: string;
}

interface ClaimRecord {
  by: string;
  bootId: string;
  begun: boolean;
}

/** A checkpoint that is somebody's alone; plain data, for records. */
export interface Claim {
  readonly path: string;
  readonly by: string;
}

/** Who was checkpointed instead of being ended is about to end. */
const endPatienceMs = 10_000;
const lockPatienceMs = 10_000;
const lookEveryMs = 10;

/** Lets the next container of its name continue from a checkpoint, as soon as the process has ended. */
export async function offerCheckpoint(
  path: string,
  process: { pid: number; startTime: number },
): Promise<void> {
  const offer: Offer = { ...process, bootId: bootId() };
  await writeSynced(`${path}${offerSuffix}`, offer);
}

/** The container has run on instead: nobody is to continue from it. */
export async function withdrawOffer(path: string): Promise<void> {
  await rm(`${path}${offerSuffix}`, { force: true });
}

/**
 * The newest checkpoint of a key that nobody has claimed, which is now the caller's alone; or the one that he has claimed before.
 * @param by  names the container
 * @returns undefined when there is none
 * @throws TimedOut when the container that it was taken of doesn't end
 */
export async function claimCheckpoint(
  store: CheckpointStore,
  owner: StoreOwner,
  key: string,
  by: string,
): Promise<{ path: string; claim: Claim } | undefined> {
  if ((await store.generations(owner, key)).length === 0) return undefined;
  using _lock = await lockDirectory(await store.directoryFor(owner, key));
  let found: StoredCheckpoint | undefined;
  for (const checkpoint of (await store.generations(owner, key)).reverse()) {
    // One that can't be read is an error: to take it for none might run a container twice.
    const claim = await readRecord<ClaimRecord>(`${checkpoint.path}${claimSuffix}`);
    if (claim?.by === by && !claim.begun) return claimOf(checkpoint.path, by); // made before a crash
    if (found || (claim && !(claim.bootId !== bootId() && !claim.begun))) continue;
    if (await readRecord<Offer>(`${checkpoint.path}${offerSuffix}`)) found = checkpoint;
  }
  if (!found) return undefined;
  await waitForItsEnd(found.path);
  await writeClaim(found.path, by, false);
  return claimOf(found.path, by);
}

function claimOf(path: string, by: string): { path: string; claim: Claim } {
  return { path, claim: { path, by } };
}

/**
 * The container's processes may run from now on: whatever happens, nobody else continues from this checkpoint.
 * @throws WrongState when it isn't the container's any more: it was given back in the middle of a crash
 */
export async function beginClaim({ path, by }: Claim): Promise<void> {
  using _lock = await lockDirectory(dirname(path));
  const claim = await readRecord<ClaimRecord>(`${path}${claimSuffix}`);
  if (claim?.by !== by) throw new WrongState(`checkpoint ${path} is no longer claimed by container ${by}`);
  await writeClaim(path, by, true);
}

/** The container has not run, and won't: the next one may have it. */
export async function returnClaim({ path, by }: Claim): Promise<void> {
  using _lock = await lockDirectory(dirname(path));
  const claim = await readRecord<ClaimRecord>(`${path}${claimSuffix}`);
  if (claim?.by === by) await rm(`${path}${claimSuffix}`, { force: true });
}

async function writeClaim(path: string, by: string, begun: boolean): Promise<void> {
  const record: ClaimRecord = { by, bootId: bootId(), begun };
  await writeSynced(`${path}${claimSuffix}`, record);
}

async function waitForItsEnd(path: string): Promise<void> {
  const offer = await readRecord<Offer>(`${path}${offerSuffix}`);
  if (!offer || offer.bootId !== bootId()) return;
  const deadline = Date.now() + endPatienceMs;
  while (isAlive(offer.pid, offer.startTime)) {
    if (Date.now() >= deadline)
      throw new TimedOut(
        `checkpoint ${path} was taken of a container instead of its end, and its process ${offer.pid} still lives after ${endPatienceMs / 1000} s: nobody may continue from it yet`,
      );
    await sleep(lookEveryMs);
  }
}

// ---- files -----------------------------------------------------------------------------------------------------------

async function writeSynced(path: string, record: object): Promise<void> {
  {
    await using file = await open(`${path}.new`, "w", 0o600);
    await file.writeFile(JSON.stringify(record));
    await file.sync();
  }
  await rename(`${path}.new`, path);
  await using directory = await openDirectory(dirname(path));
  await directory.sync();
}

async function openDirectory(path: string): Promise<FileHandle> {
  return await open(path, constants.O_RDONLY | constants.O_DIRECTORY | constants.O_NOFOLLOW).catch(
    (error) => {
      throw SyscallFailed.from(error);
    },
  );
}

async function lockDirectory(path: string): Promise<Disposable> {
  const directory = await openDirectory(path);
  const deadline = Date.now() + lockPatienceMs;
  while (!flock(directory.fd, "exclusive")) {
    if (Date.now() >= deadline) {
      await directory.close();
      throw new TimedOut(`${path} is locked by another process for ${lockPatienceMs / 1000} s`);
    }
    await sleep(lookEveryMs);
  }
  return {
    [Symbol.dispose]: () => {
      flock(directory.fd, "unlock");
      void directory.close();
    },
  };
}
