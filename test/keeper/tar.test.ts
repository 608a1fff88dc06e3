// Our tar, which CRIU runs for the files of a tmpfs, beside the real one: by the same command lines, to the same result. Needs root.

import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { gunzipSync, gzipSync } from "node:zlib";
import { afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { BUILD_TIMEOUT_MS, buildKeeper, isRoot, keeperBinary } from "./harness.ts";

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

const creating =
  "--create --gzip --no-unquote --no-wildcards --one-file-system --check-links --preserve-permissions --sparse --numeric-owner --directory".split(
    " ",
  );
const extracting = "--extract --gzip --no-unquote --no-wildcards --directory".split(" ");

describe.skipIf(!isRoot)("tar for CRIU", () => {
  let dir: string;
  const at = (...names: string[]) => path.join(dir, ...names);
  beforeEach(() => {
    dir = fs.mkdtempSync(path.join(os.tmpdir(), "tar-"));
    for (const name of ["tools", "real", "from", "to"]) fs.mkdirSync(at(name));
    for (const name of ["from", "to"])
      execFileSync("mount", ["-t", "tmpfs", "-o", "size=16m", name, at(name)]);
    fs.symlinkSync(keeperBinary, at("tools/tar"));
    // What comes next in PATH says so, and is the real one.
    fs.writeFileSync(at("real/tar"), `#!/bin/sh\necho ran >> ${at("ran")}\nexec /usr/bin/tar "$@"\n`, {
      mode: 0o755,
    });
  });
  afterEach(() => {
    for (const name of ["from/below", "from", "to"]) spawnSync("umount", [at(name)]);
    fs.rmSync(dir, { recursive: true, force: true });
  });

  interface Run {
    status: number | null;
    stdout: Buffer;
    stderr: string;
    /** the real tar has done it */
    real: boolean;
  }

  function run(argv: string[], input: string | number, ours = true): Run {
    fs.rmSync(at("ran"), { force: true });
    const stdin = typeof input === "number" ? input : fs.openSync(input, "r");
    const { status, stdout, stderr } = spawnSync("tar", argv, {
      stdio: [stdin, "pipe", "pipe"],
      env: { PATH: `${ours ? `${at("tools")}:` : ""}${at("real")}:/usr/bin:/bin` },
      maxBuffer: 64 << 20,
    });
    if (typeof input !== "number") fs.closeSync(stdin);
    return { status, stdout, stderr: stderr.toString(), real: fs.existsSync(at("ran")) };
  }
  const create = (ours = true) => run([...creating, "/proc/self/fd/0", "."], at("from"), ours);
  function extract(archive: Buffer, ours = true): Run {
    fs.writeFileSync(at("archive"), archive);
    return run([...extracting, at("to")], at("archive"), ours);
  }

  /** Everything that a tree is, but what tar doesn't keep: fractions of a second. */
  function tree(root: string): string[] {
    const found = execFileSync("find", [".", "-printf", "%p %y %m %U %G %T@ %s %n %l|\\n"], {
      cwd: root,
      encoding: "utf8",
    });
    const content = (line: string) => {
      const [name, kind] = line.split(" ");
      if (kind === "f")
        return ` ${createHash("sha1")
          .update(fs.readFileSync(path.join(root, name!)))
          .digest("hex")}`;
      return kind === "c" || kind === "b" ? ` ${fs.lstatSync(path.join(root, name!)).rdev}` : "";
    };
    return found
      .trimEnd()
      .split("\n")
      .map(
        (line) =>
          line.replace(/(\d)\.\d+ /, "$1 ").replace(/^(\S+ d .*) \d+ (\d+ \|)$/, "$1 - $2") + content(line),
      )
      .sort();
  }
  const list = (archive: Buffer) =>
    execFileSync("/usr/bin/tar", ["--list", "--verbose", "--gzip", "--numeric-owner", "--full-time"], {
      input: archive,
      encoding: "utf8",
    })
      .split("\n")
      .sort();

  const small: Record<string, () => void> = {
    "an empty tmpfs": () => {},
    "a /dev": () => {
      for (const [name, minor] of [
        ["null", 3],
        ["full", 7],
        ["zero", 5],
      ] as const) {
        execFileSync("mknod", ["-m", "666", at("from", name), "c", "1", String(minor)]);
      }
      execFileSync("mknod", [at("from/loop"), "b", "7", "300"]);
      for (const [name, target] of [
        ["fd", "/proc/self/fd"],
        ["ptmx", "pts/ptmx"],
      ] as const)
        fs.symlinkSync(target, at("from", name));
      for (const name of ["pts", "shm", "mqueue"]) fs.mkdirSync(at("from", name));
      fs.chmodSync(at("from/shm"), 0o1777);
      fs.lchownSync(at("from/ptmx"), 7, 8);
    },
    "files, FIFOs, owners, modes and times": () => {
      fs.mkdirSync(at("from/a/b/c"), { recursive: true });
      fs.writeFileSync(at("from/a/b/pid"), "4711\n");
      fs.writeFileSync(at("from/a/empty"), "");
      fs.writeFileSync(at("from/a/block"), Buffer.alloc(512, 0x5a));
      fs.writeFileSync(at("from/a/long"), Buffer.from(Array.from({ length: 60_000 }, (_, n) => n & 255)));
      fs.chownSync(at("from/a/long"), 65_534, 2_000_000);
      fs.chmodSync(at("from/a/long"), 0o6755);
      fs.chmodSync(at("from/a/empty"), 0);
      execFileSync("mkfifo", [at("from/a/fifo")]);
      fs.utimesSync(at("from/a/b/pid"), 0, 0);
      fs.utimesSync(at("from/a/b"), 1e9, 1e9);
      fs.chmodSync(at("from"), 0o1777);
      fs.utimesSync(at("from"), 12e8, 12e8);
    },
    "something mounted below": () => {
      fs.mkdirSync(at("from/below"));
      execFileSync("mount", ["-t", "tmpfs", "-o", "mode=700", "below", at("from/below")]);
      fs.writeFileSync(at("from/below/hidden"), "");
    },
    "many directories": () => {
      for (let n = 0; n < 1200; n++) fs.mkdirSync(at("from", `d${n}`));
    },
  };
  it.each(Object.keys(small))("takes and puts back %s by itself, as the real one does", (what) => {
    small[what]!();
    const ours = create();
    expect(ours).toMatchObject({ status: 0, stderr: "", real: false });
    expect(list(ours.stdout)).toEqual(list(create(false).stdout));
    const before = tree(at("from"));
    expect(extract(ours.stdout)).toMatchObject({ status: 0, stderr: "", real: false });
    const after = tree(at("to"));
    execFileSync("umount", [at("to")]);
    execFileSync("mount", ["-t", "tmpfs", "to", at("to")]);
    expect(extract(ours.stdout, false)).toMatchObject({ status: 0, real: true });
    expect(after).toEqual(tree(at("to")));
    expect(after).toEqual(before.filter((line) => !line.includes("hidden")));
  });

  const unusual: Record<string, () => void> = {
    "hard links": () => {
      fs.writeFileSync(at("from/a"), "x");
      fs.linkSync(at("from/a"), at("from/b"));
    },
    "a socket": () => {
      execFileSync("python3", [
        "-c",
        "import socket,sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])",
        at("from/s"),
      ]);
    },
    "a hole": () => {
      fs.writeFileSync(at("from/h"), "");
      fs.truncateSync(at("from/h"), 40_000);
    },
    "a long file": () => fs.writeFileSync(at("from/l"), Buffer.alloc(65_537, 1)),
    "a long name": () => fs.writeFileSync(at("from", "n".repeat(120)), ""),
    "a long link": () => fs.symlinkSync("t".repeat(100), at("from/l")),
    "an owner beyond seven digits": () => fs.chownSync(at("from"), 3_000_000, 0),
    "a time before 1970": () => execFileSync("touch", ["--date", "1969-06-01", at("from")]),
    "much in all": () => {
      for (let n = 0; n < 20; n++) fs.writeFileSync(at("from", `f${n}`), Buffer.alloc(60_000, n));
    },
  };
  it.each(Object.keys(unusual))("leaves %s to the real one, there and back", (what) => {
    unusual[what]!();
    const { status, stdout, real } = create();
    expect({ status, real }).toEqual({ status: 0, real: true });
    expect(extract(stdout)).toMatchObject({ status: 0, real: true });
    expect(tree(at("to"))).toEqual(tree(at("from")).filter((line) => !line.startsWith("./s s ")));
  });

  it("leaves other command lines to the real one", () => {
    const options = ["--list", "--gzip"];
    expect(run(options, at("from"))).toMatchObject({ real: true });
    expect(run([...creating, "/proc/self/fd/0", ".", "more"], at("from"))).toMatchObject({ real: true });
    expect(run([...extracting], at("from"))).toMatchObject({ real: true });
  });

  it("says so where there is no real one", () => {
    const { status, stderr } = spawnSync("tar", ["--list"], { env: { PATH: at("tools") }, encoding: "utf8" });
    expect({ status, stderr }).toEqual({ status: 127, stderr: expect.stringContaining("no tar in PATH") });
  });

  it("gives archives that are damaged or hostile to the real one, which judges them; nothing gets out", () => {
    fs.mkdirSync(at("from/d"));
    fs.writeFileSync(at("from/d/f"), "content");
    const good = create().stdout;
    const plain = gunzipSync(good);
    const stored = (tar: Buffer) => gzipSync(tar, { level: 0 });
    expect(extract(stored(plain))).toMatchObject({ status: 0, real: false }); // whoever has stored it
    /** A header's text, with its sum put right. */
    const changed = (offset: number, text: string) => {
      const tar = Buffer.from(plain);
      tar.write(text, offset, "latin1");
      const start = Math.floor(offset / 512) * 512;
      tar.write("        ", start + 148, "latin1");
      const sum = tar.subarray(start, start + 512).reduce((a, b) => a + b, 0);
      tar.write(`${sum.toString(8).padStart(6, "0")}\0 `, start + 148, "latin1");
      return stored(tar);
    };
    fs.mkdirSync(at("outside"));
    for (const [what, archive] of Object.entries({
      "cut off": good.subarray(0, good.length - 9),
      "a changed byte": Buffer.from(good.map((byte, index) => (index === 900 ? byte ^ 1 : byte))),
      "a changed sum": Buffer.from(good.map((byte, index) => (index === good.length - 6 ? byte ^ 1 : byte))),
      "something after it": Buffer.concat([good, Buffer.from("x")]),
      "no end": stored(plain.subarray(0, plain.length - 1024)),
      empty: Buffer.alloc(0),
      "a way up": changed(1024, "./../outside/f\0"),
      "an absolute name": changed(1024, `${at("outside/f")}\0`),
      "a size beyond it": changed(1024 + 124, "00000777777\0"),
      "a size that is none": changed(1024 + 124, "77777777777\0"),
      "a kind that is none": changed(1024 + 156, "x"),
    }))
      expect(extract(archive), what).toMatchObject({ real: true });
    expect(fs.readdirSync(at("outside"))).toEqual([]);
    // A link to outside, and a file below it.
    execFileSync("umount", [at("to")]);
    execFileSync("mount", ["-t", "tmpfs", "to", at("to")]);
    const link = Buffer.from(plain);
    link.write("2", 512 + 156, "latin1");
    link.write(`${at("outside")}\0`, 512 + 157, "latin1");
    link.write("./d\0", 512, "latin1");
    const hostile = Buffer.from(link);
    hostile.write("        ", 512 + 148, "latin1");
    const sum = hostile.subarray(512, 1024).reduce((a, b) => a + b, 0);
    hostile.write(`${sum.toString(8).padStart(6, "0")}\0 `, 512 + 148, "latin1");
    expect(extract(stored(hostile))).toMatchObject({ real: true });
    expect(fs.readdirSync(at("outside"))).toEqual([]);
  });
});
