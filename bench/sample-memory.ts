// What the memory of a program looks like to a compressor.

import { randomBytes } from "node:crypto";
import { closeSync, openSync, writeSync } from "node:fs";

/** Of every four MiB one is noise, one zeros, and two are words of a small dictionary, which shrink to a third. */
export function writeSampleMemory(path: string, mebibytes: number): void {
  const words = Array.from({ length: 3000 }, () => randomBytes(3 + Math.floor(Math.random() * 9)));
  const fd = openSync(path, "w");
  for (let i = 0; i < mebibytes; i++) {
    const mebibyte = Buffer.alloc(2 ** 20);
    if (i % 4 === 0) randomBytes(2 ** 20).copy(mebibyte);
    else if (i % 4 > 1)
      for (let at = 0; at < 2 ** 20; )
        at += words[Math.floor(Math.random() * words.length)]!.copy(mebibyte, at);
    writeSync(fd, mebibyte);
  }
  closeSync(fd);
}
