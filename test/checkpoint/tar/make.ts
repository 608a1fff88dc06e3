import {
  encodeHeader,
  endOfTar,
  tarEntry as filledIn,
  padding,
  type TarEntry,
} from "../../../src/checkpoint/tar/format.ts";

/** A member with what is left out filled in. */
export const tarEntry = (some: Partial<TarEntry> & { name: string }): TarEntry =>
  filledIn({ mode: 0o644, mtimeNs: 1_700_000_000_000_000_000n, ...some });

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
