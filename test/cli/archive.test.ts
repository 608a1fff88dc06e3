import { spawnSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { writeManifest } from "../../src/checkpoint/manifest-files.ts";
import { sampleManifest } from "../checkpoint/sample.ts";

const root = path.join(import.meta.dirname, "../..");
const built = ["dist/cedana.js", "dist/commands.js", "dist/checkpoint-worker.cjs"].every((file) =>
  fs.existsSync(path.join(root, file)),
);

let directory: string;
beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "cli-archive-"));
});
afterEach(() => fs.rmSync(directory, { recursive: true, force: true }));

function cedana(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(path.join(root, "bin/cedana"), ["archive", ...args], {
    cwd: directory,
    encoding: "utf8",
  });
  return { status, stdout, stderr };
}

describe.skipIf(!built)("cedana archive (needs `npm run build`)", () => {
  it("creates, shows, verifies and extracts, and says in one line what is wrong", async () => {
    const images = path.join(directory, "web");
    fs.mkdirSync(images);
    fs.writeFileSync(path.join(images, "inventory.img"), "i");
    await writeManifest(images, sampleManifest, { digests: true });
    fs.writeFileSync(path.join(directory, "key"), "correct horse battery staple");
    expect(cedana("create", "web", "web.tar", "--key-file", "key")).toMatchObject({ status: 0, stderr: "" });
    const shown = cedana("show", "web.tar", "--key-file", "key", "--json");
    expect(JSON.parse(shown.stdout)).toMatchObject({ compression: "zstd", encrypted: true, verified: 1 });
    const extracted = cedana("extract", "web.tar", "copy", "--key-file", "key");
    expect(extracted.stdout).toContain("checkpoint of 0123456789abcdef, layout cedana");
    expect(extracted.stdout).toContain("1 files are as the manifest says");
    expect(cedana("verify", "copy")).toMatchObject({
      status: 0,
      stdout: expect.stringContaining("copy is whole"),
    });
    expect(cedana("extract", "web.tar", "again")).toMatchObject({
      status: 1,
      stderr: expect.stringContaining("is encrypted: give its key"),
    });
    expect(fs.readdirSync(directory).sort()).toEqual(["copy", "key", "web", "web.tar"]);
  });
});
