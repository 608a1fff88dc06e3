import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { NodeFacts, RestoredContainer } from "../../src/checkpoint/compare.ts";
import { instructionsMissing } from "../../src/checkpoint/cpu.ts";
import { refusalOfRestore } from "../../src/checkpoint/finding.ts";
import type { DumpedMount, ImageFacts } from "../../src/checkpoint/image-facts.ts";
import type { CheckpointManifest } from "../../src/checkpoint/manifest.ts";
import { BrokenImage, Unsupported, WrongState } from "../../src/errors/index.ts";
import { canFuse, deadFuse } from "../live/harness/dead-fuse.ts";

vi.stubEnv("CEDANA_FILE_PATIENCE_MS", "200");
const { compareToContainer, compareToNode } = await import("../../src/checkpoint/compare.ts");

let directory: string;
let rootfs: string;
beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "compare-"));
  rootfs = path.join(directory, "rootfs");
  fs.mkdirSync(rootfs);
  fs.chmodSync(rootfs, 0o755);
});
afterEach(() => fs.rmSync(directory, { recursive: true }));

const manifest = {
  terminal: false,
  engine: { name: "runc", version: "1.1.15", path: "/usr/bin/runc" },
  kernel: "6.1.0-1-amd64",
  criuVersion: "4.2",
  options: {},
} as CheckpointManifest;

function checkpoint(changes: Partial<CheckpointManifest> = {}) {
  return {
    path: directory,
    imagePath: directory,
    manifest: { ...manifest, ...changes },
    manifestPath: directory,
  };
}

function container(changes: Partial<RestoredContainer> = {}): RestoredContainer {
  return {
    terminal: false,
    engine: { name: "runc", version: "1.3" },
    image: undefined,
    binds: new Map(),
    mountPoints: [],
    cgroupMountPoints: [],
    maskedPaths: [],
    devices: [],
    hostname: undefined,
    network: "dumped",
    ...changes,
  };
}

function mount(mountPoint: string, externalKey?: string, root = "/"): DumpedMount {
  return { id: mountPoint === "/" ? 1 : mountPoint.length + 10, parentId: 1, mountPoint, root, externalKey };
}

function facts(changes: Partial<ImageFacts> = {}): ImageFacts {
  const nothing = { ids: [1], files: [], sockets: [], hostname: undefined, hostnameImage: undefined };
  return { mounts: [mount("/")], ...nothing, ...changes };
}

async function differences(images: ImageFacts, changes: Partial<RestoredContainer> = {}) {
  const { findings, externalMounts } = await compareToContainer(checkpoint(), images, container(changes));
  return { said: findings.map(({ severity, message }) => `${severity}: ${message}`), externalMounts };
}

