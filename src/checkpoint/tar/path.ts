import { BrokenImage } from "../../errors/index.ts";
import { type RawName, showName } from "./format.ts";

/** A path that Linux takes: a tree may be deeper, but who extracts it opens it by its path. */
export const MAX_PATH_BYTES = 4095;
const MAX_NAME_BYTES = 255;

/**
 * A member's name, or a hard link's target, as a path below the directory that is extracted to; empty for that directory itself.
 * Leading "./" is what many writers put there.
 * @throws BrokenImage for whatever leads out, or could mean something else to another reader: absolute names, "..", "a//b", "a/./b"
 */
export function confinedPath(name: RawName): RawName {
  const wrong = (why: string) => new BrokenImage(`tar member ${JSON.stringify(showName(name))}: ${why}`);
  if (name === "") throw wrong("it has no name");
  if (name.startsWith("/")) throw wrong("its name is absolute");
  let path = name;
  while (path.startsWith("./")) path = path.slice(2);
  if (path === "." || path === "") return "";
  if (path.length > MAX_PATH_BYTES) throw wrong("its name is too long");
  for (const part of path.split("/")) {
    if (part === "..") throw wrong('its name leads out ("..")');
    if (part === "" || part === ".") throw wrong("its name is ambiguous");
    if (part.length > MAX_NAME_BYTES) throw wrong("its name is too long");
  }
  return path;
}

/** `a/b/c` as `a/b` and `c`. */
export function splitPath(path: RawName): { parent: RawName; base: RawName } {
  const slash = path.lastIndexOf("/");
  return { parent: path.slice(0, Math.max(slash, 0)), base: path.slice(slash + 1) };
}
