import { closeSync, constants, openSync } from "node:fs";

// File descriptors where no call waits: in threads, and where a trip through the thread pool takes longer than the call.

/** The caller closes it. */
export function openDirectory(path: string): number {
  return openSync(path, constants.O_RDONLY | constants.O_DIRECTORY);
}

/** Closes the descriptor when its use is over. */
export function withFd<T>(fd: number, use: (fd: number) => T): T {
  try {
    return use(fd);
  } finally {
    closeSync(fd);
  }
}
