import { execFileSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  type CheckpointManifest,
  checkFiles,
  readManifest,
  writeManifest,
} from "../../src/checkpoint/manifest.ts";
import { findFault } from "../../src/checkpoint/schema.ts";
import { BrokenImage, Unsupported } from "../../src/errors/index.ts";

let images: string;
const manifestPath = () => path.join(images, "cedana.json");

const written: Omit<CheckpointManifest, "version" | "files"> = {
  createdAt: "2026-01-02T03:04:05.678Z",
  containerId: "c1",
  namespace: "default",
  terminal: false,
  kernel: "6.12.0",
  criuVersion: "4.2.1",
  engine: { name: "runc", version: "1.3.6", path: "/usr/sbin/runc" },
  options: {
    tcp: "close",
    fileLocks: true,
    extUnix: false,
    shellJob: false,
    emptyNamespaces: ["network"],
    cgroupsMode: "soft",
    leaveRunning: true,
    parentPath: "../before",
  },
  specDigest: "ab".repeat(32),
  timings: { totalMs: 154, frozenMs: 57.5 },
};

beforeEach(() => {
  images = fs.mkdtempSync(path.join(os.tmpdir(), "manifest-"));
  fs.writeFileSync(path.join(images, "pages-1.img"), "12345");
  fs.writeFileSync(path.join(images, "dump.log"), "log");
});

afterEach(() => fs.rmSync(images, { recursive: true }));

/** The valid manifest with one thing changed. */
async function spoil(
  change: (manifest: Record<string, unknown> & CheckpointManifest) => void,
): Promise<void> {
  await writeManifest(images, written);
  const manifest = JSON.parse(fs.readFileSync(manifestPath(), "utf8"));
  change(manifest);
  fs.writeFileSync(manifestPath(), JSON.stringify(manifest));
}

