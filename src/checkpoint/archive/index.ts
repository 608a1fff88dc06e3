import { randomUUID } from "node:crypto";
import { closeSync, openSync } from "node:fs";
import { access, lstat, open, readdir, rename, rm, stat } from "node:fs/promises";
import { basename, dirname, isAbsolute, join, resolve } from "node:path";
import { AlreadyExists, BrokenImage, InvalidRequest, NotFound, SyscallFailed } from "../../errors/index.ts";
import { flock, renameAt } from "../../linux/addon.ts";
import { openDirectory, withFd } from "../../linux/fd.ts";
import { listTree, syncPath } from "../digest.ts";
import { algorithmOf } from "../file-hash.ts";
import { type CheckpointManifest, MANIFEST_NAME, parseManifest, readManifest } from "../manifest.ts";
import { compareFiles, verifyFiles } from "../manifest-files.ts";
import { Staging } from "../staging.ts";
import { runJob } from "../worker/pool.ts";
import type { Compression } from "./compression.ts";
import type { CreateOutput } from "./create.ts";
import { isEncrypted } from "./encryption.ts";
import type { ExtractOutput, Limits } from "./extract.ts";
import {
  type CheckpointDescription,
  containerOf,
  describe,
  type ExportedContainer,
  layoutFiles,
  parseJson,
  readJsonFile,
  type WrittenLayout,
} from "./layout.ts";

/**
 * A checkpoint's directory as one file and back: a tar, compressed or not, encrypted or not, in our layout or in another engine's. All the
 * work is done in worker threads, in constant memory.
 */

export { type Compression, compressions } from "./compression.ts";
export { MIN_SECRET_BYTES } from "./encryption.ts";
export type { Limits } from "./extract.ts";
export {
  type CheckpointDescription,
  type ExportedContainer,
  type WrittenLayout,
  writtenLayouts,
} from "./layout.ts";

export interface CreateOptions {
  /** default zstd */
  compression?: Compression;
  /** default 1 */
  level?: number;
  /** encrypt with a passphrase's or a key file's bytes */
  secret?: Uint8Array;
  /** default `cedana` */
  layout?: WrittenLayout;
  /** what the layouts say beside the images; default: what the manifest knows */
  container?: ExportedContainer;
  /** an older file of that name */
  replace?: boolean;
  /** compare every file with its digest in the manifest on the way */
  verify?: boolean;
  signal?: AbortSignal;
}

/**
 * Writes a checkpoint as one file, 0600. It has its name only when it is whole and synced.
 * @param directory  CRIU's images in `checkpoint/` or, as containerd leaves them, in the directory itself
 * @throws AlreadyExists, InvalidRequest, BrokenImage; nothing is left then
 */
export async function createArchive(
  directory: string,
  archive: string,
  options: CreateOptions = {},
): Promise<CreateOutput> {
  const { layout = "cedana", compression = "zstd", replace = false } = options;
  await expectDirectory(directory);
  if (resolve(archive).startsWith(`${resolve(directory)}/`))
    throw new InvalidRequest(
      `archive ${archive} would be part of ${directory}, which it is made of: write it elsewhere`,
    );
  const manifest = await readManifest(directory);
  const files = (await listTree(directory, options.signal))
    .filter(({ type }) => type !== "directory")
    .map(({ path }) => path);
  const bare = files.includes("inventory.img"); // `ctr task checkpoint --image-path` leaves CRIU's images themselves
  if (!bare && !files.includes("checkpoint/inventory.img"))
    throw new BrokenImage(`${directory} holds no checkpoint/inventory.img: it is no checkpoint`);
  const container = options.container ?? (manifest && containerOf(manifest));
  const isNative = layout === "cedana";
  const generated = container ? layoutFiles(layout, container) : {};
  // In our own layout what lies there is right; another layout's files are made for it.
  const extra = Object.fromEntries(
    Object.entries(generated).filter(([name]) => !isNative || options.container || !files.includes(name)),
  );
  for (const name of ["config.dump", "spec.dump"])
    if (!isNative && !(name in extra) && !files.includes(name))
      throw new InvalidRequest(
        `layout ${layout} needs ${name}, and nothing is known of the container: ${directory} has no manifest`,
      );
  if (!replace && (await exists(archive))) throw new AlreadyExists(`archive ${archive} exists`);
  const parent = dirname(archive);
  await sweepPartials(archive);
  const partial = join(parent, `.${basename(archive)}.${randomUUID()}.partial`);
  const dropWhiteouts = (layout === "podman" || layout === "crio") && files.includes("rootfs-diff.tar");
  if (dropWhiteouts && !files.includes("deleted.files"))
    throw new InvalidRequest(
      `layout ${layout} needs deleted.files beside rootfs-diff.tar, which ${directory} has not`,
    );
  const digests = options.verify
    ? Object.fromEntries(
        (manifest?.files ?? []).flatMap(({ path, digest }) => (digest ? [[path, digest]] : [])),
      )
    : {};
  const { level = 1, secret } = options;
  // Other engines' layouts don't know our manifest; its digests wouldn't fit a repacked diff either.
  const omit = isNative || bare ? [] : [MANIFEST_NAME];
  const prefix = bare ? "checkpoint/" : "";
  const input = {
    prefix,
    directory,
    archive: partial,
    compression,
    level,
    secret,
    extra,
    omit,
    dropWhiteouts,
    digests,
  };
  try {
    const output = await runJob("createArchive", input, options.signal);
    withFd(openDirectory(parent), (fd) => {
      try {
        if (!replace) renameAt([fd, basename(partial)], [fd, basename(archive)], "noReplace");
      } catch (cause) {
        if ((cause as NodeJS.ErrnoException).code === "EEXIST")
          throw new AlreadyExists(`archive ${archive} exists`, { cause });
        throw cause;
      }
    });
    if (replace) await rename(partial, archive);
    await syncPath(parent);
    return output;
  } finally {
    await rm(partial, { force: true });
    await rm(`${partial}.diff`, { force: true });
  }
}

