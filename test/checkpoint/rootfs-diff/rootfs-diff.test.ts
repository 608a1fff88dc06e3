import { execFileSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  applyRootfsDiff,
  overlayLayers,
  prepareRootfsDiff,
  snapshotOf,
  takeRootfsDiff,
} from "../../../src/checkpoint/rootfs-diff/index.ts";
import { Cancelled } from "../../../src/errors/index.ts";
import { makeNode, setTimes, setXattr } from "../../../src/linux/addon.ts";
import { describeTree } from "./tree.ts";

/** Why overlays can't be mounted here; undefined: they can. */
const missing = (() => {
  if (process.getuid?.() !== 0) return "needs root to mount overlays";
  if (!/\boverlay\b/.test(fs.readFileSync("/proc/filesystems", "utf8"))) return "the kernel has no overlay";
  return undefined;
})();

let directory: string;
const at = (...parts: string[]) => path.join(directory, ...parts);
beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "rootfs-diff-"));
  for (const name of ["lower", "upper", "work", "merged", "checkpoint"]) fs.mkdirSync(at(name));
});
afterEach(() => {
  unmount();
  fs.rmSync(directory, { recursive: true, force: true });
});

let mounted = false;
function mount(options = "redirect_dir=off,metacopy=off,index=off"): void {
  const layers = `lowerdir=${at("lower")},upperdir=${at("upper")},workdir=${at("work")}`;
  execFileSync("mount", ["-t", "overlay", "overlay", "-o", `${layers},${options}`, at("merged")]);
  mounted = true;
}
function unmount(): void {
  if (mounted) execFileSync("umount", [at("merged")]);
  mounted = false;
}

/** A copy of the lower tree, as a container elsewhere would begin with. */
function copyLower(to: string): string {
  execFileSync("cp", ["-a", at("lower"), at(to)]);
  return at(to);
}

/** Numbers that are the same in every run with the same seed (mulberry32). */
function randomOf(seed: number) {
  let state = seed;
  const next = () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return {
    below: (limit: number) => Math.floor(next() * limit),
    pick: <T>(items: readonly T[]): T => items[Math.floor(next() * items.length)]!,
  };
}

const names = ["a", "b", "c", "dir", "with space", "\xc3\xa9", "\xff\x01", ".hidden", "n".repeat(200), "-x"];
const capability = Buffer.from("0100000200200000000000000000000000000000", "hex");
const raw = (name: string) => Buffer.from(name, "latin1");

