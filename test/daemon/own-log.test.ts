import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { shortenLog } from "../../src/daemon/own-log.ts";

let directory: string;
let file: string;
beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "own-log-"));
  file = path.join(directory, "cedanad.log");
});
afterEach(() => fs.rmSync(directory, { recursive: true }));

it("of cedanad that has grown too long is begun anew, for everybody who has it open", async () => {
  expect(await shortenLog(file, 10)).toBe(false);
  const writer = fs.openSync(file, "a", 0o600);
  fs.writeSync(writer, "0123456789");
  expect(await shortenLog(file, 10)).toBe(false);
  fs.writeSync(writer, "x");
  expect(await shortenLog(file, 10)).toBe(true);
  fs.writeSync(writer, "new");
  expect(fs.readFileSync(file, "utf8")).toBe("new");
  expect(fs.readFileSync(`${file}.1`, "utf8")).toBe("0123456789x");
  expect(fs.statSync(`${file}.1`).mode & 0o777).toBe(0o600);
  expect(await shortenLog(file, 2)).toBe(true);
  fs.closeSync(writer);
  expect(fs.readFileSync(`${file}.1`, "utf8")).toBe("new");
  expect(fs.readdirSync(directory).sort()).toEqual(["cedanad.log", "cedanad.log.1"]);
});
