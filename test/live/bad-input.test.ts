// What can't be run: broken or missing bundles, and a disk that is full at any step of a Create. Nothing stays.

import { execFile, execFileSync } from "node:child_process";
import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import { describe, expect, it } from "vitest";
import { task as api } from "../../src/proto/index.ts";
import { Client } from "../../src/ttrpc/index.ts";
import { isControl, type Live } from "./harness/live.ts";
import { oursOnly } from "./harness/matrix.ts";
import { repository } from "./harness/programs.ts";
import { liveFor } from "./harness/suite.ts";
import { entries } from "./harness/system.ts";

const run = promisify(execFile);

describe("bad input", () => {
  let live: Live;
  liveFor({}, (started) => {
    live = started;
  });

  it.each([
    ["without a process", "{}", /process/],
    ["with annotations of numbers", `{"annotations":{"a":1}}`, /annotation a is not a string/],
  ])("refuses a config.json that is %s", async (_name, text, words) => {
    const failed = live.create(["true"], { rawSpec: text });
    await expect(failed).rejects.toThrow(isControl ? /./ : words);
  });

  it("refuses a bundle that isn't there, or holds no spec, at `start` and at Create", async (context) => {
    oursOnly(context, "does not look before the engine");
    const bundle = join(live.dir, "no-bundle");
    const start = () => {
      const flags = ["-namespace", live.namespace, "-id", "x", "-address", live.address, "-bundle", bundle];
      const program = join(repository, "bin/containerd-shim-cedana-v2");
      const running = run(program, [...flags, "start"], { env: live.environment() });
      running.child.stdin!.end();
      return running;
    };
    await expect(start()).rejects.toThrow(/bundle has no .*no-bundle\/config\.json/);
    mkdirSync(bundle);
    // containerd itself refuses such specs, and keeps their bundles.
    for (const [text, words] of [
      ["{ this is no JSON", /config\.json is not JSON/],
      ["[]", /config\.json is not an OCI runtime spec: not an object/],
    ] as const) {
      writeFileSync(join(bundle, "config.json"), text);
      await expect(start()).rejects.toThrow(words);
    }
    rmSync(bundle, { recursive: true });

    await using task = await live.run(["sleeper"]);
    const client = await Client.connect(task.shimSocket());
    try {
      const create = client.call(
        "containerd.task.v2.Task",
        "Create",
        api.CreateTaskRequest.encode({ id: "x", bundle }),
      );
      await expect(create).rejects.toThrow(/bundle has no .*no-bundle\/config\.json/);
    } finally {
      client.close();
    }
    expect(await task.status()).toBe("RUNNING");
  });

  it("refuses stdio that it doesn't know, and FIFOs that aren't there", async () => {
    await expect(live.create(["true"], { stdio: "gopher://x/y" })).rejects.toThrow(/gopher/);
    await expect(live.create(["true"], { stdio: join(live.dir, "no-directory/no-fifo") })).rejects.toThrow(
      /no-fifo/,
    );
    await expect(live.create(["true"], { stdio: `binary://${live.dir}/no-program` })).rejects.toThrow(
      /no-program/,
    );
  });

  it("leaves nothing of a Create on a full disk, wherever it gets full", async () => {
    const bundles = join(live.dir, "state/io.containerd.runtime.v2.task", live.namespace);
    mkdirSync(bundles, { recursive: true });
    execFileSync("mount", ["-t", "tmpfs", "-o", "size=256k", "small", bundles]);
    try {
      const outcomes: string[] = [];
      // tmpfs counts pages: one more is free at each attempt, until there is enough.
      for (let free = 0; outcomes.at(-1) !== "ran"; free++) {
        if (free > 30) throw new Error(`no Create in 30 pages: ${outcomes}`);
        fill(join(bundles, "ballast"), free);
        const outcome = await live.run(["true"], { stdio: false }).then(
          async (task) => {
            await task.exited;
            await task.delete();
            return "ran";
          },
          (error: Error) => error.message,
        );
        outcomes.push(outcome);

        if (/shim-binary-path|bootstrap\.json/.test(outcome))
          for (const { pid } of live.shims()) {
            // containerd's own write, after the shim's start: it forgets the shim. Ours leaves by itself, in a minute.
            process.kill(pid, "SIGKILL");
            for (const name of entries(join(live.runDir, "s"))) rmSync(join(live.runDir, "s", name));
          }
        if (outcome !== "ran") expect(outcome).toMatch(/no space left|ENOSPC/i);
        execFileSync("rm", [join(bundles, "ballast")]);
        expect(entries(bundles)).toEqual([]);
        const ours = live.leftovers().filter((line) => !/^process|^socket|^mount \S+ seen/.test(line));
        expect(ours, outcome).toEqual([]);
      }
      expect(outcomes.length).toBeGreaterThan(4);

      // A disk that gets full later loses no exit, and nothing of what is left.
      await using task = await live.create(["counter", "20", "6"]);
      fill(join(bundles, "ballast"), 0);
      await task.start();
      await task.nextNumber();
      await expect(task.exec(["true"], { stdio: false })).rejects.toThrow(/no space left|ENOSPC/i);
      await task.kill(15);
      expect(await task.wait()).toBe(6);
      expect(await task.delete()).toBe(6);
      await live.events.waitFor(task.id, "delete");
      expect(live.events.summary(task.id)).toEqual(["create", "start", "exit 6", "delete"]);
    } finally {
      execFileSync("umount", ["-l", bundles]);
    }
  });
});

/** Fills the file system of `path` but for some pages. */
function fill(path: string, freePages: number): void {
  const free = Number(execFileSync("stat", ["-f", "-c", "%a", join(path, "..")], { encoding: "utf8" }));
  writeFileSync(path, Buffer.alloc(Math.max(0, free - freePages) * 4096));
}
