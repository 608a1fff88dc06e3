import { existsSync, readFileSync } from "node:fs";
import { mkdir, readFile, rm } from "node:fs/promises";
import { join } from "node:path";
import { explainCriuLog } from "../../criu/log.ts";
import { messageOf, SyscallFailed, Unavailable } from "../../errors/index.ts";
import { findNative, kcmp } from "../../linux/addon.ts";
import { isAlive, startTime } from "../../linux/proc.ts";

/*
 * `criu lazy-pages`, the daemon that fills the memory of a container that runs already, and what sees to it.
 *
 * Three things can go wrong with it, and each was seen: killed with pages left, the program reads zeros in their place and no error; a
 * dump meanwhile is incomplete and says nothing; a daemon that no restore connects to waits for ever. So it runs with a library of ours
 * in it (addon/pages/pages.c, whose head says what is where): a guard beside it that holds its userfaultfds, too, locks the images, knows how it
 * ended, and ends it after a deadline. Guard and daemon are children of the owner, not ours: they outlive us, and what happens while we
 * are away is in the guard's files. Here is the policy: who waits for what, and what becomes of the container.
 */

/** How long a daemon may take until it listens: it looks at the kernel first, for some 40 ms. */
const READY_LIMIT_MS = 10_000;
const READY_LOOKS_MS = 2;
/** How long it may wait for a restore to connect, unless a test is in a hurry. The guard sees to it, also without us. */
const RESTORE_LIMIT_MS = Number(process.env.CEDANA_LAZY_DEADLINE_MS) || 120_000;
/** How often we look whether it has ended. A container is filled for some seconds once in its life. */
const END_LOOKS_MS = 20;
/** How long it may take to end when it is told to. */
const STOP_LIMIT_MS = 5_000;
const STOP_LOOKS_MS = 5;

/** Who starts and signals processes that outlive us. */
export interface PageDaemonHost {
  /** Runs a program as a child; resolves when it has ended. A repetition of the same work finds the first one's. */
  spawn(options: {
    argv: string[];
    env: string[];
    /** stdout and stderr */
    outputPath: string;
    onSpawned: (pid: number) => void;
  }): Promise<{ exitStatus: number }>;
  /** kill(2) of a child or adopted child. @throws SyscallFailed ESRCH */
  signal(pid: number, signal: number): Promise<void>;
}

const LOST_GUARD: PageDaemonEnd = { filled: false, why: "has lost its guard, which somebody killed" };

type Signaller = Pick<PageDaemonHost, "signal">;

/** What the next cedanad must know. */
export interface PageDaemonRecord {
  /** of the guard's files */
  directory: string;
  guard: ProcessRecord;
  daemon: ProcessRecord;
}

interface ProcessRecord {
  pid: number;
  /** in clock ticks since boot */
  started: number;
}

export type PageDaemonEnd =
  | { readonly filled: true }
  /** in words that follow "the page daemon" */
  | { readonly filled: false; readonly why: string };

export interface StartPageDaemon {
  /** for the guard's files and CRIU's log; made when missing */
  readonly directory: string;
  readonly imagePath: string;
  /** directory of the checkpoint, which is in use (see use.ts) until the daemon has ended */
  readonly checkpointPath: string;
  /** CRIU's work path, the same as the restore's */
  readonly workPath: string;
  /** the work was begun by a cedanad before us: what it left is gone on with */
  readonly repeated: boolean;
}

export class PageDaemon {
  readonly record: PageDaemonRecord;
  /** Never rejects. */
  readonly ended: Promise<PageDaemonEnd>;
  readonly #host: Signaller;
  #stopped = false;

  private constructor(host: Signaller, record: PageDaemonRecord) {
    this.#host = host;
    this.record = record;
    this.ended = this.#watch();
  }

  /**
   * Starts the daemon; when it returns, a restore can connect.
   * @throws Unavailable saying why it can't be had; nothing of it is left then
   */
  static async start(host: PageDaemonHost, options: StartPageDaemon): Promise<PageDaemon> {
    try {
      return await PageDaemon.#start(host, options);
    } catch (error) {
      await rm(options.directory, { recursive: true, force: true });
      throw error;
    }
  }

