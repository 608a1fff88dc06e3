import { describe, expect, it } from "vitest";
import { mappedBytes, parseFileMapping } from "../../src/linux/maps.ts";

describe("maps", () => {
  it("keeps what has a file behind it", () => {
    const lines = [
      "00400000-00401000 r--p 00000000 fe:00 2146700                            /usr/bin/a program",
      "7f2209171000-7f2209172000 rw-s 00000000 00:0e 548247                     /secretmem (deleted)",
      "7fab2b0b3000-7fab2b0c3000 rw-s 00000000 00:01 0                          /SYSV00000000 (deleted)",
      "7f0932be5000-7f0932be6000 rw-s 00000000 00:10 1057                       anon_inode:[io_uring]",
      "7f0932be6000-7f0932be7000 rw-s 00000000 00:09 1449                       socket:[547440]",
    ];
    expect(lines.map((line) => parseFileMapping(line)?.path)).toEqual([
      "/usr/bin/a program",
      "/secretmem (deleted)",
      "/SYSV00000000 (deleted)",
      "anon_inode:[io_uring]",
      "socket:[547440]",
    ]);
    const first = parseFileMapping(lines[0]!)!;
    expect(first).toMatchObject({ start: "00400000", device: "254:0", inode: 2146700, permissions: "r--p" });
    expect(mappedBytes(first)).toBe(4096);
  });

  it("leaves out anonymous memory and the kernel's own", () => {
    for (const line of [
      "7ffc1c0b5000-7ffc1c0d6000 rw-p 00000000 00:00 0                          [stack]",
      "7ffc1c1f3000-7ffc1c1f5000 r-xp 00000000 00:00 0                          [vdso]",
      "7f0932be5000-7f0932be6000 rw-p 00000000 00:00 0 ",
      "7f0932be5000-7f0932be6000 rw-p 00000000 00:00 0                          [anon:glibc: malloc]",
      "",
    ])
      expect(parseFileMapping(line)).toBeUndefined();
  });
});