/** Changes a tree at random in all the ways that there are; what can't be done there isn't. */
function change(root: string, steps: number, random: ReturnType<typeof randomOf>): void {
  const anyPath = () => {
    let found = root;
    for (let depth = 0; depth < 4; depth++) {
      found += `/${random.pick(names)}`;
      if (!fs.lstatSync(raw(found), { throwIfNoEntry: false })?.isDirectory() || random.below(3) === 0) break;
    }
    return found;
  };
  const setRandomTime = (path: string) =>
    setTimes(raw(path), 1_600_000_000_000_000_000n + BigInt(random.below(2 ** 31)));
  /** To write to; never through a link, which may lead out, nor into a FIFO, which would wait for a reader. */
  const open = (path: string, flags: number) => {
    const info = fs.lstatSync(raw(path), { throwIfNoEntry: false });
    if (info && !info.isFile()) throw Object.assign(new Error("not a file"), { code: "ENOTSUP" });
    return fs.openSync(
      raw(path),
      flags | fs.constants.O_WRONLY | fs.constants.O_CREAT | fs.constants.O_NOFOLLOW,
    );
  };
  const write = (path: string, flags: number, use: (fd: number) => void) => {
    const fd = open(path, flags);
    use(fd);
    fs.closeSync(fd);
  };
  const { O_TRUNC, O_APPEND } = fs.constants;
  const actions: ((path: string) => void)[] = [
    (path) =>
      write(path, O_TRUNC, (fd) =>
        fs.writeSync(fd, `some ${random.below(1000)}\n`.repeat(1 + random.below(2000))),
      ),
    (path) => write(path, O_APPEND, (fd) => fs.writeSync(fd, "more")),
    (path) =>
      write(path, O_TRUNC, (fd) => {
        fs.ftruncateSync(fd, 1_200_000);
        for (let i = random.below(3); i > 0; i--) fs.writeSync(fd, "data", random.below(1_100_000));
      }),
    (path) => fs.mkdirSync(raw(path), { mode: 0o711 }),
    (path) => fs.mkdirSync(raw(path)),
    (path) => fs.rmSync(raw(path), { recursive: true }),
    (path) => {
      fs.rmSync(raw(path), { recursive: true }); // and made again: opaque where it was in the lower layer
      fs.mkdirSync(raw(path));
      write(`${path}/${random.pick(names)}`, 0, (fd) => fs.writeSync(fd, "new"));
    },
    (path) => {
      fs.rmSync(raw(path), { recursive: true });
      write(path, 0, (fd) => fs.writeSync(fd, "a file now"));
    },
    (path) => fs.symlinkSync(random.pick(["a", "../..", "/nowhere", "x".repeat(300)]), raw(path)),
    (path) => fs.linkSync(raw(anyPath()), raw(path)),
    (path) => fs.renameSync(raw(path), raw(anyPath())),
    (path) => makeNode(raw(path), fs.constants.S_IFIFO | 0o640),
    (path) => makeNode(raw(path), fs.constants.S_IFCHR | 0o600, 1, 3),
    (path) => makeNode(raw(path), fs.constants.S_IFBLK | 0o600, 259, 70_000),
    (path) => fs.lchownSync(raw(path), random.below(3000), random.pick([0, 4_000_000_000])),
    (path) =>
      !fs.lstatSync(raw(path)).isSymbolicLink() &&
      fs.chmodSync(raw(path), random.pick([0o400, 0o4755, 0o2750, 0o1777])),
    (path) => setXattr(raw(path), "user.some", Buffer.from([random.below(256), 0, 10])),
    (path) => setXattr(raw(path), "trusted.some", Buffer.alloc(random.below(300), 0xff)),
    (path) => fs.lstatSync(raw(path)).isFile() && setXattr(raw(path), "security.capability", capability),
    setRandomTime,
  ];
  for (let step = 0; step < steps; step++) {
    try {
      random.pick(actions)(anyPath());
    } catch (error) {
      // Not there, there already, of another type, on another layer: another step will do.
      if (!/^(E[A-Z]+|ERR_FS_EISDIR)$/.test(String((error as NodeJS.ErrnoException).code))) throw error;
    }
  }
}

