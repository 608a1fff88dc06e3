import { readlink } from "node:fs/promises";
import { join } from "node:path";
import { InvalidRequest, SyscallFailed } from "../errors/index.ts";

/** As many as the kernel follows. */
const MAX_LINKS = 40;

/**
 * Where `path` leads for somebody whose root directory is `root`: symbolic links are followed, and neither they nor `..` lead out
 * of it. What doesn't exist stays as it is named. For trees that nobody changes meanwhile: an image's may hold any link.
 * @param root  absolute
 * @throws InvalidRequest for a circle of links
 */
export async function pathInRoot(root: string, path: string): Promise<string> {
  let links = 0;
  const resolved: string[] = [];
  const left = path.split("/").reverse();
  while (left.length > 0) {
    const part = left.pop()!;
    if (part === "" || part === ".") continue;
    if (part === "..") {
      resolved.pop();
      continue;
    }
    const target = await readlink(join(root, ...resolved, part)).catch((error: NodeJS.ErrnoException) => {
      if (error.code === "EINVAL" || error.code === "ENOENT" || error.code === "ENOTDIR") return undefined; // no link
      throw SyscallFailed.from(error);
    });
    if (target === undefined) {
      resolved.push(part);
      continue;
    }
    links += 1;
    if (links > MAX_LINKS) throw new InvalidRequest(`${path} in ${root} leads in a circle of symbolic links`);
    if (target.startsWith("/")) resolved.length = 0;
    left.push(...target.split("/").reverse());
  }
  return join(root, ...resolved);
}
