import { execFileSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { gzipSync, zstdCompressSync } from "node:zlib";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import {
  type Compression,
  compressions,
  createArchive,
  describeDirectory,
  extractArchive,
  verifyArchive,
  verifyDirectory,
  writtenLayouts,
} from "../../../src/checkpoint/archive/index.ts";
import { writeManifest } from "../../../src/checkpoint/manifest-files.ts";
import {
  AlreadyExists,
  BrokenImage,
  InvalidRequest,
  NotFound,
  PermissionDenied,
  ResourceExhausted,
  Unsupported,
} from "../../../src/errors/index.ts";
import { sampleManifest } from "../sample.ts";
import { tarEntry as entry, makeTar } from "../tar/make.ts";

let directory: string;
let checkpoint: string;
const at = (...parts: string[]) => path.join(directory, ...parts);
const secret = Buffer.from("correct horse battery staple");

const has = (program: string) => {
  try {
    execFileSync("sh", ["-c", `command -v ${program}`]);
    return true;
  } catch {
    return false;
  }
};

/** A checkpoint with what memory looks like: noise, words, zeros, holes. */
async function makeCheckpoint(): Promise<void> {
  fs.mkdirSync(path.join(checkpoint, "checkpoint/sub"), { recursive: true });
  const put = (name: string, data: Buffer | string) => fs.writeFileSync(path.join(checkpoint, name), data);
  put("checkpoint/inventory.img", "inventory");
  put("checkpoint/empty.img", "");
  put("checkpoint/sub/\u00e9 with space.img", "text");
  put(
    "checkpoint/pages-1.img",
    Buffer.concat([randomBytes(100_000), Buffer.alloc(5_000_000), Buffer.from("word ".repeat(900_000))]),
  );
  fs.truncateSync(path.join(checkpoint, "checkpoint/empty.img"), 3_000_000);
  await writeManifest(checkpoint, sampleManifest, { digests: true });
}

function contents(root: string): Record<string, string> {
  const found: Record<string, string> = {};
  for (const name of fs.readdirSync(root, { recursive: true, encoding: "utf8" }).sort()) {
    const info = fs.lstatSync(path.join(root, name));
    found[name] = info.isFile()
      ? `${(info.mode & 0o777).toString(8)} ${createHash("md5")
          .update(fs.readFileSync(path.join(root, name)))
          .digest("hex")}`
      : `${(info.mode & 0o777).toString(8)} directory`;
  }
  return found;
}

beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "archive-"));
  checkpoint = at("web");
});
afterEach(() => fs.rmSync(directory, { recursive: true, force: true }));

/** Nothing but what the test made itself. */
const nothingIsLeft = (...names: string[]) => {
  expect(fs.readdirSync(directory).sort()).toEqual([...names].sort());
};

