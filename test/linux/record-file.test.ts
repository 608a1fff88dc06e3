import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { BrokenImage, SyscallFailed } from "../../src/errors/index.ts";
import { readRecord, readRecordNow, writeRecord, writeRecordNow } from "../../src/linux/record-file.ts";

let directory: string;
let file: string;
beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "record-"));
  file = path.join(directory, "record.json");
});
afterEach(() => fs.rmSync(directory, { recursive: true }));

describe.each([
  [
    "now",
    async (of: string, record: unknown) => writeRecordNow(of, record),
    async (of: string) => readRecordNow(of),
  ],
  ["by the thread pool", writeRecord, readRecord],
] as const)("a record that is written and read %s", (_how, write, read) => {
  it("is read as it was written, by nobody but its owner", async () => {
    expect(await read(file)).toBeUndefined();
    for (const record of [{ a: 1 }, { a: 2, b: ["ü"] }]) {
      await write(file, record);
      expect(await read(file)).toEqual(record);
    }
    expect(fs.readdirSync(directory)).toEqual(["record.json"]);
    expect(fs.statSync(file).mode & 0o777).toBe(0o600);
  });

  it("stays as it was where the next one can't be written, and half of that isn't left", async () => {
    await write(file, { a: 1 });
    fs.symlinkSync("nowhere/there", `${file}~new`);
    const failed = write(file, { a: 2 });
    await expect(failed).rejects.toThrow(SyscallFailed);
    await expect(failed).rejects.toThrow(/^write \/.*record\.json: ENOENT/);
    expect(await read(file)).toEqual({ a: 1 });
    expect(fs.readdirSync(directory)).toEqual(["record.json"]);
  });

  it("is not taken for none when it is broken, or can't be read", async () => {
    fs.writeFileSync(file, "{");
    await expect(read(file)).rejects.toThrow(BrokenImage);
    fs.rmSync(file);
    fs.mkdirSync(file);
    await expect(read(file)).rejects.toThrow(SyscallFailed);
  });
});
