import { createWriteStream } from "node:fs";
import { mkdir, rm } from "node:fs/promises";
import { basename, dirname, isAbsolute, join } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { BrokenImage, InvalidRequest, ResourceExhausted } from "../../errors/index.ts";
import { hashFiles } from "../digest.ts";
import { ROOTFS_DIFF_NAME } from "../rootfs-diff/names.ts";
import { Staging } from "../staging.ts";
import { runJob } from "../worker/pool.ts";
import type { Limits } from "./extract.ts";
import { IMAGES_DIRECTORY, parseJson } from "./layout.ts";

/**
 * What `ctr container checkpoint` and containerd's client leave in the content store: an OCI index whose manifests are blobs of these
 * types. The names of image, runtime and snapshotter are annotations of the index.
 * Source: containerd core/images/mediatypes.go, client/container.go, client/container_checkpoint_opts.go.
 */
const mediaTypes = {
  criu: "application/vnd.containerd.container.criu.checkpoint.criu.tar",
  config: "application/vnd.containerd.container.checkpoint.config.v1+proto",
  runtimeOptions: "application/vnd.containerd.container.checkpoint.runtime.options+proto",
  rw: "application/vnd.containerd.container.rw.tar",
} as const;

/** The diff service's own types, by which the container's changes are stored. */
const layerType =
  /^application\/vnd\.(?:oci\.image\.layer\.v1\.tar(?:\+(?:gzip|zstd))?|docker\.image\.rootfs\.diff\.tar(?:\.(?:gzip|zstd))?)$/;

const annotation = {
  image: "org.opencontainers.image.ref.name",
  runtime: "io.containerd.checkpoint.runtime",
  snapshotter: "io.containerd.checkpoint.snapshotter",
} as const;

export interface Blob {
  mediaType: string;
  /** `sha256:…` */
  digest: string;
  size: number;
}

/** Gives a blob's bytes, from wherever it has them. What it gives is checked. */
export type BlobReader = (blob: Blob) => AsyncIterable<Uint8Array>;

export interface ContentStoreCheckpoint {
  /** tar of CRIU's images */
  criu: Blob;
  /** the container's changes to its root file system, as a layer */
  rootfsDiff: Blob | undefined;
  /** protobuf Any: the runtime spec */
  config: Blob | undefined;
  runtimeOptions: Blob | undefined;
  imageName: string;
  runtimeName: string;
  snapshotter: string;
}

/** @throws BrokenImage when it is no index of a checkpoint with a dumped task */
export function parseCheckpointIndex(bytes: Uint8Array): ContentStoreCheckpoint {
  const wrong = (why: string) => new BrokenImage(`checkpoint index: ${why}`);
  const index = parseJson(Buffer.from(bytes).toString("utf8"), "checkpoint index") as {
    manifests?: unknown;
    annotations?: Record<string, unknown>;
  } | null;
  if (!Array.isArray(index?.manifests)) throw wrong("it has no manifests");
  const blobs = index.manifests.map((value: Partial<Blob> | null): Blob => {
    const { mediaType, digest, size } = value ?? {};
    if (typeof mediaType !== "string" || typeof digest !== "string" || !/^sha256:[0-9a-f]{64}$/.test(digest))
      throw wrong("a descriptor has no media type or no SHA-256 digest");
    if (!Number.isSafeInteger(size) || size! < 0) throw wrong(`${digest} has no size`);
    return { mediaType, digest, size: size! };
  });
  const one = (matches: (type: string) => boolean, what: string): Blob | undefined => {
    const found = blobs.filter(({ mediaType }) => matches(mediaType));
    if (found.length > 1) throw wrong(`it has ${found.length} ${what}`);
    return found[0];
  };
  const criu = one((type) => type === mediaTypes.criu, "dumps");
  if (!criu) throw wrong("it holds no dump of a task (made without --task?)");
  const note = (key: string) => {
    const value = index.annotations?.[key];
    return typeof value === "string" ? value : "";
  };
  return {
    criu,
    rootfsDiff: one((type) => type === mediaTypes.rw || layerType.test(type), "layers"),
    config: one((type) => type === mediaTypes.config, "configurations"),
    runtimeOptions: one((type) => type === mediaTypes.runtimeOptions, "runtime options"),
    imageName: note(annotation.image),
    runtimeName: note(annotation.runtime),
    snapshotter: note(annotation.snapshotter),
  };
}

/**
 * Extracts a checkpoint of containerd's content store into a new directory, as ours are laid out: CRIU's images in `checkpoint/`, the layer
 * as `rootfs-diff.tar`. Every blob has its size and digest, or nothing is made.
 * @param directory  absolute, must not exist
 */
export async function extractContentStore(
  checkpoint: ContentStoreCheckpoint,
  read: BlobReader,
  directory: string,
  options: { limits?: Limits; signal?: AbortSignal } = {},
): Promise<{ files: number; bytes: number }> {
  if (!isAbsolute(directory)) throw new InvalidRequest(`directory ${directory} is not an absolute path`);
  await using staging = await Staging.beside(dirname(directory), basename(directory), { shared: true });
  const { signal, limits = {} } = options;
  const fetch = async (blob: Blob, name: string) => {
    if (blob.size > (limits.bytes ?? Number.POSITIVE_INFINITY))
      throw new ResourceExhausted(
        `checkpoint index: ${blob.digest} has ${blob.size} bytes, more than ${limits.bytes}`,
      );
    const path = join(staging.path, name);
    await pipeline(
      Readable.from(bounded(read(blob), blob)),
      createWriteStream(path, { flags: "wx", mode: 0o600 }),
      { signal },
    );
    const [hashed] = await hashFiles(
      staging.path,
      [{ path: name, size: blob.size, algorithm: "sha256" }],
      signal,
    );
    if (hashed!.digest !== blob.digest || hashed!.size !== blob.size)
      throw new BrokenImage(
        `checkpoint index: blob ${blob.digest} has ${hashed!.size} bytes and the digest ${hashed!.digest}`,
      );
    return path;
  };
  if (checkpoint.rootfsDiff) await fetch(checkpoint.rootfsDiff, ROOTFS_DIFF_NAME);
  const archive = await fetch(checkpoint.criu, ".criu.tar");
  const into = join(staging.path, IMAGES_DIRECTORY);
  await mkdir(into, { mode: 0o700 });
  const { files } = await runJob(
    "extractArchive",
    { archive, into, secret: undefined, limits, wanted: [] },
    signal,
  );
  await rm(archive);
  if (!files.some(({ path }) => path === "inventory.img"))
    throw new BrokenImage(`checkpoint index: dump ${checkpoint.criu.digest} holds no inventory.img`);
  await staging.commit(signal ? { signal } : {});
  return { files: files.length, bytes: files.reduce((sum, { size }) => sum + size, 0) };
}

async function* bounded(chunks: AsyncIterable<Uint8Array>, blob: Blob): AsyncGenerator<Uint8Array> {
  let size = 0;
  for await (const chunk of chunks) {
    size += chunk.length;
    if (size > blob.size)
      throw new BrokenImage(`checkpoint index: blob ${blob.digest} has more than its ${blob.size} bytes`);
    yield chunk;
  }
}
