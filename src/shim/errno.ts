import { constants } from "node:os";

/** errno → name, the names of `os.constants.errno`. EWOULDBLOCK and ENOTSUP yield to their other names. */
export const errorNames: ReadonlyMap<number, string> = new Map(
  Object.entries(constants.errno)
    .filter(([name]) => name !== "EWOULDBLOCK" && name !== "ENOTSUP")
    .map(([name, number]) => [number, name]),
);