describe.skipIf(missing)(`a rootfs diff${missing ? ` (${missing})` : ""}`, () => {
  it.each(Array.from({ length: 8 }, (_, seed) => seed))(
    "applied to a copy of the lower tree gives the same tree, whatever changed (seed %i)",
    async (seed) => {
      const random = randomOf(seed * 7919 + 1);
      change(at("lower"), 150, random);
      mount();
      change(at("merged"), 150, random);
      await takeRootfsDiff(await overlayLayers(at("merged")), at("checkpoint"));
      const copy = copyLower("copy");
      await applyRootfsDiff(at("checkpoint"), copy);
      expect(describeTree(copy)).toEqual(describeTree(at("merged")));
    },
  );

  it.each([1, 2, 3])(
    "without whiteouts, as Podman has it, gives the same tree by deleted.files (seed %i)",
    async (seed) => {
      const random = randomOf(seed);
      const ascii = (root: string) => change(root, 120, random);
      names.splice(0, names.length, ...names.filter((name) => !name.includes("\xff"))); // JSON can't name that
      ascii(at("lower"));
      mount();
      ascii(at("merged"));
      await takeRootfsDiff(await overlayLayers(at("merged")), at("checkpoint"), { whiteouts: false });
      expect(
        execFileSync("tar", ["-tf", at("checkpoint/rootfs-diff.tar")], { encoding: "latin1" }),
      ).not.toContain(".wh.");
      const copy = copyLower("copy");
      await applyRootfsDiff(at("checkpoint"), copy);
      expect(describeTree(copy)).toEqual(describeTree(at("merged")));
    },
  );

  it("applies to an overlay as well as to a plain tree", async () => {
    fs.mkdirSync(at("lower/dir"));
    fs.writeFileSync(at("lower/dir/old"), "");
    mount();
    fs.rmSync(at("merged/dir"), { recursive: true });
    fs.mkdirSync(at("merged/dir"));
    fs.writeFileSync(at("merged/dir/new"), "new");
    await takeRootfsDiff(await overlayLayers(at("merged")), at("checkpoint"));
    const expected = describeTree(at("merged"));
    unmount();
    for (const name of ["upper", "work"]) {
      fs.rmSync(at(name), { recursive: true });
      fs.mkdirSync(at(name));
    }
    mount();
    await applyRootfsDiff(at("checkpoint"), at("merged"));
    expect(describeTree(at("merged"))).toEqual(expected);
  });

  it("reads whiteouts that are attributes, and those of a mount by a user", async () => {
    fs.mkdirSync(at("lower/dir"));
    for (const name of ["gone", "dir/gone", "stays"]) fs.writeFileSync(at("lower", name), "");
    fs.mkdirSync(at("upper/dir"));
    setXattr(at("upper/dir"), "user.overlay.opaque", Buffer.from("x"));
    for (const name of ["gone", "dir/gone"]) {
      fs.writeFileSync(at("upper", name), "");
      setXattr(at("upper", name), "user.overlay.whiteout", Buffer.from("y"));
    }
    const layers = { upper: at("upper"), lowers: [at("lower")] };
    expect(await takeRootfsDiff(layers, at("checkpoint"))).toMatchObject({ deleted: 2 });
    const copy = copyLower("copy");
    expect(await applyRootfsDiff(at("checkpoint"), copy)).toMatchObject({ deleted: 2 });
    expect(fs.readdirSync(copy, { recursive: true }).sort()).toEqual(["dir", "stays"]);
  });

  it("leaves out what it is told to, deletions too", async () => {
    for (const name of ["lower/gone.log", "lower/gone"]) fs.writeFileSync(at(name), "");
    mount();
    for (const name of ["gone.log", "gone"]) fs.rmSync(at("merged", name));
    fs.mkdirSync(at("merged/var/cache/deep"), { recursive: true });
    for (const name of ["var/cache/deep/x", "var/keep", "var/x.log", "cache"])
      fs.writeFileSync(at("merged", name), "");
    const exclude = ["/var/cache", "*.log"];
    await takeRootfsDiff(await overlayLayers(at("merged")), at("checkpoint"), { exclude });
    const listed = execFileSync("tar", ["-tf", at("checkpoint/rootfs-diff.tar")], { encoding: "utf8" });
    expect(listed.trim().split("\n")).toEqual(["./", "cache", ".wh.gone", "var/", "var/keep"]);
    expect(fs.readFileSync(at("checkpoint/deleted.files"), "utf8")).toBe('["/gone"]');
  });

  it("that grows over its limit is an error that says where, and leaves nothing", async () => {
    mount();
    fs.writeFileSync(at("merged/big"), Buffer.alloc(300_000));
    const taking = takeRootfsDiff(await overlayLayers(at("merged")), at("checkpoint"), { maxBytes: 100_000 });
    await expect(taking).rejects.toThrow(/more than the allowed 100000 bytes, reached at big/);
    expect(fs.readdirSync(at("checkpoint"))).toEqual([]);
  });

  it("of a renamed directory or a file without its data is refused by name", async () => {
    fs.mkdirSync(at("lower/dir"));
    fs.writeFileSync(at("lower/file"), "data");
    mount("redirect_dir=on,metacopy=on,index=off");
    const take = async () => takeRootfsDiff(await overlayLayers(at("merged")), at("checkpoint"));
    fs.renameSync(at("merged/dir"), at("merged/moved"));
    await expect(take()).rejects.toThrow(/moved was renamed/);
    fs.rmSync(at("merged/moved"), { recursive: true });
    fs.chmodSync(at("merged/file"), 0o600);
    await expect(take()).rejects.toThrow(/of file only the metadata/);
  });

  it("with a path that nobody could put back is refused, and where", async () => {
    mount();
    // Longer than any path that a program may name: step by step.
    execFileSync(
      "sh",
      [
        "-c",
        `i=0; while [ $i -lt 18 ]; do mkdir ${"d".repeat(240)} && cd -P ${"d".repeat(240)} || exit 1; i=$((i+1)); done`,
      ],
      {
        cwd: at("merged"),
      },
    );
    await expect(takeRootfsDiff(await overlayLayers(at("merged")), at("checkpoint"))).rejects.toThrow(
      /d… is longer than 4095 bytes/,
    );
    expect(fs.readdirSync(at("checkpoint"))).toEqual([]);
    execFileSync("rm", ["-r", at("merged", "d".repeat(240))]);
  });

  it("names the sockets that it can't hold", async () => {
    mount();
    execFileSync(
      "perl",
      ["-MSocket", "-e", 'socket(S,PF_UNIX,SOCK_STREAM,0); bind(S,sockaddr_un("socket")) or die'],
      {
        cwd: at("merged"),
      },
    );
    expect(await takeRootfsDiff(await overlayLayers(at("merged")), at("checkpoint"))).toMatchObject({
      sockets: ["socket"],
    });
  });

  it("is there only for an overlay", async () => {
    await expect(overlayLayers(at("merged"))).rejects.toThrow(/no mount point/);
    await expect(overlayLayers("/proc")).rejects.toThrow(/of type proc/);
  });
});

