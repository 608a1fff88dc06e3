import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { verifyArchive } from "../../src/checkpoint/archive/index.ts";
import { missingCallers, type Outcome, Podman, type Side } from "./harness/callers.ts";
import type { EngineName } from "./harness/live.ts";
import { IMAGE, programs, repository } from "./harness/programs.ts";
import { entries, isAlive } from "./harness/system.ts";
import { until } from "./harness/until.ts";

// Checkpoint and restore by Podman through cedana-runtime. CEDANA_TEST_OCI=engine is the control: the same list with the engine
// itself. What fails there and not here: with crun, every restore on a host with cgroups of both versions.

const missing = missingCallers();
/** Without it engines refuse a pre-dump. */
const tracksDirtyPages = spawnSync("criu", ["check", "--feature", "mem_dirty_track"]).status === 0;
const lockHolder = ["/programs/locks"];
const side: Side = process.env.CEDANA_TEST_OCI === "engine" ? "engine" : "wrapper";

describe.skipIf(missing).each<EngineName>(["runc", "crun"])(
  `podman checkpoints over %s${missing ? ` (${missing})` : ""}`,
  (engine) => {
    let podman: Podman;
    let testPrograms: string;
    beforeAll(async () => {
      [podman, testPrograms] = [await Podman.start(engine), await programs()];
    });
    afterEach(async () => {
      await podman.on(side, "rm", "--all", "--force", "--time", "0");
      await podman.place.expectNoLeftovers((argv) => /cedanad/.test(argv));
    });
    afterAll(async () => await podman?.stop());

    const on = (...args: string[]) => podman.on(side, ...args);
    async function ok(...args: string[]): Promise<string> {
      const { status, stdout, stderr } = await on(...args);
      expect(status, `podman ${args.join(" ")}: ${stderr}\n${podman.place.cedanadLog().slice(-2000)}`).toBe(
        0,
      );
      return stdout.trim();
    }
    async function fails(words: RegExp, ...args: string[]): Promise<Outcome> {
      const outcome = await on(...args);
      expect(outcome.status, `podman ${args.join(" ")}`).not.toBe(0);
      expect(outcome.stderr).toMatch(words);
      return outcome;
    }
    const file = (name: string) => join(podman.place.dir, name);

    async function run(name: string, flags: string[] = [], command = ["/programs/counter"]): Promise<void> {
      await ok(
        "run",
        "--detach",
        "--name",
        name,
        "--volume",
        `${testPrograms}:/programs:ro`,
        ...flags,
        IMAGE,
        ...command,
      );
      await numbers(name);
    }
    /** What the counter has printed, once there is something. */
    async function numbers(name: string, more = 1): Promise<number[]> {
      return await until(
        async () => {
          const lines = (await ok("logs", name))
            .split("\n")
            .filter((line) => /^\d+\b/.test(line))
            .map(Number);
          return lines.length >= more && lines;
        },
        { everyMs: 50, what: () => `numbers of ${name}` },
      );
    }
    /** It counts on where it was: no number is missing, none comes twice. An import brings the log of the first along, or doesn't. */
    async function countsOn(name: string, before: number): Promise<void> {
      const all = await until(
        async () => {
          const read = await numbers(name);
          return read.at(-1)! > before && read;
        },
        { everyMs: 50, what: () => `${name} to count on from ${before}` },
      );
      expect(all[0]).toBeLessThanOrEqual(before);
      expect(all).toEqual(Array.from({ length: all.length }, (_, at) => all[0]! + at));
    }
    const status = async (name: string) => await ok("inspect", "--format", "{{.State.Status}}", name);

    it("and goes on, leaves running, keeps files, restores in place", async () => {
      await run("c");
      await ok("container", "checkpoint", "--leave-running", "c");
      expect(await status("c")).toBe("running");
      let before = (await numbers("c")).length;
      await countsOn("c", before);
      await ok("container", "checkpoint", "--keep", "--print-stats", "c");
      expect(await status("c")).toBe("exited");
      const path = await ok("inspect", "--format", "{{.State.CheckpointPath}}", "c");
      if (side === "wrapper") {
        const manifest = JSON.parse(readFileSync(join(path, "cedana.json"), "utf8"));
        expect(manifest).toMatchObject({
          engine: { name: engine },
          options: { leaveRunning: false },
          terminal: false,
        });
      }
      before = (await numbers("c")).length;
      await ok("container", "restore", "--keep", "c");
      await countsOn("c", before);
      await ok("exec", "c", "true"); // it is a container like others
      await ok("container", "checkpoint", "c");
      await ok("container", "restore", "c");
      await countsOn("c", before);
      await ok("stop", "--time", "1", "c");
    });

    it.each(["gzip", "zstd", "none"])(
      "exports by %s and imports under the same name, and under others",
      { timeout: 90_000 },
      async (compression) => {
        await run("c");
        await ok("container", "checkpoint", "--export", file("c.tar"), "--compress", compression, "c");
        if (side === "wrapper") {
          const { description, verified } = await verifyArchive(file("c.tar"));
          expect(description).toMatchObject({ layout: "podman", container: { name: "c", runtime: engine } });
          expect(verified).toBeGreaterThan(5); // what Podman has put around it isn't taken for a fault
        }
        const before = (await numbers("c")).length;
        await ok("rm", "c");
        if (compression === "gzip") {
          await ok("container", "restore", "--import", file("c.tar"));
          await countsOn("c", before);
          await ok("rm", "--force", "--time", "0", "c");
        }
        // Twice from the same archive, side by side.
        for (const name of ["one", "two"])
          await ok("container", "restore", "--import", file("c.tar"), "--name", name);
        for (const name of ["one", "two"]) await countsOn(name, before);
      },
    );

    it("takes along changes of the root file system and volumes, or not", { timeout: 90_000 }, async () => {
      await run(
        "c",
        ["--volume", "data:/data"],
        ["sh", "-c", "echo kept >/file; echo v >/data/file; exec /programs/counter"],
      );
      await ok("container", "checkpoint", "--export", file("c.tar"), "c");
      await ok("rm", "c");
      await ok("volume", "rm", "data");
      await ok("container", "restore", "--import", file("c.tar"), "--name", "with");
      expect(await ok("exec", "with", "cat", "/file", "/data/file")).toBe("kept\nv");
      await ok("rm", "--force", "--time", "0", "with");
      await run("c", [], ["sh", "-c", "echo lost >/file; exec /programs/counter"]);
      await ok(
        "container",
        "checkpoint",
        "--export",
        file("n.tar"),
        "--ignore-rootfs",
        "--ignore-volumes",
        "c",
      );
      await ok("rm", "c");
      await ok(
        "container",
        "restore",
        "--import",
        file("n.tar"),
        "--ignore-rootfs",
        "--ignore-volumes",
        "--name",
        "without",
      );
      expect((await on("exec", "without", "cat", "/file")).status).not.toBe(0);
      await ok("volume", "rm", "--force", "data");
    });

    it.skipIf(!tracksDirtyPages)(
      "first writes memory only, then the rest; in archives, too",
      {
        timeout: 90_000,
      },
      async () => {
        await run("c");
        await ok("container", "checkpoint", "--pre-checkpoint", "c");
        expect(await status("c")).toBe("running");
        await ok("container", "checkpoint", "--with-previous", "c");
        let before = (await numbers("c")).length;
        await ok("container", "restore", "c");
        await countsOn("c", before);
        for (const name of ["earlier.tar", "p.tar"])
          await ok("container", "checkpoint", "--pre-checkpoint", "--export", file(name), "c");
        await ok("container", "checkpoint", "--with-previous", "--export", file("w.tar"), "c");
        before = (await numbers("c")).length;
        await ok("rm", "c");
        const restore = ["container", "restore", "--import", file("w.tar"), "--name"];
        for (const name of ["d", "e"]) {
          await ok(...restore, name, "--import-previous", file("p.tar"));
          await countsOn(name, before);
        }
        await fails(side === "wrapper" ? /builds on the pre-dump .*missing/ : /./, ...restore, "without");
        if (side === "wrapper")
          await fails(/where another one is now/, ...restore, "of", "--import-previous", file("earlier.tar"));
        expect((await ok("ps", "--format", "{{.Names}}")).split("\n").sort()).toEqual(["d", "e"]);
      },
    );

    // An engine alone takes memory for unchanged that has changed before the checkpoint in between.
    it.runIf(tracksDirtyPages && side === "wrapper")(
      "and with a previous one that isn't the latest any more: then the rest is all of it",
      { timeout: 90_000 },
      async () => {
        await run("c", [], ["/programs/pages", "64"]);
        const last = async () => (await ok("logs", "--tail", "1", "c")).split(" ").map(Number);
        async function touch(touched: number): Promise<void> {
          await ok("kill", "--signal", "USR1", "c");
          await until(async () => (await last())[1] === touched, { everyMs: 50, what: () => "a change" });
        }
        await ok("container", "checkpoint", "--pre-checkpoint", "c");
        await touch(1);
        await ok("container", "checkpoint", "--with-previous", "--leave-running", "c");
        await touch(2);
        await ok("container", "checkpoint", "--with-previous", "c");
        const [before] = await last();
        await ok("container", "restore", "c");
        await until(async () => (await last())[0]! > before! + 1, { everyMs: 50, what: () => "it to go on" });
        expect((await last()).slice(1)).toEqual([2, 2]);
      },
    );

    it.skipIf(tracksDirtyPages)(
      "says of memory only what the kernel lacks for it, and the container runs on",
      async () => {
        await run("c");
        await fails(/./, "container", "checkpoint", "--pre-checkpoint", "c");
        expect(await status("c")).toBe("running");
        await countsOn("c", (await numbers("c")).length);
      },
    );

    it("all of them, the latest one, into an image; and tells how long it took", {
      timeout: 90_000,
    }, async () => {
      await run("one");
      await run("two");
      const before = { one: (await numbers("one")).length, two: (await numbers("two")).length };
      const dumped = JSON.parse(await ok("container", "checkpoint", "--all", "--print-stats"));
      expect(dumped.container_statistics).toHaveLength(2);
      for (const {
        runtime_checkpoint_duration: took,
        criu_statistics: criu,
      } of dumped.container_statistics) {
        expect(took).toBeGreaterThan(0);
        expect(criu.pages_written).toBeGreaterThan(0);
      }
      const restored = JSON.parse(await ok("container", "restore", "--all", "--print-stats"));
      expect(restored.container_statistics).toHaveLength(2);
      for (const { criu_statistics: criu } of restored.container_statistics)
        expect(criu.pages_restored).toBeGreaterThan(0);
      await countsOn("one", before.one);
      await countsOn("two", before.two);
      await ok("container", "checkpoint", "--latest");
      expect([await status("one"), await status("two")]).toEqual(["running", "exited"]);
      await ok("container", "restore", "--latest");
      await countsOn("two", before.two);

      await ok("container", "checkpoint", "--create-image", "cp", "one");
      const at = (await numbers("one")).length;
      await ok("rm", "one");
      await ok("container", "restore", "--name", "three", "cp");
      await countsOn("three", at);
      await ok("rm", "--force", "--time", "0", "three");
      await ok("rmi", "cp");
    });

    it("a container with --init, with a terminal, with file locks", { timeout: 90_000 }, async () => {
      await run("init", ["--init"]);
      await ok("container", "checkpoint", "init");
      await ok("container", "restore", "init");
      await run("tty", ["--tty"]);
      await ok("container", "checkpoint", "tty");
      const before = (await numbers("tty")).length;
      await ok("container", "restore", "tty");
      expect((await numbers("tty", before + 2)).length).toBeGreaterThan(before);
      // The flag at the dump is enough for cedana: the manifest tells the restore.
      await run("lock", [], lockHolder);
      await fails(side === "engine" ? /criu failed/ : /lock/i, "container", "checkpoint", "lock");
      expect(await status("lock")).toBe("running");
      await ok("container", "checkpoint", "--file-locks", "--export", file("lock.tar"), "lock");
      await ok("rm", "lock");
      await ok(
        "container",
        "restore",
        ...(side === "engine" ? ["--file-locks"] : []),
        "--import",
        file("lock.tar"),
      );
      await numbers("lock", 2);
    });

    it.runIf(side === "wrapper")("by annotation, without any flag", async () => {
      await run("c", ["--annotation", "cedana.io/file-locks=true"], lockHolder);
      await ok("container", "checkpoint", "c");
      await ok("container", "restore", "c");
      await fails(/annotation cedana.io\/tcp is "maybe"/, "container", "checkpoint", await bad());
      async function bad(): Promise<string> {
        await run("bad", ["--annotation", "cedana.io/tcp=maybe"]);
        return "bad";
      }
      expect(await status("bad")).toBe("running");
    });

    it("says what can't be: paused, stopped, running, no archive, images that are broken", {
      timeout: 90_000,
    }, async () => {
      await run("c");
      await fails(/running/, "container", "restore", "c");
      await ok("pause", "c");
      await fails(/is not running|state improper/, "container", "checkpoint", "c"); // Podman's word
      await ok("unpause", "c");
      await ok("container", "checkpoint", "--keep", "c");
      const path = await ok("inspect", "--format", "{{.State.CheckpointPath}}", "c");
      await fails(/not running|state improper/, "container", "checkpoint", "c");
      await fails(/no such file/i, "container", "restore", "--import", file("nowhere.tar"));
      const core = readFileSync(join(path, "pstree.img"));
      writeFileSync(join(path, "pstree.img"), Buffer.alloc(core.length, 0xff)); // of the right size: for CRIU to find
      const { stderr } = await fails(/./, "container", "restore", "--keep", "c");
      if (side === "wrapper") expect(stderr).toMatch(/restore of container [0-9a-f]{64} from .*CRIU: Error/);
      writeFileSync(join(path, "pstree.img"), core);
      await ok("container", "restore", "--keep", "c"); // nothing of the failure is in the way
      await ok("rm", "--force", "--time", "0", "c");
      expect(existsSync(path)).toBe(false);
    });

    it.runIf(side === "wrapper")(
      "which cedana preflight looks at before, by the id that Podman shows",
      async () => {
        await run("c");
        await run("lock", [], lockHolder);
        const look = async (name: string) =>
          await podman.place.run([
            join(repository, "bin/cedana"),
            "preflight",
            (await ok("ps", "--quiet", "--filter", `name=^${name}$`)).trim(),
          ]);
        const free = await look("c");
        expect(free.status, free.stdout + free.stderr).toBe(0);
        expect(free.stdout).toMatch(/^container [0-9a-f]{64}: can be checkpointed/);
        expect((await look("lock")).stdout).toMatch(/^option +file-locks/m);
        const nobody = await podman.place.run([join(repository, "bin/cedana"), "preflight", "nobody"]);
        expect(nobody).toMatchObject({
          status: 1,
          stderr: expect.stringContaining("no container nobody runs"),
        });
      },
    );

    it.runIf(side === "wrapper")(
      "though cedanad is killed before, and is started when none runs",
      async () => {
        await run("c");
        const pid = podman.place.cedanadPid();
        if (isAlive(pid)) process.kill(pid, "SIGKILL");
        await ok("exec", "c", "true"); // passed through as ever
        await ok("container", "checkpoint", "--leave-running", "c");
        expect(await status("c")).toBe("running");
      },
    );

    it.runIf(side === "wrapper")(
      "and cedanad is killed in the middle: the next one takes it, and the container runs on",
      async () => {
        await run("c", [], ["/programs/memory", "128"]);
        await ok("container", "checkpoint", "--leave-running", "c"); // cedanad runs, and isn't below conmon
        const pid = podman.place.cedanadPid();
        const checkpoint = on("container", "checkpoint", "--leave-running", "c");
        const frozen = () =>
          entries(join(podman.place.runDir, "oci")).some((name) => name.endsWith("~frozen"));
        await until(frozen, { everyMs: 1, what: () => "a frozen container" });
        process.kill(pid, "SIGKILL");
        const { status: failed, stderr } = await checkpoint;
        expect([failed, stderr]).toEqual([0, ""]);
        expect(frozen()).toBe(false);
        const sums = async () => (await ok("logs", "c")).split("\n").length;
        const before = await sums();
        await until(async () => (await sums()) > before, { everyMs: 50, what: () => "it to go on" });
        const left = () =>
          entries(join(podman.place.runDir, "oci")).some((name) => name.endsWith("~dumping")) ||
          entries(join(podman.place.runDir, "c")).some((name) => name.startsWith("oci-"));
        await until(() => !left(), { what: () => "the end of what the dump had begun" });
        await ok("container", "checkpoint", "--leave-running", "c");
      },
    );

    // runc alone restores into a network namespace whose lo is down: a connection over it can't come back.
    it.skipIf(engine === "runc" && side === "engine")(
      "an established connection, which the restore keeps without being told",
      async () => {
        await run("c", ["--network", "none"], ["/programs/tcp"]);
        await fails(/connected TCP socket|cedana\.io\/tcp/i, "container", "checkpoint", "c");
        await ok("container", "checkpoint", "--tcp-established", "c");
        const before = (await numbers("c")).length;
        await ok("container", "restore", ...(side === "engine" ? ["--tcp-established"] : []), "c");
        await countsOn("c", before);
      },
    );

    it("in a pod, into another one", { timeout: 90_000 }, async () => {
      await ok("pod", "create", "--name", "one", "--network", "none");
      await run("c", ["--pod", "one"]);
      await ok("container", "checkpoint", "--export", file("pod.tar"), "c");
      const before = (await numbers("c")).length;
      await ok("pod", "rm", "--force", "one");
      await ok("pod", "create", "--name", "two", "--network", "none");
      await ok("container", "restore", "--import", file("pod.tar"), "--pod", "two");
      await countsOn("c", before);
      await ok("pod", "rm", "--force", "two");
    });
  },
);