  static async #start(host: PageDaemonHost, options: StartPageDaemon): Promise<PageDaemon> {
    const { directory, imagePath, checkpointPath, workPath } = options;
    const library = findNative("libcedana-pages.so", "build/pages", "CEDANA_PAGES_LIBRARY");
    if (!options.repeated) await rm(directory, { recursive: true, force: true });
    await mkdir(directory, { recursive: true, mode: 0o700 });
    const outputPath = join(directory, "output");
    let spawnedPid = 0;
    let failure: Error | undefined;
    let endedWith: number | undefined;
    void host
      .spawn({
        // By its status-fd, a byte on stdout, it says that it listens. The machine's own configuration is not for it: it may name
        // another log, or the restore's options.
        argv: [
          ...["criu", "lazy-pages", "--no-default-config", "--images-dir", imagePath, "--work-dir", workPath],
          ...["--log-file", join(directory, LOG_NAME), "-v2", "--status-fd", "1"],
        ],
        env: [
          `LD_PRELOAD=${library}`,
          `CEDANA_PAGES_DIR=${directory}`,
          `CEDANA_PAGES_CHECKPOINT=${checkpointPath}`,
          `CEDANA_PAGES_DEADLINE_MS=${RESTORE_LIMIT_MS}`,
        ],
        outputPath,
        onSpawned: (pid) => {
          spawnedPid = pid;
        },
      })
      .then(
        ({ exitStatus }) => {
          endedWith = exitStatus;
        },
        (error: Error) => {
          failure = error;
        },
      );
    const limit = performance.now() + READY_LIMIT_MS;
    for (;;) {
      if (failure) throw new Unavailable(`start criu lazy-pages: ${failure.message}`, { cause: failure });
      // Repeated: whoever asks for `ended` is told how, and the restore that it was for goes on from where it was.
      if (options.repeated && existsSync(join(directory, "ended"))) break;
      if (endedWith !== undefined) {
        const end = readEnd(directory); // the guard's own status says no more than that it wasn't 0
        const how = end && !end.filled ? end.why : `ended with status ${endedWith}`;
        throw new Unavailable(`criu lazy-pages ${how}${await lastWords(directory)}`);
      }
      if (isReady(outputPath)) break;
      if (performance.now() > limit) {
        await kill(host, spawnedPid);
        throw new Unavailable(`criu lazy-pages does not listen after ${READY_LIMIT_MS} ms`);
      }
      await delay(READY_LOOKS_MS);
    }
    const guarded = readGuard(directory);
    if (!guarded) {
      await kill(host, spawnedPid);
      throw new Unavailable(
        `criu lazy-pages runs without the guard (${library}): a static CRIU, or one with capabilities of its file`,
      );
    }
    const [guard, daemon] = guarded;
    if (!existsSync(join(directory, "ended")) && !shareDescriptors(guard, daemon)) {
      await kill(host, guard);
      throw new Unavailable(
        "the guard has no part in CRIU's descriptors: criu in PATH is a script around CRIU",
      );
    }
    return new PageDaemon(host, {
      directory,
      guard: { pid: guard, started: startTime(guard) ?? 0 },
      daemon: { pid: daemon, started: startTime(daemon) ?? 0 },
    });
  }

  /** The daemon as the cedanad before us left it. */
  static revive(host: Signaller, record: PageDaemonRecord): PageDaemon {
    return new PageDaemon(host, record);
  }

  /**
   * How it has ended by now, if it has, and before the restore that it was for: CRIU's daemon ends with status 1 when that fails, by
   * signal or for want of a restore when somebody has ended it.
   */
  endSoFar(): PageDaemonEnd | undefined {
    const end = readEnd(this.record.directory);
    if (end && !end.filled && /^ended with status/.test(end.why)) return undefined;
    return end ?? (isAlive(this.record.guard.pid, this.record.guard.started) ? undefined : LOST_GUARD);
  }

  /**
   * Ends it and removes its files: when the container has ended, or can't have come to run. The holder ends by itself, as soon as no
   * process lives whose memory it holds.
   */
  async stop(): Promise<void> {
    this.#stopped = true;
    const { guard, daemon, directory } = this.record;
    if (!(await end(this.#host, guard, SIGTERM))) await end(this.#host, guard, SIGKILL);
    await end(this.#host, daemon, SIGKILL); // its guard was killed: it is on its own
    await rm(directory, { recursive: true, force: true });
  }

  async #watch(): Promise<PageDaemonEnd> {
    const { directory, guard } = this.record;
    for (;;) {
      const alive = isAlive(guard.pid, guard.started); // before the file: it is written, then the guard ends
      const end = readEnd(directory);
      if (end?.filled) return end;
      if (end) return { filled: false, why: `${end.why}${await lastWords(directory)}` };
      if (this.#stopped) return { filled: false, why: "was stopped" };
      if (!alive) return LOST_GUARD;
      await delay(END_LOOKS_MS);
    }
  }
}

const SIGTERM = 15;
const SIGKILL = 9;
const LOG_NAME = "lazy-pages.log";

/** Ends what was spawned, and with it what it has started. A guard takes its daemon along, CRIU alone is only that. */
async function kill(host: Signaller, pid: number): Promise<void> {
  const started = pid === 0 ? undefined : startTime(pid);
  if (started === undefined) return; // it was never started, or has ended
  if (!(await end(host, { pid, started }, SIGTERM))) await end(host, { pid, started }, SIGKILL);
}

/** @returns whether it is there no longer */
async function end(host: Signaller, { pid, started }: ProcessRecord, signal: number): Promise<boolean> {
  if (!isAlive(pid, started)) return true;
  await host.signal(pid, signal).catch((error: unknown) => {
    if (!(error instanceof SyscallFailed && error.code === "ESRCH")) throw error; // it has just ended
  });
  const limit = performance.now() + STOP_LIMIT_MS;
  while (isAlive(pid, started) && performance.now() < limit) await delay(STOP_LOOKS_MS);
  return !isAlive(pid, started);
}

/** A program that was executed by what the library had divided has a table of its own. */
function shareDescriptors(guard: number, daemon: number): boolean {
  try {
    return kcmp(guard, daemon, "files") === 0;
  } catch {
    return false; // ESRCH: one has ended
  }
}

function isReady(outputPath: string): boolean {
  try {
    return readFileSync(outputPath).includes(0);
  } catch {
    return false; // not made yet
  }
}

function readGuard(directory: string): [guard: number, daemon: number] | undefined {
  const path = join(directory, "guard");
  if (!existsSync(path)) return undefined;
  const [guard = 0, daemon = 0] = readFileSync(path, "utf8").split(/\s/).map(Number);
  return [guard, daemon];
}

function readEnd(directory: string): PageDaemonEnd | undefined {
  const path = join(directory, "ended");
  if (!existsSync(path)) return undefined;
  const [how, number] = readFileSync(path, "utf8").split(/\s/);
  if (how === "exit" && number === "0") return { filled: true };
  if (how === "exit") return { filled: false, why: `ended with status ${number}` };
  if (how === "deadline")
    return { filled: false, why: `was ended: no restore came to it within ${RESTORE_LIMIT_MS} ms` };
  return { filled: false, why: `was ended by signal ${number}` };
}

/** What CRIU's log says went wrong, or what was printed, for the end of a sentence. */
async function lastWords(directory: string): Promise<string> {
  const summary = await explainCriuLog(join(directory, LOG_NAME)).catch(() => undefined); // no log: it didn't come to that
  const said =
    summary?.errors.at(-1) ??
    (await readFile(join(directory, "output"), "utf8").catch((error) => messageOf(error)))
      .replaceAll("\0", "")
      .trim();
  return said ? `: ${said}` : "";
}

function delay(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