describe.skipIf(missing)(`a root file system without layers${missing ? ` (${missing})` : ""}`, () => {
  const root = () => at("copy");
  /** As the native snapshotter: a copy, in which things are changed. */
  async function takeFrom(exclude: string[] = [], sameAtNs = 0n) {
    return await takeRootfsDiff(await snapshotOf(root(), at("lower"), sameAtNs), at("checkpoint"), {
      exclude,
    });
  }
  const listed = () =>
    execFileSync("tar", ["-tf", at("checkpoint/rootfs-diff.tar")], { encoding: "utf8" })
      .trim()
      .split("\n");
  const deleted = () => JSON.parse(fs.readFileSync(at("checkpoint/deleted.files"), "utf8"));
  const now = () => BigInt(Date.now()) * 1_000_000n;

  it.each(Array.from({ length: 12 }, (_, seed) => seed))(
    "is made again of what it was made of and its changes, whatever changed (seed %i)",
    async (seed) => {
      const random = randomOf(seed * 104_729 + 3);
      change(at("lower"), 150, random);
      copyLower("copy");
      await new Promise((resolve) => setTimeout(resolve, 20)); // a file system's clock is coarse
      const sameAtNs = seed % 2 === 0 ? 0n : now();
      await new Promise((resolve) => setTimeout(resolve, 20));
      change(root(), seed % 3 === 0 ? 15 : 120, random);
      await takeFrom([], sameAtNs);
      const fresh = copyLower("fresh");
      await applyRootfsDiff(at("checkpoint"), fresh);
      expect(describeTree(fresh)).toEqual(describeTree(root()));
    },
  );

  it("has nothing in its layer when nothing changed", async () => {
    change(at("lower"), 150, randomOf(5));
    copyLower("copy");
    expect(await takeFrom([], now())).toMatchObject({ members: 0, deleted: 0, sockets: [] });
  });

  it("has in its layer what changed, the directories around it, and nothing else", async () => {
    for (const name of ["etc", "etc/deep", "usr", "gone"]) fs.mkdirSync(at("lower", name));
    for (const name of ["etc/deep/a", "etc/b", "usr/c", "gone/d", "e"])
      fs.writeFileSync(at("lower", name), "x");
    copyLower("copy");
    fs.writeFileSync(at("copy/etc/deep/a"), "yy");
    fs.rmSync(at("copy/gone"), { recursive: true });
    fs.rmSync(at("copy/e"));
    await takeFrom();
    expect(listed()).toEqual(["./", ".wh.e", "etc/deep/", "etc/deep/a", ".wh.gone"]);
    expect(deleted()).toEqual(["/e", "/gone"]);
  });

  it("is compared by its contents where a program has set size and time back", async () => {
    fs.writeFileSync(at("lower/a"), "one");
    const times = fs.statSync(at("lower/a"), { bigint: true });
    copyLower("copy");
    const before = now() - 1_000_000_000n;
    fs.writeFileSync(at("copy/a"), "two");
    setTimes(at("copy/a"), times.mtimeNs);
    setTimes(root(), fs.statSync(at("lower"), { bigint: true }).mtimeNs);
    await takeFrom([], before);
    expect(listed()).toContain("a");
  });

  it("is compared by its contents where directories have changed places, and files are alike by size and time", async () => {
    const time = 1_700_000_000_000_000_000n;
    for (const name of ["v1", "v2"]) {
      fs.mkdirSync(at("lower", name, "deep"), { recursive: true });
      fs.writeFileSync(at("lower", name, "deep/file"), name);
      for (const path of [`${name}/deep/file`, `${name}/deep`, name]) setTimes(at("lower", path), time);
    }
    copyLower("copy");
    await new Promise((resolve) => setTimeout(resolve, 20)); // a file system's clock is coarse
    const before = now();
    await new Promise((resolve) => setTimeout(resolve, 20));
    for (const [from, to] of [
      ["v1", "v3"],
      ["v2", "v1"],
      ["v3", "v2"],
    ] as const)
      fs.renameSync(at("copy", from), at("copy", to));
    await takeFrom([], before);
    const fresh = copyLower("fresh");
    await applyRootfsDiff(at("checkpoint"), fresh);
    expect(describeTree(fresh)).toEqual(describeTree(root()));
  });

  it("keeps files of several names one file, and others apart", async () => {
    for (const name of ["a", "c"]) {
      fs.writeFileSync(at("lower", name), name.repeat(9));
      fs.linkSync(at("lower", name), at("lower", `${name}2`));
    }
    fs.writeFileSync(at("lower/single"), "single");
    copyLower("copy");
    fs.linkSync(at("copy/a"), at("copy/0-before")); // a new name, before the old ones
    fs.linkSync(at("copy/single"), at("copy/z-after")); // and one after it
    fs.rmSync(at("copy/c2")); // no longer linked, and otherwise the same
    execFileSync("cp", ["-a", at("copy/c"), at("copy/c2")]);
    await takeFrom();
    const fresh = copyLower("fresh");
    await applyRootfsDiff(at("checkpoint"), fresh);
    expect(describeTree(fresh)).toEqual(describeTree(root()));
    const inode = (name: string) => fs.statSync(path.join(fresh, name)).ino;
    expect(inode("0-before")).toBe(inode("a2"));
    expect(inode("single")).toBe(inode("z-after"));
    expect(inode("c")).not.toBe(inode("c2"));
    expect(listed()).not.toContain("single"); // it is there: its new name is a link to it
  });

  it("leaves out what is excluded, and what is mounted in it from elsewhere", async () => {
    fs.mkdirSync(at("lower/mnt"));
    fs.writeFileSync(at("lower/old.log"), "");
    copyLower("copy");
    fs.rmSync(at("copy/old.log"));
    fs.writeFileSync(at("copy/new.log"), "");
    fs.writeFileSync(at("copy/kept"), "");
    execFileSync("mount", ["-t", "tmpfs", "none", at("copy/mnt")]);
    try {
      fs.writeFileSync(at("copy/mnt/x"), "");
      await takeFrom(["*.log"]);
    } finally {
      execFileSync("umount", [at("copy/mnt")]);
    }
    expect(listed()).toEqual(["./", "kept"]);
    expect(deleted()).toEqual([]);
  });

  it("is read ahead while the container goes on changing it", async () => {
    for (let i = 0; i < 300; i++) fs.mkdirSync(at("lower", `${i}`, "below"), { recursive: true });
    copyLower("copy");
    const changes = await snapshotOf(root(), at("lower"), 0n);
    let ready = false;
    const reading = prepareRootfsDiff(changes, []).then(() => {
      ready = true;
    });
    for (let i = 0; i < 300 || !ready; i++) {
      fs.rmSync(at("copy", `${i}`), { recursive: true, force: true });
      fs.writeFileSync(at("copy", `${i % 7}`), "");
      await new Promise((next) => setImmediate(next));
    }
    await reading;
    await expect(prepareRootfsDiff(changes, ["/"])).rejects.toThrow(/names nothing below the root/);
    await expect(prepareRootfsDiff(changes, [], AbortSignal.abort())).rejects.toBeInstanceOf(Cancelled);
  });

  it("with a layer of an overlay of the container's own is refused by name", async () => {
    copyLower("copy");
    fs.mkdirSync(at("copy/upper"));
    setXattr(at("copy/upper"), "trusted.overlay.opaque", Buffer.from("y"));
    await expect(takeFrom()).rejects.toThrow(/upper belongs to the layer of an overlay in the container/);
    expect(fs.readdirSync(at("checkpoint"))).toEqual([]);
  });
});
