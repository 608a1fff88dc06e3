import { closeSync, constants, openSync, readSync, write as writeToFd } from "node:fs";
import { setImmediate as nextTurn, setTimeout as sleep } from "node:timers/promises";
import { Unsupported } from "../errors/index.ts";
import { notFoundOr } from "./cgroup-files.ts";

export type FreezerState = "thawed" | "freezing" | "frozen";

// A freeze takes a fraction of a millisecond unless a process waits for a disk or a CPU, so look again at once for the
// first looks (some 10 us each) and then every millisecond (the finest that Node's timers do).
const eagerLooks = 50;
// v1: a process that forks while its cgroup freezes can be missed; writing FROZEN again catches the child. A short thaw
// lets processes get out of a place where they can't freeze. Source: runc, libcontainer/cgroups/fs/freezer.go.
const thawEveryLooks = 100;

/**
 * The freezer's files, held open.
 *
 * Looking is a read(2) of a few bytes at once, about 5 us: a detour through the thread pool takes twenty times that, and
 * ever longer on a host whose CPUs are busy, which is where frozen time hurts. Writing goes through the thread pool,
 * because it waits for the kernel's lock on all cgroups.
 */
export class Freezer {
  readonly name: string;
  readonly #version: 1 | 2;
  readonly #control: number;
  /** v2 says in another file whether everybody stands. */
  readonly #events: number;
  readonly #buffer = Buffer.alloc(256);

  private constructor(name: string, version: 1 | 2, control: number, events: number) {
    this.name = name;
    this.#version = version;
    this.#control = control;
    this.#events = events;
  }

  /** @throws Unsupported without a freezer, NotFound when the cgroup has been removed */
  static open(
    cgroup: { readonly version: 1 | 2; path(controller: string): string | undefined },
    flags: number = constants.O_RDWR,
  ): Freezer {
    const path = cgroup.path("freezer");
    if (path === undefined)
      throw new Unsupported("freezing: no freezer hierarchy is mounted, or it isn't used");
    let control: number | undefined;
    try {
      control = openSync(`${path}/${cgroup.version === 2 ? "cgroup.freeze" : "freezer.state"}`, flags);
      const events = cgroup.version === 2 ? openSync(`${path}/cgroup.events`, constants.O_RDONLY) : control;
      return new Freezer(path, cgroup.version, control, events);
    } catch (err) {
      if (control !== undefined) closeSync(control);
      throw notFoundOr(err, path);
    }
  }

  [Symbol.dispose](): void {
    closeSync(this.#control);
    if (this.#events !== this.#control) closeSync(this.#events);
  }

  async want(state: "FROZEN" | "THAWED"): Promise<void> {
    const text = this.#version === 1 ? state : state === "FROZEN" ? "1" : "0";
    try {
      await write(this.#control, text);
    } catch (err) {
      throw notFoundOr(err, this.name);
    }
  }

  /** Whether freezing has been asked for, here or above (v2: here). */
  wanted(): boolean {
    if (this.#version === 1) return this.state() !== "thawed";
    return this.#read(this.#control).startsWith("1");
  }

  state(): FreezerState {
    if (this.#version === 1) {
      const text = this.#read(this.#control).trim();
      return text === "FROZEN" ? "frozen" : text === "FREEZING" ? "freezing" : "thawed";
    }
    if (/^frozen 1$/m.test(this.#read(this.#events))) return "frozen";
    return this.wanted() ? "freezing" : "thawed";
  }

  /** Looks until it is in that state. @returns false when the time is over */
  async settled(goal: FreezerState, timeoutMs: number, signal?: AbortSignal): Promise<boolean> {
    const deadline = performance.now() + timeoutMs;
    for (let look = 1; ; look++) {
      signal?.throwIfAborted();
      if (this.state() === goal) return true;
      if (performance.now() >= deadline) return false;
      // Between looks others have their turn on the event loop.
      if (look <= eagerLooks) await nextTurn();
      else await sleep(1, undefined, signal && { signal });
      if (this.#version === 1 && goal === "frozen" && look > eagerLooks) {
        if (look % thawEveryLooks === 0) {
          await this.want("THAWED");
          await sleep(10, undefined, signal && { signal });
        }
        await this.want("FROZEN");
      }
    }
  }

  #read(fd: number): string {
    try {
      return this.#buffer.toString("latin1", 0, readSync(fd, this.#buffer, 0, this.#buffer.length, 0));
    } catch (err) {
      throw notFoundOr(err, this.name);
    }
  }
}

function write(fd: number, text: string): Promise<void> {
  return new Promise((resolve, reject) => {
    writeToFd(fd, text, 0, "latin1", (err) => (err ? reject(err) : resolve()));
  });
}
