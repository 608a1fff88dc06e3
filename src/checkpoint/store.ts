import { constants, type Stats } from "node:fs";
import { lstat, mkdir, open, readdir, rename, rm } from "node:fs/promises";
import { join } from "node:path";
import { InvalidRequest, NotFound, PermissionDenied, SyscallFailed, WrongState } from "../errors/index.ts";
import { expectAnswer } from "../linux/apart.ts";
import { MANIFEST_NAME } from "./manifest.ts";
import { sweep } from "./staging.ts";
import { CheckpointUse } from "./use.ts";

/*
 * The node's own checkpoints, by name. A name belongs to an owner: nobody gets at another owner's by any spelling of a name.
 *
 *   <root>/<owner's namespace>/<owner's pod namespace, or "-">/<name>/<generation>/   a checkpoint: cedana.json and all that it lists
 *   <root>/…/<name>/<generation>.resume, .claim                                       who may continue from it (resume.ts)
 *   <root>/<owner's namespace>/<owner's pod namespace, or "-">/<name>/tmp/            staging: never read as a checkpoint
 *
 * A generation is the time at which the dump was asked for (UTC, milliseconds), so the newest is the last in order. What has no
 * manifest is none. All directories are 0700 and root's: memory images hold secrets.
 */

/** Who may use a name: everything in a containerd namespace, or, under Kubernetes, in a namespace of its. */
export interface StoreOwner {
  namespace: string;
  /** Kubernetes' namespace of the pod, as containerd's CRI says it; the pod can't choose it */
  podNamespace?: string | undefined;
}

export interface StoredCheckpoint {
  name: string;
  generation: string;
  /** directory of the checkpoint */
  path: string;
}

/** Names as containerd allows them for containers, and Kubernetes for everything: no slash, no leading dot. */
const NAME = /^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$/;
const GENERATION = /^\d{8}T\d{9}Z(-\d{1,4})?$/;
const STAGING = "tmp";
/** Files beside a generation, which go with it: resume.ts says what is in them. */
export const offerSuffix = ".resume";
export const claimSuffix = ".claim";
/** In the staging directory: what is being removed, and is no checkpoint any more. */
const REMOVED_PREFIX = "removed-";
const NO_POD_NAMESPACE = "-";

/** 20261125T191500123Z */
export function generationAt(date: Date): string {
  return date.toISOString().replaceAll(/[-:.]/g, "");
}

export class CheckpointStore {
  readonly root: string;

  /** @param root  absolute; made when the first checkpoint is */
  constructor(root: string) {
    this.root = root;
  }