describe("an archive", () => {
  for (const compression of compressions)
    for (const encrypted of [false, true]) {
      const missing = compression === "lz4" && !has("lz4") ? "needs lz4" : undefined;
      it.skipIf(missing)(
        `with ${compression}${encrypted ? ", encrypted" : ""} gives the checkpoint back${missing ? ` (${missing})` : ""}`,
        async () => {
          await makeCheckpoint();
          const options = { compression, ...(encrypted && { secret }) };
          const made = await createArchive(checkpoint, at("web.tar"), options);
          expect(fs.statSync(at("web.tar"))).toMatchObject({ size: made.archiveBytes, mode: 0o100600 });
          const before = contents(checkpoint);
          const read = encrypted ? { secret } : {};
          const found = await extractArchive(at("web.tar"), at("copy"), read);
          expect(found).toMatchObject({
            compression,
            encrypted,
            verified: 4,
            description: { layout: "cedana", images: "checkpoint" },
          });
          const copy = contents(at("copy"));
          // For other tools; what is in them says the test with checkpointctl.
          for (const name of ["config.dump", "spec.dump"]) Reflect.deleteProperty(copy, name);
          const modes = (found: Record<string, string>) =>
            Object.fromEntries(
              Object.entries(found).map(([name, text]) => [
                name,
                text.replace(/^\d+/, text.endsWith("y") ? "700" : "600"),
              ]),
            );
          expect(copy).toEqual(modes(before));
          expect(fs.statSync(at("copy/checkpoint/pages-1.img")).blocks * 512).toBeLessThan(5_500_000); // zeros are holes
          expect(await verifyDirectory(at("copy"))).toMatchObject({ verified: 4 });
          expect(await verifyArchive(at("web.tar"), read)).toMatchObject({ verified: 4 });
          nothingIsLeft("web", "web.tar", "copy");
        },
      );
    }

  it.each<[Compression, string[]]>([
    ["gzip", ["gzip", "-dc"]],
    ["zstd", ["zstd", "-dc"]],
    ["lz4", ["lz4", "-dc"]],
  ])("with %s is what its program reads", async (compression, [program, ...args]) => {
    if (!has(program!)) return;
    await makeCheckpoint();
    await createArchive(checkpoint, at("web.tar"), { compression });
    fs.mkdirSync(at("out"));
    execFileSync("sh", ["-c", `${[program, ...args].join(" ")} < web.tar | tar -xf - -C out`], {
      cwd: directory,
    });
    const names = ["checkpoint/pages-1.img", "checkpoint/empty.img", "cedana.json"];
    for (const name of names)
      expect(fs.readFileSync(at("out", name)).equals(fs.readFileSync(path.join(checkpoint, name)))).toBe(
        true,
      );
  });

  it.each<[Compression, (data: Buffer) => Buffer]>([
    ["gzip", (data) => Buffer.concat([gzipSync(data.subarray(0, 5000)), gzipSync(data.subarray(5000))])],
    [
      "zstd",
      (data) =>
        Buffer.concat([
          zstdCompressSync(data.subarray(0, 5000)),
          Buffer.from("502a4d1803000000616263", "hex"),
          zstdCompressSync(data.subarray(5000)),
        ]),
    ],
  ])("of %s in several parts, as parallel writers make it, is read whole", async (compression, pack) => {
    await makeCheckpoint();
    await createArchive(checkpoint, at("plain.tar"), { compression: "none" });
    fs.writeFileSync(at("parts.tar"), pack(fs.readFileSync(at("plain.tar"))));
    expect(await verifyArchive(at("parts.tar"))).toMatchObject({ compression, verified: 4 });
  });

  it("of an older checkpoint, whose digests are SHA-256, is compared with these, wherever the manifest is in it", async () => {
    await makeCheckpoint();
    const manifest = JSON.parse(fs.readFileSync(path.join(checkpoint, "cedana.json"), "utf8"));
    for (const file of manifest.files)
      file.digest = `sha256:${createHash("sha256")
        .update(fs.readFileSync(path.join(checkpoint, file.path)))
        .digest("hex")}`;
    fs.writeFileSync(path.join(checkpoint, "cedana.json"), JSON.stringify(manifest));
    await createArchive(checkpoint, at("ours.tar"), { verify: true });
    const members = [
      "checkpoint/inventory.img",
      "checkpoint/empty.img",
      "checkpoint/pages-1.img",
      "checkpoint/sub",
    ];
    execFileSync("tar", ["-C", checkpoint, "-cf", at("last.tar"), ...members, "cedana.json"]);
    for (const archive of ["ours.tar", "last.tar"])
      expect(await verifyArchive(at(archive))).toMatchObject({ verified: 4 });
    fs.writeFileSync(path.join(checkpoint, "checkpoint/inventory.img"), "Inventory");
    execFileSync("tar", ["-C", checkpoint, "-cf", at("wrong.tar"), ...members, "cedana.json"]);
    await expect(verifyArchive(at("wrong.tar"))).rejects.toThrow(
      /inventory.img has the digest sha256:[0-9a-f]{64} instead of sha256:/,
    );
    await expect(createArchive(checkpoint, at("wrong.tar.zst"), { verify: true })).rejects.toThrow(
      BrokenImage,
    );
  });

  it("of images without a directory around them has them in checkpoint/", async () => {
    fs.mkdirSync(checkpoint);
    fs.writeFileSync(path.join(checkpoint, "inventory.img"), "1");
    await writeManifest(checkpoint, sampleManifest, { digests: true });
    await createArchive(checkpoint, at("web.tar"));
    expect(await extractArchive(at("web.tar"), at("copy"))).toMatchObject({ verified: 1 });
    expect(fs.readdirSync(at("copy/checkpoint")).sort()).toEqual(["cedana.json", "inventory.img"]);
    expect(await verifyDirectory(at("copy"))).toMatchObject({ verified: 1 });
    expect((await describeDirectory(at("copy"))).container.id).toBe(sampleManifest.containerId);
  });

  it("of images of which nothing else is known can be extracted, too", async () => {
    fs.mkdirSync(path.join(checkpoint, "checkpoint"), { recursive: true });
    fs.writeFileSync(path.join(checkpoint, "checkpoint/inventory.img"), "1");
    await createArchive(checkpoint, at("web.tar"));
    const extracted = await extractArchive(at("web.tar"), at("copy"));
    expect(extracted).toMatchObject({
      verified: 0,
      description: { layout: "cedana", container: { id: "" } },
    });
  });

  it("takes an earlier checkpoint along only where it is inside", async () => {
    await makeCheckpoint();
    fs.mkdirSync(path.join(checkpoint, "pre-checkpoint"));
    fs.symlinkSync("../pre-checkpoint", path.join(checkpoint, "checkpoint/parent"));
    await createArchive(checkpoint, at("web.tar"));
    await extractArchive(at("web.tar"), at("copy"));
    expect(fs.readlinkSync(at("copy/checkpoint/parent"))).toBe("../pre-checkpoint");
    fs.rmSync(path.join(checkpoint, "checkpoint/parent"));
    fs.symlinkSync("../../before", path.join(checkpoint, "checkpoint/parent"));
    await expect(createArchive(checkpoint, at("second.tar"))).rejects.toThrow(
      /parent is a link to ..\/..\/before/,
    );
    nothingIsLeft("web", "web.tar", "copy");
  });

  it("replaces no other unless told to, and leaves nothing of a failure or of a killed writer", async () => {
    await makeCheckpoint();
    fs.writeFileSync(at("web.tar"), "old");
    await expect(createArchive(checkpoint, at("web.tar"))).rejects.toThrow(AlreadyExists);
    expect(fs.readFileSync(at("web.tar"), "utf8")).toBe("old");
    fs.writeFileSync(at(".web.tar.01234567-89ab-cdef-0123-456789abcdef.partial"), "of a killed writer");
    await createArchive(checkpoint, at("web.tar"), { replace: true });
    await extractArchive(at("web.tar"), at("copy"));
    await expect(extractArchive(at("web.tar"), at("copy"))).rejects.toThrow(AlreadyExists);
    await extractArchive(at("web.tar"), at("copy"), { replace: true });
    await expect(createArchive(at("nothing"), at("x.tar"))).rejects.toThrow(NotFound);
    await expect(createArchive(checkpoint, at("nowhere/x.tar"))).rejects.toThrow(NotFound);
    await expect(createArchive(checkpoint, at("web/x.tar"))).rejects.toThrow(/would be part of/);
    fs.mkdirSync(at("empty"));
    await expect(createArchive(at("empty"), at("x.tar"))).rejects.toThrow(/inventory.img/);
    nothingIsLeft("web", "web.tar", "copy", "empty");
  });

  it("is not made of a checkpoint that isn't as its manifest says, when it is to be verified", async () => {
    await makeCheckpoint();
    await createArchive(checkpoint, at("good.tar"), { verify: true });
    const pages = fs.readFileSync(path.join(checkpoint, "checkpoint/pages-1.img"));
    pages[77]! ^= 1;
    fs.writeFileSync(path.join(checkpoint, "checkpoint/pages-1.img"), pages);
    await expect(createArchive(checkpoint, at("bad.tar"), { verify: true })).rejects.toThrow(
      /pages-1.img is not as the manifest says/,
    );
    await createArchive(checkpoint, at("bad.tar"));
    await expect(extractArchive(at("bad.tar"), at("copy"))).rejects.toThrow(
      /not as its manifest says: checkpoint\/pages-1.img has the digest/,
    );
    nothingIsLeft("web", "good.tar", "bad.tar");
  });

  it("is given up when it is told to, and leaves nothing", async () => {
    await makeCheckpoint();
    fs.truncateSync(path.join(checkpoint, "checkpoint/pages-1.img"), 2 ** 36);
    fs.writeFileSync(path.join(checkpoint, "checkpoint/full.img"), Buffer.alloc(2 ** 26, "x"));
    const stop = new AbortController();
    const making = createArchive(checkpoint, at("web.tar"), { signal: stop.signal, level: 19 });
    setTimeout(() => stop.abort(), 100);
    await expect(making).rejects.toMatchObject({ name: "Cancelled" });
    nothingIsLeft("web");
  });
});

