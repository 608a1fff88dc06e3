// Mappings that are of a file, from /proc/PID/maps. Source: proc_pid_maps(5).

export interface FileMapping {
  readonly start: string;
  readonly end: string;
  /** `rw-s`: the last letter says shared or private */
  readonly permissions: string;
  /** `major:minor`, decimal */
  readonly device: string;
  readonly inode: number;
  /** ends with " (deleted)" for a file without a name; "/SYSV…", "/memfd:…", "/dev/zero (deleted)", "anon_inode:…" too */
  readonly path: string;
}

/** Bytes that a mapping covers. */
export function mappedBytes({ start, end }: FileMapping): number {
  return Number(BigInt(`0x${end}`) - BigInt(`0x${start}`));
}

/**
 * Parses one line of maps; undefined for anonymous memory and for the kernel's own ([stack], [vdso], …).
 *
 *   7f2209171000-7f2209172000 rw-s 00000000 00:0e 548247                     /secretmem (deleted)
 */
export function parseFileMapping(line: string): FileMapping | undefined {
  // Nearly all lines of a big process are anonymous memory: they end with the inode 0 and no name.
  const match = /^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ ([0-9a-f]+):([0-9a-f]+) (\d+)\s+(\S.*)$/.exec(line);
  if (!match) return undefined;
  const [, start, end, permissions, major, minor, inode, path] = match;
  if (path!.startsWith("[")) return undefined;
  return {
    start: start!,
    end: end!,
    permissions: permissions!,
    device: `${Number.parseInt(major!, 16)}:${Number.parseInt(minor!, 16)}`,
    inode: Number(inode),
    path: path!.replaceAll("\\012", "\n"),
  };
}
