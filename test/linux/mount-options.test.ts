import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { InvalidRequest, Unsupported } from "../../src/errors/index.ts";
import {
  MS,
  mountCalls,
  parseMountInfoLine,
  planMount,
  readMountInfo,
} from "../../src/linux/mount-options.ts";

const plan = (type: string, source: string, ...options: string[]) =>
  planMount({ type, source, options }, "/target");

describe("planMount", () => {
  it("makes flags of the options that are flags, and data of the others", () => {
    expect(
      plan("tmpfs", "tmpfs", "nosuid", "nodev", "noexec", "relatime", "ro", "size=64m", "mode=755"),
    ).toEqual({
      mountType: "tmpfs",
      source: "tmpfs",
      target: "/target",
      flags: MS.NOSUID | MS.NODEV | MS.NOEXEC | MS.RELATIME | MS.RDONLY,
      data: "size=64m,mode=755",
      loop: false,
    });
  });

  it("lets a later option take back an earlier one", () => {
    expect(plan("tmpfs", "x", "ro", "rw", "nosuid", "suid", "noexec", "exec").flags).toBe(0);
    expect(plan("tmpfs", "x", "rw", "ro").flags).toBe(MS.RDONLY);
    expect(plan("tmpfs", "x", "sync", "async", "noatime", "atime", "nodiratime", "diratime").flags).toBe(0);
  });

  it.each([
    ["bind", MS.BIND],
    ["rbind", MS.BIND | MS.REC],
    ["sync", MS.SYNCHRONOUS],
    ["dirsync", MS.DIRSYNC],
    ["remount", MS.REMOUNT],
    ["mand", MS.MANDLOCK],
    ["noatime", MS.NOATIME],
    ["nodiratime", MS.NODIRATIME],
    ["strictatime", MS.STRICTATIME],
    ["lazytime", MS.LAZYTIME],
    ["nosymfollow", MS.NOSYMFOLLOW],
  ])("knows %s", (option, flags) => {
    expect(plan("", "/from", option).flags).toBe(flags);
  });

  it("sets propagation apart, because the kernel takes it only alone", () => {
    const made = plan("bind", "/from", "rbind", "rslave", "nosuid");
    expect(made).toMatchObject({ flags: MS.BIND | MS.REC | MS.NOSUID, propagation: MS.SLAVE | MS.REC });
    expect(mountCalls(made)).toEqual([
      {
        mountType: "bind",
        source: "/from",
        target: "/target",
        flags: MS.BIND | MS.REC | MS.NOSUID,
        data: "",
        loop: false,
      },
      { mountType: "", source: "", target: "/target", flags: MS.SLAVE | MS.REC, data: "", loop: false },
    ]);
  });

  it("does not mistake the recursion of a propagation for that of a bind", () => {
    expect(plan("tmpfs", "x", "rprivate")).toMatchObject({ flags: 0, propagation: MS.PRIVATE | MS.REC });
  });

  it("makes a read-only bind in two steps", () => {
    const calls = mountCalls(plan("bind", "/from", "rbind", "ro", "nodev"));
    expect(calls.map((call) => call.flags)).toEqual([
      MS.BIND | MS.REC | MS.RDONLY | MS.NODEV,
      MS.BIND | MS.REC | MS.RDONLY | MS.NODEV | MS.REMOUNT,
    ]);
  });

  it("remounts by flags alone, unless there is data to change", () => {
    expect(mountCalls(plan("bind", "/from", "bind", "remount", "ro")).map((call) => call.flags)).toEqual([
      MS.BIND | MS.REMOUNT | MS.RDONLY,
    ]);
    expect(mountCalls(plan("tmpfs", "x", "remount", "size=1m"))).toHaveLength(1);
  });

  it("ignores containerd's own options", () => {
    expect(plan("bind", "/from", "X-containerd.mkdir.path=/x", "bind", "").data).toBe("");
  });

  it("asks for a loop device", () => {
    expect(plan("ext4", "/image", "loop", "ro", "direct-io")).toMatchObject({
      loop: true,
      data: "",
      flags: MS.RDONLY,
    });
  });

  it("hands file systems in user space to their helper", () => {
    const made = plan("fuse3.fuse-overlayfs", "overlay", "lowerdir=/a:/b", "ro");
    expect(made.helper?.argv).toEqual([
      ..."mount.fuse3 overlay /target -o lowerdir=/a:/b -o ro -t fuse-overlayfs".split(" "),
    ]);
    expect(plan("fuse.sshfs", "x").helper?.argv).toEqual("mount.fuse x /target -t sshfs".split(" "));
  });

  it("refuses what it can't do", () => {
    expect(() => plan("bind", "/from", "bind", "uidmap=0:1:2", "gidmap=0:1:2")).toThrow(Unsupported);
    expect(() => planMount({ type: "bind", source: "/x" }, "rootfs")).toThrow(InvalidRequest);
  });
});