describe("an encrypted archive", () => {
  /** Without a manifest, one chunk and a bit: the cipher alone must notice. */
  async function makeEncrypted(): Promise<Buffer> {
    fs.mkdirSync(path.join(checkpoint, "checkpoint"), { recursive: true });
    fs.writeFileSync(path.join(checkpoint, "checkpoint/inventory.img"), randomBytes(300_000));
    fs.writeFileSync(path.join(checkpoint, "config.dump"), "{}");
    fs.writeFileSync(path.join(checkpoint, "spec.dump"), "{}");
    await createArchive(checkpoint, at("web.tar"), { compression: "none", secret });
    return fs.readFileSync(at("web.tar"));
  }
  const fails = async (bytes: Buffer, error: unknown, key: Buffer | null = secret) => {
    fs.writeFileSync(at("bad.tar"), bytes);
    await expect(extractArchive(at("bad.tar"), at("copy"), key ? { secret: key } : {})).rejects.toThrow(
      error as RegExp,
    );
    nothingIsLeft("web", "web.tar", "bad.tar");
  };

  it("opens with its key alone", async () => {
    const bytes = await makeEncrypted();
    await fails(bytes, PermissionDenied, Buffer.from("correct horse battery stapla"));
    await fails(bytes, /encrypted: give its key/, null);
    const names = ["inventory.img", "config.dump", "ustar"];
    for (const name of names) expect(bytes.includes(name), name).toBe(false);
    await extractArchive(at("web.tar"), at("copy"), { secret });
  });

  it("is refused with any bit flipped, anywhere", async () => {
    const bytes = await makeEncrypted();
    // Of each field of the header, then of the first chunk, its tag, and the last one's.
    const chunk = 256 * 1024 + 16;
    const places = [0, 15, 20, 36, 71, 72, 72 + chunk - 1, bytes.length - 1];
    for (const place of places) {
      const flipped = Buffer.from(bytes);
      flipped[place]! ^= 0x10;
      await fails(flipped, /./);
    }
  });

  it("is refused when it is cut off, extended, or its chunks are mixed", async () => {
    const bytes = await makeEncrypted();
    const chunk = 256 * 1024 + 16;
    const header = bytes.subarray(0, 72);
    const [first, second] = [bytes.subarray(72, 72 + chunk), bytes.subarray(72 + chunk)];
    await fails(bytes.subarray(0, 50), /truncated in its header/);
    await fails(Buffer.concat([header, first]), /cut off, in chunk 0/); // at a chunk's border
    await fails(bytes.subarray(0, -1), /chunk 1/);
    await fails(Buffer.concat([bytes, Buffer.from("x")]), /chunk 1/);
    await fails(Buffer.concat([header, first, first, second]), /chunk 1/);
  });

  it("can't make us spend memory and time that it names", async () => {
    const bytes = await makeEncrypted();
    for (const [place, value] of [
      [16, 2],
      [17, 40],
      [18, 255],
      [19, 200],
    ] as const) {
      const hostile = Buffer.from(bytes);
      hostile[place] = value;
      await fails(hostile, Unsupported);
    }
    const newer = Buffer.from(bytes);
    newer[15] = 2;
    await fails(newer, /version 2/);
  });

  it("is not replaced by one that isn't", async () => {
    await makeEncrypted();
    await createArchive(checkpoint, at("bad.tar"));
    await fails(fs.readFileSync(at("bad.tar")), /not encrypted, and a key was given/);
  });

  it("wants a key that can't be guessed at once", async () => {
    await makeEncrypted();
    await expect(createArchive(checkpoint, at("x.tar"), { secret: Buffer.from("short") })).rejects.toThrow(
      InvalidRequest,
    );
    nothingIsLeft("web", "web.tar");
  });
});

