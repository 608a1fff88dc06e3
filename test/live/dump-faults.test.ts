// cedanad ends at each boundary between the steps of a dump: the call is answered, the container runs on, nothing is left frozen or half.

import { existsSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { dumpSteps } from "../../src/checkpoint/dump.ts";
import { readManifest } from "../../src/checkpoint/manifest.ts";
import { verifyFiles } from "../../src/checkpoint/manifest-files.ts";
import { boundariesOf } from "./harness/boundaries.ts";
import { BreakableDaemon } from "./harness/breakable.ts";
import { Live } from "./harness/live.ts";
import { until } from "./harness/until.ts";

const boundaries = boundariesOf("dump", dumpSteps);

describe("a crash of cedanad in a dump", () => {
  // Two new cedanads for each boundary: a second where the machine is idle, three where it isn't.
  it("leaves a whole checkpoint, at each boundary of its steps", { timeout: 300_000 }, async () => {
    using daemon = new BreakableDaemon();
    // 1.7 can't store two checkpoints of a container within one second.
    await using live = await Live.start({
      containerd: "2.1",
      engine: "runc",
      env: daemon.env,
    });
    await using task = await live.run(["counter"]);
    await task.nextNumber();
    // Each replaces the one before.
    const image = mkdtempSync(join(live.dir, "image-"));
    writeFileSync(join(image, "mine"), "");
    let last = "";
    for (const boundary of boundaries) {
      daemon.crashNextAt(boundary);
      await live.killCedanad();
      await task.status(); // a delivery to the one that is dying would count
      await task.checkpoint({ imagePath: image });
      const manifest = (await readManifest(image))!;
      expect(manifest.createdAt > last, boundary).toBe(true);
      last = manifest.createdAt;
      const faults = await verifyFiles(manifest, image);
      expect(
        faults.map(({ message }) => message),
        boundary,
      ).toEqual(["mine is a file that the manifest doesn't name"]);
      expect(await task.status(), boundary).toBe("RUNNING");
      const before = await task.nextNumber();
      expect(await task.nextNumber(), boundary).toBe(before + 1);
      const left = readdirSync(task.bundle).filter((name) => /criu|frozen|attempt/.test(name));
      expect(left, boundary).toEqual([]);
    }
    expect(live.cedanadLog().match(/cedanad serves/g)!.length).toBeGreaterThan(2 * boundaries.length);
  });

  it("thaws the container when nobody asks again", async () => {
    await using live = await Live.start({ containerd: "1.7", engine: "runc" });
    await using task = await live.run(["counter"]);
    await task.nextNumber();
    // As it is left by a crash between freeze and dump, after which the caller has gone, too.
    const freezer = `/sys/fs/cgroup/freezer/${live.namespace}/${task.id}/freezer.state`;
    writeFileSync(freezer, "FROZEN");
    writeFileSync(join(task.bundle, "cedana-frozen"), "1\n");
    await live.killCedanad();
    await until(() => readFileSync(freezer, "utf8").trim() === "THAWED", { what: () => "the thaw" });
    await until(() => !existsSync(join(task.bundle, "cedana-frozen")), {
      what: () => "the end of the marker",
    });
    task.stdout.skip();
    await task.nextNumber();
  });
});
