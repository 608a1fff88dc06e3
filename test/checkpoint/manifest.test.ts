import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cpuFacts, parseCpuInfo } from "../../src/checkpoint/cpu.ts";
import schema from "../../src/checkpoint/manifest.schema.json" with { type: "json" };
import { type CheckpointManifest, readManifest } from "../../src/checkpoint/manifest.ts";
import { compareSizes, verifyFiles, writeManifest } from "../../src/checkpoint/manifest-files.ts";
import { findFault, type Schema } from "../../src/checkpoint/schema.ts";
import { BrokenImage, Cancelled, Unsupported } from "../../src/errors/index.ts";

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
    networkLock: "skip",
    leaveRunning: true,
    parentPath: "../before",
    parentDigests: [`xxh128:${"cd".repeat(16)}`],
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

describe("compareSizes", () => {
  it("takes images that are as they were, with or without their logs", async () => {
    await writeManifest(images, written);
    const manifest = (await readManifest(images))!;
    expect(await compareSizes(images, manifest)).toEqual([]);
    fs.rmSync(path.join(images, "dump.log"));
    expect(await compareSizes(images, manifest)).toEqual([]);
  });

  it("names what is missing or has another size", async () => {
    fs.writeFileSync(path.join(images, "core-1.img"), "x");
    await writeManifest(images, written);
    const manifest = (await readManifest(images))!;
    fs.appendFileSync(path.join(images, "pages-1.img"), "6");
    fs.rmSync(path.join(images, "core-1.img"));
    expect((await compareSizes(images, manifest)).map(({ message }) => message)).toEqual([
      "core-1.img is missing",
      "pages-1.img has 6 bytes instead of 5",
    ]);
  });
});

describe("verifyFiles", () => {
  const verify = async () => (await verifyFiles((await readManifest(images))!, images)).map((fault) => fault);

  it("finds nothing in images that are as they were", async () => {
    fs.mkdirSync(path.join(images, "sub"));
    fs.writeFileSync(path.join(images, "sub/empty"), "");
    fs.symlinkSync("../before", path.join(images, "parent"));
    await writeManifest(images, written, { digests: true });
    const digests = (await readManifest(images))!.files.map((file) => [file.path, file.digest]);
    const names = ["dump.log", "pages-1.img", "sub/empty"];
    const sums = execFileSync("xxh128sum", names, { cwd: images, encoding: "utf8" });
    expect(sums).toBe(
      digests.map(([name, digest]) => `${digest!.replace("xxh128:", "")}  ${name}\n`).join(""),
    );
    expect(await verify()).toEqual([]);
  });

  it("compares with SHA-256 where a manifest has it, as those of older checkpoints do", async () => {
    await writeManifest(images, written, { digests: true });
    const manifest = (await readManifest(images))!;
    const sha256 = (path_: string) =>
      `sha256:${createHash("sha256")
        .update(fs.readFileSync(path.join(images, path_)))
        .digest("hex")}`;
    for (const file of manifest.files) file.digest = sha256(file.path);
    fs.writeFileSync(path.join(images, "cedana.json"), JSON.stringify(manifest));
    expect(await verify()).toEqual([]);
    fs.writeFileSync(path.join(images, "pages-1.img"), "12346");
    expect(await verify()).toMatchObject([{ path: "pages-1.img", kind: "digest" }]);
  });

  it("names each fault by its file and kind", async () => {
    for (const name of ["changed", "gone", "grown", "linked", "same"])
      fs.writeFileSync(path.join(images, `${name}.img`), name);
    await writeManifest(images, written, { digests: true });
    fs.writeFileSync(path.join(images, "changed.img"), "chamged");
    fs.rmSync(path.join(images, "gone.img"));
    fs.appendFileSync(path.join(images, "grown.img"), "!");
    fs.rmSync(path.join(images, "linked.img"));
    fs.symlinkSync("same.img", path.join(images, "linked.img"));
    fs.writeFileSync(path.join(images, "new.img"), "");
    fs.symlinkSync("/etc/passwd", path.join(images, "link"));
    const faults = await verify();
    expect(faults.map(({ path: name, kind }) => [name, kind])).toEqual([
      ["changed.img", "digest"],
      ["gone.img", "missing"],
      ["grown.img", "size"],
      ["link", "extra"],
      ["linked.img", "type"],
      ["new.img", "extra"],
    ]);
    for (const fault of faults) expect(fault.message).toContain(fault.path);
  });

  it("finds any single flipped bit", async () => {
    const bytes = Buffer.from("some bytes of a page");
    fs.writeFileSync(path.join(images, "pages-1.img"), bytes);
    await writeManifest(images, written, { digests: true });
    for (const bit of [0, 7, 80, bytes.length * 8 - 1]) {
      const flipped = Buffer.from(bytes);
      flipped[bit >> 3]! ^= 1 << (bit & 7);
      fs.writeFileSync(path.join(images, "pages-1.img"), flipped);
      expect(await verify()).toMatchObject([{ path: "pages-1.img", kind: "digest" }]);
    }
  });

  it("gives up when it is told to, and does the next one", async () => {
    await writeManifest(images, written, { digests: true });
    const manifest = (await readManifest(images))!;
    await expect(verifyFiles(manifest, images, AbortSignal.abort())).rejects.toThrow(Cancelled);
    fs.truncateSync(path.join(images, "pages-1.img"), 2 ** 36); // takes minutes
    manifest.files.find((file) => file.path === "pages-1.img")!.size = 2 ** 36;
    const stop = new AbortController();
    const verifying = verifyFiles(manifest, images, stop.signal);
    setTimeout(() => stop.abort(), 50);
    await expect(verifying).rejects.toThrow(Cancelled);
    fs.writeFileSync(path.join(images, "pages-1.img"), "12345");
    expect(await verify()).toEqual([]);
  });

  it("takes a manifest without digests by its sizes", async () => {
    await writeManifest(images, written);
    expect(await verify()).toEqual([]);
    fs.appendFileSync(path.join(images, "pages-1.img"), "6");
    expect(await verify()).toMatchObject([{ kind: "size" }]);
  });
});

