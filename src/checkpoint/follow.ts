import { closeSync, constants, lstatSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join, relative } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { BrokenImage, Cancelled, WrongState } from "../errors/index.ts";
import { openBeneath } from "../linux/addon.ts";
import { openDirectory } from "../linux/fd.ts";
import { Xxh128, xxh128Files } from "../linux/xxh128.ts";
import type { HashedFile } from "./digest-job.ts";

/*
 * Digests of the checkpoint that we are making, in a directory that is ours. Nobody starts a thread for them: the event loop only says which
 * bytes are next, and the thread pool reads and hashes them in bites of a millisecond or two, between which other calls have their turn.
 */

/** CRIU and the engines let everybody read what they write. */
const PRIVATE = 0o600;
const MIB = 1024 * 1024;
/** Read and hashed in 1 to 2 ms. */
const BITE_BYTES = 8 * MIB;
/** Files up to here are hashed many in one trip to the thread pool; none of them is worth following. */
const SMALL_BYTES = MIB;
const SMALL_AT_ONCE = 128;
/** How often a file that grows is looked at: CRIU writes some 25 MiB meanwhile, which take 4 ms. */
const LOOK_MS = 10;

/** A large file, as far as it has been hashed. */
class Followed {
  readonly path: string;
  readonly #hash = new Xxh128();
  size = 0;

  constructor(path: string) {
    this.path = path;
  }

  /** @returns whether there may be more */
  async takeBite(root: number, toDisk = false): Promise<boolean> {
    const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
    const fd = openBeneath(root, this.path, flags);
    try {
      const read = await this.#hash.read(fd, this.size, BITE_BYTES, { toDisk });
      this.size += read;
      return read === BITE_BYTES;
    } finally {
      closeSync(fd);
    }
  }

  digest(): string {
    return `xxh128:${this.#hash.digest()}`;
  }
}

/** Hashes CRIU's pages while it writes them. */
export interface Follower {
  /** so far */
  readonly bytes: number;
  /** The writer has ended: hashes what is left. @returns every regular file below the directory, sorted by path */
  finish(signal?: AbortSignal): Promise<HashedFile[]>;
  /** Ends it where nobody calls `finish`. */
  abandon(): void;
}

/**
 * Hashes CRIU's pages while it writes them: they grow at their end and nowhere else, one after another, and a core that CRIU leaves idle keeps
 * up with it, so that the digest of a large checkpoint is known soon after its end.
 * @param directory       of the checkpoint
 * @param options.images  directory of CRIU's images, in it or the same
 * @param options.toDisk  the disk begins with what is there, beside CRIU: somebody is going to wait for it
 */
export function followFiles(
  directory: string,
  options: { images?: string; toDisk?: boolean } = {},
): Follower {
  const { images = directory, toDisk = false } = options;
  const end = new AbortController();
  const followed = new Map<string, Followed>();
  const following = follow(directory, relative(directory, images), { followed, toDisk, end: end.signal });
  following.catch(() => {}); // told by finish, or abandoned
  return {
    get bytes() {
      return [...followed.values()].reduce((sum, { size }) => sum + size, 0);
    },
    finish: async (signal) => {
      end.abort();
      await following;
      return await digestTree(directory, { followed, signal });
    },
    abandon: () => end.abort(),
  };
}

async function follow(
  directory: string,
  images: string,
  { followed, toDisk, end }: { followed: Map<string, Followed>; toDisk: boolean; end: AbortSignal },
): Promise<void> {
  const sizeOf = (path: string) => lstatSync(join(directory, path), { throwIfNoEntry: false })?.size;
  const pages = (number: number) => join(images, `pages-${number}.img`);
  let before: number | undefined;
  for (let number = 1; !end.aborted; ) {
    const path = pages(number);
    const written = sizeOf(path);
    if (written !== undefined) {
      const left = written - (followed.get(path)?.size ?? 0);
      const isWhole = sizeOf(pages(number + 1)) !== undefined;
      // One that hasn't grown since the last look is whole, too, as a rule.
      const rests = written === before;
      before = written;
      if (left >= BITE_BYTES || ((isWhole || rests) && written > SMALL_BYTES && left > 0)) {
        const file = followed.get(path) ?? new Followed(path);
        followed.set(path, file);
        await withDirectory(directory, (root) => file.takeBite(root, toDisk));
        continue;
      }
      if (isWhole) {
        number++;
        before = undefined;
        continue;
      }
    }
    await sleep(LOOK_MS, undefined, { signal: end }).catch(() => {}); // the end has come
  }
}

/**
 * Hashes every regular file of a checkpoint that is being made, and makes it readable for its owner alone. For what comes from elsewhere:
 * `hashFiles`.
 * @param options.followed  files of which a part has been hashed
 * @returns sorted by path
 * @throws WrongState when a file changes meanwhile
 */
export async function digestTree(
  directory: string,
  options: { followed?: Map<string, Followed>; signal?: AbortSignal | undefined } = {},
): Promise<HashedFile[]> {
  const { followed = new Map<string, Followed>(), signal } = options;
  const whole = new Map<string, HashedFile>();
  const checkCancelled = () => {
    if (signal?.aborted) throw new Cancelled("hashing was cancelled", { cause: signal.reason });
  };
  await withDirectory(directory, async (root) => {
    const large = [...followed.values()];
    const sizes = new Map<string, number>();
    const takeLarge = async () => {
      for (let file = large.pop(); file; file = large.pop()) {
        do checkCancelled();
        while (await file.takeBite(root));
        whole.set(file.path, { path: file.path, size: file.size, digest: file.digest() });
      }
    };
    const takeSmall = async () => {
      const paths = await regularFiles(directory);
      for (let at = 0; at < paths.length; at += SMALL_AT_ONCE) {
        checkCancelled();
        const some = paths.slice(at, at + SMALL_AT_ONCE);
        const found = await xxh128Files(root, some, SMALL_BYTES, PRIVATE).catch((error) => {
          throw new BrokenImage(`${error.path} can't be hashed: ${error.message}`, { cause: error });
        });
        for (const [index, path] of some.entries()) {
          const { size, digest } = found[index]!;
          sizes.set(path, size);
          if (followed.has(path)) continue;
          if (digest === undefined) large.push(new Followed(path));
          else whole.set(path, { path, size, digest: `xxh128:${digest}` });
        }
      }
    };
    await allOf([takeSmall(), takeLarge()]);
    await allOf([takeLarge(), takeLarge()]); // what was not known to be large before
    for (const { path, size } of whole.values())
      if (sizes.get(path) !== size) throw new WrongState(`${path} changed after it was written`);
  });
  return [...whole.values()].sort((a, b) => (a.path < b.path ? -1 : 1));
}

/** CRIU's `parent` is a link to another checkpoint, and no part of this one. */
async function regularFiles(directory: string): Promise<string[]> {
  const entries = await readdir(directory, { withFileTypes: true, recursive: true });
  return entries
    .filter((entry) => entry.isFile())
    .map((entry) => relative(directory, join(entry.parentPath, entry.name)));
}

/** Two of the thread pool's four threads, at most. None is in work any more when this fails. */
async function allOf(lanes: [Promise<void>, Promise<void>]): Promise<void> {
  for (const lane of await Promise.allSettled(lanes)) if (lane.status === "rejected") throw lane.reason;
}

async function withDirectory<T>(directory: string, use: (fd: number) => Promise<T>): Promise<T> {
  const fd = openDirectory(directory);
  try {
    return await use(fd);
  } finally {
    closeSync(fd);
  }
}
