// Mounts and their undoing. They need root.

import { execFileSync } from "node:child_process";
import fs from "node:fs";
import { beforeAll, describe, expect, it } from "vitest";
import { encodeMessage, type FieldValues } from "../../src/shim/keeper-protocol.ts";
import { until } from "../live/harness/until.ts";
import { BUILD_TIMEOUT_MS, buildKeeper, isRoot, Pod, type } from "./harness.ts";

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

const MS_RDONLY = 1;
const MS_NOSYMFOLLOW = 256;
const MS_BIND = 4096;

const mountsBelow = (dir: string) =>
  fs
    .readFileSync("/proc/self/mountinfo", "utf8")
    .split("\n")
    .filter((line) => line.split(" ")[4]?.startsWith(dir));

/** Nothing stays mounted, whatever the test did. */
async function pod(): Promise<Pod & AsyncDisposable> {
  const started = await Pod.start();
  const dispose = started[Symbol.asyncDispose].bind(started);
  started[Symbol.asyncDispose] = async () => {
    for (const line of mountsBelow(started.dir).reverse())
      execFileSync("umount", ["-l", line.split(" ")[4]!]);
    await dispose();
  };
  return started;
}

describe.skipIf(!isRoot)("mounts", () => {
  it("are made at targets that needn't exist, and unmounted with all below and above them", async () => {
    await using p = await pod();
    const target = p.path("a/b/rootfs");
    const mount = async (values: object) => (await p.link.operate(type.MOUNT, values)).string("message");
    expect(await mount({ mountType: "tmpfs", source: "t", target, mountData: "size=1m,mode=750" })).toBe("");
    expect(fs.statSync(target).mode & 0o777).toBe(0o750);
    expect(await mount({ mountType: "tmpfs", source: "t", target: `${target}/with space` })).toBe("");
    expect(await mount({ mountType: "tmpfs", source: "t", target })).toBe("");
    expect(mountsBelow(p.dir).length).toBe(3);
    fs.mkdirSync(p.path("a/b/rootfs-not")); // begins with the same letters
    expect(await mount({ mountType: "tmpfs", source: "t", target: p.path("a/b/rootfs-not") })).toBe("");
    fs.symlinkSync(p.path("a"), p.path("link"));
    const unmounted = await p.link.operate(type.UNMOUNT, { target: p.path("link/b/rootfs/") });
    expect(unmounted.string("message")).toBe("");
    expect(mountsBelow(p.dir).map((line) => line.split(" ")[4])).toEqual([p.path("a/b/rootfs-not")]);
    expect((await p.link.operate(type.UNMOUNT, { target })).int("errno")).toBe(0);
  });

  it("that are busy are detached", async () => {
    await using p = await pod();
    const target = p.path("busy");
    await p.link.operate(type.MOUNT, { mountType: "tmpfs", source: "t", target });
    const held = fs.openSync(`${target}/file`, "w");
    expect((await p.link.operate(type.UNMOUNT, { target })).int("errno")).toBe(0);
    expect(mountsBelow(p.dir)).toEqual([]);
    fs.closeSync(held);
  });

  it("say what failed, and refuse what is no place", async () => {
    await using p = await pod();
    for (const [kind, values, message] of [
      [
        type.MOUNT,
        { mountType: "nofs", source: "s", target: p.path("x") },
        /mount s \(nofs\) at .*: No such device/,
      ],
      [type.MOUNT, { mountType: "tmpfs", source: "s" }, /mount at nothing: not an absolute path/],
      [
        type.MOUNT,
        { mountType: "ext4", source: "/no/image", target: p.path("x"), loop: 1 },
        /attach \/no\/image to a loop device: No such file/,
      ],
      [
        type.MOUNT,
        { mountType: "tmpfs", target: p.path("x"), cwd: "/no/dir" },
        /chdir \/no\/dir: No such file/,
      ],
      [type.UNMOUNT, { target: "/" }, /not an absolute path below \//],
      [type.UNMOUNT, { target: "//" }, /not an absolute path below \//],
      [type.UNMOUNT, {}, /not an absolute path below \//],
    ] as const) {
      expect((await p.link.operate(kind, values)).string("message")).toMatch(message);
    }
    expect(fs.readlinkSync(`/proc/${p.pid}/cwd`)).toBe("/");
  });

  it("of overlays may have more layers than fit a page, with paths below a directory", async () => {
    await using p = await pod();
    const layers = Array.from({ length: 120 }, (_, i) => `layer-${"x".repeat(40)}-${i}`);
    const base = p.path("layers");
    await p.link.operate(type.MOUNT, { mountType: "tmpfs", source: "t", target: base });
    for (const [i, layer] of layers.entries()) {
      fs.mkdirSync(`${base}/${layer}`);
      fs.writeFileSync(`${base}/${layer}/file${i}`, "");
    }
    for (const [count, name] of [
      [3, "small"],
      [120, "large"],
    ] as const) {
      const mountData = `lowerdir=${layers.slice(0, count).join(":")}`;
      const result = await p.link.operate(type.MOUNT, {
        mountType: "overlay",
        source: "overlay",
        target: p.path(name),
        mountFlags: MS_RDONLY | MS_NOSYMFOLLOW,
        mountData,
        cwd: base,
      });
      expect(result.string("message")).toBe("");
      expect(fs.readdirSync(p.path(name)).length).toBe(count);
      expect(mountsBelow(p.path(name))[0]!.split(" ")[5]).toBe("ro,relatime,nosymfollow");
      expect((await p.link.operate(type.UNMOUNT, { target: p.path(name) })).int("errno")).toBe(0);
    }
    expect((await p.link.operate(type.UNMOUNT, { target: base })).int("errno")).toBe(0);
  });

  it.skipIf(!fs.existsSync("/dev/loop-control") || !fs.existsSync("/sbin/mkfs.ext4"))(
    "of a disk keep nobody waiting: an image by a loop device, which goes with its mount",
    async () => {
      await using p = await pod();
      const [image, target] = [p.path("image"), p.path("target")];
      fs.writeFileSync(image, "");
      fs.truncateSync(image, 8 << 20);
      execFileSync("/sbin/mkfs.ext4", ["-q", image]);
      const behind = async (kind: typeof type.MOUNT | typeof type.UNMOUNT, values: FieldValues) => {
        const step = `disk-${p.link.log.length}`;
        // Both in one piece: the second is answered first, because the first is left to a helper.
        p.link.socket.write(
          Buffer.concat([
            encodeMessage(kind, { request: 0, step, ...values }),
            encodeMessage(type.IO_FREE, { request: 0, step: `${step}-behind`, io: "none" }),
          ]),
        );
        const result = await p.link.result(0, step);
        expect(p.link.log.slice(-2).map((message) => message.string("step"))).toEqual([
          `${step}-behind`,
          step,
        ]);
        return result.string("message");
      };
      expect(await behind(type.MOUNT, { mountType: "ext4", source: image, target, loop: 1 })).toBe("");
      const device = mountsBelow(p.dir)[0]!.split(" - ")[1]!.split(" ")[1]!;
      expect(device).toMatch(/^\/dev\/loop\d+$/);
      fs.writeFileSync(`${target}/file`, "x");
      expect(await behind(type.UNMOUNT, { target })).toBe("");
      expect(mountsBelow(p.dir)).toEqual([]);
      await until(() => !fs.existsSync(`/sys/block/${device.slice(5)}/loop/backing_file`), {
        what: () => `the end of ${device}`,
      });
      expect(await behind(type.MOUNT, { mountType: "ext4", source: "/dev/null", target })).toMatch(
        /mount \/dev\/null \(ext4\) at .*: Block device required/,
      );
      expect(p.link.count(type.EXIT)).toBe(0);
    },
  );

  it("that take long hold nothing of the keeper's open", async () => {
    await using p = await pod();
    await p.client();
    await p.link.operate(type.IO_OPEN, { io: "x", stdoutKind: 1, stdout: p.mkfifo("out") });
    // Whoever opens a FIFO for reading waits for a writer.
    const source = p.mkfifo("image");
    const mount = { mountType: "ext4", source, target: p.path("target"), loop: 1, mountFlags: MS_RDONLY };
    p.link.send(type.MOUNT, { request: 0, step: "slow", ...mount });
    const children = () => fs.readFileSync(`/proc/${p.pid}/task/${p.pid}/children`, "utf8").trim();
    const helper = await until(() => children() || undefined, { what: () => "the helper" });
    await until(() => fs.readdirSync(`/proc/${helper}/fd`).join(" ") === "0 1 2 3", {
      what: () => `the helper's descriptors: ${fs.readdirSync(`/proc/${helper}/fd`)}`,
    });
    fs.closeSync(fs.openSync(source, "w"));
    expect((await p.link.result(0, "slow")).string("message")).toMatch(/attach .*\/image to a loop device/);
  });

  it("bind a directory", async () => {
    await using p = await pod();
    fs.mkdirSync(p.path("from"));
    fs.writeFileSync(p.path("from/file"), "x");
    await p.link.operate(type.MOUNT, { source: p.path("from"), target: p.path("to"), mountFlags: MS_BIND });
    expect(fs.readdirSync(p.path("to"))).toEqual(["file"]);
    expect((await p.link.operate(type.UNMOUNT, { target: p.path("to") })).int("errno")).toBe(0);
  });
});
