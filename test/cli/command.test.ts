import { execFile } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";

const cedana = join(import.meta.dirname, "../../bin/cedana");
const runDirectory = mkdtempSync(join(tmpdir(), "cedana-cli-"));
afterAll(() => rmSync(runDirectory, { recursive: true }));

function run(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  return new Promise((resolve) =>
    execFile(
      cedana,
      args,
      { env: { ...process.env, CEDANA_RUN_DIR: runDirectory } },
      (error, stdout, stderr) => resolve({ code: error ? Number(error.code) : 0, stdout, stderr }),
    ),
  );
}

const built = ["cedana.js", "commands.js"].every((name) =>
  existsSync(join(import.meta.dirname, "../../dist", name)),
);

describe.skipIf(!built)("a command's end (needs `npm run build`)", () => {
  it.each([
    ["an unknown flag", ["status", "--bogus"]],
    ["a missing argument", ["checkpoint", "inspect"]],
    ["a value that isn't one of them", ["setup", "--target", "toaster"]],
    ["a number that is none", ["daemon", "stop", "--timeout", "soon"]],
    ["nothing to look at", ["preflight"]],
    ["a command that there isn't", ["checkpoint", "bogus"]],
    [
      "flags that exclude each other",
      ["archive", "verify", "x", "--key-file", "a", "--passphrase-file", "b"],
    ],
  ])("is 64 for %s", async (_what, args) => {
    const { code, stdout, stderr } = await run(...args);
    expect([code, stdout]).toEqual([64, ""]);
    expect(stderr).toMatch(/^cedana: .*; see `cedana .*--help`\n$/);
  });

  it("is 1, with one line that says why, when it fails", async () => {
    const { code, stdout, stderr } = await run("status");
    expect([code, stdout]).toEqual([1, ""]);
    expect(stderr).toMatch(/^cedana: cedanad is not running: nobody listens at .*cedanad.*\.sock\. .*\n$/);
  });

  it("is 0 when there is nothing to do", async () => {
    expect(await run("daemon", "stop")).toMatchObject({ code: 0, stdout: "cedanad is not running\n" });
  });
});
