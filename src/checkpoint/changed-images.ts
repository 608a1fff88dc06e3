import { mkdir, readdir, readFile, realpath, rm, symlink, writeFile } from "node:fs/promises";
import { join, relative } from "node:path";
import { encodeMessage, type Message, readOne } from "../criu/image/index.ts";

/*
 * Images as CRIU is to see them, where the new container wants something else than they say: a directory of links to them, and in the place
 * of some their copies with what has changed. The images themselves stay as they were taken.
 */

/** An image with one message, changed. */
export interface ChangedImage {
  /** of the file */
  readonly name: string;
  /** of the message */
  readonly kind: string;
  readonly message: Message;
}

/** The directory that CRIU is to take for the images, in an owner's directory. */
export function changedImages(directory: string): string {
  return join(directory, "criu-images");
}

/** Makes that directory. */
export async function linkImages(
  imagePath: string,
  directory: string,
  changes: readonly ChangedImage[],
): Promise<void> {
  const place = changedImages(directory);
  await rm(place, { recursive: true, force: true }); // of an attempt before a crash
  await mkdir(place, { mode: 0o700 });
  // Relative: CRIU opens some of them when the container's root is already its own, but the directory is still the host's.
  const there = relative(await realpath(place), await realpath(imagePath));
  for (const name of await readdir(imagePath))
    if (!changes.some((change) => change.name === name)) await symlink(join(there, name), join(place, name));
  for (const { name, kind, message } of changes) {
    const bytes = encodeMessage(kind, message);
    const words = (await readFile(join(imagePath, name))).subarray(0, 8); // the magic ones
    const length = Buffer.alloc(4);
    length.writeUInt32LE(bytes.length);
    await writeFile(join(place, name), Buffer.concat([words, length, bytes]), { mode: 0o600 });
  }
}

const CGROUPS = "cgroup.img";

/**
 * The image of cgroups with nothing but the hierarchy of version 2. Of one that an engine took alone where that is mounted beside others, CRIU
 * would make in those what was there on the whole host at the dump, other containers' cgroups too, which nobody removes.
 * @returns undefined where it names none in others (as ours), or none in that of version 2
 */
export async function withoutOtherHierarchies(imagePath: string): Promise<ChangedImage | undefined> {
  const before = await readOne(join(imagePath, CGROUPS), "CGROUP").catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "ENOENT") throw error; // nobody has asked for cgroups
  });
  const all = (before?.controllers ?? []) as Message[];
  const controllers = all.filter(isOfVersion2);
  const strangers = all.filter((one) => !isOfVersion2(one) && ((one.dirs ?? []) as Message[]).length > 0);
  if (!before || strangers.length === 0 || controllers.length === 0) return undefined;
  const sets = ((before.sets ?? []) as Message[]).map((set) => ({
    ...set,
    ctls: ((set.ctls ?? []) as Message[]).filter(({ name }) => name === ""),
  }));
  return { name: CGROUPS, kind: "cgroup_entry", message: { ...before, sets, controllers } };
}

function isOfVersion2({ cnames }: Message): boolean {
  return (cnames as string[]).includes("");
}