describe("an overlay with many layers", () => {
  const snapshots = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
  const layers = (count: number) => Array.from({ length: count }, (_, n) => `${snapshots}/${n + 10}/fs`);

  it("is left alone while it fits", () => {
    const made = plan("overlay", "overlay", `workdir=${snapshots}/1/work`, `lowerdir=${layers(3).join(":")}`);
    expect(made).toMatchObject({ data: `workdir=${snapshots}/1/work,lowerdir=${layers(3).join(":")}` });
    expect(made).not.toHaveProperty("cwd");
  });

  it("is named relative to the directory above all of them when it nears a page", () => {
    const made = plan(
      "overlay",
      "overlay",
      "index=off",
      `workdir=${snapshots}/1/work`,
      `upperdir=${snapshots}/1/fs`,
      `lowerdir=${layers(100).join(":")}`,
    );
    expect(made.cwd).toBe(snapshots);
    const lower = Array.from({ length: 100 }, (_, n) => `${n + 10}/fs`).join(":");
    expect(made.data).toBe(`index=off,workdir=1/work,upperdir=1/fs,lowerdir=${lower}`);
  });

  it("takes the deepest directory that is above all of them, not a common beginning of names", () => {
    const names = Array.from({ length: 100 }, (_, n) => `/data/layers/layer-with-a-long-name-${100 + n}`);
    const made = plan("overlay", "overlay", `lowerdir=${names.join(":")}`);
    expect(made.cwd).toBe("/data/layers");
    expect(made.data.startsWith("lowerdir=layer-with-a-long-name-100:")).toBe(true);
  });

  it("stays absolute when only the root is above all of them", () => {
    const made = plan("overlay", "overlay", `upperdir=/up`, `lowerdir=${layers(100).join(":")}`);
    expect(made).not.toHaveProperty("cwd");
  });

  it("keeps escaped colons in one piece and escapes commas", () => {
    const odd = Array.from(
      { length: 90 },
      (_, n) => `/data/with\\:colon/a,b/layer-with-a-long-name-${100 + n}`,
    );
    const made = plan("overlay", "overlay", `lowerdir=${odd.join(":")}`);
    expect(made.cwd).toBe("/data/with:colon/a,b");
    expect(made.data.split(":")).toHaveLength(90);
    expect(plan("overlay", "overlay", "upperdir=/a,b", "lowerdir=/c\\,d").data).toBe(
      "upperdir=/a\\,b,lowerdir=/c\\,d",
    );
  });

  it("leaves data-only layers alone", () => {
    const made = plan("overlay", "overlay", `lowerdir=${layers(100).join(":")}::${snapshots}/data`);
    expect(made).not.toHaveProperty("cwd");
  });
});

describe("mountinfo", () => {
  it("reads a line with optional fields and escapes", () => {
    const line =
      "36 35 98:0 /mnt1 /mnt\\040two/a\\134b rw,noatime shared:1 master:2 - ext3 /dev/ro\\011ot rw,errors=continue";
    expect(parseMountInfoLine(line)).toEqual({
      mountId: 36,
      parentId: 35,
      device: "98:0",
      root: "/mnt1",
      mountPoint: "/mnt two/a\\b",
      options: ["rw", "noatime"],
      propagation: ["shared:1", "master:2"],
      type: "ext3",
      source: "/dev/ro\tot",
      superOptions: ["rw", "errors=continue"],
    });
  });

  it("is not taken in by a dash for a name", () => {
    const line = "36 35 98:0 / - rw - tmpfs - rw";
    expect(parseMountInfoLine(line)).toMatchObject({ mountPoint: "-", type: "tmpfs", source: "-" });
    expect(parseMountInfoLine("")).toBeUndefined();
    expect(parseMountInfoLine("36 35 98:0 / /x rw")).toBeUndefined();
  });
});