describe("a checkpoint and a container", () => {
  it("differ in nothing that matters when the container is the same under another name", async () => {
    const images = facts({
      mounts: [mount("/"), mount("/data", "/data"), mount("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu")],
    });
    const same = {
      binds: new Map([["/data", directory]]),
      mountPoints: ["/data", "/sys/fs/cgroup"],
      cgroupMountPoints: ["/sys/fs/cgroup"],
    };
    expect(await differences(images, same)).toEqual({ said: [], externalMounts: [] });
  });

  it("differ by each mount from outside that is missing, or whose source is", async () => {
    const images = facts({ mounts: [mount("/"), mount("/a", "/a", "/srv/a"), mount("/b", "/b")] });
    const { said } = await differences(images, {
      binds: new Map([["/b", "/nowhere"]]),
      mountPoints: ["/b", "/c"],
    });
    expect(said).toEqual([
      expect.stringMatching(/^error: it has a mount from outside at \/a \(\/srv\/a of its file system\)/),
      expect.stringMatching(/^error: the source of the bind mount \/b, \/nowhere, does not exist/),
      expect.stringMatching(/^warning: the container's mount at \/c will not be there/),
    ]);
  });

  it.skipIf(!canFuse)("are not compared by files on a mount whose server doesn't answer", async () => {
    const dead = path.join(directory, "dead");
    fs.mkdirSync(dead);
    using _dead = deadFuse(dead);
    const images = facts({
      mounts: [mount("/"), mount("/data", "/data")],
      files: [{ path: "/data/open", mountId: mount("/data").id, size: 1n, mode: 0o100644 }],
    });
    const binds = new Map([["/data", dead]]);
    const { said } = await differences(images, { binds, mountPoints: ["/data"], rootfs });
    expect(said).toEqual([expect.stringMatching(/the bind mount \/data, .*, does not answer/)]);
  });

  it("differ in the key by which the engines hide files: CRIU is told of the other engine's", async () => {
    const byRunc = facts({ mounts: [mount("/"), mount("/proc/keys", "/dev/null", "/null")] });
    const byCrun = facts({ mounts: [mount("/"), mount("/proc/keys", "/proc/keys", "/null")] });
    const crun = { engine: { name: "crun", version: "1.21" }, maskedPaths: ["/proc/keys"] };
    const runc = { maskedPaths: ["/proc/keys"] };
    expect((await differences(byRunc, runc)).externalMounts).toEqual([]);
    expect((await differences(byCrun, crun)).externalMounts).toEqual([]);
    expect(await differences(byRunc, crun)).toEqual({
      said: ["warning: it was taken with runc, this container has crun"],
      externalMounts: [{ key: "/dev/null", source: "/dev/null" }],
    });
    expect((await differences(byCrun, runc)).externalMounts).toEqual([
      { key: "/proc/keys", source: "/dev/null" },
    ]);
    // A bind mount isn't taken for a mask, whatever it is called.
    const planted = facts({ mounts: [mount("/"), mount("/x", "/etc/shadow", "/null")] });
    expect((await differences(planted)).externalMounts).toEqual([]);
  });

  it("differ in files that were open: missing, of another size, of another mode; links lead nowhere outside", async () => {
    const write = (name: string, text: string, mode = 0o644) =>
      fs.writeFileSync(path.join(rootfs, name), text, { mode });
    write("same", "1234");
    write("grown", "12345");
    write("mode", "1234", 0o600);
    fs.symlinkSync("/etc/passwd", path.join(rootfs, "link"));
    const open = (name: string) => ({ mountId: 1, path: `/${name}`, size: 4n, mode: 0o100644 });
    const files = ["same", "grown", "mode", "gone", "link"].map(open);
    const images = facts({ mounts: [mount("/"), mount("/volume")], files });
    expect((await differences(images, { rootfs })).said).toEqual([
      "error: the container's image has no /volume, where the checkpoint has a mount",
      "error: /grown has 5 bytes instead of 4: it needs the same image",
      "error: /mode has the mode 100600 instead of 100644: it needs the same image",
      "error: /gone is missing: it needs the same image",
      "error: /link is missing: it needs the same image",
    ]);
    // What a rootfs diff brings isn't there yet.
    fs.writeFileSync(path.join(directory, "rootfs-diff.tar"), "");
    expect((await differences(images, { rootfs })).said).toEqual([]);
  });

  it("differ in addresses: connections come back closed, what is bound to one that is gone can't", async () => {
    const socket = (address: string | undefined, state: number, freeBind = false) =>
      ({ isTcp: true, state, address, port: 80, freeBind }) as const;
    const loopback = [socket("127.0.0.1", 1), socket("127.0.0.1", 10), socket(undefined, 10)];
    const compared = async (sockets: ImageFacts["sockets"], network: RestoredContainer["network"]) => {
      const { closesTcp, findings } = await compareToContainer(
        checkpoint(),
        facts({ sockets }),
        container({ network }),
      );
      return { closesTcp, said: findings.map(({ severity, message }) => `${severity}: ${message}`) };
    };
    for (const network of ["host", "empty", "dumped", { path: "/proc/self/ns/net" }] as const)
      expect(await compared(loopback, network)).toEqual({ closesTcp: false, said: [] });
    const foreign = [...loopback, socket("192.0.2.1", 1), socket("192.0.2.1", 8)];
    expect(await compared(foreign, "dumped")).toEqual({ closesTcp: false, said: [] });
    expect(await compared(foreign, "empty")).toEqual({
      closesTcp: true,
      said: [expect.stringMatching(/^warning: its TCP connections from 192\.0\.2\.1 come back closed/)],
    });
    const listening = [socket("192.0.2.1", 10), socket("192.0.2.1", 1), socket("192.0.2.2", 10, true)];
    expect((await compared(listening, "host")).said).toEqual([
      expect.stringMatching(/^error: it has a socket at 192\.0\.2\.1 port 80, which is no address/),
      expect.stringMatching(/^warning: /),
    ]);
  });

  it("differ in the terminal and the image", async () => {
    const { findings } = await compareToContainer(
      checkpoint({ terminal: true, image: { name: "web:1" } }),
      undefined,
      container({ image: "web:2" }),
    );
    expect(findings.map(({ severity }) => severity)).toEqual(["error", "warning"]);
  });
});

describe("a checkpoint and a node", () => {
  const features = ["avx2", "constant_tsc", "sse2"];
  const node: NodeFacts = {
    cpu: { architecture: "x64", features },
    kernel: "6.1.0",
    criu: "4.2.1",
    plugins: new Set(),
  };
  // An inventory without plugins.
  beforeEach(() =>
    fs.writeFileSync(path.join(directory, "inventory.img"), Buffer.from("1631315802000000" + "0802", "hex")),
  );
  const said = async (changes: Partial<CheckpointManifest>, options = {}) =>
    (await compareToNode(checkpoint(changes), node, options)).map(
      ({ severity, message }) => `${severity}: ${message}`,
    );

  it("fit when the node has all that the dump had", async () => {
    expect(await said({ cpu: { architecture: "x64", features: ["sse2"] } })).toEqual([]);
  });

  it("differ in instructions, unless the administrator lets that pass, and in nothing else of a CPU", async () => {
    const cpu = { architecture: "x64", features: [...features, "avx512f", "arch_perfmon"] };
    expect(await said({ cpu })).toEqual([expect.stringMatching(/^error: this CPU lacks avx512f, which/)]);
    expect(await said({ cpu }, { ignoreCpu: true })).toEqual([expect.stringMatching(/^warning: .*avx512f/)]);
    expect(await said({ cpu: { architecture: "arm64", features: [] } })).toEqual([
      "error: it is of a arm64 machine, this one is x64",
    ]);
    const arm = { architecture: "arm64", features: ["sve"] };
    expect(instructionsMissing(arm, { architecture: "arm64", features: [] })).toEqual(["sve"]);
  });

  it("differ in CRIU and kernel", async () => {
    expect(await said({ criuVersion: "5.0", kernel: "6.18.0" })).toEqual([
      "error: it was taken by CRIU 5.0, this node has 4.2.1: install 5.0 or newer",
      "warning: it was taken on kernel 6.18.0, this node has 6.1.0",
    ]);
    expect(await said({ criuVersion: "4.3" })).toEqual([expect.stringMatching(/^warning: it was taken by/)]);
  });
});

describe("the refusal of a restore", () => {
  it("has all errors in one, and the class of the worst", () => {
    const error = (kind: "checkpoint" | "container" | "node", message: string) =>
      ({ kind, fault: "mount", severity: "error", message }) as const;
    expect(
      refusalOfRestore("/cp", [{ kind: "node", fault: "kernel", severity: "warning", message: "old" }]),
    ).toBeUndefined();
    const both = refusalOfRestore("/cp", [error("container", "no mount"), error("node", "no CPU")]);
    expect(both).toBeInstanceOf(Unsupported);
    expect(both!.message).toBe("checkpoint /cp can't be restored on this node: no mount; no CPU");
    expect(refusalOfRestore("/cp", [error("container", "a")])).toBeInstanceOf(WrongState);
    const many = Array.from({ length: 30 }, (_, at) => error("checkpoint", `file ${at}`));
    expect(refusalOfRestore("/cp", many)).toBeInstanceOf(BrokenImage);
    expect(refusalOfRestore("/cp", many)!.message).toMatch(/file 19; and 10 more$/);
  });
});
