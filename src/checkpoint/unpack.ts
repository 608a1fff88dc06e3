import { createHash } from "node:crypto";
import { mkdir, readdir, readlink, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { BrokenImage } from "../errors/index.ts";
import { readRecord, writeRecord } from "../linux/record-file.ts";
import { extractArchive } from "./archive/index.ts";
import { isThere } from "./open.ts";

/*
 * Archives that are unpacked for a restore. Memory images need more room than a bundle has, whose file system is memory itself; so
 * they lie in a directory of their own, which outlives cedanad and the machine, and nobody asks for again when their container has gone:
 *
 *   <root>/<digest of the owner's directory>/       the checkpoint; there only when all of it was authentic and complete
 *   <root>/<digest of the owner's directory>.json   whose it is, and what it was unpacked from
 *
 * What belongs to a directory that isn't there any more is swept.
 */

interface Note {
  owner: string;
  /** in which the owner's path means something */
  mountNamespace: string;
  archive: string;
  /** of the archive: another file of that name is another archive */
  identity: string;
}

export class UnpackedCheckpoint {
  readonly #root: string;
  readonly #owner: string;
  readonly #path: string;

  /**
   * @param root   where all of them are: absolute, made when missing
   * @param owner  directory of whoever restores: the bundle
   */
  constructor(root: string, owner: string) {
    this.#root = root;
    this.#owner = owner;
    this.#path = join(root, createHash("sha256").update(owner).digest("hex").slice(0, 32));
  }

  /**
   * Unpacks, or finds unpacked what was unpacked for the same owner from the same archive.
   * @returns the directory
   * @throws as `extractArchive`; nothing is left then
   */
  async open(archive: string, secret: Uint8Array | undefined, signal: AbortSignal): Promise<string> {
    const { dev, ino, size, mtimeNs } = await stat(archive, { bigint: true });
    const wanted: Note = {
      owner: this.#owner,
      mountNamespace: await mountNamespace(),
      archive,
      identity: [dev, ino, size, mtimeNs].join(" "),
    };
    const noted = await readNote(this.#notePath);
    const isSame =
      noted && noted !== "broken" && noted.archive === archive && noted.identity === wanted.identity;
    if (isSame && (await isThere(this.#path))) return this.#path;
    await this.remove();
    await mkdir(this.#root, { recursive: true, mode: 0o700 });
    await sweepUnpacked(this.#root);
    await writeRecord(this.#notePath, wanted);
    try {
      await extractArchive(archive, this.#path, { ...(secret && { secret }), signal });
    } catch (error) {
      await this.remove();
      throw error;
    }
    return this.#path;
  }

  async remove(): Promise<void> {
    await rm(this.#path, { recursive: true, force: true });
    await rm(this.#notePath, { force: true });
  }

  get #notePath(): string {
    return `${this.#path}.json`;
  }
}

/** Removes what belongs to nobody any more, as far as can be seen from here. @returns their owners */
export async function sweepUnpacked(root: string): Promise<string[]> {
  const swept: string[] = [];
  const here = await mountNamespace();
  for (const name of await readdir(root).catch(() => [])) {
    const [, id] = /^([0-9a-f]{32})\.json$/.exec(name) ?? [];
    const note = id && (await readNote(join(root, name)));
    if (!note) continue;
    if (note === "broken") {
      for (const left of [id, name]) await rm(join(root, left), { recursive: true, force: true });
      continue;
    }
    if (note.mountNamespace !== here || (await isThere(note.owner))) continue;
    await new UnpackedCheckpoint(root, note.owner).remove();
    swept.push(note.owner);
  }
  return swept;
}

/**
 * A note isn't synced: the machine's end may leave half of it. No owner has survived that, and nobody's restore may fail for it.
 * @returns undefined when there is none
 */
async function readNote(path: string): Promise<Note | "broken" | undefined> {
  return await readRecord<Note>(path).catch((error) => {
    if (error instanceof BrokenImage) return "broken" as const;
    throw error;
  });
}

async function mountNamespace(): Promise<string> {
  return await readlink("/proc/self/ns/mnt");
}
