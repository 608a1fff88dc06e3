import { mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { compareToContainer, type RestoredContainer } from "../../src/checkpoint/compare.ts";
import { refusalOfRestore } from "../../src/checkpoint/finding.ts";
import { findGpuMounts, gpuMountSource, makeMountPoint } from "../../src/checkpoint/gpu-mounts.ts";
import { Unsupported } from "../../src/errors/index.ts";

let place: string;
const stateBefore = process.env.CEDANA_STATE_DIR;
beforeEach(() => {
  place = mkdtempSync(join(tmpdir(), "cedana-gpu-mounts-"));
  process.env.CEDANA_STATE_DIR = join(place, "state");
});
afterEach(() => {
  if (stateBefore === undefined) delete process.env.CEDANA_STATE_DIR;
  else process.env.CEDANA_STATE_DIR = stateBefore;
  rmSync(place, { recursive: true });
});

const digest = "0123456789abcdef".repeat(4);

describe("a mount's source at a restore", () => {
  it.each([
    ["/usr/lib/x86_64-linux-gnu/libcuda.so.570.133.20"],
    ["/usr/lib64/libnvidia-ml.so.1"],
    ["/usr/bin/nvidia-smi"],
    ["/dev/nvidia0"],
    ["/dev/nvidia-uvm"],
    ["/dev/nvidia-caps/nvidia-cap1"],
    ["/run/nvidia/driver/dev/nvidiactl"],
    ["/run/nvidia-persistenced/socket"],
    ["/proc/driver/nvidia/gpus/0000:65:00.0"],
    ["/lib/firmware/nvidia/570.133.20/gsp_ga10x.bin"],
    ["/usr/share/vulkan/icd.d/nvidia_icd.json"],
  ])("is %s, as its name says", (source) => {
    expect(gpuMountSource("/anywhere", `cedana-gpu:${source}`, "/")).toBe(source);
  });

  it.each([
    ["/etc/shadow"],
    ["/usr/lib/../../etc/libcuda.so.1/../../shadow"],
    ["/dev/sda"],
    ["/dev/nvidia0/../sda"],
    ["/run/containerd/containerd.sock"],
    ["/root/.ssh"],
    ["/usr/lib/libc.so.6"],
    ["/proc/driver/nvidia/../../1/mem"],
    ["relative/libcuda.so.1"],
  ])("is never %s, whatever images say", (source) => {
    expect(gpuMountSource("/anywhere", `cedana-gpu:${source}`, "/")).toBeUndefined();
  });

  it("of the library and the traces is a directory of ours, whatever images say", () => {
    const [library, traces] = [join(place, "state/gpu-library"), join(place, "state/gpu-traces")];
    expect(gpuMountSource("/dev/cedana-gpu", "/dev/cedana-gpu", `/old/${digest}`)).toBe(
      join(library, digest),
    );
    expect(gpuMountSource("/dev/cedana-gpu-trace", "cedana-gpu:/x", "/old/default.c1")).toBe(
      join(traces, "default.c1"),
    );
    for (const root of ["/old/..", "/old/.", "/", "/etc/shadow"])
      expect(gpuMountSource("/dev/cedana-gpu", "/dev/cedana-gpu", root)).toBeUndefined();
    expect(gpuMountSource("/dev/cedana-gpu-trace", "/x", "/old/..")).toBeUndefined();
  });

  it("of other mounts isn't ours to say", () => {
    expect(gpuMountSource("/data", "/data", "/srv")).toBeUndefined();
  });
});

describe("findGpuMounts", () => {
  it("finds nothing where there is no GPU", async () => {
    expect(await findGpuMounts(process.pid, [])).toEqual([]);
  });
});

describe("makeMountPoint", () => {
  it("makes a file for a file, a directory for a directory, and follows no link out of the root file system", async () => {
    const [rootfs, outside] = [join(place, "rootfs"), join(place, "outside")];
    mkdirSync(rootfs);
    mkdirSync(outside);
    const file = join(place, "libcuda.so.1");
    writeFileSync(file, "x");
    symlinkSync(outside, join(rootfs, "lib"));
    await makeMountPoint(rootfs, "/usr/lib/libcuda.so.1", file);
    await makeMountPoint(rootfs, "/usr/lib/libcuda.so.1", file); // it is there
    expect(statSync(join(rootfs, "usr/lib/libcuda.so.1")).size).toBe(0);
    await makeMountPoint(rootfs, "/proc/driver/nvidia", place);
    expect(statSync(join(rootfs, "proc/driver/nvidia")).isDirectory()).toBe(true);
    await makeMountPoint(rootfs, "/lib/libcuda.so.1", file);
    expect(readdirSync(outside)).toEqual([]);
  });
});

describe("a restore", () => {
  const container = (binds: [string, string][] = []): RestoredContainer => ({
    terminal: false,
    engine: { name: "runc", version: "1.3" },
    image: undefined,
    binds: new Map(binds),
    mountPoints: binds.map(([at]) => at),
    cgroupMountPoints: [],
    maskedPaths: [],
    devices: [],
    hostname: undefined,
    network: "host",
  });
  const mount = (id: number, mountPoint: string, externalKey?: string, root = "/") => ({
    id,
    parentId: id === 1 ? 0 : 1,
    mountPoint,
    root,
    externalKey,
  });
  const checkpoint = { path: "/c", imagePath: "/c", manifest: undefined, manifestPath: undefined };

  it("brings what the images name, and lists what this node lacks", async () => {
    mkdirSync(join(place, "state/gpu-library", digest), { recursive: true });
    const mounts = [
      mount(1, "/"),
      mount(2, "/dev/cedana-gpu", "/dev/cedana-gpu", `/x/${digest}`),
      mount(3, "/dev/nvidia7", "cedana-gpu:/dev/nvidia7"),
      mount(4, "/usr/lib/libcuda.so.1", "cedana-gpu:/usr/lib/libcuda.so.999.1"),
      mount(5, "/evil", "cedana-gpu:/etc/shadow"),
    ];
    const { findings, externalMounts } = await compareToContainer(
      checkpoint,
      { ids: [1], mounts, files: [], sockets: [], hostname: undefined, hostnameImage: undefined },
      container([["/usr/lib/libcuda.so.1", place]]),
    );
    expect(externalMounts.map(({ key, source }) => [key, source])).toEqual([
      ["/dev/cedana-gpu", join(place, "state/gpu-library", digest)],
      ["cedana-gpu:/dev/nvidia7", "/dev/nvidia7"],
      // The new container has a mount there itself: that one.
      ["cedana-gpu:/usr/lib/libcuda.so.999.1", place],
    ]);
    const errors = findings.filter(({ severity }) => severity === "error").map(({ message }) => message);
    expect(errors).toEqual([
      expect.stringMatching(/^\/dev\/nvidia7 of the GPU driver, .* is not on this node/),
      expect.stringMatching(/^it has a mount from outside at cedana-gpu:\/etc\/shadow/),
    ]);
    expect(refusalOfRestore("/c", findings)).toBeInstanceOf(Unsupported);
  });
});
