import { existsSync, mkdirSync, rmdirSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { criuConfig } from "../../src/criu/option-file.ts";
import { InvalidRequest } from "../../src/errors/index.ts";
import { hostCgroupVersion, unifiedPath } from "../../src/linux/cgroup-hierarchy.ts";
import { usesSystemd } from "../../src/runtime/oci/call.ts";
import { RestoreCgroup } from "../../src/runtime/restore-cgroup.ts";

const hostile = '/pod/x"\naction-script "/tmp/evil';
const version = await hostCgroupVersion();
const of = (cgroupsPath: string, systemd = false) =>
  RestoreCgroup.of({
    spec: { linux: { cgroupsPath } },
    id: "c1",
    engine: "crun",
    systemd,
    parent: process.pid,
  });

describe("the cgroup of a restore", () => {
  it("never lets a path become another option of CRIU", async () => {
    expect(() => criuConfig({ cgroupRoots: [["", hostile]] })).toThrow(InvalidRequest);
  });

  it("is CRIU's to be told with version 2 only, where the path is known", async () => {
    const root = (await of("/pod/x")).roots?.find(([controller]) => controller === "");
    expect(root).toEqual(version === 2 ? ["", "/pod/x"] : undefined);
    expect((await of("pod/x")).roots).toBeUndefined();
  });

  it.skipIf(version !== 2)("of a scope is systemd's to make", async () => {
    const cgroup = await of("system.slice:cedana-test:x", true);
    expect(cgroup.roots).toContainEqual(["", "/system.slice/cedana-test-x.scope/container"]);
    await cgroup.make("");
    expect(existsSync(await unifiedPath("/system.slice/cedana-test-x.scope"))).toBe(false);
  });

  it.skipIf(version !== 2)("goes with all that was made for it, and with nothing else", async () => {
    const top = await unifiedPath(`/cedana-test-${process.pid}`);
    mkdirSync(top);
    try {
      const path = `/cedana-test-${process.pid}/a/b`;
      const cgroup = await of(path);
      await cgroup.make("full");
      expect(existsSync(join(top, "a"))).toBe(false);
      await cgroup.make("");
      await cgroup.make("soft");
      expect(existsSync(join(top, "a/b"))).toBe(true);
      await cgroup.remove();
      expect(existsSync(join(top, "a"))).toBe(false);

      await cgroup.make("");
      mkdirSync(join(top, "a/others"));
      rmdirSync(join(top, "a/b"));
      await cgroup.remove();
      expect(existsSync(join(top, "a/others"))).toBe(true);
      rmdirSync(join(top, "a/others"));
      rmdirSync(join(top, "a"));
    } finally {
      rmdirSync(top);
    }
  });
});

it.each([
  [[], false],
  [["--root", "/r", "--systemd-cgroup"], true],
  [["--systemd-cgroup=true"], true],
  [["--systemd-cgroup=false"], false],
  [["--cgroup-manager=systemd"], true],
  [["--cgroup-manager", "systemd"], true],
  [["--systemd-cgroup", "--cgroup-manager", "cgroupfs"], false],
])("%j: systemd's cgroups %s", (argv, systemd) => {
  expect(usesSystemd(argv)).toBe(systemd);
});
