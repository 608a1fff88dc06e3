import { addonPart } from "./addon.ts";

// The typed face of addon/binding/xxh128.cc: XXH3 with 128 bits, of bytes and of files.

declare const state: unique symbol;
type State = { readonly [state]: never };

interface Xxh128Addon {
  xxh128Create(): State;
  xxh128Update(state: State, bytes: Uint8Array): void;
  xxh128ReadSync(state: State, fd: number, offset: number, length: number): number;
  xxh128Read(state: State, fd: number, offset: number, length: number, toDisk: boolean): Promise<number>;
  xxh128Digest(state: State): string;
  xxh128Files(
    directory: number,
    paths: readonly string[],
    most: number,
    mode: number,
  ): Promise<Xxh128OfFile[]>;
}

const addon = () => addonPart<Xxh128Addon>();

/** A hash in the making. */
export class Xxh128 {
  readonly #state = addon().xxh128Create();

  update(bytes: Uint8Array): void {
    addon().xxh128Update(this.#state, bytes);
  }

  /**
   * Reads a file and hashes what it reads; for worker threads.
   * @returns how many bytes there were: fewer than `length` at the end of the file
   */
  readSync(fd: number, offset: number, length: number): number {
    return addon().xxh128ReadSync(this.#state, fd, offset, length);
  }

  /**
   * The same in the thread pool. Until it is over, nothing else can be asked of this hash, and the descriptor must stay open.
   * @param options.toDisk  the kernel begins to write these bytes to the disk, which nobody waits for; see sync_file_range(2)
   */
  read(fd: number, offset: number, length: number, { toDisk = false } = {}): Promise<number> {
    return addon().xxh128Read(this.#state, fd, offset, length, toDisk);
  }

  /** 32 hexadecimal digits, as `xxh128sum` prints them. */
  digest(): string {
    return addon().xxh128Digest(this.#state);
  }
}

export interface Xxh128OfFile {
  size: number;
  /** absent: it has more bytes than asked for, or is growing */
  digest?: string;
}

/**
 * Hashes files in one trip to the thread pool.
 * @param directory  an open directory; the paths can't lead out of it, and no link is followed
 * @param most       bytes; what has more is not read
 * @param mode       what the files' mode becomes; 0: it stays
 * @throws SystemError with `path`, for the first that can't be read; EINVAL for what is not a regular file
 */
export function xxh128Files(
  directory: number,
  paths: readonly string[],
  most: number,
  mode = 0,
): Promise<Xxh128OfFile[]> {
  return addon().xxh128Files(directory, paths, most, mode);
}
