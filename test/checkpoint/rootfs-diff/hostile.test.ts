import { execFileSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { gzipSync, zstdCompressSync } from "node:zlib";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { applyRootfsDiff } from "../../../src/checkpoint/rootfs-diff/index.ts";
import { tarEntry as entry, makeTar } from "../tar/make.ts";

// What a stranger may put into a rootfs diff. Applied to a tree with a secret beside it: nothing outside may be read into it,
// changed or removed.

let directory: string;
let target: string;
const at = (...parts: string[]) => path.join(directory, ...parts);

const missing = process.getuid?.() === 0 ? undefined : "needs root, as restores do";

beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "hostile-"));
  target = at("target");
  for (const name of ["target/etc", "outside", "checkpoint"]) fs.mkdirSync(at(name), { recursive: true });
  fs.writeFileSync(at("outside/secret"), "secret");
  fs.writeFileSync(at("target/etc/file"), "old");
  fs.symlinkSync("../outside", at("target/out"));
  fs.symlinkSync("etc", at("target/within"));
});
afterEach(() => fs.rmSync(directory, { recursive: true, force: true }));

const apply = async (tar: Buffer | undefined, deleted?: unknown, options = {}) => {
  if (tar) fs.writeFileSync(at("checkpoint/rootfs-diff.tar"), tar);
  if (deleted !== undefined)
    fs.writeFileSync(
      at("checkpoint/deleted.files"),
      typeof deleted === "string" ? deleted : JSON.stringify(deleted),
    );
  return await applyRootfsDiff(at("checkpoint"), target, options);
};
const outsideIsUntouched = () => {
  expect(fs.readdirSync(at("outside"))).toEqual(["secret"]);
  expect(fs.readFileSync(at("outside/secret"), "utf8")).toBe("secret");
  expect(fs.statSync(at("outside/secret")).nlink).toBe(1);
  expect(fs.readdirSync(directory).sort()).toEqual(["checkpoint", "outside", "target"]);
};

const file = (name: string) => entry({ name, size: 1 });
const dir = (name: string) => entry({ name, type: "directory" });

