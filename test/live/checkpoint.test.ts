// Checkpoint and restore through the Task API, with each engine.

import { mkdtempSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { verifyImages } from "../../src/criu/image/index.ts";
import type { Live } from "./harness/live.ts";
import { type Combination, missingFor } from "./harness/matrix.ts";
import { numbersIn } from "./harness/output.ts";
import { liveFor } from "./harness/suite.ts";

/** Programs that print a rising number as long as everything they hold is right, and what they need. */
const programs: [what: string, args: string[], annotations: Record<string, string>][] = [
  ["a counter on stdout", ["counter"], {}],
  ["a tree of processes in several sessions", ["tree"], {}],
  ["open and deleted files", ["files"], {}],
  ["unix sockets", ["sockets"], {}],
  ["pipes", ["pipes"], {}],
  ["an established TCP connection in its own network namespace", ["tcp"], { "cedana.io/tcp": "keep" }],
];

/** Each engine once, and two containerds. */
const combinations: Combination[] = [
  { containerd: "1.7", engine: "runc" },
  { containerd: "2.1", engine: "crun" },
];

for (const combination of combinations) {
  const missing = missingFor(combination);
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor(combination, (started) => {
      live = started;
    });

    for (const [what, args, annotations] of programs)
      it(`restores ${what}`, async () => {
        // Images alone hold no files of the root file system: a directory that both containers see holds /tmp.
        const source = mkdtempSync(join(live.dir, "tmp-"));
        const mounts = [{ destination: "/tmp", type: "bind", source, options: ["rbind", "rw"] }];
        const task = await live.run(args, { annotations, mounts });
        let last = -1;
        while (last < 3) last = await task.nextNumber();
        const image = await task.checkpoint({ exit: true });
        expect(await task.wait()).toBe(137);
        expect((await verifyImages(image)).findings).toEqual([]);
        await task.stdout.end().catch(() => undefined);
        last = numbersIn(task.stdout.text).at(-1) ?? last;
        await task.destroy();
        await using restored = await live.restore(image, args, { annotations, mounts });
        expect(await restored.nextNumber()).toBe(last + 1);
      });

    it("leaves the container running when it is not told to end it, and the image restores all the same", async () => {
      const task = await live.run(["counter"]);
      await task.nextNumber();
      const image = await task.checkpoint();
      expect(await task.status()).toBe("RUNNING");
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
      await task.destroy();
      await using restored = await live.restore(image, ["counter"]);
      expect(await restored.nextNumber()).toBeGreaterThan(0);
    });

    it("leaves a paused container paused", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      await task.pause();
      await task.checkpoint();
      expect(await task.status()).toBe("PAUSED");
      await task.resume();
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
    });

    it("leaves the container running when a dump fails, says why, and removes what the attempt wrote", async () => {
      await using task = await live.run(["tcp"]); // an established connection without a policy
      await task.nextNumber();
      const image = mkdtempSync(join(live.dir, "image-"));
      writeFileSync(join(image, "mine"), "");
      const failed = task.checkpoint({ imagePath: image });
      await expect(failed).rejects.toMatchObject({ status: "FAILED_PRECONDITION" });
      await expect(failed).rejects.toThrow(/can't be checkpointed as it is: .*cedana\.io\/tcp: keep/);
      expect(readdirSync(image)).toEqual(["mine"]);
      expect(await task.status()).toBe("RUNNING");
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
    });

    it.each([
      ["a relative image path", "relative/path", "INVALID_ARGUMENT", /absolute/],
      ["an image path that is a file", "/etc/passwd", "INVALID_ARGUMENT", /\/etc\/passwd.*EEXIST/],
      ["an image path below a file", "/etc/passwd/x", "INVALID_ARGUMENT", /\/etc\/passwd\/x/],
    ])("refuses %s and changes nothing", async (_what, imagePath, status, message) => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      const failed = task.checkpoint({ imagePath });
      await expect(failed).rejects.toMatchObject({ status });
      await expect(failed).rejects.toThrow(message);
      expect(await task.status()).toBe("RUNNING");
    });

    it("refuses to checkpoint a container that was only created", async () => {
      await using task = await live.create(["counter"]);
      await expect(task.checkpoint()).rejects.toMatchObject({ status: "FAILED_PRECONDITION" });
      expect(await task.status()).toBe("CREATED");
    });

    it("refuses to restore what is not a checkpoint, and leaves nothing", async () => {
      const empty = mkdtempSync(join(live.dir, "image-"));
      await expect(live.restore(empty, ["counter"])).rejects.toThrow(/not a checkpoint/);
      await expect(live.restore(join(live.dir, "missing"), ["counter"])).rejects.toMatchObject({
        status: "NOT_FOUND",
      });
    });

    it("restores a shell on a terminal", async () => {
      const task = await live.run(["sh"], { terminal: true, stdin: true });
      task.write("x=41; echo ready\n");
      await task.stdout.lineMatching(/^ready/);
      const image = await task.checkpoint({ exit: true });
      await task.destroy();
      await using restored = await live.restore(image, ["sh"], { terminal: true, stdin: true });
      restored.write("echo answer $((x+1))\n");
      await restored.stdout.lineMatching(/^answer 42/);
    });
  });
}
