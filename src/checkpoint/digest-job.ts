import { closeSync, constants, fstatSync, readdirSync } from "node:fs";
import { BrokenImage } from "../errors/index.ts";
import { openBeneath } from "../linux/addon.ts";
import { openDirectory, withFd } from "../linux/fd.ts";
import { type DigestAlgorithm, FileHash } from "./file-hash.ts";
import type { JobContext } from "./worker/context.ts";

// Lists and hashes, in a worker thread, what lies in a checkpoint. The directory may come from anybody: below it no link is followed, and
// nothing but a regular file is opened.

/** One thing in a checkpoint, by its path in it. */
export interface FoundFile {
  path: string;
  type: "file" | "directory" | "symlink" | "other";
  /** of a regular file, else 0 */
  size: number;
}

export interface HashedFile {
  path: string;
  size: number;
  /** `xxh128:` or `sha256:`, and hexadecimal digits */
  digest: string;
}

/** Between two looks whether the caller has given up. */
const READ_BYTES = 8 * 1024 * 1024;

export function listFilesHere({ directory }: { directory: string }, context: JobContext): FoundFile[] {
  const found: FoundFile[] = [];
  walk(directory, context, (entry) => found.push(entry));
  return found.sort((a, b) => (a.path < b.path ? -1 : 1));
}

/** Depth first; a directory after what is in it. */
function walk(directory: string, context: JobContext, visit: (entry: FoundFile) => void): void {
  const into = (fd: number, prefix: string) => {
    for (const entry of readdirSync(`/proc/self/fd/${fd}`, { withFileTypes: true })) {
      context.checkCancelled();
      const path = prefix + entry.name;
      if (entry.isDirectory()) {
        withFd(openBeneath(fd, entry.name, constants.O_RDONLY | constants.O_DIRECTORY), (child) => {
          into(child, `${path}/`);
          visit({ path, type: "directory", size: 0 });
        });
      } else if (entry.isFile()) {
        withFd(openFile(fd, entry.name, path), (child) =>
          visit({ path, type: "file", size: fstatSync(child).size }),
        );
      } else visit({ path, type: entry.isSymbolicLink() ? "symlink" : "other", size: 0 });
    }
  };
  withFd(openDirectory(directory), (fd) => into(fd, ""));
}

export function hashFilesHere(
  { directory, files }: { directory: string; files: { path: string; algorithm: DigestAlgorithm }[] },
  context: JobContext,
): HashedFile[] {
  return withFd(openDirectory(directory), (root) =>
    files.map(({ path, algorithm }) =>
      withFd(openFile(root, path, path), (fd) => {
        const hash = new FileHash(algorithm);
        let size = 0;
        for (let read = READ_BYTES; read === READ_BYTES; size += read) {
          context.checkCancelled();
          read = hash.readSync(fd, size, READ_BYTES);
        }
        return { path, size, digest: hash.digest() };
      }),
    ),
  );
}

function openFile(directory: number, name: string, path: string): number {
  let fd: number;
  try {
    // Not blocked by a FIFO without a writer.
    fd = openBeneath(directory, name, constants.O_RDONLY | constants.O_NONBLOCK | constants.O_NOFOLLOW);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT")
      throw new BrokenImage(`${path} is missing`, { cause: error });
    throw new BrokenImage(`${path} can't be opened as a file of the checkpoint`, { cause: error });
  }
  if (fstatSync(fd).isFile()) return fd;
  closeSync(fd);
  throw new BrokenImage(`${path} is not a regular file`);
}
