import { seek } from "../../linux/addon.ts";
import { type Extent, MAX_EXTENTS } from "./format.ts";

/**
 * The pieces of data of an open file; undefined when it has no holes, or so many that they are not worth their list.
 * @param blocks  as fstat(2) counts them, of 512 bytes: no fewer than the size means no holes, without a look
 */
export function findExtents(fd: number, size: number, blocks: number): Extent[] | undefined {
  if (size === 0 || blocks * 512 >= size) return undefined;
  const extents: Extent[] = [];
  for (let offset = 0; offset < size; ) {
    const data = seek(fd, "data", offset);
    if (data === undefined || data >= size) break;
    const hole = Math.min(seek(fd, "hole", data) ?? size, size);
    extents.push({ offset: data, size: hole - data });
    if (extents.length > MAX_EXTENTS) return undefined;
    offset = hole;
  }
  return extents.length === 1 && extents[0]!.size === size ? undefined : extents;
}
