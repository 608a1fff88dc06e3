import { createHash } from "node:crypto";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { gzipSync } from "node:zlib";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  type Blob,
  extractContentStore,
  parseCheckpointIndex,
} from "../../../src/checkpoint/archive/content-store.ts";
import { BrokenImage, ResourceExhausted } from "../../../src/errors/index.ts";
import { tarEntry as entry, makeTar } from "../tar/make.ts";

let directory: string;
beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "content-store-"));
});
afterEach(() => fs.rmSync(directory, { recursive: true, force: true }));

const blobs = new Map<string, Buffer>();
function store(mediaType: string, bytes: Buffer): Blob {
  const digest = `sha256:${createHash("sha256").update(bytes).digest("hex")}`;
  blobs.set(digest, bytes);
  return { mediaType, digest, size: bytes.length };
}
const read = async function* ({ digest }: Blob) {
  const bytes = blobs.get(digest)!;
  for (let at = 0; at < bytes.length; at += 700) yield bytes.subarray(at, at + 700);
};

const criuTar = makeTar(
  [entry({ name: "inventory.img", size: 1 }), "i"],
  [entry({ name: "pages-1.img", size: 4000 }), "p".repeat(4000)],
);
const criu = store("application/vnd.containerd.container.criu.checkpoint.criu.tar", criuTar);
const layer = store("application/vnd.oci.image.layer.v1.tar+gzip", gzipSync(makeTar([entry({ name: "a" })])));
const config = store("application/vnd.containerd.container.checkpoint.config.v1+proto", Buffer.from("any"));
const image = store("application/vnd.oci.image.index.v1+json", Buffer.from("{}"));
const indexOf = (...manifests: unknown[]) =>
  Buffer.from(
    JSON.stringify({
      schemaVersion: 2,
      manifests,
      annotations: {
        "org.opencontainers.image.ref.name": "docker.io/library/busybox:latest",
        "io.containerd.checkpoint.runtime": "io.containerd.runc.v2",
        "io.containerd.checkpoint.snapshotter": "overlayfs",
      },
    }),
  );

describe("a checkpoint of containerd's content store", () => {
  it("is read by its index", () => {
    expect(parseCheckpointIndex(indexOf(image, criu, layer, config))).toEqual({
      criu,
      rootfsDiff: layer,
      config,
      runtimeOptions: undefined,
      imageName: "docker.io/library/busybox:latest",
      runtimeName: "io.containerd.runc.v2",
      snapshotter: "overlayfs",
    });
  });

  it("is extracted as ours are laid out", async () => {
    const target = path.join(directory, "web");
    const made = await extractContentStore(parseCheckpointIndex(indexOf(criu, layer)), read, target);
    expect(made).toEqual({ files: 2, bytes: 4001 });
    expect(fs.readdirSync(target, { recursive: true }).sort()).toEqual([
      "checkpoint",
      "checkpoint/inventory.img",
      "checkpoint/pages-1.img",
      "rootfs-diff.tar",
    ]);
    expect(fs.readFileSync(path.join(target, "rootfs-diff.tar"))).toEqual(blobs.get(layer.digest));
  });

  it.each<[string, RegExp, unknown[]]>([
    ["without a dump", /no dump of a task/, [image, layer]],
    ["with two dumps", /2 dumps/, [criu, criu]],
    ["with a digest of another kind", /no SHA-256 digest/, [{ ...criu, digest: "md5:1" }]],
    ["with a digest that is a path", /no SHA-256 digest/, [{ ...criu, digest: "sha256:../../etc/passwd" }]],
    ["without a size", /has no size/, [{ ...criu, size: -1 }]],
    ["with a hole", /descriptor/, [null]],
  ])("%s is refused", (_what, message, manifests) => {
    expect(() => parseCheckpointIndex(indexOf(...manifests))).toThrow(message);
  });

  it("that is no index is refused", () => {
    for (const text of ["", "null", "{}", "[]"])
      expect(() => parseCheckpointIndex(Buffer.from(text))).toThrow(BrokenImage);
  });

  it("whose blobs are not what the index says leaves nothing", async () => {
    const target = path.join(directory, "web");
    const extract = (...manifests: Blob[]) =>
      extractContentStore(parseCheckpointIndex(indexOf(...manifests)), read, target);
    blobs.set(`sha256:${"1".repeat(64)}`, criuTar);
    const wrongDigest = { ...criu, digest: `sha256:${"1".repeat(64)}` };
    await expect(extract(wrongDigest)).rejects.toThrow(/blob sha256:1+ has \d+ bytes and the digest/);
    await expect(extract({ ...criu, size: 100 })).rejects.toThrow(/more than its 100 bytes/);
    await expect(extract({ ...criu, size: criu.size + 1 })).rejects.toThrow(BrokenImage);
    const empty = store(criu.mediaType, makeTar([entry({ name: "x" })]));
    await expect(extract(empty)).rejects.toThrow(/no inventory.img/);
    await expect(
      extractContentStore(parseCheckpointIndex(indexOf(criu)), read, target, { limits: { bytes: 100 } }),
    ).rejects.toThrow(ResourceExhausted);
    expect(fs.readdirSync(directory)).toEqual([]);
  });
});
