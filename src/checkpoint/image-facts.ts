import { join } from "node:path";
import { ImageFault, type Message, readImage } from "../criu/image/index.ts";
import { showAddress } from "../linux/addresses.ts";

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

/** A socket of IP that is bound. */
export interface DumpedSocket {
  isTcp: boolean;
  /** of TCP, as the kernel numbers them */
  state: number;
  /** its own, as `localAddresses` has them; undefined: any */
  address: string | undefined;
  port: number;
  /** it needs no address that exists */
  freeBind: boolean;
}

/** What CRIU's images ask of the surroundings of a restore. */
export interface ImageFacts {
  /** of processes, threads, process groups and sessions, as CRIU makes them again; ascending */
  ids: number[];
  mounts: DumpedMount[];
  files: DumpedFile[];
  sockets: DumpedSocket[];
  /** of the container's own namespace; undefined: it has none */
  hostname: string | undefined;
  /** name of the image that has it */
  hostnameImage: string | undefined;
}

/**
 * Reads the images of mounts and files: some KB, whatever the memory.
 * @returns undefined where images are broken or missing: what checks them says more about it
 */
export async function readImageFacts(imagePath: string): Promise<ImageFacts | undefined> {
  try {
    const image = (name: string) => readImage(join(imagePath, `${name}.img`));
    const tree = await image("pstree");
    const [root] = tree;
    const [ids] = await image(`ids-${Number(root?.pid)}`);
    const hostnameImage = `utsns-${Number(ids?.uts_ns_id)}`;
    const [mounts, files, remaps, [uts]] = await Promise.all([
      // Without a mount namespace of its own, a process tree has none.
      image(`mountpoints-${Number(ids?.mnt_ns_id)}`).catch(absent),
      image("files").catch(absent),
      image("remap-fpath").catch(absent),
      image(hostnameImage).catch(absent),
    ]);
    const deleted = new Set(remaps.map(({ orig_id }) => Number(orig_id)));
    return {
      ids: idsOf(tree),
      mounts: mounts.map(mountOf),
      files: files
        .map(({ reg }) => reg as Message | undefined)
        .filter((reg) => reg !== undefined && !deleted.has(Number(reg.id)))
        .map((reg) => fileOf(reg!)),
      sockets: files
        .map(({ isk }) => isk as Message | undefined)
        .filter((isk) => isk !== undefined)
        .map(socketOf),
      hostname: uts && textOf(uts.nodename),
      hostnameImage: uts && `${hostnameImage}.img`,
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

/**
 * A process group or session whose first process has ended gets a helper of its id, which ends when the others are there; but for those of
 * the first process, which are others' where it hasn't its own.
 */
function idsOf(tree: readonly Message[]): number[] {
  const numbers = (values: unknown[]) => values.map(Number);
  const processes = new Set(
    tree.flatMap(({ pid, threads }) => numbers([pid, ...((threads ?? []) as unknown[])])),
  );
  const [root] = tree;
  const outside = numbers([root?.pgid, root?.sid]).filter((id) => !processes.has(id));
  const groups = tree
    .flatMap(({ pgid, sid }) => numbers([pgid, sid]))
    .filter((id) => id > 0 && !outside.includes(id));
  return [...new Set([...processes, ...groups])].sort((a, b) => a - b);
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

const AF_INET = 2;
const IPPROTO_TCP = 6;

function socketOf(socket: Message): DumpedSocket {
  const words = ((socket.src_addr ?? []) as number[]).map((word) => {
    const bytes = Buffer.alloc(4);
    bytes.writeUInt32LE(Number(word) >>> 0); // as they are in memory
    return bytes;
  });
  return {
    isTcp: Number(socket.proto) === IPPROTO_TCP,
    state: Number(socket.state),
    address: addressOf(Number(socket.family), Buffer.concat(words)),
    port: Number(socket.src_port),
    freeBind: Boolean((socket.ip_opts as Message | undefined)?.freebind),
  };
}

/** As the kernel's tables name it; undefined for the one that stands for all. */
function addressOf(family: number, bytes: Buffer): string | undefined {
  const isMapped = bytes.length === 16 && bytes.subarray(0, 12).equals(MAPPED);
  if (bytes.every((byte) => byte === 0)) return undefined;
  if (family === AF_INET || isMapped) {
    const last = [...bytes.subarray(isMapped ? 12 : 0)];
    return last.every((byte) => byte === 0) ? undefined : showAddress(Buffer.from(last));
  }
  return showAddress(bytes);
}

/** Of addresses of version 4 on a socket of version 6. */
const MAPPED = Buffer.from("00000000000000000000ffff", "hex");

/** A name that isn't UTF-8 is none that we compare. */
function textOf(value: Message[string] | undefined): string {
  return typeof value === "string" ? value : "";
}
