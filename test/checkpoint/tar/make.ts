import { encodeHeader, endOfTar, padding, type TarEntry } from "../../../src/checkpoint/tar/format.ts";

/** A member with what is left out filled in. */
export function tarEntry(some: Partial<TarEntry> & { name: string }): TarEntry {
  const { type = "file" } = some;
  return {
    type,
    mode: 0o644,
    uid: 0,
    gid: 0,
    mtimeNs: 1_700_000_000_000_000_000n,
    size: 0,
    linkName: "",
    major: 0,
    minor: 0,
    xattrs: new Map(),
    extents: undefined,
    ...some,
  };
}

/** A whole tar; contents are written as they are given, whatever the header says. */
export function makeTar(...members: [entry: TarEntry, data?: Buffer | string | undefined][]): Buffer {
  return Buffer.concat([
    ...members.flatMap(([header, data = ""]) => {
      const bytes = Buffer.from(data);
      return [encodeHeader(header), bytes, padding(bytes.length)];
    }),
    endOfTar(),
  ]);
}
