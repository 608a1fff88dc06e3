// Root file systems: images behind loop devices, tmpfs, bind, overlays whose options are longer than a page; and that nothing of
// them stays mounted, on whatever way out.

import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import type { Mount } from "./harness/client.ts";
import { isControl, Live } from "./harness/live.ts";
import { oursOnly, skipUnless } from "./harness/matrix.ts";
import { entries, isAlive, mountsBelow } from "./harness/system.ts";
import { until } from "./harness/until.ts";

const mount = (type: string, source: string, options: string[], target = ""): Mount => ({
  type,
  source,
  target,
  options,
});

/** Files behind loop devices that are below a directory. */
const loopFiles = (below: string): string[] =>
  entries("/sys/block")
    .filter((name) => name.startsWith("loop"))
    .flatMap((name) => {
      try {
        return readFileSync(`/sys/block/${name}/loop/backing_file`, "utf8").trim();
      } catch {
        return []; // no file is behind it
      }
    })
    .filter((path) => path.startsWith(below));

describe("a root file system", () => {
  let live: Live;
  let tree: string;
  beforeAll(async () => {
    live = await Live.start();
    tree = join(live.dir, "tree");
    for (const name of ["bin", "dev", "proc", "sys", "run", "tmp", "programs", "etc"])
      mkdirSync(join(tree, name), { recursive: true });
    execFileSync("cp", ["/bin/busybox", join(tree, "bin/busybox")]);
    for (const name of ["sh", "cat", "grep", "ls", "touch"])
      execFileSync("ln", ["-s", "busybox", join(tree, "bin", name)]);
  });
  afterEach(async () => {
    await live.expectNoLeftovers();
    await until(() => loopFiles(live.dir).length === 0, {
      what: () => `no loop device for ${loopFiles(live.dir)}`,
    });
  });
  afterAll(() => live?.stop());

  /** What the container says of its own root, then its answer to a write. */
  async function look(rootfs: Mount[], snapshot = false): Promise<{ root: string; writable: boolean }> {
    const script = "grep ' / ' /proc/mounts; touch /tmp/x 2>/dev/null && echo writable || echo no";
    const { status, stdout } = await live.runToEnd(["sh", "-c", script], { rootfs, snapshot });
    expect(status).toBe(0);
    const lines = stdout.trim().split("\n");
    return { root: lines.at(-2)!.split(" ")[2]!, writable: lines.at(-1) === "writable" };
  }

  function image(kind: "ext4" | "erofs"): string {
    const file = join(live.dir, `${kind}.img`);
    if (kind === "ext4") execFileSync("mkfs.ext4", ["-q", "-d", tree, file, "16M"], { stdio: "ignore" });
    else execFileSync("mkfs.erofs", ["--quiet", file, tree], { stdio: "ignore" });
    return file;
  }
  const lacks = (kind: string) =>
    readFileSync("/proc/filesystems", "utf8").includes(`\t${kind}\n`) ? "" : `the kernel has no ${kind}`;

  it("may be an ext4 image", async (context) => {
    skipUnless(context, lacks("ext4") === "", lacks("ext4"));
    const file = image("ext4");
    expect(await look([mount("ext4", file, ["loop"])])).toEqual({ root: "ext4", writable: true });
    expect(await look([mount("ext4", file, ["loop", "ro"])])).toEqual({ root: "ext4", writable: false });
  });

  it("may be an erofs image", async (context) => {
    skipUnless(context, lacks("erofs") === "", lacks("erofs"));
    const file = image("erofs");
    expect(await look([mount("erofs", file, ["loop", "ro"])])).toEqual({ root: "erofs", writable: false });
  });

  it("may be a directory, read-only or not", async () => {
    const { root } = await look([mount("bind", tree, ["rbind", "rw"])]);
    expect(await look([mount("bind", tree, ["rbind", "ro"])])).toEqual({ root, writable: false });
    expect(await look([mount("bind", tree, ["rbind", "rw"])])).toEqual({ root, writable: true });
  });

  it("may be of several mounts, each at a place of its own", async () => {
    const { stdout } = await live.runToEnd(["sh", "-c", "grep ' /tmp ' /proc/mounts; cat /home/mark"], {
      snapshot: true,
      rootfs: [
        mount("tmpfs", "tmpfs", ["size=1m", "mode=1777"], "/tmp"),
        mount("bind", marked("home"), ["bind", "ro"], "home"),
      ],
    });
    expect(stdout).toMatch(/^tmpfs \/tmp tmpfs .*size=1024k.*\nhome\n$/);
  });

  it("keeps a mount inside that an image's symbolic link would lead out", async () => {
    const outside = join(live.dir, "outside");
    mkdirSync(outside);
    symlinkSync(outside, join(tree, "leads-out"));
    mkdirSync(join(tree, outside), { recursive: true });
    await using task = await live.run(["sleeper"], {
      rootfs: [mount("bind", tree, ["rbind", "rw"]), mount("tmpfs", "tmpfs", [], "leads-out")],
      snapshot: false,
    });
    expect(mountsBelow(live.dir, live.containerdPid)).not.toContain(outside);
    const { stdout } = await task.execToEnd(["cat", "/proc/mounts"]);
    expect(stdout).toContain(`tmpfs ${outside} tmpfs`);
  });

  function marked(name: string, parent = live.dir): string {
    const directory = join(parent, name);
    mkdirSync(directory, { recursive: true });
    writeFileSync(join(directory, "mark"), `${name}\n`);
    return directory;
  }

  it("may be an overlay whose options are longer than a page", async () => {
    // 60 layers of one parent fit when they are named relative to it; of two, with long names, they never do.
    const near = Array.from({ length: 60 }, (_, n) => layer("near", `${n}-${"x".repeat(50)}`, n));
    const far = Array.from({ length: 60 }, (_, n) =>
      layer(n % 2 ? "left" : "right", `${n}-${"y".repeat(120)}`, n),
    );
    // The Go shim only names directories relative to one parent.
    for (const layers of isControl ? [near] : [near, far]) {
      const lower = `lowerdir=${[...layers, tree].join(":")}`;
      expect(lower.length).toBeGreaterThan(4096);
      const work = join(live.dir, `work-${layers === near}`);
      for (const name of ["upper", "work"]) mkdirSync(join(work, name), { recursive: true });
      for (const options of [[lower], [lower, `upperdir=${work}/upper`, `workdir=${work}/work`]]) {
        const { stdout } = await live.runToEnd(["sh", "-c", "ls /layers; grep ' / ' /proc/mounts >&2"], {
          rootfs: [mount("overlay", "overlay", options)],
          snapshot: false,
        });
        expect(stdout.trim().split("\n").sort()).toEqual(layers.map((_, n) => `${n}`).sort());
      }
    }
  });

  function layer(parent: string, name: string, number: number): string {
    const directory = join(live.dir, parent, name);
    mkdirSync(join(directory, "layers"), { recursive: true });
    writeFileSync(join(directory, "layers", String(number)), "");
    return directory;
  }

  describe("is unmounted", () => {
    const nothing = () => join(live.dir, "no.img");

    it("when the last mount of a Create fails, which says why", async () => {
      writeFileSync(nothing(), Buffer.alloc(1 << 20));
      const failed = live.create(["sleeper"], {
        rootfs: [mount("tmpfs", "tmpfs", [], "tmp"), mount("ext4", nothing(), ["loop", "ro"])],
      });
      await expect(failed).rejects.toThrow(isControl ? "invalid argument" : /mount .*ext4.* at .*rootfs/);
    });

    it("when a mount's option makes no sense", async () => {
      const failed = live.create(["sleeper"], { rootfs: [mount("tmpfs", "tmpfs", ["nonsense=1"], "tmp")] });
      await expect(failed).rejects.toThrow(/nonsense|invalid argument/i);
    });

    it("when the engine can't create the container", async () => {
      const failed = live.create(["/no/such"], { rootfs: [mount("tmpfs", "tmpfs", [], "tmp")] });
      await expect(failed).rejects.toThrow(/no such file/);
    });

    it("by a Delete of a task that was never started", async () => {
      await using task = await live.create(["sleeper"], { rootfs: [mount("tmpfs", "tmpfs", [], "tmp")] });
      await task.delete();
    });

    it("after the keeper was killed", async (context) => {
      oursOnly(context, "has no keeper");
      skipUnless(context, lacks("ext4") === "", lacks("ext4"));
      const task = await live.run(["sleeper"], {
        rootfs: [mount("ext4", image("ext4"), ["loop"])],
        snapshot: false,
      });
      process.kill(live.shimOf(task.id).pid, "SIGKILL");
      await until(() => !isAlive(task.pid), { what: () => "the end of the container" });
      await live.events.waitFor(task.id, "exit");
      await task.io.close();
      await live.removeContainer(task.id);
    });
  });
});
