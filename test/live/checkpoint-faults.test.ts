// Dumps and restores that fail, and a cedanad that is killed in the middle of one: the container runs on, nothing is left.

import { execFileSync } from "node:child_process";
import {
  appendFileSync,
  cpSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const KILLS = process.env.CEDANA_SOAK ? 100 : 4;

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination);
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    let good: string;
    let disk: string;
    beforeAll(async () => {
      // A mount that is there before containerd's mount namespace is.
      disk = mkdtempSync("/run/cd-");
      execFileSync("mount", ["-t", "tmpfs", "-o", "size=1m", "cedana-live", disk]);
      live = await Live.start(combination);
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      good = await task.checkpoint();
    });
    afterEach(() => live.expectNoLeftovers());
    afterAll(async () => {
      await live?.stop();
      execFileSync("umount", [disk]);
      rmdirSync(disk);
    });

    async function runsOn(task: LiveTask): Promise<void> {
      expect(await task.status()).toBe("RUNNING");
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
    }

    /** More comes out than what waited in the pipes. */
    async function standsNot(task: LiveTask): Promise<void> {
      expect(await task.status()).toBe("RUNNING");
      const last = (await task.stdout.lineMatching(/^(\d+) /))[1]!;
      for (let line = 0; line < 5; line++) await task.stdout.lineMatching(/^\d+ /);
      expect(Number((await task.stdout.lineMatching(/^(\d+) /))[1])).toBe(Number(last) + 6);
    }

    /** A copy of a good checkpoint, damaged. */
    function damaged(damage: (image: string) => void): string {
      const image = mkdtempSync(join(live.dir, "damaged-"));
      cpSync(good, image, { recursive: true });
      damage(image);
      return image;
    }

    /** Creates and starts; the task that failed to start must be deletable, and its container gone. */
    async function failsToStart(image: string, message: RegExp): Promise<void> {
      const task = await live.create(["counter"], { criuImagePath: image });
      try {
        await expect(task.start()).rejects.toThrow(message);
        expect(await task.status()).toBe("STOPPED");
        expect(existsSync(join(task.bundle, "criu-restore.log"))).toBe(true);
        expect(readFileSync(join(task.bundle, "config.json"), "utf8")).not.toContain("cedana-loopback");
        const left = live.leftovers().filter((line) => /^cgroup|^engine state|\(container,/.test(line));
        expect(left).toEqual([]);
        expect(await task.delete()).toBe(255);
      } finally {
        await task.destroy();
      }
    }

    // These come before any engine.
    const once = combination.engine === "runc";
    it.runIf(once).each([
      ["a missing file", (image: string) => rmSync(join(image, "pstree.img")), /pstree.img is missing/],
      [
        "a file cut short",
        (image: string) => truncateSync(join(image, "files.img"), 5),
        /files.img has 5 bytes/,
      ],
      ["a file grown", (image: string) => appendFileSync(join(image, "pages-1.img"), "x"), /pages-1.img has/],
      [
        "no descriptors",
        (image: string) => rmSync(join(image, "descriptors.json")),
        /descriptors.json is missing/,
      ],
      ["a broken manifest", (image: string) => writeFileSync(join(image, "cedana.json"), "{"), /is not JSON/],
      [
        "a newer manifest",
        (image: string) => writeFileSync(join(image, "cedana.json"), '{"version":9}'),
        /version 9/,
      ],
    ])("refuses images with %s before anything is made", async (_what, damage, message) => {
      const image = damaged(damage);
      await expect(live.create(["counter"], { criuImagePath: image })).rejects.toThrow(message);
    });

    it.runIf(once).each([
      ["an empty directory", () => mkdtempSync(join(live.dir, "empty-")), "DATA_LOSS", /no inventory.img/],
      ["a path that is missing", () => join(live.dir, "nowhere"), "NOT_FOUND", /nowhere does not exist/],
      ["a path that is relative", () => "images", "INVALID_ARGUMENT", /not an absolute path/],
      [
        "a file that is no archive",
        () => join(good, "inventory.img"),
        "DATA_LOSS",
        /archive .*inventory\.img/,
      ],
    ])("refuses to restore from %s", async (_what, path, status, message) => {
      const failed = live.create(["counter"], { criuImagePath: path() });
      await expect(failed).rejects.toMatchObject({ details: expect.stringMatching(message) });
      // Statuses that containerd doesn't know come out as UNKNOWN.
      expect([status, "UNKNOWN"]).toContain(await failed.catch((error) => error.status));
    });

    it("says what CRIU found broken, and leaves a task that can be deleted", async () => {
      // The same size, so that only CRIU can see it.
      const overwrite = (name: string) => (image: string) => {
        const path = join(image, name);
        writeFileSync(path, Buffer.alloc(statSync(path).size, 0xff));
      };
      await failsToStart(damaged(overwrite("pstree.img")), /CRIU: .*(?:magic|image)/is);
      const memory = readdirSync(good).find((name) => /^mm-\d+\.img$/.test(name))!;
      await failsToStart(damaged(overwrite(memory)), /CRIU: /);
    });

    it("leaves no process where a restore fails after the processes were made", async () => {
      // Of the right size, so that only CRIU sees it, when the process takes on its memory.
      const pagemap = readdirSync(good).find((name) => /^pagemap-\d+\.img$/.test(name))!;
      await failsToStart(
        damaged((image) => {
          const bytes = readFileSync(join(image, pagemap));
          writeFileSync(join(image, pagemap), bytes.fill(0xff, 8));
        }),
        /CRIU: /,
      );
    });

    it("names a file that is another than at the dump, before CRIU does", async () => {
      const source = mkdtempSync(join(live.dir, "bin-"));
      const program = join(source, "counter");
      cpSync(join(live.programs, "counter"), program);
      const mounts = [{ destination: "/own", type: "bind", source, options: ["rbind", "ro"] }];
      const task = await live.run(["/own/counter"], { mounts });
      await task.nextNumber();
      const image = await task.checkpoint({ exit: true });
      await task.destroy();
      appendFileSync(program, "changed");
      const failed = await live.create(["/own/counter"], { mounts, criuImagePath: image });
      await expect(failed.start()).rejects.toThrow(
        /\/own\/counter has \d+ bytes instead of \d+: .*same versions of mounted files/,
      );
      expect(await failed.status()).toBe("STOPPED");
      await failed.destroy();
    });

    it("leaves the container running when the disk is full, says so, and leaves nothing there", async () => {
      await using large = await live.run(["memory", "8"]);
      await large.stdout.lineMatching(/^ready/);
      const refused = large.checkpoint({ imagePath: join(disk, "image") });
      await expect(refused).rejects.toMatchObject({ status: "FAILED_PRECONDITION" });
      await expect(refused).rejects.toThrow(/space/);
      expect(readdirSync(disk)).toEqual([]);
      await large.stdout.lineMatching(/^\d+ /);

      // Room for its memory, so that CRIU begins, but not for everything else.
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      writeFileSync(join(disk, "ballast"), Buffer.alloc(960 * 1024));
      for (const exit of [false, true]) {
        const failed = task.checkpoint({ imagePath: join(disk, "image"), exit });
        await expect(failed).rejects.toThrow(/dump of task .*No space left on device/s);
        await expect(failed).rejects.toThrow(/full/);
        expect(readdirSync(disk)).toEqual(["ballast"]);
        await runsOn(task);
      }
      expect(existsSync(join(task.bundle, "criu-dump.log"))).toBe(true);
      rmSync(join(disk, "ballast"));
      const image = await task.checkpoint();
      await task.destroy();
      await using restored = await live.restore(image, ["counter"]);
      await restored.nextNumber();
    });

    it("leaves a paused container paused when a dump fails", async () => {
      await using task = await live.run(["tcp"]); // an established connection without a policy
      await task.nextNumber();
      await task.pause();
      await expect(task.checkpoint({ exit: true })).rejects.toThrow(/cedana\.io\/tcp/);
      expect(await task.status()).toBe("PAUSED");
      await task.resume();
      await runsOn(task);
    });

    it(`answers a dump and a restore in whose middle cedanad is killed, ${KILLS} times each`, async () => {
      const args = ["memory", "32"];
      let task = await live.run(args);
      try {
        const sum = (await task.stdout.lineMatching(/^ready (\S+)/))[1];
        for (let round = 0; round < KILLS; round++) {
          const after = (round / KILLS) * 150; // spread over the whole of it
          const dump = task.checkpoint({ exit: round % 2 === 1 });
          await new Promise((resolve) => setTimeout(resolve, after));
          await live.killCedanad();
          const image = await dump;
          expect(existsSync(join(image, "cedana.json"))).toBe(true);
          if (round % 2 === 0) await standsNot(task);
          else expect(await task.wait()).toBe(137);
          await task.destroy();
          task = await live.create(args, { criuImagePath: image });
          const start = task.start();
          await new Promise((resolve) => setTimeout(resolve, after));
          await live.killCedanad();
          await start;
          expect((await task.stdout.lineMatching(/^\d+ (\S+)/))[1], `round ${round}`).toBe(sum);
          const left = () => readdirSync(task.bundle).filter((name) => /^criu-|attempt|original/.test(name));
          await until(() => left().length === 0, { what: () => `the removal of ${left()}` }); // by the next cedanad, after a late kill
        }
      } finally {
        await task.destroy();
      }
    });
  });
}