  /**
   * The directory of a name, made when missing.
   * @throws InvalidRequest for what is no name, PermissionDenied when the store isn't ours alone
   */
  async directoryFor(owner: StoreOwner, name: string): Promise<string> {
    const parts = [...ownerParts(owner), checkedName(name)];
    await expectAnswer(this.root);
    await mkdir(this.root, { recursive: true, mode: 0o700 });
    await this.#check(this.root);
    let path = this.root;
    for (const part of parts) {
      path = join(path, part);
      await mkdir(path, { mode: 0o700 }).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== "EEXIST") throw SyscallFailed.from(error);
      });
      await this.#check(path);
    }
    return path;
  }

  /** Where the next checkpoint of a name goes: a path in the name's directory that isn't there yet. */
  async placeFor(owner: StoreOwner, name: string, at = new Date()): Promise<string> {
    const directory = await this.directoryFor(owner, name);
    const taken = new Set(await readdir(directory));
    const generation = generationAt(at);
    if (!taken.has(generation)) return join(directory, generation);
    for (let n = 1; ; n++) if (!taken.has(`${generation}-${n}`)) return join(directory, `${generation}-${n}`);
  }

  /**
   * Finds what `cedana.io/restore-from` names: `NAME` is the newest checkpoint of that name, `NAME@GENERATION` a certain one.
   * @throws InvalidRequest, NotFound naming what there is
   */
  async find(owner: StoreOwner, reference: string): Promise<StoredCheckpoint> {
    const [name = "", generation, ...more] = reference.split("@");
    checkedName(name);
    if (more.length > 0 || (generation !== undefined && !GENERATION.test(generation)))
      throw new InvalidRequest(
        `${quote(reference)} is not the name of a checkpoint: NAME or NAME@GENERATION`,
      );
    const all = await this.generations(owner, name);
    const found = generation === undefined ? all.at(-1) : all.find((one) => one.generation === generation);
    if (found) return found;
    const { namespace, podNamespace } = owner;
    const there = all.map((one) => one.generation).join(", ");
    throw new NotFound(
      `checkpoint ${reference} of namespace ${podNamespace ? `${namespace}/${podNamespace}` : namespace} does not exist: ${
        there ? `there are ${there}` : "`cedana checkpoint list` shows the store"
      }`,
    );
  }

  /** Whole checkpoints of a name, the oldest first; none for a name that isn't there. */
  async generations(owner: StoreOwner, name: string): Promise<StoredCheckpoint[]> {
    const directory = await this.#existing([...ownerParts(owner), checkedName(name)]);
    if (directory === undefined) return [];
    const found: StoredCheckpoint[] = [];
    for (const generation of (await readdir(directory))
      .filter((entry) => GENERATION.test(entry))
      .sort(inOrder)) {
      const path = join(directory, generation);
      await this.#check(path);
      if (await isFile(join(path, MANIFEST_NAME))) found.push({ name, generation, path });
    }
    return found;
  }

  /** All whole checkpoints of an owner. */
  async list(owner: StoreOwner): Promise<StoredCheckpoint[]> {
    const directory = await this.#existing(ownerParts(owner));
    const names =
      directory === undefined ? [] : (await readdir(directory)).filter((name) => NAME.test(name)).sort();
    return (await Promise.all(names.map((name) => this.generations(owner, name)))).flat();
  }

  /** Who has checkpoints here. */
  async owners(): Promise<StoreOwner[]> {
    const owners: StoreOwner[] = [];
    await expectAnswer(this.root);
    for (const namespace of await names(this.root))
      for (const pod of await names(join(this.root, namespace), [NO_POD_NAMESPACE]))
        owners.push(pod === NO_POD_NAMESPACE ? { namespace } : { namespace, podNamespace: pod });
    return owners;
  }

  /**
   * Removes the oldest checkpoints of a name until `keep` are left; the newest whole one always is, and so is what is in use.
   * @returns what was removed
   */
  async prune(owner: StoreOwner, name: string, keep: number): Promise<StoredCheckpoint[]> {
    const all = await this.generations(owner, name);
    const surplus = all.slice(0, Math.max(0, all.length - Math.max(1, keep)));
    const removed: StoredCheckpoint[] = [];
    for (const checkpoint of surplus) if (await this.#remove(checkpoint)) removed.push(checkpoint);
    return removed;
  }

  /**
   * Removes a checkpoint: at once for everybody who looks, then its files.
   * @throws WrongState when it is in use: a container is to be restored from it, or is still being filled from it
   */
  async remove(checkpoint: StoredCheckpoint): Promise<void> {
    if (await this.#remove(checkpoint)) return;
    throw new WrongState(
      `checkpoint ${checkpoint.name}@${checkpoint.generation} is in use: a container is to be restored from it, or its memory is still being filled from it`,
    );
  }

  async #remove(checkpoint: StoredCheckpoint): Promise<boolean> {
    using unused = await CheckpointUse.remove(checkpoint.path);
    if (!unused) return false;
    const staging = join(checkpoint.path, "..", STAGING);
    await mkdir(staging, { recursive: true, mode: 0o700 });
    await this.#check(staging);
    const aside = join(staging, `${REMOVED_PREFIX}${checkpoint.generation}-${process.pid}`);
    await rename(checkpoint.path, aside);
    for (const suffix of [offerSuffix, claimSuffix]) await rm(`${checkpoint.path}${suffix}`, { force: true });
    await rm(aside, { recursive: true });
    return true;
  }

  /**
   * Removes what crashes have left: dumps that nobody goes on with, and what was being removed. What somebody works on stays.
   * @returns how many directories were removed
   */
  async sweep(): Promise<number> {
    let count = 0;
    for (const owner of await this.owners()) {
      const directory = await this.#existing(ownerParts(owner));
      for (const name of directory === undefined ? [] : await names(directory)) {
        const path = await this.#existing([...ownerParts(owner), name]);
        if (path === undefined) continue;
        count += (await sweep(path)).length;
        const removed = await readdir(join(path, STAGING)).catch((): string[] => []); // ENOENT: there never was one
        for (const one of removed.filter((entry) => entry.startsWith(REMOVED_PREFIX))) {
          await rm(join(path, STAGING, one), { recursive: true, force: true });
          count++;
        }
      }
    }
    return count;
  }

  /** Path of a directory below the root, or undefined when it isn't there. Every step of the way is checked. */
  async #existing(parts: readonly string[]): Promise<string | undefined> {
    await expectAnswer(this.root);
    let path = this.root;
    for (const part of ["", ...parts]) {
      path = join(path, part);
      if (!(await look(path))) return undefined;
      await this.#check(path);
    }
    return path;
  }

  /** A directory of the store is a directory, root's (or ours), and nobody else may write there: nothing in it was planted. */
  async #check(path: string): Promise<void> {
    const info = await look(path);
    if (!info) throw new NotFound(`${path} does not exist`);
    const wrong = !info.isDirectory()
      ? "is not a directory"
      : info.uid !== 0 && info.uid !== process.getuid!()
        ? `belongs to user ${info.uid}`
        : info.mode & 0o022
          ? `can be written by others (mode ${(info.mode & 0o777).toString(8)})`
          : undefined;
    if (wrong) throw new PermissionDenied(`${path} ${wrong}: not used as a place for checkpoints`);
  }
}