describe("a hostile archive is refused by what is wrong with it, and leaves nothing:", () => {
  const inventory: Parameters<typeof makeTar>[0] = [
    entry({ name: "checkpoint/inventory.img", size: 1 }),
    "i",
  ];
  const file = (name: string) => entry({ name, size: 1 });
  it.each<[string, RegExp, Parameters<typeof makeTar>]>([
    ["a name that leads out", /"..\/x".*leads out/, [[file("../x"), "x"]]],
    ["an absolute name", /absolute/, [[file("/tmp/x"), "x"]]],
    ["a symbolic link", /link is a symlink/, [[entry({ name: "link", type: "symlink", linkName: "/etc" })]]],
    [
      "a parent that leads out",
      /parent is a symlink/,
      [[entry({ name: "checkpoint/parent", type: "symlink", linkName: "../../x" })]],
    ],
    [
      "a file below a link",
      /below checkpoint\/parent, a symlink/,
      [
        [entry({ name: "checkpoint/parent", type: "symlink", linkName: "../pre" })],
        [file("checkpoint/parent/x"), "x"],
      ],
    ],
    [
      "a hard link",
      /again is a hardlink/,
      [inventory, [entry({ name: "again", type: "hardlink", linkName: "checkpoint/inventory.img" })]],
    ],
    ["a device", /null is a char/, [[entry({ name: "null", type: "char", major: 1, minor: 3 })]]],
    ["a FIFO", /fifo is a fifo/, [[entry({ name: "fifo", type: "fifo" })]]],
    ["a member twice", /inventory.img is in it twice/, [inventory, inventory]],
    [
      "a member in very many directories",
      /deeper than a checkpoint's files are/,
      [[entry({ name: `${"d/".repeat(40)}x`, size: 1 }), "x"]],
    ],
    [
      "a file below a file",
      /below a, a file/,
      [
        [file("a"), "1"],
        [file("a/b"), "2"],
      ],
    ],
    [
      "a file that is a directory, too",
      /a is in it twice/,
      [[entry({ name: "a", type: "directory" })], [file("a"), "2"]],
    ],
    ["a name that is no text", /not UTF-8/, [[file("\xff"), "x"]]],
    ["no checkpoint at all", /no checkpoint that we know|not a checkpoint/, [[file("hello"), "x"]]],
    [
      "no images",
      /inventory.img/,
      [
        [entry({ name: "config.dump", size: 2 }), "{}"],
        [entry({ name: "spec.dump", size: 2 }), "{}"],
      ],
    ],
    ["a whole pod", /whole pod/, [[file("pod.dump"), "x"]]],
    ["a manifest that is none", /cedana.json/, [[entry({ name: "cedana.json", size: 2 }), "{}"], inventory]],
    [
      "more than fits",
      /more than \d+ bytes, reached at big/,
      [[entry({ name: "big", size: 2 ** 50, extents: [] })]],
    ],
  ])("%s", async (_what, message, members) => {
    fs.writeFileSync(at("bad.tar"), makeTar(...members));
    await expect(extractArchive(at("bad.tar"), at("copy"))).rejects.toThrow(message);
    await expect(verifyArchive(at("bad.tar"))).rejects.toThrow(message);
    nothingIsLeft("bad.tar");
  });

  it.each<[string, (whole: Buffer) => Buffer]>([
    ["plain", (whole) => whole],
    ["gzip", (whole) => gzipSync(whole)],
    ["zstd", (whole) => zstdCompressSync(whole)],
    ...(has("lz4")
      ? [
          ["lz4", (whole: Buffer) => execFileSync("lz4", ["-q", "-c", "-"], { input: whole })] as [
            string,
            (whole: Buffer) => Buffer,
          ],
        ]
      : []),
  ])("%s, cut off or with something behind it", async (_what, pack) => {
    const spec = [entry({ name: "spec.dump", size: 2 }), "{}"] as Parameters<typeof makeTar>[0];
    const config = [entry({ name: "config.dump", size: 2 }), "{}"] as Parameters<typeof makeTar>[0];
    const noise = [
      entry({ name: "checkpoint/pages-1.img", size: 50_000 }),
      randomBytes(50_000),
    ] as Parameters<typeof makeTar>[0];
    const bytes = pack(makeTar(inventory, spec, config, noise));
    fs.writeFileSync(at("bad.tar"), bytes);
    await verifyArchive(at("bad.tar"));
    const bad = [
      bytes.subarray(0, bytes.length / 2),
      bytes.subarray(0, -3),
      Buffer.concat([bytes, Buffer.from("garbage!")]),
      bytes.subarray(0, 5),
      Buffer.alloc(0),
    ];
    for (const [index, some] of bad.entries()) {
      fs.writeFileSync(at("bad.tar"), some);
      await expect(extractArchive(at("bad.tar"), at("copy")), `case ${index}`).rejects.toThrow(BrokenImage);
      nothingIsLeft("bad.tar");
    }
  });

  it("more bytes or members than are allowed, and bombs", async () => {
    fs.writeFileSync(at("bad.tar"), makeTar(inventory, [entry({ name: "a", size: 3000 }), "x".repeat(3000)]));
    const extract = (limits: object) => extractArchive(at("bad.tar"), at("copy"), { limits });
    await expect(extract({ bytes: 3000 })).rejects.toThrow(/more than 3000 bytes, reached at a/);
    await expect(extract({ members: 1 })).rejects.toThrow(/more than 1 members/);
    // 300 MB of one letter in some kilobytes. Zeros are no bomb: memory has them, and they are not written.
    const part = zstdCompressSync(Buffer.alloc(10_000_000, "x"));
    const header = makeTar([entry({ name: "bomb", size: 300_000_000 })]).subarray(0, 512);
    fs.writeFileSync(
      at("bad.tar"),
      Buffer.concat([zstdCompressSync(header), ...Array.from({ length: 30 }, () => part)]),
    );
    await expect(extract({})).rejects.toThrow(ResourceExhausted);
    await expect(extract({})).rejects.toThrow(/at bomb: more than 1000 for each/);
    nothingIsLeft("bad.tar");
  });
});

