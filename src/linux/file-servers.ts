import { TimedOut, Unavailable } from "../errors/index.ts";
import type { NumbersOfStat } from "./addon.ts";
import { isServed, statApart, type Waiting } from "./apart.ts";

/** A file system that doesn't answer by then counts as dead. */
export const PATIENCE_MS = 2_000;
/** Questions under way at once: each has a thread. */
const MAX_QUESTIONS = 8;
/** After so many mounts without an answer no other is asked. */
const MAX_SILENT = 8;
/** All containers together leave so many questions behind, and room for those of callers. */
const MAX_LEFT_BEHIND = 128;

/** Who answers for the files of a mount: the kernel itself; a server; a server that doesn't. */
type Answering = "kernel" | "server" | "nobody";

/**
 * The servers of the file systems that some processes have files on. A container may be such a server itself, any number of times, and mean not to
 * answer: so few are asked at once, none again that was silent, and none at all when many were.
 *
 * A mount is told from others by `mount`, which stays the same as long as it is there.
 */
export class FileServers {
  readonly #answering = new Map<string, Promise<Answering>>();
  readonly #silent = new Set<string>();
  readonly #line: (() => void)[] = [];
  #questions = 0;

  /** @param path  a file of the mount's */
  answering(mount: string, path: string): Promise<Answering> {
    const known = this.#answering.get(mount) ?? this.#find(mount, path);
    this.#answering.set(mount, known);
    return known;
  }

  async #find(mount: string, path: string): Promise<Answering> {
    try {
      const served = await this.#ask(mount, () => isServed(path, waiting(mount)));
      return served === undefined ? "nobody" : served ? "server" : "kernel";
    } catch {
      return "kernel"; // closed meanwhile: stat(2) says so
    }
  }

  /** stat(2) of a file that a server answers for. @returns undefined when it didn't. @throws what stat(2) says */
  async stat(mount: string, path: string): Promise<NumbersOfStat | undefined> {
    return await this.#ask(mount, () => statApart(path, waiting(mount)));
  }

  async #ask<T>(mount: string, question: () => Promise<T>): Promise<T | undefined> {
    await this.#turn();
    try {
      if (this.#silent.has(mount) || this.#silent.size >= MAX_SILENT) return undefined;
      return await question();
    } catch (err) {
      if (!(err instanceof TimedOut || err instanceof Unavailable)) throw err;
      this.#silent.add(mount);
      return undefined;
    } finally {
      this.#next();
    }
  }

  async #turn(): Promise<void> {
    if (this.#questions >= MAX_QUESTIONS) await new Promise<void>((resolve) => this.#line.push(resolve));
    else this.#questions += 1;
  }

  #next(): void {
    const next = this.#line.shift();
    if (next) next();
    else this.#questions -= 1;
  }
}

function waiting(mount: string): Waiting {
  return { timeoutMs: PATIENCE_MS, on: `mount ${mount}`, mostLeftBehind: MAX_LEFT_BEHIND };
}
