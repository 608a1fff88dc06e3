import { basename, dirname, join } from "node:path";
import { NotFound } from "../../errors/index.ts";
import { readManifest } from "../manifest.ts";
import { writeManifest } from "../manifest-files.ts";
import { Staging } from "../staging.ts";
import type { Compression } from "./compressions.ts";
import { createArchive } from "./index.ts";
import { containerOf } from "./layout.ts";

/** Names as people expect them of a tar. */
const archiveNames: Readonly<Record<Compression, string>> = {
  none: "checkpoint.tar",
  gzip: "checkpoint.tar.gz",
  lz4: "checkpoint.tar.lz4",
  zstd: "checkpoint.tar.zst",
};

/**
 * Makes a checkpoint's directory in the store one with an archive: the archive, and a manifest whose `files` names it and whose `archive`
 * says what it is. The two directories are swapped: at each moment the one or the other is there, whole.
 * @param spec  of the container, for tools that read `spec.dump`
 */
export async function archiveCheckpoint(
  directory: string,
  options: { compression: Compression; spec: object; secret?: Uint8Array; signal?: AbortSignal },
): Promise<void> {
  const { compression, spec, secret, signal } = options;
  const manifest = await readManifest(directory);
  if (!manifest) throw new NotFound(`${directory} is no checkpoint of ours: it has no manifest`);
  const file = archiveNames[compression];
  await using staging = await Staging.beside(dirname(directory), basename(directory), { replace: true });
  await createArchive(directory, join(staging.path, file), {
    compression,
    container: { ...containerOf(manifest), spec },
    ...(secret && { secret }),
    ...(signal && { signal }),
  });
  const { version: _version, files: _files, ...facts } = manifest;
  await writeManifest(
    staging.path,
    { ...facts, archive: { file, compression, encrypted: secret !== undefined } },
    { digests: true, ...(signal && { signal }) },
  );
  await staging.commit(signal ? { signal } : {});
}