describe("the schema in the repository", () => {
  type Whole<T> = T extends (infer I)[]
    ? Whole<I>[]
    : T extends object
      ? { [K in keyof T]-?: Whole<T[K]> }
      : T;
  // The compiler wants every property here; the tests want every one of these in the schema, and no other there.
  const whole: Whole<CheckpointManifest> = {
    ...written,
    version: 1,
    hostname: "web-0",
    pod: { namespace: "default", name: "web-0", container: "web" },
    generation: 1,
    criuVersion: "4.2.1",
    cedanaVersion: "0.1.0",
    image: { name: "docker.io/library/busybox:latest", digest: `sha256:${"0".repeat(64)}` },
    cpu: { architecture: "x64", model: "some", features: ["avx", "sse"] },
    name: "web",
    trigger: "command",
    rootfsDiff: {
      source: "snapshot",
      snapshotter: "native",
      bytes: 1024,
      members: 0,
      deleted: 0,
      exclude: ["*.log"],
      sockets: ["run/s"],
    },
    archive: { file: "checkpoint.tar.zst", compression: "zstd", encrypted: false },
    gpu: {
      means: "driver",
      driverVersion: 13000,
      driver: "580.65.06",
      devices: [{ uuid: "a0".repeat(16), name: "some GPU", memoryBytes: 1 }],
      processes: [
        {
          pidInContainer: 1,
          comm: "python",
          before: "running",
          restoreThread: 7,
          devices: ["a0".repeat(16)],
          memoryBytes: 1,
          times: { lockMs: 1, checkpointMs: 2.5, restoreMs: 3, unlockMs: 4 },
        },
      ],
    },
    plugins: [{ name: "runc", version: "0.1.0" }],
    namespaces: [{ type: "network", path: "/run/netns/pod" }],
    options: { ...(written.options as Whole<CheckpointManifest["options"]>) },
    files: [{ path: "pages-1.img", size: 1, digest: `sha256:${"0".repeat(64)}` }],
  };

  /** `options.tcp`, `files[].path` … of a value, and of a schema. */
  const pathsOfValue = (value: unknown, at = ""): string[] =>
    Array.isArray(value)
      ? value.flatMap((item) => pathsOfValue(item, `${at}[]`))
      : typeof value === "object" && value !== null
        ? Object.entries(value).flatMap(([key, member]) => pathsOfValue(member, `${at}.${key}`))
        : [at];
  const pathsOfSchema = (rule: Schema, at = ""): string[] =>
    rule.items
      ? pathsOfSchema(rule.items, `${at}[]`)
      : rule.properties
        ? Object.entries(rule.properties).flatMap(([key, member]) => pathsOfSchema(member, `${at}.${key}`))
        : [at];

  it("has exactly the properties that the manifest has", () => {
    expect(findFault(whole, schema as Schema)).toBeUndefined();
    const used = new Set(pathsOfValue({ ...whole, timings: { totalMs: 1 } }));
    expect([...used].sort()).toEqual(pathsOfSchema(schema as Schema).sort());
  });
});

describe("the facts of a CPU", () => {
  it("are read as x86 and ARM tell them", async () => {
    expect(parseCpuInfo("model name\t: Some CPU\nflags\t\t: fpu avx \n\nflags\t\t: other\n", "x64")).toEqual({
      architecture: "x64",
      model: "Some CPU",
      features: ["avx", "fpu"],
    });
    expect(parseCpuInfo("Features\t: fp asimd\n", "arm64").features).toEqual(["asimd", "fp"]);
    expect((await cpuFacts()).features.length).toBeGreaterThan(5);
  });
});

describe("a schema", () => {
  it("with a keyword that we don't implement is refused, not half applied", () => {
    expect(() => findFault({}, { maxLength: 5 } as never)).toThrow(/maxLength/);
  });
});
