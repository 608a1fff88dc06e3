// What differs between a checkpoint and the container that is to be restored from it: said before CRIU runs, all of it, or no obstacle.

import { execFileSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { CheckpointManifest } from "../../src/checkpoint/manifest.ts";
import { Live } from "./harness/live.ts";
import { missingFor } from "./harness/matrix.ts";
import type { Spec } from "./harness/spec.ts";

function changeManifest(image: string, change: (manifest: CheckpointManifest) => void): void {
  const path = join(image, "cedana.json");
  const manifest = JSON.parse(readFileSync(path, "utf8")) as CheckpointManifest;
  change(manifest);
  writeFileSync(path, JSON.stringify(manifest));
}

const named = (hostname: string) => (spec: Spec) => {
  spec.hostname = hostname;
};

const crun = { containerd: "2.1", engine: "crun" } as const;
const missing = missingFor(crun);

describe("a restore", () => {
  it("names everything that keeps it from working, before anything is made", async () => {
    await using live = await Live.start({ containerd: "1.7", engine: "runc" });
    const source = mkdtempSync(join(live.dir, "data-"));
    const mounts = ["/data", "/more"].map((destination) => ({
      destination,
      type: "bind",
      source,
      options: ["rbind", "rw"],
    }));
    const task = await live.run(["counter"], { mounts });
    await task.nextNumber();
    const image = await task.checkpoint();
    await task.destroy();
    changeManifest(image, (manifest) => {
      manifest.criuVersion = "99.1";
      manifest.cpu = { architecture: "x64", features: ["avx512_from_tomorrow", "constant_tsc"] };
    });
    const failed = live.create(["counter"], { criuImagePath: image, terminal: true });
    const said = await failed.then(
      () => "",
      (error: Error) => error.message,
    );
    for (const expected of [
      /it is of a container without a terminal/,
      /mount from outside at \/data/,
      /mount from outside at \/more/,
      /taken by CRIU 99\.1/,
      /this CPU lacks avx512_from_tomorrow, which/,
    ])
      expect(said).toMatch(expected);
    await live.expectNoLeftovers();
  });

  it.for(["runc", "crun"] as const)(
    "follows the links that %s's container has for sources of bind mounts",
    async (engine) => {
      await using live = await Live.start({ containerd: "1.7", engine });
      const source = mkdtempSync(join(live.dir, "data-"));
      const link = join(live.dir, "link");
      symlinkSync(source, link);
      const mounts = [{ destination: "/data", type: "bind", source: link, options: ["rbind", "rw"] }];
      const before = await live.run(["counter"], { mounts });
      await before.nextNumber();
      const image = await before.checkpoint();
      await before.destroy();
      await using after = await live.restore(image, ["counter"], { mounts });
      await after.nextNumber();
      writeFileSync(join(source, "seen"), "");
      expect((await after.execToEnd(["busybox", "ls", "/data"])).stdout).toBe("seen\n");
      expect(
        (JSON.parse(readFileSync(join(after.bundle, "config.json"), "utf8")) as Spec).mounts,
      ).toContainEqual(mounts[0]);
    },
  );

  it("gives a container its own host name, and closes connections from an address that it hasn't", async () => {
    const networks = ["192.0.2.1", "192.0.2.2"].map((address, at) => ({
      address,
      name: `cedana-${process.pid}-${at}`,
    }));
    try {
      for (const { address, name } of networks) {
        execFileSync("ip", ["netns", "add", name]);
        execFileSync("ip", ["-n", name, "address", "add", `${address}/32`, "dev", "lo"]);
        execFileSync("ip", ["-n", name, "link", "set", "lo", "up"]);
      }
      const [before, after] = networks.map(({ name }) => ({ network: `/run/netns/${name}` }));
      await using live = await Live.start({ containerd: "1.7", engine: "runc" });
      const args = ["identity", networks[0]!.address];
      const annotations = { "cedana.io/tcp": "keep" };
      const line = /^(\d+) (\S+) (\S+)$/;
      const task = await live.run(args, { annotations, namespaces: before, edit: named("first") });
      expect((await task.stdout.lineMatching(line)).slice(2)).toEqual(["first", "open"]);
      const image = await task.checkpoint({ exit: true });
      await task.destroy();
      const files = readdirSync(image).sort();
      {
        await using same = await live.restore(image, args, {
          annotations,
          namespaces: before,
          edit: named("first"),
        });
        expect((await same.stdout.lineMatching(line)).slice(2)).toEqual(["first", "open"]);
      }
      await using other = await live.restore(image, args, {
        annotations,
        namespaces: after,
        edit: named("second"),
      });
      expect((await other.stdout.lineMatching(line)).slice(2)).toEqual(["second", "closed"]);
      expect(readdirSync(image).sort()).toEqual(files);
      expect(readdirSync(other.bundle).filter((name) => /^criu-/.test(name))).toEqual([]);
    } finally {
      for (const { name } of networks) execFileSync("ip", ["netns", "delete", name], { stdio: "ignore" });
    }
  });

  it.skipIf(missing)("takes what the other engine has dumped, both ways", async () => {
    await using runcs = await Live.start({ containerd: "1.7", engine: "runc" });
    await using cruns = await Live.start(crun);
    for (const [from, to] of [
      [runcs, cruns],
      [cruns, runcs],
    ] as const) {
      await using task = await from.run(["counter"]);
      await task.nextNumber();
      const image = await task.checkpoint();
      await using restored = await to.restore(image, ["counter"], { edit: named("other") });
      expect(await restored.nextNumber()).toBeGreaterThan(0);
      expect((await restored.execToEnd(["hostname"])).stdout).toBe("other\n");
    }
  });
});
