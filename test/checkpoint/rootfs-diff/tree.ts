import { createHash } from "node:crypto";
import { type BigIntStats, constants, lstatSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { getXattr, listXattrs } from "../../../src/linux/addon.ts";

/** Everything that can be seen of a tree, by path (bytes as latin1), as text that can be compared. Which names are one file, too. */
export function describeTree(root: string): Record<string, string> {
  const seen: Record<string, string> = {};
  const names = new Map<string, string[]>();
  const visit = (path: string, shown: string) => {
    const at = Buffer.from(path, "latin1");
    const info = lstatSync(at, { bigint: true });
    seen[shown] = describeEntry(at, info);
    if (info.isDirectory())
      for (const name of readdirSync(at, { encoding: "latin1" }).sort())
        visit(`${path}/${name}`, `${shown}/${name}`);
    else if (info.nlink > 1n) {
      const key = `${info.dev}:${info.ino}`;
      names.set(key, [...(names.get(key) ?? []), shown]);
    }
  };
  visit(root, "");
  for (const group of names.values()) for (const name of group) seen[name] += ` same as ${group.join(",")}`;
  return seen;
}

function describeEntry(at: Buffer, info: BigIntStats): string {
  const kind = Number(info.mode) & constants.S_IFMT;
  const xattrs = listXattrs(at)
    .filter((name) => !/overlay\.|selinux/.test(name))
    .sort()
    .map((name) => `${name}=${getXattr(at, name)?.toString("hex")}`);
  const facts = [
    kind.toString(8),
    (Number(info.mode) & 0o7777).toString(8),
    `${info.uid}:${info.gid}`,
    `${info.mtimeNs}`,
    ...xattrs,
  ];
  if (info.isFile()) {
    facts.push(`${info.size}`, createHash("md5").update(readFileSync(at)).digest("hex"));
    if (info.size > 1_000_000n) facts.push(info.blocks * 512n < info.size / 2n ? "sparse" : "full");
  }
  if (info.isSymbolicLink()) facts.push(readlinkSync(at, { encoding: "latin1" }));
  if (info.isCharacterDevice() || info.isBlockDevice()) facts.push(`device ${info.rdev}`);
  return facts.join(" ");
}
