import { existsSync } from "node:fs";
import { messageOf } from "../../errors/index.ts";
import { PageDaemon, type PageDaemonEnd, type PageDaemonHost, type StartPageDaemon } from "./page-daemon.ts";
import { whyNotLazy } from "./suitable.ts";

/** A container that wants its memory to be filled behind it. */
export interface LazyTarget extends PageDaemonHost {
  readonly userNamespace: boolean;
  /** It has a page daemon from here on, and this is to be on record before anything is restored. */
  begun(daemon: PageDaemon): void;
  /** The restore that the daemon was for has failed, and the daemon has ended. */
  undone(): void;
  /** It is restored eagerly, and why. */
  refused(reason: string): void;
}

export interface LazyRestore {
  /** Called at once, before anything that is left of the restore is ended. */
  restoreHasFailed(): void;
  /** Then: nothing of the daemon stays. */
  stop(): Promise<void>;
  /** Whether an eager restore may succeed where this one has failed, and then why this one did. */
  toBlame(failure: unknown): string | undefined;
}

/** What CRIU says where userfaultfds, or the daemon, are what it failed at. */
const ABOUT_LAZY_PAGES = /userfault|uffd|lazy.pages/i;
/**
 * Starts a page daemon, if a container can be restored lazily at all.
 * @returns what to do about it after a failure of the restore; or the reason for an eager one
 */
export async function beginLazyRestore(
  target: LazyTarget,
  options: StartPageDaemon,
): Promise<LazyRestore | string> {
  // A repetition whose first one had come so far that there is a directory goes the same way, whatever has changed since.
  const decided = options.repeated && existsSync(options.directory);
  const reason = decided ? undefined : await whyNotLazy(options.imagePath, target.userNamespace);
  if (reason !== undefined) return reason;
  let daemon: PageDaemon;
  try {
    daemon = await PageDaemon.start(target, options);
  } catch (error) {
    return messageOf(error);
  }
  target.begun(daemon);
  let earlyEnd: PageDaemonEnd | undefined;
  return {
    restoreHasFailed: () => {
      earlyEnd = daemon.endSoFar();
    },
    stop: async () => {
      await daemon.stop();
      target.undone();
    },
    toBlame: (failure) => {
      if (earlyEnd && !earlyEnd.filled) return `the page daemon ${earlyEnd.why}`;
      const text = messageOf(failure);
      return ABOUT_LAZY_PAGES.test(text) ? text : undefined;
    },
  };
}
