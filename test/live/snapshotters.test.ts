// Checkpoints with the changed files of containers whose root file system is no overlay: what it was made of is asked of containerd.

import {
  chmodSync,
  closeSync,
  existsSync,
  ftruncateSync,
  linkSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { readManifest } from "../../src/checkpoint/manifest.ts";
import { setTimes, setXattr } from "../../src/linux/addon.ts";
import { describeTree } from "../checkpoint/rootfs-diff/tree.ts";
import { BreakableDaemon } from "./harness/breakable.ts";
import { Live, type LiveOptions } from "./harness/live.ts";
import { missingFor } from "./harness/matrix.ts";
import { liveFor } from "./harness/suite.ts";
import { entries, mountsBelow } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const COUNTER = ["counter", "20", "7"];

/** As containerd sees it, which may have a mount namespace of its own. */
const rootOf = (task: LiveTask, ...parts: string[]) =>
  join(`/proc/${task.live.containerdPid}/root`, task.bundle, "rootfs", ...parts);

async function dump(task: LiveTask, ...flags: string[]): Promise<string> {
  return JSON.parse(await task.live.cedana("dump", "containerd", task.id, "--json", ...flags)).path as string;
}

/** Neither containerd has anything of a dump any more, nor a bundle, nor the mount namespace. */
async function expectNothingLeft(task: LiveTask): Promise<void> {
  const { live } = task;
  const snapshots = await live.ctr("snapshots", "--snapshotter", live.options.snapshotter, "list");
  expect(snapshots).not.toContain("cedana");
  expect(await live.ctr("leases", "list", "--quiet")).toBe("");
  expect(entries(task.bundle).filter((name) => /base|dump|criu|frozen|attempt/.test(name))).toEqual([]);
  expect(mountsBelow(live.dir, live.containerdPid).filter((path) => path.includes("base"))).toEqual([]);
}

async function expectGoesOn(task: LiveTask): Promise<void> {
  expect(await task.status()).toBe("RUNNING");
  task.stdout.skip();
  const before = await task.nextNumber();
  expect(await task.nextNumber()).toBe(before + 1);
}

/** In all the ways that a program has, without its knowing. */
function changeFiles(task: LiveTask): void {
  const at = (...parts: string[]) => rootOf(task, ...parts);
  mkdirSync(at("srv/new/deep"), { recursive: true, mode: 0o750 });
  writeFileSync(at("srv/new/deep/file"), "added");
  const etc = readdirSync(at("etc")).filter((name) => lstatSync(at("etc", name)).isFile());
  expect(etc.length).toBeGreaterThan(1);
  rmSync(at("etc", etc[0]!));
  const { mtimeNs, size } = lstatSync(at("etc", etc[1]!), { bigint: true });
  writeFileSync(at("etc", etc[1]!), "#".repeat(Number(size))); // as long and as old as it was
  setTimes(at("etc", etc[1]!), mtimeNs);
  const applets = readdirSync(at("bin")).filter((name) => lstatSync(at("bin", name)).isSymbolicLink());
  renameSync(at("bin", applets[0]!), at("bin/renamed"));
  rmSync(at("var"), { recursive: true, force: true }); // a directory instead of a directory
  mkdirSync(at("var"), { mode: 0o700 });
  writeFileSync(at("var/only"), "");
  linkSync(at("srv/new/deep/file"), at("srv/new/link"));
  linkSync(at("bin/busybox"), at("srv/busybox")); // a new name of what the image has
  symlinkSync("../nowhere", at("srv/symlink"));
  setXattr(at("srv/new/deep"), "trusted.some", Buffer.from([1, 0, 2]));
  setXattr(
    at("bin/busybox"),
    "security.capability",
    Buffer.from("0100000200200000000000000000000000000000", "hex"),
  );
  chmodSync(at("srv/new/deep/file"), 0o4711);
  const sparse = openSync(at("srv/sparse"), "w");
  ftruncateSync(sparse, 6_000_000);
  writeSync(sparse, "in the middle", 3_000_000);
  closeSync(sparse);
}

const kinds: Pick<Required<LiveOptions>, "containerd" | "snapshotter" | "engine">[] = [
  { containerd: "1.7", snapshotter: "native", engine: "runc" },
  { containerd: "1.7", snapshotter: "blockfile", engine: "runc" },
  { containerd: "2.1", snapshotter: "native", engine: "crun" },
];
for (const kind of kinds) {
  const hasExt4 = readFileSync("/proc/filesystems", "utf8").includes("\text4\n");
  const missing =
    missingFor(kind) ?? (kind.snapshotter === "blockfile" && !hasExt4 ? "the kernel has no ext4" : undefined);
  describe.skipIf(missing)(
    `${kind.snapshotter} of containerd ${kind.containerd}${missing ? ` (${missing})` : ""}`,
    () => {
      let live: Live;
      liveFor(kind, (started) => {
        live = started;
      });

      it("has the files that the container changed, and another container of the image goes on with them", async () => {
        let last: number;
        let expected: Record<string, string>;
        {
          await using task = await live.run(COUNTER);
          last = await task.nextNumber();
          changeFiles(task);
          expected = describeTree(rootOf(task)); // before it: CRIU makes and removes a directory in /tmp
          const path = await dump(task, "--name", "web");
          expect((await readManifest(path))?.rootfsDiff).toMatchObject({
            source: "snapshot",
            snapshotter: kind.snapshotter,
            deleted: expect.any(Number),
          });
          await expectGoesOn(task);
          await expectNothingLeft(task);
        }
        await using restored = await live.run(COUNTER, { annotations: { "cedana.io/restore-from": "web" } });
        expect(await restored.nextNumber()).toBeGreaterThan(last);
        expect(describeTree(rootOf(restored))).toEqual(expected);
        // Of a restored one, too.
        writeFileSync(rootOf(restored, "srv/again"), "");
        expected = describeTree(rootOf(restored));
        await dump(restored, "--name", "web");
        await using again = await live.run(COUNTER, { annotations: { "cedana.io/restore-from": "web" } });
        expect(describeTree(rootOf(again))).toEqual(expected);
      });
    },
  );
}

describe("a container that has no overlay", () => {
  let live: Live;
  const daemon = new BreakableDaemon();
  beforeAll(async () => {
    live = await Live.start({
      containerd: "1.7",
      snapshotter: "native",
      engine: "runc",
      env: { CEDANA_DAEMON: daemon.program },
    });
  });
  afterEach(() => live.expectNoLeftovers());
  afterAll(async () => {
    await live?.stop();
    daemon[Symbol.dispose]();
  });

  it("runs on when containerd can't be asked what it was made of, and the error says so", async () => {
    await using task = await live.run(COUNTER);
    await task.nextNumber();
    await live.stopContainerd();
    try {
      await expect(dump(task, "--name", "away")).rejects.toThrow(
        /changed files of task .* no\s.*overlay.*\/c\.sock\).*ECONNREFUSED/s,
      );
    } finally {
      await live.startContainerd();
    }
    await expectGoesOn(task);
    await expectNothingLeft(task);
    expect(entries(join(live.dir, "var/checkpoints", live.namespace, "-/away/tmp"))).toEqual([]);
  });

  it("is left as it was where the changes are too many", async () => {
    await using task = await live.run(COUNTER, { annotations: { "cedana.io/rootfs-max-bytes": "1Mi" } });
    await task.nextNumber();
    writeFileSync(rootOf(task, "big"), Buffer.alloc(2 << 20, 1));
    await expect(dump(task)).rejects.toThrow(/more than the allowed 1048576 bytes, reached at big/);
    await expectGoesOn(task);
    await expectNothingLeft(task);
  });

  it("that is no snapshot of containerd's is refused by name", async () => {
    const tree = { type: "bind", source: join(live.dir, "tree"), target: "", options: ["rbind", "rw"] };
    mkdirSync(join(tree.source, "programs"), { recursive: true });
    for (const name of ["proc", "dev", "sys", "tmp"]) mkdirSync(join(tree.source, name));
    await using task = await live.run(COUNTER, { rootfs: [tree], snapshot: false, recordSnapshot: false });
    await task.nextNumber();
    await expect(dump(task)).rejects.toThrow(/containerd has no snapshot\s.*of that container/);
    await expectGoesOn(task);
    await expectNothingLeft(task);
  });

  // The keeper waits between its attempts to start a cedanad, some 2 s each.
  it.each(["dump.takeRootfs.before", "dump.takeRootfs.after"])(
    "has a whole checkpoint, and containerd nothing of it, after a crash at %s",
    { timeout: 60_000 },
    async (boundary) => {
      await using task = await live.run(COUNTER);
      await task.nextNumber();
      writeFileSync(rootOf(task, "mine"), "");
      daemon.crashNextAt(boundary);
      await live.killCedanad();
      await task.status();
      await dump(task, "--name", "crash").catch(() => {}); // its cedanad ends
      const place = join(live.dir, "var/checkpoints", live.namespace, "-/crash");
      const [generation] = await until(
        () => {
          const found = entries(place).filter((name) => name !== "tmp");
          return found.length > 0 && !existsSync(join(task.bundle, "cedana-dump")) ? found : undefined;
        },
        { what: () => "a checkpoint" },
      );
      expect((await readManifest(join(place, generation!)))?.rootfsDiff?.members).toBeGreaterThan(1);
      await expectGoesOn(task);
      await expectNothingLeft(task);
      rmSync(place, { recursive: true });
    },
  );
});