// mount(2) in a mount namespace of its own, so that nothing is left behind whatever happens.
const root = process.getuid?.() === 0;
const script = `
import ctypes, json, os, sys
plan = json.load(open(sys.argv[1]))
libc = ctypes.CDLL(None, use_errno=True)
for call in plan["calls"]:
    if call.get("cwd"): os.chdir(call["cwd"])
    arguments = [call[key].encode() or None for key in ("source", "target", "mountType")]
    if libc.mount(*arguments, ctypes.c_ulong(call["flags"]), call["data"].encode() or None) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
print(json.dumps({"mountinfo": open("/proc/self/mountinfo").read(), "list": os.listdir(plan["calls"][0]["target"])}))
`;

describe.skipIf(!root)("the kernel (as root)", () => {
  let directory: string;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), "cedana-mount-"));
  });
  afterEach(() => rmSync(directory, { recursive: true }));

  function mount(type: string, source: string, options: string[]) {
    const target = join(directory, "target");
    mkdirSync(target);
    const calls = mountCalls(planMount({ type, source, options }, target));
    writeFileSync(join(directory, "plan.json"), JSON.stringify({ calls }));
    const arguments_ = [
      "-m",
      "--propagation",
      "private",
      "python3",
      "-c",
      script,
      join(directory, "plan.json"),
    ];
    const { stdout, stderr } = spawnSync("unshare", arguments_, { encoding: "utf8" });
    expect(stderr).toBe("");
    const { mountinfo, list } = JSON.parse(stdout) as { mountinfo: string; list: string[] };
    const mounts = mountinfo.split("\n").map(parseMountInfoLine);
    return { list, mounted: mounts.findLast((m) => m?.mountPoint === target)! };
  }

  // Overlay on tmpfs or a plain disk; an overlay can't be its own upper layer.
  it("mounts an overlay of 200 layers whose names hold commas and colons", () => {
    const layers = Array.from({ length: 200 }, (_, n) => `a,b:c-${n}`);
    for (const layer of layers) {
      mkdirSync(join(directory, "layers", layer), { recursive: true });
      writeFileSync(join(directory, "layers", layer, `file-${layer}`), "");
    }
    for (const name of ["upper", "work"]) mkdirSync(join(directory, "layers", name));
    const escaped = layers.map((layer) => join(directory, "layers", layer).replaceAll(":", "\\:"));
    const { list, mounted } = mount("overlay", "overlay", [
      `workdir=${directory}/layers/work`,
      `upperdir=${directory}/layers/upper`,
      `lowerdir=${escaped.join(":")}`,
    ]);
    expect(mounted.type).toBe("overlay");
    expect(list).toHaveLength(200);
  });

  it("makes a read-only bind read-only", () => {
    mkdirSync(join(directory, "from"));
    const { mounted } = mount("bind", join(directory, "from"), ["rbind", "ro", "nosuid", "rslave"]);
    expect(mounted.options).toEqual(expect.arrayContaining(["ro", "nosuid"]));
  });

  it("gives a tmpfs its size", () => {
    const { mounted } = mount("tmpfs", "tmpfs", ["size=64k", "nodev"]);
    expect(mounted.superOptions).toContain("size=64k");
  });
});

it("reads the mounts of another process", async () => {
  const proc = async (pid: number | "self") =>
    (await readMountInfo(pid, "/proc")).find(({ mountPoint }) => mountPoint === "/proc");
  expect((await proc(process.pid))!.type).toBe("proc");
  expect(await proc(process.pid)).toEqual(await proc("self"));
});
