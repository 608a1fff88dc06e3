import { randomUUID } from "node:crypto";
import {
  chmodSync,
  closeSync,
  constants,
  fstatSync,
  fsync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  renameSync,
  rmdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { rm } from "node:fs/promises";
import { basename, dirname, isAbsolute, join, relative, resolve } from "node:path";
import { promisify } from "node:util";
import {
  AlreadyExists,
  InvalidRequest,
  PermissionDenied,
  Unavailable,
  Unsupported,
  WrongState,
} from "../errors/index.ts";
import { flock, openBeneath, renameAt } from "../linux/addon.ts";
import { syncTree } from "./digest.ts";
import { MANIFEST_NAME, readManifest } from "./manifest.ts";

/**
 * A checkpoint is made beside its place and put there in one step, so that at each moment, whatever crashes, there is the old one or
 * the new one, never half.
 *
 * `Staging.beside`: our own place, `STORE/NAME`. It is made in `STORE/tmp/UUID`, synced, and renamed; where there is an old one, the two
 * are swapped (renameat2(2), RENAME_EXCHANGE) and the old one is removed.
 *
 * `Staging.inside`: the caller gives the directory itself, as containerd does, and it may hold things of others. It is made in
 * `DIRECTORY/.cedana-UUID/new` and its entries are moved, an older checkpoint's to `.cedana-UUID/old` before, the manifest last. What is
 * to be moved is written down first (`.cedana-UUID/plan.json`), so that whoever comes after a crash moves it back.
 *
 * Who works in a staging directory holds a lock on it (flock(2)), which ends with the process: a staging directory whose lock is free
 * was left by a crash, and `sweep` removes it. Directories are 0700: memory images hold secrets.
 */

const STAGING_PREFIX = ".cedana-";
const PLAN_NAME = "plan.json";
const uuidPattern = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

/**
 * Names in a store: of checkpoints, namespaces, containers. One path component, nothing hidden, no `..`, and not `tmp`, which is ours.
 * @throws InvalidRequest
 */
export function checkName(name: string, what = "checkpoint"): string {
  if (!/^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$/.test(name) || name === "tmp")
    throw new InvalidRequest(
      `${what} name ${JSON.stringify(name.slice(0, 80))} is not allowed: letters, digits, "_", "." and "-", at most 200, not "tmp"`,
    );
  return name;
}

/** What another cedanad needs to go on with a staging after a crash. */
export interface StagingRecord {
  kind: "beside" | "inside";
  /** directory of the staging, which has the lock */
  root: string;
  finalPath: string;
  /** the topmost directory that was made for it */
  made?: string | undefined;
}

interface StagingFields extends StagingRecord {
  lock: number;
  replace?: boolean;
}

export class Staging implements AsyncDisposable {
  /** where the checkpoint is made: an empty directory, 0700 */
  readonly path: string;
  /** where it will be */
  readonly finalPath: string;
  readonly #root: string;
  #lock: number | undefined;
  readonly #kind: StagingRecord["kind"];
  readonly #replace: boolean;
  readonly #made: string | undefined;

  private constructor(fields: StagingFields) {
    this.#kind = fields.kind;
    this.#root = fields.root;
    this.path = fields.kind === "inside" ? join(fields.root, "new") : fields.root;
    this.finalPath = fields.finalPath;
    this.#lock = fields.lock;
    this.#replace = fields.replace ?? false;
    this.#made = fields.made;
  }

  /**
   * Begins a checkpoint `store/name`, and removes what crashes have left in the store.
   * @param store    an absolute directory of ours, made when missing
   * @param options.replace  an older one of that name; else it is an error at once, and again at `commit`
   * @param options.shared   the store is somebody's directory and not a store: staging is `.cedana-UUID` in it, which leaves no `tmp`,
   *                         and it may be one where everybody has only his own (sticky, as /tmp)
   * @throws InvalidRequest, AlreadyExists, PermissionDenied when others may write to the store
   */
  static async beside(
    store: string,
    name: string,
    options: { replace?: boolean; shared?: boolean } = {},
  ): Promise<Staging> {
    const { replace = false, shared = false } = options;
    checkName(name);
    if (!isAbsolute(store)) throw new InvalidRequest(`store ${store} is not an absolute path`);
    mkdirSync(store, { recursive: true, mode: 0o700 });
    if (shared) store = realpathSync(store); // somebody's directory may be a link; a store may not
    using storeFd = new Directory(store);
    storeFd.expectOurs(store, shared);
    await sweep(store);
    const temporary = shared ? store : join(store, "tmp");
    if (!replace && exists(storeFd.path(name)))
      throw new AlreadyExists(`checkpoint ${join(store, name)} exists`);
    if (!shared) makeDirectory(storeFd.path("tmp"));
    const flags = constants.O_RDONLY | constants.O_DIRECTORY;
    using temporaryFd = new Directory(openBeneath(storeFd.fd, shared ? "." : "tmp", flags));
    temporaryFd.expectOurs(temporary, shared);
    const { name: uuid, lock } = makeLocked(temporaryFd, shared ? STAGING_PREFIX : "");
    return new Staging({
      kind: "beside",
      root: join(temporary, uuid),
      finalPath: join(store, name),
      lock,
      replace,
    });
  }

  /**
   * Begins a checkpoint whose files shall lie directly in a directory that the caller names; made when missing, and then removed
   * when it comes to nothing. Files of others in it stay. What an older checkpoint's manifest there names is replaced, or, without
   * one, CRIU's images and logs.
   * @throws InvalidRequest
   */
  static async inside(directory: string): Promise<Staging> {
    if (!isAbsolute(directory)) throw new InvalidRequest(`image path ${directory} is not an absolute path`);
    let made: string | undefined;
    try {
      made = mkdirSync(directory, { recursive: true, mode: 0o700 });
      directory = realpathSync(directory); // the caller may name it by a link
      if (!made) {
        await sweep(directory);
        const ours = await olderEntries(directory);
        expectRoom(
          directory,
          entriesOf(directory).filter((name) => isCriuFile(name) && !ours.includes(name)),
        );
      }
      using target = new Directory(directory);
      const { name, lock } = makeLocked(target, STAGING_PREFIX);
      const root = join(directory, name);
      for (const part of ["new", "old"]) mkdirSync(join(root, part), { mode: 0o700 });
      return new Staging({ kind: "inside", root, finalPath: directory, lock, made });
    } catch (error) {
      if (made) removeMade(made, directory);
      const { code, message, syscall } = error as NodeJS.ErrnoException;
      if (syscall !== undefined && !["ENOSPC", "EIO", "EDQUOT", "EMFILE"].includes(code ?? ""))
        // the machine's fault, not the caller's
        throw new InvalidRequest(`make image path ${directory}: ${message}`, { cause: error });
      throw error;
    }
  }

  /** For `resume`, by whoever comes after a crash. */
  record(): StagingRecord {
    return {
      kind: this.#kind,
      root: this.#root,
      finalPath: this.finalPath,
      ...(this.#made !== undefined && { made: this.#made }),
    };
  }

  /**
   * Goes on with a staging whose maker was killed, one without `replace`: with an image path, as it was before its commit.
   * @returns undefined when it has gone: it was committed, or swept
   * @throws Unavailable when somebody works on it
   */
  static resume(record: StagingRecord): Staging | undefined {
    const lock = tryLock(record.root);
    if (lock === undefined) {
      if (!exists(record.root)) return undefined;
      throw new Unavailable(`staging ${record.root} is in use`);
    }
    if (record.kind === "inside") undoMoves(record.finalPath, record.root);
    return new Staging({ ...record, lock });
  }

  /** Nothing was made in it yet, or it was moved to its place. */
  get isEmpty(): boolean {
    return entriesOf(this.path).length === 0;
  }

  /**
   * Syncs what was made and puts it in its place. When this throws, the place is as it was.
   * @param options.durable  false: what is new may be lost when the machine fails, and the disk is not waited for; where an older
   *                         checkpoint gives way, it is all the same
   */
  async commit(options: { durable?: boolean; signal?: AbortSignal } = {}): Promise<void> {
    if (this.#lock === undefined)
      throw new WrongState(`staging ${this.path} is committed or given up already`);
    moveParentLinks(this.path, this.finalPath);
    const outgoing = this.#kind === "inside" ? await olderEntries(this.finalPath) : [];
    const replaces = outgoing.length > 0 || (this.#kind === "beside" && exists(this.finalPath));
    const durable = options.durable !== false || replaces;
    if (durable) await syncTree(this.path, options.signal);
    if (this.#kind === "inside") await putInside(this.finalPath, basename(this.#root), outgoing, durable);
    else await this.#putBeside(durable);
    this.#release();
  }

  async #putBeside(durable: boolean): Promise<void> {
    using from = new Directory(dirname(this.#root));
    using to = new Directory(dirname(this.finalPath));
    const name = basename(this.finalPath);
    const old = swapIn(from, basename(this.#root), to, name, this.#replace, this.finalPath);
    if (durable) {
      await synced(to.fd);
      await synced(from.fd);
    }
    // The new one is in its place, and synced: from here on nothing fails any more.
    if (old) await rm(this.#root, { recursive: true, force: true }).catch(() => undefined); // swept later
  }

  /**
   * Gives up, but keeps what was made, for it can't be made again: beside its place, by a name that no sweep touches.
   * @returns where it is
   */
  keep(): string {
    const kept = join(dirname(this.#root), `kept-${basename(this.#root).replace(STAGING_PREFIX, "")}`);
    renameSync(this.#root, kept);
    this.#release();
    return this.#kind === "inside" ? join(kept, "new") : kept;
  }

  /** Removes what was not committed. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#lock === undefined) return;
    try {
      await rm(this.#root, { recursive: true, force: true });
      if (this.#made) removeMade(this.#made, this.finalPath);
    } finally {
      this.#release();
    }
  }

  #release(): void {
    if (this.#lock !== undefined) closeSync(this.#lock);
    this.#lock = undefined;
  }
}

/**
 * Removes what crashes have left in a store or in an image path; an interrupted move into an image path is undone. What somebody
 * is working on stays.
 * @returns the directories that were removed
 */
export async function sweep(directory: string): Promise<string[]> {
  const removed: string[] = [];
  const inside = entriesOf(directory).filter((name) => uuidPattern.test(name.slice(STAGING_PREFIX.length)));
  const candidates = [
    ...inside.filter((name) => name.startsWith(STAGING_PREFIX)).map((name) => join(directory, name)),
    ...entriesOf(join(directory, "tmp"))
      .filter((name) => uuidPattern.test(name))
      .map((name) => join(directory, "tmp", name)),
  ];
  for (const path of candidates) {
    const lock = tryLock(path);
    if (lock === undefined) continue;
    try {
      // In a directory that others may write to, anybody may put something by such a name, with a plan of what we should move.
      const { uid, mode } = fstatSync(lock);
      if (!isOurs(uid, mode)) continue;
      if (basename(path).startsWith(STAGING_PREFIX)) undoMoves(directory, path);
      await rm(path, { recursive: true, force: true });
      removed.push(path);
    } finally {
      closeSync(lock);
    }
  }
  return removed;
}

/** Removes directories that we made, from the innermost, as far as nobody has put anything there. */
function removeMade(outermost: string, innermost: string): void {
  for (let path = resolve(innermost); ; path = dirname(path)) {
    try {
      rmdirSync(path);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ENOENT") return; // somebody else's files are in it
    }
    if (path === resolve(outermost) || path === dirname(path)) return;
  }
}

/** An open directory; what is named through it can't be moved away under us. */
class Directory implements Disposable {
  readonly fd: number;

  constructor(directory: string | number) {
    this.fd = typeof directory === "number" ? directory : Directory.#open(directory);
  }

  static #open(path: string): number {
    try {
      return openSync(path, constants.O_RDONLY | constants.O_DIRECTORY | constants.O_NOFOLLOW);
    } catch (cause) {
      if ((cause as NodeJS.ErrnoException).code !== "ENOTDIR") throw cause;
      throw new InvalidRequest(`${path} is no directory, or a link to one: name the directory itself`, {
        cause,
      });
    }
  }

  /** An entry in it; `name` must be one component. */
  path(name: string): string {
    return `/proc/self/fd/${this.fd}/${name}`;
  }

  /** Whoever may write to a directory may swap its entries while we work; not ours where it is sticky. */
  expectOurs(shown: string, sticky = false): void {
    const { uid, mode } = fstatSync(this.fd);
    if (sticky && (mode & 0o1000) !== 0 && (uid === 0 || uid === process.geteuid?.())) return;
    if (!isOurs(uid, mode))
      throw new PermissionDenied(
        `${shown} may be written to by others (owner ${uid}, mode ${(mode & 0o7777).toString(8)}): a store must be ours alone (chmod 0700)`,
      );
  }

  [Symbol.dispose](): void {
    closeSync(this.fd);
  }
}

const isOurs = (uid: number, mode: number) => uid === process.geteuid?.() && (mode & 0o022) === 0;

function makeDirectory(path: string): void {
  try {
    mkdirSync(path, { mode: 0o700 });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  }
}

/** A new directory with our lock on it. A sweep may take it between the two steps, for one of a crash: then another one. */
function makeLocked(parent: Directory, prefix: string): { name: string; lock: number } {
  for (;;) {
    const name = prefix + randomUUID();
    mkdirSync(parent.path(name), { mode: 0o700 });
    const lock = tryLock(parent.path(name));
    if (lock === undefined) continue;
    if (exists(parent.path(name)) && fstatSync(lock).nlink > 0) {
      chmodSync(parent.path(name), 0o700); // umask may have taken more
      return { name, lock };
    }
    closeSync(lock);
  }
}

/** @returns the open directory that holds the lock; undefined when somebody else has it, or the directory has gone */
function tryLock(path: string): number | undefined {
  let fd: number;
  try {
    fd = openSync(path, constants.O_RDONLY | constants.O_DIRECTORY | constants.O_NOFOLLOW);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" || code === "ENOTDIR" || code === "ELOOP") return undefined; // gone, or not one of ours
    throw error;
  }
  if (flock(fd, "exclusive")) return fd;
  closeSync(fd);
  return undefined;
}

/** @returns whether there was an old one, which is now where the new one was */
function swapIn(
  from: Directory,
  fromName: string,
  to: Directory,
  name: string,
  replace: boolean,
  shown: string,
): boolean {
  for (;;) {
    const swap = replace && exists(to.path(name));
    try {
      renameAt([from.fd, fromName], [to.fd, name], swap ? "exchange" : "noReplace");
      return swap;
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === "EEXIST" && replace) continue; // another one was faster
      if (code === "ENOENT" && swap && exists(from.path(fromName))) continue; // the old one has gone meanwhile
      if (code === "EEXIST") throw new AlreadyExists(`checkpoint ${shown} exists`, { cause: error });
      if (code === "EINVAL")
        throw new Unsupported(
          `the file system of ${dirname(shown)} can't swap directories (renameat2): keep checkpoints on ext4, xfs, btrfs, tmpfs or overlay`,
          { cause: error },
        );
      throw error;
    }
  }
}

/** A disk may take its time: the event loop doesn't wait for it. */
const synced = promisify(fsync);

/** What is moved into an image path, written down before the first move. */
interface Plan {
  /** entries that come in, in order */
  incoming: string[];
  /** of an older checkpoint; they go out before */
  outgoing: string[];
}

function expectRoom(directory: string, foreign: readonly string[]): void {
  if (foreign.length > 0)
    throw new AlreadyExists(
      `image path ${directory} holds ${foreign.slice(0, 5).join(", ")}, which no whole checkpoint left there: remove it, or take another path`,
    );
}

/** A crash of ours finds the plan in any case; `durable` makes one of the machine find it, too. */
async function putInside(
  directory: string,
  stagingName: string,
  outgoing: string[],
  durable: boolean,
): Promise<void> {
  const root = join(directory, stagingName);
  using target = new Directory(directory);
  using incomingFd = new Directory(join(root, "new"));
  using outgoingFd = new Directory(join(root, "old"));
  const incoming = readdirSync(join(root, "new")).sort();
  // The manifest makes it a checkpoint: it comes last.
  if (incoming.includes(MANIFEST_NAME)) incoming.push(...incoming.splice(incoming.indexOf(MANIFEST_NAME), 1));
  const staying = new Set(entriesOf(directory));
  for (const name of outgoing) staying.delete(name);
  expectRoom(
    directory,
    incoming.filter((name) => staying.has(name)),
  );
  const plan: Plan = { incoming, outgoing };
  const sync = async (fd: number) => void (durable && (await synced(fd)));
  const planFd = openSync(join(root, PLAN_NAME), "wx", 0o600);
  try {
    writeFileSync(planFd, JSON.stringify(plan));
    await sync(planFd);
  } finally {
    closeSync(planFd);
  }
  using rootFd = new Directory(root);
  await sync(rootFd.fd);
  try {
    // An older manifest goes first: without it, half a checkpoint isn't taken for a whole one.
    for (const name of [...outgoing].sort(
      (a, b) => Number(b === MANIFEST_NAME) - Number(a === MANIFEST_NAME),
    ))
      renameAt([target.fd, name], [outgoingFd.fd, name], "noReplace");
    for (const name of incoming) renameAt([incomingFd.fd, name], [target.fd, name], "noReplace");
    await sync(target.fd);
  } catch (error) {
    undoMoves(directory, root);
    throw error;
  }
  rmSync(join(root, PLAN_NAME)); // from here on a sweep undoes nothing
  await sync(rootFd.fd);
  try {
    for (const part of ["new", "old", ""]) rmdirSync(join(root, part));
  } catch {
    await rm(root, { recursive: true, force: true }).catch(() => undefined); // an older checkpoint is in it; swept later
  }
}

/** Brings an image path back to before the moves of a plan, as far as they went. No plan: nothing was moved, or all was. */
function undoMoves(directory: string, root: string): void {
  let plan: Plan;
  try {
    plan = JSON.parse(readFileSync(join(root, PLAN_NAME), "utf8")) as Plan;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" || error instanceof SyntaxError) return; // half a plan: nothing was moved, or nothing older was at stake
    throw error;
  }
  const safe = (names: unknown) =>
    (Array.isArray(names) ? names : []).filter(
      (name): name is string =>
        typeof name === "string" && name !== "" && name !== "." && name !== ".." && !name.includes("/"),
    );
  // An entry of ours is in one of the two places: where it isn't in `new`, it was moved.
  for (const name of safe(plan.incoming).reverse())
    if (!exists(join(root, "new", name)) && exists(join(directory, name)))
      renameSync(join(directory, name), join(root, "new", name));
  for (const name of safe(plan.outgoing))
    if (exists(join(root, "old", name)) && !exists(join(directory, name)))
      renameSync(join(root, "old", name), join(directory, name));
  rmSync(join(root, PLAN_NAME));
}

/** What CRIU and the engines leave in an image path. */
export function isCriuFile(name: string): boolean {
  return /\.img$|^descriptors\.json$|^stats-dump$|^dump\.log$|^parent$/.test(name);
}

/** The top entries that an older checkpoint in this directory consists of: by its manifest, or by their names where it has none. */
async function olderEntries(directory: string): Promise<string[]> {
  const found = entriesOf(directory);
  const manifest = found.includes(MANIFEST_NAME)
    ? await readManifest(directory).catch(() => undefined) // broken: then as if there were none
    : undefined;
  const byName = found.includes("inventory.img") ? found.filter(isCriuFile) : [];
  const names = new Set(manifest?.files.map(({ path }) => path.split("/", 1)[0]!) ?? byName);
  names.add(MANIFEST_NAME);
  if (manifest) names.add("parent"); // CRIU's link to an earlier checkpoint is no file
  return found.filter((name) => names.has(name));
}

/**
 * CRIU's `parent`, a link to the earlier images, is relative, and was right where it was made: it must lead to the same place from
 * where it will be.
 */
function moveParentLinks(path: string, finalPath: string): void {
  for (const below of ["", "checkpoint"]) {
    const link = join(path, below, "parent");
    let target: string;
    try {
      target = readlinkSync(link);
    } catch {
      continue; // ENOENT, EINVAL: there is none
    }
    const leadsTo = resolve(dirname(link), target);
    // Moved already, by a commit that a crash cut off.
    if (!exists(leadsTo) && exists(resolve(join(finalPath, below), target))) continue;
    if (isAbsolute(target) || leadsTo === path || leadsTo.startsWith(`${path}/`)) continue;
    rmSync(link);
    symlinkSync(relative(join(finalPath, below), leadsTo), link);
  }
}

function exists(path: string): boolean {
  return lstatSync(path, { throwIfNoEntry: false }) !== undefined;
}

function entriesOf(path: string): string[] {
  try {
    return readdirSync(path);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" || code === "ENOTDIR") return [];
    throw error;
  }
}
