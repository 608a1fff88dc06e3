// What differs between a checkpoint and the container that is to be restored from it: said before CRIU runs, all of it, or no obstacle.

import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { CheckpointManifest } from "../../src/checkpoint/manifest.ts";
import { Live } from "./harness/live.ts";
import { missingFor } from "./harness/matrix.ts";

function changeManifest(image: string, change: (manifest: CheckpointManifest) => void): void {
  const path = join(image, "cedana.json");
  const manifest = JSON.parse(readFileSync(path, "utf8")) as CheckpointManifest;
  change(manifest);
  writeFileSync(path, JSON.stringify(manifest));
}

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
      await using restored = await to.restore(image, ["counter"]);
      expect(await restored.nextNumber()).toBeGreaterThan(0);
    }
  });
});