describe("the layouts of other engines", () => {
  const container = {
    id: "0123456789abcdef",
    name: "web",
    image: "docker.io/library/busybox:latest",
    imageDigest: `sha256:${"1".repeat(64)}`,
    runtime: "runc",
    createdAt: "2026-01-02T03:04:05Z",
    checkpointedAt: "2026-01-03T03:04:05Z",
    spec: { ociVersion: "1.0.2", mounts: [{ type: "bind", source: "/srv", destination: "/data" }] },
    pod: { name: "pod-1", namespace: "prod", logPath: "/var/log/pods/x" },
  };

  it.each(writtenLayouts)("%s is written, and known again", async (layout) => {
    await makeCheckpoint();
    fs.writeFileSync(path.join(checkpoint, "deleted.files"), '["/gone"]');
    fs.writeFileSync(
      path.join(checkpoint, "rootfs-diff.tar"),
      makeTar([entry({ name: "a", size: 1 }), "a"], [entry({ name: ".wh.gone" })]),
    );
    if (layout === "cedana") await writeManifest(checkpoint, sampleManifest, { digests: true });
    await createArchive(checkpoint, at("web.tar"), { layout, container });
    const { description } = await extractArchive(at("web.tar"), at("copy"));
    expect(description).toMatchObject({ layout, images: "checkpoint", rootfsDiff: true, deletedFiles: true });
    expect(description.container).toMatchObject({ id: container.id, image: container.image });
    expect((await describeDirectory(at("copy"))).layout).toBe(layout);
    // Podman and CRI-O would make files named .wh.gone.
    const names = execFileSync("tar", ["-tf", at("copy/rootfs-diff.tar")], { encoding: "utf8" })
      .trim()
      .split("\n");
    expect(names).toEqual(layout === "podman" || layout === "crio" ? ["a"] : ["a", ".wh.gone"]);
    const pod = layout === "podman" ? "" : "pod-1";
    expect(description.container.pod).toBe(pod);
  });

  it.skipIf(!has("lz4"))("leave no lz4 behind when the rootfs diff in it can't be repacked", async () => {
    await makeCheckpoint();
    fs.writeFileSync(path.join(checkpoint, "deleted.files"), "[]");
    const broken = execFileSync("lz4", ["-q", "-c", "-"], {
      input: randomBytes(20_000_000),
      maxBuffer: 1 << 30,
    });
    fs.writeFileSync(path.join(checkpoint, "rootfs-diff.tar"), broken);
    await expect(createArchive(checkpoint, at("web.tar"), { layout: "podman", container })).rejects.toThrow(
      BrokenImage,
    );
    const children = () =>
      execFileSync("ps", ["--ppid", String(process.pid), "-o", "comm="], { encoding: "utf8" });
    await vi.waitUntil(() => !children().includes("lz4"), { timeout: 10_000 });
    nothingIsLeft("web");
  });

  it.each<[string, string[], Record<string, string> | undefined]>([
    ["podman", ["network.status", "ctr.log"], { "io.container.manager": "libpod" }],
    ["crio", ["bind.mounts", "deleted.files"], { "io.container.manager": "cri-o" }],
    ["crio", ["io.kubernetes.cri-o.LogPath"], undefined],
    ["containerd-cri", ["status", "status.dump", "container.log"], undefined],
    ["podman", ["devshm-checkpoint.tar", "artifacts/x"], undefined],
  ])("%s is known by %j", async (layout, names, annotations) => {
    const spec = JSON.stringify({ annotations });
    fs.writeFileSync(
      at("their.tar"),
      makeTar(
        [entry({ name: "./", type: "directory" })],
        [entry({ name: "checkpoint/", type: "directory" })],
        [entry({ name: "checkpoint/inventory.img", size: 1 }), "i"],
        [entry({ name: "config.dump", size: 13 }), '{"id":"1234"}'],
        [entry({ name: "spec.dump", size: spec.length }), spec],
        ...names.map((name): Parameters<typeof makeTar>[0] => [entry({ name })]),
      ),
    );
    expect((await verifyArchive(at("their.tar"))).description).toMatchObject({
      layout,
      container: { id: "1234" },
    });
  });
});