export interface Extracted {
  description: CheckpointDescription;
  compression: Compression;
  encrypted: boolean;
  archiveBytes: number;
  /** of all files */
  bytes: number;
  files: number;
  /** how many files have a digest in the manifest, and have it still */
  verified: number;
}

export interface ReadOptions {
  secret?: Uint8Array;
  limits?: Limits;
  signal?: AbortSignal;
}

/**
 * Extracts an archive of any layout that we read into a new directory. It is there only when the whole archive was authentic, complete and
 * as its manifest says; until then it is in staging, and a failure leaves nothing.
 * @param directory  absolute; its last part is a checkpoint's name (`checkName`). Must not exist, unless `replace`
 * @throws BrokenImage, ResourceExhausted for one that asks too much, PermissionDenied for a wrong key, AlreadyExists
 */
export async function extractArchive(
  archive: string,
  directory: string,
  options: ReadOptions & { replace?: boolean } = {},
): Promise<Extracted> {
  if (!isAbsolute(directory)) throw new InvalidRequest(`directory ${directory} is not an absolute path`);
  await expectFile(archive);
  await using staging = await Staging.beside(dirname(directory), basename(directory), {
    replace: options.replace ?? false,
    shared: true,
  });
  const extracted = await read(archive, staging.path, options);
  await staging.commit(options.signal ? { signal: options.signal } : {});
  return extracted;
}

/** Whether an archive needs a key. */
export async function isEncryptedArchive(archive: string): Promise<boolean> {
  await expectFile(archive);
  await using file = await open(archive);
  const { buffer, bytesRead } = await file.read(Buffer.alloc(64), 0, 64, 0);
  return isEncrypted(buffer.subarray(0, bytesRead));
}

/** Reads an archive to its end and checks all that `extractArchive` checks, but writes nothing. */
export async function verifyArchive(archive: string, options: ReadOptions = {}): Promise<Extracted> {
  await expectFile(archive);
  return await read(archive, undefined, options);
}

async function read(archive: string, into: string | undefined, options: ReadOptions): Promise<Extracted> {
  const wanted = [MANIFEST_NAME, `checkpoint/${MANIFEST_NAME}`, "config.dump", "spec.dump"];
  const input = { archive, into, secret: options.secret, limits: options.limits ?? {}, wanted };
  let output: ExtractOutput;
  let description: CheckpointDescription;
  try {
    output = await runJob("extractArchive", input, options.signal);
    description = await describeContents(output);
  } catch (error) {
    if (error instanceof BrokenImage)
      throw new BrokenImage(`archive ${archive}: ${error.message}`, { cause: error });
    throw error;
  }
  const { manifest } = description;
  if (manifest) {
    const faults = compareFiles(manifest, inManifest(manifest, output), generatedNames);
    if (faults.length > 0)
      throw new BrokenImage(
        `archive ${archive} is not as its manifest says: ${faults.map(({ message }) => message).join(", ")}`,
      );
  }
  return {
    description,
    compression: output.compression,
    encrypted: output.encrypted,
    archiveBytes: output.archiveBytes,
    bytes: output.files.reduce((sum, { size }) => sum + size, 0),
    files: output.files.length,
    verified: manifest?.files.filter(({ digest }) => digest !== undefined).length ?? 0,
  };
}

/** An archive has these for other tools, though the directory that it was made of may not. */
const generatedNames: readonly string[] = ["config.dump", "spec.dump"];

/**
 * The files as the manifest names them: by their path beside it, and with a digest of the kind that it has. What others have put around
 * a checkpoint of ours, as Podman does when it exports one, it doesn't know.
 */
