// What CRIU is allowed, by annotation or by containerd's options: each shown by what it does.

import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { verifyDirectory } from "../../src/checkpoint/archive/index.ts";
import type { Live, RunOptions } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { liveFor } from "./harness/suite.ts";
import type { CheckpointOptions } from "./harness/task.ts";
import { until } from "./harness/until.ts";

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination);
  const { engine } = combination;
  describe.skipIf(missing)(`${engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor(combination, (started) => {
      live = started;
    });

    const manifestOf = (image: string) => JSON.parse(readFileSync(join(image, "cedana.json"), "utf8"));

    /** A directory that both containers see as /tmp: images hold no files. */
    function sharedTmp(): Pick<RunOptions, "mounts"> & { source: string } {
      const source = mkdtempSync(join(live.dir, "tmp-"));
      return {
        source,
        mounts: [{ destination: "/tmp", type: "bind", source, options: ["rbind", "rw"] }],
      };
    }

    /** Dumps a counting program, and restores it with nothing but the manifest's word; it must count on. */
    async function roundTrip(args: string[], options: RunOptions, checkpoint: CheckpointOptions = {}) {
      const task = await live.run(args, options);
      let image: string;
      let last = await task.nextNumber();
      try {
        image = await task.checkpoint({ exit: true, ...checkpoint });
        await task.wait();
        await task.stdout.end();
        last = Number(task.stdout.text.trim().split("\n").at(-1));
      } finally {
        await task.destroy();
      }
      const { annotations: _, ...rest } = options;
      await using restored = await live.restore(image, args, rest);
      expect(await restored.nextNumber()).toBe(last + 1);
      return image;
    }

    async function refused(args: string[], options: RunOptions, message: RegExp) {
      await using task = await live.run(args, options);
      await task.nextNumber();
      await expect(task.checkpoint()).rejects.toThrow(message);
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
    }

    it("file locks are refused unless allowed, and held by the restored processes", async () => {
      await refused(["locks"], sharedTmp(), /file-locks: .*cedana\.io\/file-locks: "true"/);
      const image = await roundTrip(["locks"], sharedTmp(), { fileLocks: true });
      expect(manifestOf(image).options).toMatchObject({ fileLocks: true });
    });

    it("a unix socket with a peer outside is refused unless allowed, and connected again", async () => {
      const { source, mounts } = sharedTmp();
      mounts![0]!.destination = source; // CRIU connects to the name that the peer gave its socket
      const inbox = spawn(join(live.programs, "inbox"), [join(source, "inbox")], {
        stdio: ["ignore", "pipe", "inherit"],
      });
      let received = "";
      inbox.stdout.on("data", (chunk: Buffer) => {
        received += chunk.toString();
      });
      try {
        await until(() => existsSync(join(source, "inbox")), { what: () => "the peer's socket" });
        const args = ["outside", join(source, "inbox")];
        // In the network namespace of the peer: across two, no kernel tells CRIU who it is.
        const outside: RunOptions = { mounts, namespaces: { network: "host" } };
        await refused(args, outside, /unix-outside: .*cedana\.io\/ext-unix: "true"/);
        const annotations = { "cedana.io/ext-unix": "true" };
        const image = await roundTrip(args, { ...outside, annotations });
        expect(manifestOf(image).options).toMatchObject({ extUnix: true });
        const numbers = received.trim().split("\n").map(Number);
        const restart = numbers.lastIndexOf(0);
        expect(numbers.slice(restart)).toEqual(numbers.slice(restart).map((_, index) => index));
      } finally {
        const gone = new Promise((resolve) => inbox.once("exit", resolve));
        inbox.kill("SIGKILL");
        await gone;
      }
    });

    it("connections are kept where containerd's option says so", async () => {
      const image = await roundTrip(["tcp"], {}, { openTcp: true });
      expect(manifestOf(image).options).toMatchObject({ tcp: "keep" });
    });

    it("connections that are to be closed at the dump are closed after the restore", async () => {
      const task = await live.run(["tcp"], { annotations: { "cedana.io/tcp": "close" } });
      await task.nextNumber();
      const image = await task.checkpoint({ exit: true });
      await task.destroy();
      await using restored = await live.restore(image, ["tcp"]);
      await restored.stdout.lineMatching(/^FAILED/);
      expect(await restored.wait()).toBe(100);
    });

    it("kept connections can be closed at the restore alone", async () => {
      const task = await live.run(["tcp"], { annotations: { "cedana.io/tcp": "keep" } });
      await task.nextNumber();
      const image = await task.checkpoint({ exit: true });
      await task.destroy();
      await using restored = await live.restore(image, ["tcp"], {
        annotations: { "cedana.io/tcp": "close" },
      });
      await restored.stdout.lineMatching(/^FAILED/);
      expect(await restored.wait()).toBe(100);
    });

    it("a connection that nobody has accepted is refused unless it may be skipped", async () => {
      await refused(["inflight"], { annotations: { "cedana.io/tcp": "keep" } }, /skip-in-flight/);
      await roundTrip(["inflight"], { annotations: { "cedana.io/tcp": "skip-in-flight" } });
    });

    it("a shell job is restored as one", async () => {
      const image = await roundTrip(["counter"], { annotations: { "cedana.io/shell-job": "true" } });
      expect(manifestOf(image).options).toMatchObject({ shellJob: true });
    });

    it("cgroup modes and empty namespaces are checked, passed on and replayed", async () => {
      const image = await roundTrip(["counter"], {}, { cgroupsMode: "ignore" });
      expect(manifestOf(image).options).toMatchObject({ cgroupsMode: "ignore" });
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      await expect(task.checkpoint({ cgroupsMode: "nonsense" })).rejects.toMatchObject({
        status: "INVALID_ARGUMENT",
        details: expect.stringContaining("soft, full, strict, ignore"),
      });
      if (engine === "runc") {
        const empty = await task.checkpoint({ emptyNamespaces: ["network"] });
        expect(manifestOf(empty).options).toMatchObject({ emptyNamespaces: ["network"] });
      } else {
        await expect(task.checkpoint({ emptyNamespaces: ["network"] })).rejects.toMatchObject({
          status: "UNIMPLEMENTED",
          details: expect.stringContaining("--empty-ns"),
        });
      }
    });

    it("a parent that holds no images is refused, relative and absolute", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      for (const parentPath of ["../no-such-parent", join(live.dir, "no-such-parent")])
        await expect(task.checkpoint({ parentPath })).rejects.toMatchObject({
          status: "NOT_FOUND",
          details: expect.stringContaining("no-such-parent"),
        });
      expect(await task.status()).toBe("RUNNING");
    });

    it("the manifest says how the checkpoint was taken, of what and by whom, for root's eyes only", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      const workPath = mkdtempSync(join(live.dir, "work-"));
      const image = await task.checkpoint({ workPath });
      const manifest = manifestOf(image);
      for (const name of readdirSync(image)) expect(statSync(join(image, name)).mode & 0o077, name).toBe(0);
      expect((await verifyDirectory(image)).verified).toBe(manifest.files.length);
      expect(existsSync(join(workPath, "dump.log"))).toBe(true);
      expect(manifest).toMatchObject({
        version: 1,
        containerId: task.id,
        terminal: false,
        options: { fileLocks: false, extUnix: false, shellJob: false, leaveRunning: true },
        files: expect.arrayContaining([
          {
            path: "inventory.img",
            size: expect.any(Number),
            digest: expect.stringMatching(/^xxh128:[0-9a-f]{32}$/),
          },
        ]),
        namespaces: expect.arrayContaining([{ type: "pid" }]),
        plugins: [{ name: "containerd" }, { name: engine }],
        cpu: { features: expect.arrayContaining(["fpu"]) },
        timings: { criuDump: expect.any(Number) },
        criuVersion: expect.stringMatching(/^\d+\.\d+/),
        kernel: expect.stringMatching(/^\d+\.\d+/),
        engine: { name: engine, version: expect.stringMatching(/^\d+\.\d+/) },
      });
    });
  });
}