describe("a manifest", () => {
  it("is read as it was written, with the files that lie there", async () => {
    fs.mkdirSync(path.join(images, "sub"));
    fs.writeFileSync(path.join(images, "sub/rootfs-diff.tar"), "tar");
    fs.symlinkSync("../before", path.join(images, "parent"));
    await writeManifest(images, written);
    const files = [
      { path: "dump.log", size: 3 },
      { path: "pages-1.img", size: 5 },
      { path: "sub/rootfs-diff.tar", size: 3 },
    ];
    expect(await readManifest(images)).toEqual({ version: 1, ...written, files });
  });

  it("can be read by its owner alone, and leaves nothing beside it", async () => {
    fs.writeFileSync(`${manifestPath()}.new`, "of a writer that was killed");
    await writeManifest(images, written);
    await writeManifest(images, written);
    expect(fs.statSync(manifestPath()).mode & 0o777).toBe(0o600);
    expect(fs.readdirSync(images).sort()).toEqual(["cedana.json", "dump.log", "pages-1.img"]);
    expect((await readManifest(images))?.files.map((file) => file.path)).toEqual(["dump.log", "pages-1.img"]);
  });

  it("is not written when no reader would take it", async () => {
    await expect(writeManifest(images, { ...written, specDigest: "none" })).rejects.toThrow(/specDigest/);
    expect(fs.readdirSync(images).sort()).toEqual(["dump.log", "pages-1.img"]);
  });

  it("may be absent", async () => {
    expect(await readManifest(images)).toBeUndefined();
    expect(await readManifest(path.join(images, "nowhere"))).toBeUndefined();
  });

  it("of a newer version is refused by that", async () => {
    await spoil((manifest) => Object.assign(manifest, { version: 2, options: "other" }));
    await expect(readManifest(images)).rejects.toThrow(Unsupported);
    await expect(readManifest(images)).rejects.toThrow(/version 2; this cedana knows up to 1/);
  });

  it("may have properties that we don't know", async () => {
    await spoil((manifest) =>
      Object.assign(manifest, { more: 1, options: { ...written.options, more: {} } }),
    );
    expect(await readManifest(images)).toMatchObject({ more: 1 });
  });

  it.each<[string, string, (manifest: Record<string, unknown> & CheckpointManifest) => void]>([
    ["without a version", "version is missing", (manifest) => Reflect.deleteProperty(manifest, "version")],
    ["of version 0", "version is 0, not 1", (manifest) => Object.assign(manifest, { version: 0 })],
    [
      "of a version in words",
      'version is "2", not 1',
      (manifest) => Object.assign(manifest, { version: "2" }),
    ],
    ["without options", "options is missing", (manifest) => Reflect.deleteProperty(manifest, "options")],
    [
      "with options in a list",
      "options is [], not of type object",
      (manifest) => Object.assign(manifest, { options: [] }),
    ],
    [
      "with a TCP policy of its own",
      'options.tcp is "drop", not one of keep, close, skip-in-flight',
      (manifest) => Object.assign(manifest.options, { tcp: "drop" }),
    ],
    [
      "with a number for a boolean",
      "options.fileLocks is 1, not of type boolean",
      (manifest) => Object.assign(manifest.options, { fileLocks: 1 }),
    ],
    [
      "with a namespace without a name",
      "options.emptyNamespaces[0] is too short",
      (manifest) => Object.assign(manifest.options, { emptyNamespaces: [""] }),
    ],
    [
      "with a file outside",
      'files[0].path is "../../etc/passwd", which is not allowed',
      (manifest) => Object.assign(manifest, { files: [{ path: "../../etc/passwd", size: 1 }] }),
    ],
    [
      "with a file by its absolute path",
      'files[0].path is "/x", which is not allowed',
      (manifest) => Object.assign(manifest, { files: [{ path: "/x", size: 1 }] }),
    ],
    [
      "with a file of negative size",
      "files[0].size is -1, less than 0",
      (manifest) => Object.assign(manifest, { files: [{ path: "x", size: -1 }] }),
    ],
    [
      "with a timing that is no number",
      'timings.frozenMs is "long", not of type number',
      (manifest) => Object.assign(manifest.timings, { frozenMs: "long" }),
    ],
  ])("%s is broken, and says where", async (_what, fault, change) => {
    await spoil(change);
    await expect(readManifest(images)).rejects.toThrow(BrokenImage);
    await expect(readManifest(images)).rejects.toThrow(fault);
  });

  it.each(["", "{", "null", "[]", "5", '"text"'])("that is %j is broken", async (text) => {
    fs.writeFileSync(manifestPath(), text);
    await expect(readManifest(images)).rejects.toThrow(BrokenImage);
  });

  it("that links to another file does not show it", async () => {
    const secret = path.join(images, "secret");
    fs.writeFileSync(secret, "root:hash");
    fs.symlinkSync(secret, manifestPath());
    await expect(readManifest(images)).rejects.toThrow(BrokenImage);
    fs.rmSync(manifestPath());
    fs.renameSync(secret, manifestPath());
    await expect(readManifest(images)).rejects.not.toThrow(/root/);
  });

  it("that is a FIFO, a directory or huge is broken, and not waited for", async () => {
    execFileSync("mkfifo", [manifestPath()]);
    await expect(readManifest(images)).rejects.toThrow(BrokenImage);
    fs.rmSync(manifestPath());
    fs.mkdirSync(manifestPath());
    await expect(readManifest(images)).rejects.toThrow(BrokenImage);
    fs.rmdirSync(manifestPath());
    fs.writeFileSync(manifestPath(), "");
    fs.truncateSync(manifestPath(), 2 ** 34);
    await expect(readManifest(images)).rejects.toThrow(BrokenImage);
  });
});

describe("checkFiles", () => {
  it("takes images that are as they were, with or without their logs", async () => {
    await writeManifest(images, written);
    const manifest = (await readManifest(images))!;
    await checkFiles(images, manifest);
    fs.rmSync(path.join(images, "dump.log"));
    await checkFiles(images, manifest);
  });

  it("names what is missing or has another size", async () => {
    fs.writeFileSync(path.join(images, "core-1.img"), "x");
    await writeManifest(images, written);
    const manifest = (await readManifest(images))!;
    fs.appendFileSync(path.join(images, "pages-1.img"), "6");
    fs.rmSync(path.join(images, "core-1.img"));
    const check = checkFiles(images, manifest);
    await expect(check).rejects.toThrow(BrokenImage);
    await expect(checkFiles(images, manifest)).rejects.toThrow(
      "core-1.img is missing, pages-1.img has 6 bytes instead of 5",
    );
  });
});

describe("a schema", () => {
  it("with a keyword that we don't implement is refused, not half applied", () => {
    expect(() => findFault({}, { maxLength: 5 } as never)).toThrow(/maxLength/);
  });
});