function inManifest(manifest: CheckpointManifest, { files, contents }: ExtractOutput): FoundInArchive[] {
  const prefix = contents[MANIFEST_NAME] === undefined ? "checkpoint/" : "";
  const named = new Map(manifest.files.map(({ path, digest }) => [path, digest]));
  const beside = files.filter(({ path }) => path.startsWith(prefix));
  return beside.map(({ path, size, digests }) => {
    const name = path.slice(prefix.length);
    const expected = named.get(name);
    // None of that kind, in an archive with two manifests: it is not what it should be, rather than not looked at.
    const digest =
      expected && (digests.find((one) => algorithmOf(one) === algorithmOf(expected)) ?? "unknown");
    return { path: name, size, digest };
  });
}

type FoundInArchive = { path: string; size: number; digest: string | undefined };

async function describeContents({ files, contents }: ExtractOutput): Promise<CheckpointDescription> {
  const text = contents[MANIFEST_NAME] ?? contents[`checkpoint/${MANIFEST_NAME}`];
  const manifest = text === undefined ? undefined : parseManifest(text, MANIFEST_NAME);
  const readJson = async (name: string) =>
    contents[name] === undefined ? undefined : parseJson(contents[name], name);
  return await describe(
    files.map(({ path }) => path),
    readJson,
    manifest,
  );
}

/** What a checkpoint's directory is, of any layout. @throws NotFound, BrokenImage, Unsupported */
export async function describeDirectory(
  directory: string,
  signal?: AbortSignal,
): Promise<CheckpointDescription> {
  await expectDirectory(directory);
  const files = (await listTree(directory, signal))
    .filter(({ type }) => type === "file")
    .map(({ path }) => path);
  try {
    const { manifest } = await findManifest(directory);
    return await describe(files, (name) => readJsonFile(join(directory, name)), manifest);
  } catch (error) {
    if (error instanceof BrokenImage)
      throw new BrokenImage(`${directory}: ${error.message}`, { cause: error });
    throw error;
  }
}

/** Compares a directory with its manifest. @throws BrokenImage naming every fault; NotFound when it has no manifest */
export async function verifyDirectory(
  directory: string,
  signal?: AbortSignal,
): Promise<{ manifest: CheckpointManifest; verified: number }> {
  await expectDirectory(directory);
  const { manifest, at } = await findManifest(directory);
  if (!manifest)
    throw new NotFound(`${directory} has no ${MANIFEST_NAME}: there is nothing to compare it with`);
  const faults = (await verifyFiles(manifest, at, signal)).filter(
    ({ kind, path }) => kind !== "extra" || !generatedNames.includes(path),
  );
  if (faults.length > 0)
    throw new BrokenImage(
      `checkpoint ${directory} is not as its manifest says: ${faults.map(({ message }) => message).join(", ")}`,
    );
  return { manifest, verified: manifest.files.filter(({ digest }) => digest !== undefined).length };
}

/** Beside CRIU's images, or beside their directory. */
async function findManifest(
  directory: string,
): Promise<{ manifest: CheckpointManifest | undefined; at: string }> {
  for (const at of [directory, join(directory, "checkpoint")]) {
    const manifest = await readManifest(at);
    if (manifest) return { manifest, at };
  }
  return { manifest: undefined, at: directory };
}

/** Half archives of this name whose writers were killed. A living one's has a lock. */
async function sweepPartials(archive: string): Promise<void> {
  const names = await readdir(dirname(archive)).catch((cause) => {
    throw new NotFound(`archive ${archive} can't be written: ${(cause as Error).message}`, { cause });
  });
  for (const name of names) {
    if (!name.startsWith(`.${basename(archive)}.`) || !/\.[0-9a-f-]{36}\.partial(\.diff)?$/.test(name))
      continue;
    const path = join(dirname(archive), name.replace(/\.diff$/, ""));
    let fd: number;
    try {
      fd = openSync(path, "r");
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw SyscallFailed.from(error);
      await rm(join(dirname(archive), name), { force: true }); // the scratch file of one that has gone
      continue;
    }
    try {
      if (flock(fd, "exclusive")) await rm(join(dirname(archive), name), { force: true });
    } finally {
      closeSync(fd);
    }
  }
}

async function expectFile(path: string): Promise<void> {
  const info = await stat(path).catch(() => undefined);
  if (!info) throw new NotFound(`archive ${path} does not exist`);
  if (!info.isFile()) throw new InvalidRequest(`archive ${path} is not a regular file`);
}

async function expectDirectory(path: string): Promise<void> {
  const info = await lstat(path).catch(() => undefined);
  if (!info) throw new NotFound(`checkpoint ${path} does not exist`);
  if (!info.isDirectory()) throw new InvalidRequest(`checkpoint ${path} is not a directory`);
}

/** Whether it is one; false when it is something else, or not there. */
export async function isDirectory(path: string): Promise<boolean> {
  return (await stat(path).catch(() => undefined))?.isDirectory() ?? false;
}

const exists = (path: string) =>
  access(path).then(
    () => true,
    () => false, // whatever else is wrong with it shows when it is made
  );
