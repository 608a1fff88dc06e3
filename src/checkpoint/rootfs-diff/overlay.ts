import { type BigIntStats, constants, fstatSync, lstatSync, readdirSync } from "node:fs";
import { BrokenImage, Unsupported } from "../../errors/index.ts";
import { getXattr, listXattrs, openBeneath } from "../../linux/addon.ts";
import { openDirectory, withFd } from "../../linux/fd.ts";
import { pathBytes, type RawName, rawName, showName } from "../tar/format.ts";
import { attributes, entryPath, expectName, type LayerWriter } from "./layer.ts";

export interface Layers {
  /** overlay's upper directory */
  upper: string;
  /** the directories below it, the topmost first; undefined when their paths are not known */
  lowers: string[] | undefined;
}

/**
 * Overlay's upper directory as a tar layer. Overlay's marks are read where they are: a whiteout is a character device 0:0, or an empty
 * file with the attribute `overlay.whiteout`; an opaque directory has `overlay.opaque` ("y", and "x" where whiteouts are in
 * attributes). A directory that was renamed (`overlay.redirect`) or a file of which only the metadata was copied up
 * (`overlay.metacopy`) isn't whole in the upper directory: that is refused.
 * Source: kernel, Documentation/filesystems/overlayfs.rst; OCI image-spec, layer.md.
 */
export class OverlayWalk {
  readonly #layers: Layers;
  readonly #writer: LayerWriter;
  /** first name of each file that has several, by device and inode */
  readonly #links = new Map<string, RawName>();

  constructor(layers: Layers, writer: LayerWriter) {
    this.#layers = layers;
    this.#writer = writer;
  }

  walk(): void {
    withFd(openDirectory(this.#layers.upper), (root) => {
      // The container's root directory itself.
      this.#directory(root, ".", fstatSync(root, { bigint: true }), "");
      this.#walk(root, "");
    });
  }

  #walk(directory: number, prefix: RawName): void {
    const names = readdirSync(`/proc/self/fd/${directory}`, { encoding: "buffer" }).map(rawName).sort();
    for (const name of names) {
      this.#writer.context.checkCancelled();
      const path = prefix + name;
      if (this.#writer.isExcluded(path)) continue;
      expectName(name, path);
      const info = lstatSync(entryPath(directory, name), { bigint: true });
      if (isWhiteout(directory, name, info)) this.#writer.deleted(prefix, name);
      else if (info.isDirectory())
        withFd(
          openBeneath(directory, pathBytes(name), constants.O_RDONLY | constants.O_DIRECTORY),
          (child) => {
            this.#directory(child, path, info, `${path}/`);
            this.#walk(child, `${path}/`);
          },
        );
      else this.#other(directory, name, path, info);
    }
  }

  /** The directory itself, then its mark, before what is in it: a reader empties it before it fills it. */
  #directory(fd: number, path: RawName, info: BigIntStats, prefix: RawName): void {
    const self = `/proc/self/fd/${fd}/.`;
    const names = listXattrs(self);
    const overlay = (what: string) => overlayAttribute(self, names, what);
    if (overlay("redirect"))
      throw new Unsupported(
        `rootfs diff: directory ${showName(path)} was renamed over layers (overlay.redirect); mount the container's overlay with redirect_dir=off`,
      );
    this.#writer.directory(path, info, attributes(self, names));
    if (overlay("opaque") !== "y") return;
    this.#writer.opaque(prefix, path);
    this.#listHidden(path === "." ? "" : path);
  }

  #other(directory: number, name: RawName, path: RawName, info: BigIntStats): void {
    const at = entryPath(directory, name);
    const names = listXattrs(at);
    if (overlayAttribute(at, names, "metacopy") !== undefined)
      throw new Unsupported(
        `rootfs diff: of ${showName(path)} only the metadata is in the upper layer (overlay.metacopy); mount the container's overlay with metacopy=off`,
      );
    if (info.nlink > 1n && !info.isSocket()) {
      const key = `${info.dev}:${info.ino}`;
      const first = this.#links.get(key);
      if (first !== undefined) {
        this.#writer.hardLink(path, info, first);
        return;
      }
      this.#links.set(key, path);
    }
    this.#writer.other(directory, name, path, info, attributes(at, names));
  }

  /** What the layers below have in an opaque directory and the upper one hasn't: gone, with no whiteout of its own. */
  #listHidden(path: RawName): void {
    if (!this.#layers.lowers) {
      if (this.#writer.whiteouts) return; // the mark says it all
      throw new Unsupported(
        `rootfs diff: what ${showName(path)} hides can't be listed, because the lower layers are not known; use whiteouts`,
      );
    }
    const upper = namesIn(this.#layers.upper, path) ?? new Map();
    const lower = new Map<RawName, boolean>();
    for (const layer of this.#layers.lowers)
      for (const [name, isDirectory] of namesIn(layer, path) ?? [])
        if (!lower.has(name)) lower.set(name, isDirectory);
    for (const [name, isDirectory] of [...lower].sort(([a], [b]) => (a < b ? -1 : 1))) {
      const child = path === "" ? name : `${path}/${name}`;
      if (this.#writer.isExcluded(child)) continue;
      if (!upper.has(name)) this.#writer.hidden(child);
      else if (isDirectory && upper.get(name)) this.#listHidden(child);
    }
  }
}

function isWhiteout(directory: number, name: RawName, info: BigIntStats): boolean {
  if (info.isCharacterDevice()) return info.rdev === 0n;
  if (!info.isFile() || info.size !== 0n) return false;
  const at = entryPath(directory, name);
  return overlayAttribute(at, listXattrs(at), "whiteout") !== undefined;
}

/** `user.` where the overlay is mounted with userxattr, as unprivileged ones are. */
function overlayAttribute(
  path: Buffer | string,
  names: readonly RawName[],
  what: string,
): string | undefined {
  for (const name of [`trusted.overlay.${what}`, `user.overlay.${what}`])
    if (names.includes(name)) return getXattr(path, name)?.toString("latin1");
  return undefined;
}

/** The names in a layer's directory, and which are directories; undefined when it has none there. Whiteouts count as not there. */
function namesIn(layer: string, path: RawName): Map<RawName, boolean> | undefined {
  let fd: number;
  try {
    fd = withFd(openDirectory(layer), (root) =>
      openBeneath(root, path === "" ? "." : pathBytes(path), constants.O_RDONLY | constants.O_DIRECTORY),
    );
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" || code === "ENOTDIR" || code === "ELOOP") return undefined;
    throw new BrokenImage(`rootfs diff: read layer ${layer}`, { cause: error });
  }
  return withFd(fd, () => {
    const names = new Map<RawName, boolean>();
    for (const bytes of readdirSync(`/proc/self/fd/${fd}`, { encoding: "buffer" })) {
      const name = rawName(bytes);
      const info = lstatSync(entryPath(fd, name), { bigint: true });
      if (!isWhiteout(fd, name, info)) names.set(name, info.isDirectory());
    }
    return names;
  });
}