describe.skipIf(missing)(`a hostile rootfs diff${missing ? ` (${missing})` : ""} is refused:`, () => {
  it.each<[string, RegExp, Parameters<typeof makeTar>]>([
    ["a name that leads out", /leads out/, [[file("../x"), "x"]]],
    ["a name that leads out further down", /leads out/, [[file("etc/../../x"), "x"]]],
    ["an absolute name", /absolute/, [[file("/x"), "x"]]],
    ["a name that is two things", /ambiguous/, [[file("etc//x"), "x"]]],
    ["a directory that leads out", /leads out/, [[dir("..")]]],
    ["a file behind a link that leads out", /below a symbolic link/, [[file("out/x"), "x"]]],
    ["a file behind a link that stays inside", /below a symbolic link/, [[file("within/x"), "x"]]],
    [
      "a file behind a link of its own",
      /below a symbolic link/,
      [[entry({ name: "own", type: "symlink", linkName: "../outside" })], [file("own/x"), "x"]],
    ],
    [
      "a hard link to outside",
      /leads out/,
      [[entry({ name: "x", type: "hardlink", linkName: "../outside/secret" })]],
    ],
    [
      "a hard link to an absolute path",
      /absolute/,
      [[entry({ name: "x", type: "hardlink", linkName: "/etc/passwd" })]],
    ],
    [
      "a hard link through a link",
      /can't be reached/,
      [[entry({ name: "x", type: "hardlink", linkName: "out/secret" })]],
    ],
    [
      "a hard link to a directory",
      /a directory/,
      [[entry({ name: "x", type: "hardlink", linkName: "etc" })]],
    ],
    ["a hard link to itself", /hard link to x/, [[entry({ name: "x", type: "hardlink", linkName: "x" })]]],
    ["a hard link to nothing", /not there/, [[entry({ name: "x", type: "hardlink", linkName: "nothing" })]]],
    ["a whiteout of the parent", /no whiteout/, [[file("etc/.wh..."), "x"]]],
    ["a whiteout of the directory itself", /no whiteout/, [[file("etc/.wh.."), "x"]]],
    ["a whiteout of nothing", /no whiteout/, [[file("etc/.wh."), "x"]]],
    ["a whiteout behind a link", /below a symbolic link/, [[file("out/.wh.secret"), "x"]]],
    ["a mark that empties behind a link", /below a symbolic link/, [[file("out/.wh..wh..opq"), "x"]]],
    [
      "a member twice",
      /in it twice/,
      [
        [file("a"), "1"],
        [file("a"), "2"],
      ],
    ],
    ["a directory instead of its own file", /in it twice/, [[file("a"), "1"], [dir("a")]]],
    [
      "a deletion of its own file",
      /same layer/,
      [
        [file("a"), "1"],
        [file(".wh.a"), "x"],
      ],
    ],
    ["a parent that is missing", /no parent directory/, [[file("nowhere/a"), "1"]]],
    ["a parent that is a file", /no directory/, [[file("etc/file/a"), "1"]]],
    ["a root that is a file", /root is not a directory/, [[file("./"), ""]]],
  ])("%s", async (_what, message, members) => {
    if (message.source.includes("root is not"))
      members[0]![0] = entry({ name: ".", type: "symlink", linkName: "/" });
    await expect(apply(makeTar(...members))).rejects.toThrow(message);
    outsideIsUntouched();
  });

  it.each([
    ["a path that leads out", ["/../outside/secret"], /leads out/],
    ["a path behind a link", ["/out/secret"], /below a symbolic link/],
    ["the root", ["/"], /root directory/],
    ["what is no list", { a: 1 }, /not a list/],
    ["what is not JSON", "[", /not JSON/],
  ])("a deletion of %s", async (_what, list, message) => {
    await expect(apply(undefined, list)).rejects.toThrow(message);
    outsideIsUntouched();
  });

  it("a link that is deleted or replaced doesn't touch what it leads to", async () => {
    fs.symlinkSync("../outside", at("target/out2"));
    const made = makeTar([entry({ name: "out", size: 3, mode: 0o600 }), "new"]);
    expect(await apply(made, ["/out2", "/gone/x", "/etc/file/x"])).toMatchObject({ deleted: 1, bytes: 3 });
    expect(fs.readFileSync(at("target/out"), "utf8")).toBe("new");
    expect(fs.existsSync(at("target/out2"))).toBe(false);
    outsideIsUntouched();
  });

  it("a hard link is replaced, not written through", async () => {
    fs.linkSync(at("outside/secret"), at("target/etc/linked"));
    await apply(makeTar([entry({ name: "etc/linked", size: 3 }), "new"]));
    expect(fs.readFileSync(at("outside/secret"), "utf8")).toBe("secret");
  });

  it("more bytes, members or devices than allowed", async () => {
    const made = makeTar([entry({ name: "a", size: 2000 }), "x".repeat(2000)], [file("b"), "1"]);
    await expect(apply(made, undefined, { maxBytes: 1999 })).rejects.toThrow(
      /allowed 1999 bytes, reached at a/,
    );
    await expect(apply(made, undefined, { maxMembers: 1 })).rejects.toThrow(/more than 1 members/);
    const device = makeTar([entry({ name: "disk", type: "block", major: 8 })]);
    await expect(apply(device, undefined, { devices: false })).rejects.toThrow(/disk is a device/);
  });

  it("what is cut off, or has something behind it", async () => {
    const made = makeTar([entry({ name: "a", size: 2000 }), "x".repeat(2000)]);
    await expect(apply(made.subarray(0, 1000))).rejects.toThrow(/truncated/);
    await expect(apply(Buffer.concat([made, made]))).rejects.toThrow(/followed by something else/);
  });

  it("but whatever compression it has is undone", async () => {
    const made = makeTar([entry({ name: "a", size: 3 }), "abc"]);
    for (const tar of [made, gzipSync(made), zstdCompressSync(made)]) {
      await apply(tar);
      expect(fs.readFileSync(at("target/a"), "utf8")).toBe("abc");
    }
  });

  it("and GNU tar's own is taken", async () => {
    fs.mkdirSync(at("layer/etc"), { recursive: true });
    fs.writeFileSync(at("layer/etc/file"), "new", { mode: 0o640 });
    const made = execFileSync("tar", ["-C", at("layer"), "-cf", "-", "."]);
    fs.rmSync(at("layer"), { recursive: true });
    await apply(made);
    expect(fs.readFileSync(at("target/etc/file"), "utf8")).toBe("new");
    expect(fs.statSync(at("target/etc/file")).mode & 0o777).toBe(0o640);
  });
});
