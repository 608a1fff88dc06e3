// What a checkpoint consists of beside CRIU's images, with what real containerds leave: the content store, and overlay mounts.

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { createReadStream, existsSync, mkdirSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import {
  type Blob,
  extractContentStore,
  parseCheckpointIndex,
} from "../../src/checkpoint/archive/content-store.ts";
import { createArchive, extractArchive } from "../../src/checkpoint/archive/index.ts";
import { applyRootfsDiff, overlayLayers, takeRootfsDiff } from "../../src/checkpoint/rootfs-diff/index.ts";
import { setXattr } from "../../src/linux/addon.ts";
import { describeTree } from "../checkpoint/rootfs-diff/tree.ts";
import type { Live } from "./harness/live.ts";
import { missingFor } from "./harness/matrix.ts";
import { liveFor } from "./harness/suite.ts";

const combination = { containerd: "1.7", engine: "runc" } as const;
const missing = missingFor(combination);
const IMAGE = "cedana.local/busybox:latest";

describe.skipIf(missing)(`archives${missing ? ` (${missing})` : ""}`, () => {
  let live: Live;
  liveFor(combination, (started) => {
    live = started;
  });

  /** A container that has changed its root file system. */
  async function runAndChange(): Promise<string> {
    const id = live.newId("archive");
    const flags = ["--runtime", live.options.runtime, "--snapshotter", "overlayfs"];
    await live.ctr("run", "-d", "--null-io", ...flags, IMAGE, id, "sh", "-c", "while :; do sleep 60; done");
    const change =
      "echo new > /etc/new; mkdir -m 750 /made; ln /etc/new /made/again; rm -r /bin/vi; chmod 711 /tmp";
    await live.ctr("task", "exec", "--exec-id", "change", id, "sh", "-c", change);
    return id;
  }

  /** The files of the image, as a container elsewhere begins with. */
  function freshRootfs(rootfs: string[]): string {
    const target = mkdtempSync(join(live.dir, "rootfs-"));
    for (const layer of rootfs.toReversed()) execFileSync("cp", ["-a", `${layer}/.`, target]);
    return target;
  }

  function expectChanged(target: string): void {
    expect(readFileSync(join(target, "etc/new"), "utf8")).toBe("new\n");
    const stat = (path: string) =>
      execFileSync("stat", ["-c", "%a %h", join(target, path)], { encoding: "utf8" }).trim();
    expect(stat("made/again")).toBe("644 2");
    expect(stat("made")).toMatch(/^750 /);
    expect(stat("tmp")).toMatch(/^711 /);
    expect(existsSync(join(target, "bin/vi"))).toBe(false);
    expect(stat("bin/sh")).toBeDefined();
  }

  it("of containerd's content store are read, and its layer is applied", async () => {
    const id = await runAndChange();
    const ref = "cedana.local/checkpoint:1";
    await live.ctr("container", "checkpoint", "--rw", "--task", id, ref);
    const lowers = (await overlayLayers(join(live.bundleOf(id), "rootfs"))).lowers!;
    const listed = (await live.ctr("images", "ls", `name==${ref}`))
      .split("\n")
      .find((line) => line.startsWith(ref))!;
    const digest = /sha256:[0-9a-f]{64}/.exec(listed)![0];
    const [store] = execFileSync("find", [live.dir, "-path", "*content/blobs/sha256", "-type", "d"], {
      encoding: "utf8",
    }).split("\n");
    const pathOf = (blob: string) => join(store!, blob.replace("sha256:", ""));
    const checkpoint = parseCheckpointIndex(readFileSync(pathOf(digest)));
    expect(checkpoint).toMatchObject({
      imageName: IMAGE,
      runtimeName: live.options.runtime,
      snapshotter: "overlayfs",
    });
    const target = join(live.dir, "extracted");
    await extractContentStore(checkpoint, (blob: Blob) => createReadStream(pathOf(blob.digest)), target);
    expect(readFileSync(join(target, "checkpoint/inventory.img")).length).toBeGreaterThan(0);
    const rootfs = freshRootfs(lowers);
    await applyRootfsDiff(target, rootfs);
    expectChanged(rootfs);
    await live.ctr("task", "delete", "-f", id).catch(() => undefined);
    await live.ctr("container", "delete", id);
    await live.ctr("images", "rm", "--sync", ref);
  });

  it("hold what a running container changed in its overlay", async () => {
    const id = await runAndChange();
    const layers = await overlayLayers(join(live.bundleOf(id), "rootfs"));
    const checkpoint = join(live.dir, "taken");
    mkdirSync(join(checkpoint, "checkpoint"), { recursive: true });
    writeFileSync(join(checkpoint, "checkpoint/inventory.img"), "");
    await live.ctr("task", "pause", id);
    await takeRootfsDiff(layers, checkpoint);
    await live.ctr("task", "resume", id);
    for (const name of ["config.dump", "spec.dump"]) writeFileSync(join(checkpoint, name), "{}");
    await createArchive(checkpoint, join(live.dir, "taken.tar"));
    await extractArchive(join(live.dir, "taken.tar"), join(live.dir, "copy"));
    const rootfs = freshRootfs(layers.lowers!);
    await applyRootfsDiff(join(live.dir, "copy"), rootfs);
    expectChanged(rootfs);
    await live.ctr("task", "delete", "-f", id).catch(() => undefined);
    await live.ctr("container", "delete", id);
  });

  it("have a rootfs diff that containerd applies as an image's layer, to the same tree", async () => {
    const at = (name: string) => join(live.dir, "layered", name);
    for (const name of ["lower/dir", "upper", "work", "merged", "base", "diff", "mounted"])
      mkdirSync(at(name), { recursive: true });
    for (const name of ["lower/gone", "lower/kept", "lower/dir/hidden"]) writeFileSync(at(name), name);
    const layers = `lowerdir=${at("lower")},upperdir=${at("upper")},workdir=${at("work")}`;
    execFileSync("mount", ["-t", "overlay", "overlay", "-o", layers, at("merged")]);
    try {
      const script = `
        rm gone; rm -r dir; mkdir -m 2750 dir; echo in > dir/new; ln dir/new linked; ln -s /nowhere link; mkfifo fifo; mknod null c 1 3
        truncate -s 5000000 holes; echo end >> holes; chown 70000:4000000000 kept; chmod 4711 kept; touch -d @1600000000.123456789 kept`;
      execFileSync("sh", ["-ec", script], { cwd: at("merged") });
      setXattr(
        at("merged/kept"),
        "security.capability",
        Buffer.from("0100000200200000000000000000000000000000", "hex"),
      );
      writeFileSync(Buffer.from(`${at("merged")}/\xff${"n".repeat(150)}`, "latin1"), "");
      await takeRootfsDiff({ upper: at("lower"), lowers: [] }, at("base"));
      await takeRootfsDiff(await overlayLayers(at("merged")), at("diff"));
      const ref = "cedana.local/layered:1";
      importImage(ref, [at("base/rootfs-diff.tar"), at("diff/rootfs-diff.tar")], at("image.tar"));
      await live.ctr("images", "import", "--snapshotter", "overlayfs", at("image.tar"));
      await live.ctr("images", "mount", "--snapshotter", "overlayfs", ref, at("mounted"));
      const described = (root: string) =>
        Object.fromEntries(
          Object.entries(describeTree(root))
            .filter(([path]) => path !== "") // a snapshot's root directory is the snapshotter's
            .map(([path, facts]) => [path, facts.replace(/ (sparse|full)\b/, "")]),
        );
      expect(described(at("mounted"))).toEqual(described(at("merged")));
      await live.ctr("images", "unmount", "--rm", at("mounted"));
      await live.ctr("images", "rm", "--sync", ref);
    } finally {
      execFileSync("umount", [at("merged")]);
    }
  });

  /** An image of these layers as an OCI layout in a tar, which `ctr images import` takes. */
  function importImage(ref: string, layers: string[], tar: string): void {
    const directory = `${tar}.d`;
    mkdirSync(join(directory, "blobs/sha256"), { recursive: true });
    const blob = (bytes: Buffer | string) => {
      const hex = createHash("sha256").update(bytes).digest("hex");
      writeFileSync(join(directory, "blobs/sha256", hex), bytes);
      return { digest: `sha256:${hex}`, size: Buffer.byteLength(bytes) };
    };
    const stored = layers.map((layer) => ({
      mediaType: "application/vnd.oci.image.layer.v1.tar",
      ...blob(readFileSync(layer)),
    }));
    const rootfs = { type: "layers", diff_ids: stored.map(({ digest }) => digest) };
    const config = {
      mediaType: "application/vnd.oci.image.config.v1+json",
      ...blob(
        JSON.stringify({
          architecture: process.arch === "x64" ? "amd64" : process.arch,
          os: "linux",
          config: {},
          rootfs,
        }),
      ),
    };
    const manifest = {
      schemaVersion: 2,
      mediaType: "application/vnd.oci.image.manifest.v1+json",
      config,
      layers: stored,
    };
    const annotations = { "io.containerd.image.name": ref };
    const descriptor = { mediaType: manifest.mediaType, ...blob(JSON.stringify(manifest)), annotations };
    writeFileSync(
      join(directory, "index.json"),
      JSON.stringify({ schemaVersion: 2, manifests: [descriptor] }),
    );
    writeFileSync(join(directory, "oci-layout"), JSON.stringify({ imageLayoutVersion: "1.0.0" }));
    execFileSync("tar", ["-C", directory, "-cf", tar, "oci-layout", "index.json", "blobs"]);
  }
});