/** By time; of one millisecond, by number. */
function inOrder(a: string, b: string): number {
  const [atA = "", nA = "0"] = a.split("-");
  const [atB = "", nB = "0"] = b.split("-");
  return atA < atB ? -1 : atA > atB ? 1 : Number(nA) - Number(nB);
}

function ownerParts(owner: StoreOwner): [namespace: string, podNamespace: string] {
  const pod = owner.podNamespace === undefined ? NO_POD_NAMESPACE : checkedName(owner.podNamespace);
  return [checkedName(owner.namespace), pod];
}

/** @throws InvalidRequest for what can be no name of a checkpoint */
export function checkedName(name: string): string {
  // "tmp" is the staging directory beside the checkpoints.
  if (!NAME.test(name) || name === STAGING)
    throw new InvalidRequest(
      `${quote(name)} is not a name: letters, digits, "_", "." and "-", at most 128, the first a letter or digit, and not "tmp"`,
    );
  return name;
}

const quote = (text: string) => JSON.stringify(text.length > 200 ? `${text.slice(0, 200)}…` : text);

async function names(path: string, more: readonly string[] = []): Promise<string[]> {
  const entries = await readdir(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT" || error.code === "ENOTDIR") return [];
    throw SyscallFailed.from(error);
  });
  return entries.filter((name) => NAME.test(name) || more.includes(name)).sort();
}

/** Without following a link. */
async function look(path: string): Promise<Stats | undefined> {
  return await lstat(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT" || error.code === "ENOTDIR") return undefined;
    throw SyscallFailed.from(error);
  });
}

async function isFile(path: string): Promise<boolean> {
  try {
    await using file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
    return (await file.stat()).isFile();
  } catch {
    return false; // ENOENT: not whole; ELOOP: a link, which none of ours is
  }
}
