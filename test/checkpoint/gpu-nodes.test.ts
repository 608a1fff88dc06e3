import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, mkdtempSync, rmSync, statSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { isGpuNode, makeGpuNodes } from "../../src/checkpoint/gpu-nodes.ts";
import { makeNode } from "../../src/linux/addon.ts";
import { splitDevice } from "../../src/linux/fdinfo.ts";

// A process whose root directory is a small tree: as much of a container as this needs.
let rootfs: string;
let outside: string;
let pid: number;
let end: () => Promise<void>;
const warnings: unknown[] = [];
const log = { info: () => {}, warn: (...words: unknown[]) => warnings.push(words) };

beforeEach(async () => {
  const place = mkdtempSync(join(tmpdir(), "cedana-gpu-nodes-"));
  rootfs = join(place, "rootfs");
  outside = join(place, "outside");
  for (const directory of [rootfs, outside, join(rootfs, "dev")]) mkdirSync(directory);
  writeFileSync(join(outside, "victim"), "", { mode: 0o600 });
  warnings.length = 0;
  const child = spawn("python3", [
    "-c",
    `import os,sys\nos.chroot(${JSON.stringify(rootfs)})\nos.chdir("/")\nprint("ready",flush=True)\nsys.stdin.read()`,
  ]);
  await once(child.stdout, "data");
  pid = child.pid!;
  end = async () => {
    child.stdin.end();
    await once(child, "exit");
    rmSync(place, { recursive: true });
  };
});
afterEach(() => end());

const S_IFCHR = 0o20000;
const numbersOf = (name: string) => splitDevice(statSync(join(rootfs, "dev", name)).rdev);

describe.skipIf(process.getuid!() !== 0)("the device nodes of GPUs in a restored container", () => {
  it("are made as the new container has them: new ones, and those with another number", async () => {
    makeNode(join(rootfs, "dev/nvidia-uvm"), S_IFCHR | 0o666, 510, 0);
    await makeGpuNodes(
      [pid],
      [
        { path: "/dev/nvidia1", major: 195, minor: 1 },
        { path: "/dev/nvidia-uvm", major: 511, minor: 0, mode: 0o640, uid: 5, gid: 6 },
        { path: "/dev/nvidia-caps/nvidia-cap1", major: 236, minor: 1, mode: 0o400 },
      ],
      log,
    );
    expect(numbersOf("nvidia1")).toEqual({ major: 195, minor: 1 });
    expect(statSync(join(rootfs, "dev/nvidia1")).mode).toBe(S_IFCHR | 0o666);
    expect(numbersOf("nvidia-uvm")).toEqual({ major: 511, minor: 0 });
    expect(statSync(join(rootfs, "dev/nvidia-uvm"))).toMatchObject({ mode: S_IFCHR | 0o640, uid: 5, gid: 6 });
    expect(numbersOf("nvidia-caps/nvidia-cap1")).toEqual({ major: 236, minor: 1 });
    expect(warnings).toEqual([]);
  });

  it("that are right stay the same files", async () => {
    makeNode(join(rootfs, "dev/nvidia0"), S_IFCHR | 0o600, 195, 0);
    const { ino, mode } = statSync(join(rootfs, "dev/nvidia0"));
    await makeGpuNodes([pid], [{ path: "/dev/nvidia0", major: 195, minor: 0 }], log);
    expect(statSync(join(rootfs, "dev/nvidia0"))).toMatchObject({ ino, mode });
  });

  it("replace no file of the container's, and lead nowhere out of it", async () => {
    symlinkSync(join(outside, "victim"), join(rootfs, "dev/nvidia0"));
    writeFileSync(join(rootfs, "dev/nvidiactl"), "theirs");
    symlinkSync(outside, join(rootfs, "dev/nvidia-caps"));
    await makeGpuNodes(
      [pid],
      [
        { path: "/dev/nvidia0", major: 195, minor: 0 },
        { path: "/dev/nvidiactl", major: 195, minor: 255 },
      ],
      log,
    );
    expect(warnings).toHaveLength(2);
    expect(statSync(join(outside, "victim"))).toMatchObject({ mode: 0o100600, size: 0 });
    await expect(
      makeGpuNodes([pid], [{ path: "/dev/nvidia-caps/nvidia-cap1", major: 236, minor: 1 }], log),
    ).rejects.toThrow(/ELOOP/);
  });

  it("are told from other devices", () => {
    for (const path of [
      "/dev/nvidia0",
      "/dev/nvidiactl",
      "/dev/nvidia-uvm",
      "/dev/nvidia-caps/nvidia-cap2",
      "/dev/dxg",
    ])
      expect(isGpuNode(path)).toBe(true);
    for (const path of ["/dev/fuse", "/dev/nvidia0/x", "/dev/nvidia-caps/../sda", "/etc/nvidia0"])
      expect(isGpuNode(path)).toBe(false);
  });
});
