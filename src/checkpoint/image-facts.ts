import { join } from "node:path";
import { ImageFault, type Message, readImage } from "../criu/image/index.ts";

/** A mount of the container, as CRIU's images have it. */
export interface DumpedMount {
  id: number;
  parentId: number;
  /** in the container */
  mountPoint: string;
  /** of the mounted file system: what is shown there */
  root: string;
  /** what the engine called it, when it comes from outside: the restore must be told what it is there */
  externalKey: string | undefined;
}

/** A file that was open or mapped, by a path; CRIU opens it again and compares it. */
export interface DumpedFile {
  mountId: number;
  /** in the container */
  path: string;
  /** undefined: of a file whose size CRIU doesn't compare */
  size: bigint | undefined;
  /** as stat(2) has it */
  mode: number | undefined;
}

/** What CRIU's images ask of the surroundings of a restore. */
export interface ImageFacts {
  mounts: DumpedMount[];
  files: DumpedFile[];
}

/**
 * Reads the images of mounts and files: some KB, whatever the memory.
 * @returns undefined where images are broken or missing: what checks them says more about it
 */
export async function readImageFacts(imagePath: string): Promise<ImageFacts | undefined> {
  try {
    const image = (name: string) => readImage(join(imagePath, `${name}.img`));
    const [root] = await image("pstree");
    const [ids] = await image(`ids-${Number(root?.pid)}`);
    const [mounts, files, remaps] = await Promise.all([
      // Without a mount namespace of its own, a process tree has none.
      image(`mountpoints-${Number(ids?.mnt_ns_id)}`).catch(absent),
      image("files").catch(absent),
      image("remap-fpath").catch(absent),
    ]);
    const deleted = new Set(remaps.map(({ orig_id }) => Number(orig_id)));
    return {
      mounts: mounts.map(mountOf),
      files: files
        .map(({ reg }) => reg as Message | undefined)
        .filter((reg) => reg !== undefined && !deleted.has(Number(reg.id)))
        .map((reg) => fileOf(reg!)),
    };
  } catch (error) {
    if (error instanceof ImageFault || (error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

function absent(error: NodeJS.ErrnoException): Message[] {
  if (error.code === "ENOENT") return [];
  throw error;
}

function mountOf(mount: Message): DumpedMount {
  return {
    id: Number(mount.mnt_id),
    parentId: Number(mount.parent_mnt_id),
    mountPoint: textOf(mount.mountpoint),
    root: textOf(mount.root),
    externalKey: mount.ext_key === undefined ? undefined : textOf(mount.ext_key),
  };
}

function fileOf(file: Message): DumpedFile {
  return {
    mountId: Number(file.mnt_id ?? -1),
    path: textOf(file.name),
    size: file.size === undefined ? undefined : BigInt(file.size as bigint),
    mode: file.mode === undefined ? undefined : Number(file.mode),
  };
}

/** A name that isn't UTF-8 is none that we compare. */
function textOf(value: Message[string] | undefined): string {
  return typeof value === "string" ? value : "";
}
