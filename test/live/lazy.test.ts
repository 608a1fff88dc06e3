// cedana.io/lazy: a restored container starts at once, and its memory is filled behind it. Whatever happens to the page daemon, the
// program never sees a byte that it has not written: it goes on, or waits, or is ended.

import {
  copyFileSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { createArchive } from "../../src/checkpoint/archive/index.ts";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { BreakableDaemon } from "./harness/breakable.ts";
import { Live } from "./harness/live.ts";
import { bothEngines, missingFor, skipUnless } from "./harness/matrix.ts";
import { compileProgram } from "./harness/programs.ts";
import { generator } from "./harness/random.ts";
import { isAlive } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const LAZY = { "cedana.io/lazy": "true" };
/** So much that some of it is missing still when a test looks. */
const MIB = 128;

for (const combination of bothEngines) {
  const missing = missingFor(combination);
  const title = `a lazy restore with ${combination.engine}`;
  describe.skipIf(missing)(`${title}${missing ? ` (${missing})` : ""}`, () => {
    /** What the engine has no part in, one is enough for. */
    const once = it.runIf(combination.engine === "runc");
    let daemon: BreakableDaemon;
    let live: Live;
    let images: string;
    let last: number;
    const args = ["pattern", String(MIB), "2"];

    beforeAll(async () => {
      daemon = new BreakableDaemon();
      live = await Live.start({ ...combination, env: { CEDANA_DAEMON: daemon.program } });
      ({ images, last } = await dumped(args));
    });
    afterEach(() => live.expectNoLeftovers());
    afterAll(async () => {
      await live?.stop();
      daemon[Symbol.dispose]();
    });

    async function dumped(args: string[]): Promise<{ images: string; last: number }> {
      await using task = await live.run(args);
      const last = await task.nextNumber();
      return { images: await task.checkpoint({ exit: true }), last };
    }

    /** Pids of guard and daemon. */
    function pageDaemon(task: LiveTask): { guard: number; daemon: number } {
      const [guard = 0, daemon = 0] = readFileSync(join(task.bundle, "lazy-pages/guard"), "utf8")
        .split(" ")
        .map(Number);
      return { guard, daemon };
    }

    function lazy(task: LiveTask): { state?: string; reason?: string } {
      return JSON.parse(readFileSync(join(task.bundle, "cedana-task.json"), "utf8")).lazy ?? {};
    }

    const filled = (task: LiveTask) =>
      until(() => lazy(task).state === "filled" && !existsSync(join(task.bundle, "lazy-pages")), {
        timeoutMs: 60_000,
        what: () => `all memory: ${JSON.stringify(lazy(task))}`,
      });

    /** Restored, with a page daemon that stands still before it has filled all. The machine may be too slow to catch it at once. */
    async function halfFilled(from = images, command = args): Promise<LiveTask> {
      for (let attempt = 0; attempt < 10; attempt++) {
        const task = await live.create(command, { annotations: LAZY, criuImagePath: from });
        const caught = stopEarly(task);
        await task.start();
        if (await caught) return task;
        await task[Symbol.asyncDispose]();
      }
      throw new Error("the page daemon was never caught before it had filled all");
    }

    /** Stops the daemon as soon as the container's processes are there. */
    async function stopEarly(task: LiveTask): Promise<boolean> {
      await until(() => existsSync(join(task.bundle, "init.pid")), { everyMs: 1, timeoutMs: 20_000 });
      const { daemon } = pageDaemon(task);
      if (existsSync(join(task.bundle, "lazy-pages/ended"))) return false;
      process.kill(daemon, "SIGSTOP");
      return isAlive(daemon) && !existsSync(join(task.bundle, "lazy-pages/ended"));
    }

    const goOn = (task: LiveTask) => process.kill(pageDaemon(task).daemon, "SIGCONT");

    /** It comes to something that is missing. */
    async function blocked(task: LiveTask): Promise<void> {
      for (let ticks = 0; ticks < 2 * MIB + 100; ticks++) {
        const line = await task.stdout.line(2_000).catch(() => undefined);
        if (line === undefined) return;
        expect(line).not.toContain("WRONG");
      }
      throw new Error("the program goes on, though memory is missing");
    }

    /** Once around all memory, and nothing wrong. */
    async function verified(task: LiveTask, mib = MIB): Promise<void> {
      task.stdout.skip();
      const now = await task.nextNumber();
      while ((await task.nextNumber()) < now + mib);
      expect(task.stdout.text).not.toContain("WRONG");
    }

    it("goes on with the next number, all memory is as it was, and nothing is left of the daemon", async () => {
      await using task = await live.restore(images, args, { annotations: LAZY });
      expect(await task.nextNumber()).toBeGreaterThanOrEqual(last);
      await filled(task);
      await verified(task);
      expect(readdirSync(task.bundle).filter((name) => /^criu|lazy|attempt/.test(name))).toEqual([]);
    });

    it("never reads a wrong byte when the page daemon is killed, at any moment", async () => {
      const random = generator(20_261_125);
      const ends: number[] = [];
      for (let round = 0; round < 5; round++) {
        await using task = await live.create(args, { annotations: LAZY, criuImagePath: images });
        const starting = task.start().catch(() => undefined); // a restore that lost it is tried again, eagerly
        const guard = join(task.bundle, "lazy-pages/guard");
        await until(() => existsSync(guard), { everyMs: 1, timeoutMs: 20_000, what: () => "a page daemon" });
        const { daemon } = pageDaemon(task);
        await new Promise((resolve) => setTimeout(resolve, random() * 250));
        if (isAlive(daemon)) process.kill(daemon, "SIGKILL");
        await starting;
        // It was killed, restored in the ordinary way, or filled before.
        const state = await until(
          () => ["filled", "eager", "lost"].find((state) => state === lazy(task).state),
          { timeoutMs: 60_000 },
        );
        if (state === "lost") expect(await task.wait()).toBe(137);
        else await verified(task);
        expect(task.stdout.text, state).not.toContain("WRONG");
        ends.push(state.length);
      }
      expect(ends).toHaveLength(5);
    }, 120_000);

    once(
      "blocks while the page daemon stands still, and goes on with it",
      async () => {
        await using task = await halfFilled();
        await blocked(task);
        goOn(task);
        await verified(task);
        await filled(task);
      },
      120_000,
    );

    once("is ended when the page daemon's guard is killed; the daemon goes, too", async () => {
      await using task = await halfFilled();
      const { guard, daemon } = pageDaemon(task);
      process.kill(guard, "SIGKILL");
      expect(await task.wait()).toBe(137);
      await until(() => !isAlive(daemon), { what: () => "the daemon's end" });
      expect(task.stdout.text).not.toContain("WRONG");
      expect(lazy(task)).toMatchObject({ state: "lost", reason: expect.stringMatching(/guard/) });
    });

    once("blocks, and is ended, when guard and daemon are killed at once", async () => {
      for (let round = 0; round < 3; round++) {
        await using task = await halfFilled();
        const { guard, daemon } = pageDaemon(task);
        process.kill(-guard, "SIGKILL"); // their process group
        expect(await task.wait()).toBe(137);
        expect([guard, daemon].map((pid) => isAlive(pid))).toEqual([false, false]);
        expect(task.stdout.text).not.toContain("WRONG");
      }
    });

    once(
      "goes on while cedanad is killed again and again",
      async () => {
        await using task = await halfFilled();
        await live.killCedanad();
        expect(await task.status()).toBe("RUNNING");
        goOn(task);
        await live.killCedanad();
        await filled(task);
        await verified(task);
      },
      120_000,
    );

    once(
      "blocks when the page daemon is killed while there is no cedanad; the next one ends it",
      async () => {
        await using task = await halfFilled();
        const { daemon: pages, guard } = pageDaemon(task);
        daemon.break();
        try {
          await live.killCedanad();
          process.kill(pages, "SIGKILL");
          await until(() => !isAlive(guard), { what: () => "the guard's word" });
          await blocked(task);
          expect(isAlive(task.pid)).toBe(true);
        } finally {
          daemon.mend();
        }
        expect(await task.wait()).toBe(137);
        expect(task.stdout.text).not.toContain("WRONG");
      },
      120_000,
    );

    it("is dumped only when all memory is there, also paused", async () => {
      await using task = await halfFilled();
      let done = false;
      const dumping = task.checkpoint({ exit: true }).finally(() => {
        done = true;
      });
      await until(() => /waits until the memory has been filled/.test(live.cedanadLog()));
      expect(done).toBe(false);
      goOn(task);
      const second = await dumping;
      await using again = await live.restore(second, args, { annotations: LAZY });
      await verified(again);
      await filled(again);
      rmSync(second, { recursive: true });
    }, 120_000);

    once("leaves nothing when it is killed and deleted meanwhile", async () => {
      await using task = await halfFilled();
      const pids = Object.values(pageDaemon(task));
      await task.kill(9);
      expect(await task.wait()).toBe(137);
      await task.delete();
      await until(() => !pids.some((pid) => isAlive(pid)), { what: () => "the daemon's end" });
    });

    once(
      "keeps the checkpoint that it is filled from, in the store; images that go all the same were open",
      async () => {
        const store = new CheckpointStore(join(live.dir, "var/checkpoints"));
        const owner = { namespace: live.namespace };
        {
          await using source = await live.run(args);
          await source.nextNumber();
          await source.checkpoint({ imagePath: await store.placeFor(owner, "lazy"), exit: true });
        }
        const [stored] = await store.generations(owner, "lazy");
        await using task = await halfFilled(stored!.path);
        await expect(store.remove(stored!)).rejects.toThrow(/in use/);
        rmSync(stored!.path, { recursive: true });
        goOn(task);
        await verified(task);
        await filled(task);
      },
      120_000,
    );

    once(
      "is filled from what was unpacked of an archive, which goes when it is not needed any more",
      async () => {
        const archive = join(live.dir, "lazy.tar");
        await createArchive(images, archive, { compression: "none" });
        const unpacked = join(live.dir, "var/unpacked");
        await using task = await halfFilled(archive);
        expect(readdirSync(unpacked)).not.toEqual([]);
        await live.killCedanad();
        goOn(task);
        await verified(task);
        await filled(task);
        await until(() => readdirSync(unpacked).length === 0);
        rmSync(archive);
      },
      120_000,
    );

    once("is what `ctr container restore --live` makes of a container that is annotated so", async () => {
      const [before, after, image] = [live.newId("ctr"), live.newId("ctr"), "cedana.local/lazy:1"];
      const output = join(live.dir, `${before}.out`);
      await live.ctr(
        ...["run", "--detach", ...live.ctrRuntimeFlags(), "--annotation", "cedana.io/lazy=true"],
        ...["--log-uri", `file://${output}`],
        ...["--mount", `type=bind,src=${live.programs},dst=/programs,options=rbind:ro`],
        ...[live.image, before, "/programs/pattern", "32", "20"],
      );
      await until(() => existsSync(output) && /^3$/m.test(readFileSync(output, "utf8")));
      await live.ctr("container", "checkpoint", "--rw", "--task", before, image);
      const remove = async (id: string) => {
        await live.ctr("task", "delete", "--force", id).catch(() => undefined); // ctr ends with the task's exit status
        await live.ctr("container", "delete", id);
      };
      await remove(before);
      try {
        await live.ctr("container", "restore", "--rw", "--live", after, image);
        const record = join(live.bundleOf(after), "cedana-task.json");
        await until(() => JSON.parse(readFileSync(record, "utf8")).lazy?.state === "filled");
        expect(await live.ctr("task", "ls")).toMatch(new RegExp(`${after}\\s+\\d+\\s+RUNNING`));
      } finally {
        await remove(after);
        await live.ctr("images", "rm", "--sync", image);
      }
    });

    it("fills several processes, and those that they fork meanwhile; killed, none reads a wrong byte", async () => {
      const command = ["pattern", "96", "2", "3", "fork"];
      const several = (await dumped(command)).images;
      {
        await using task = await live.restore(several, command, { annotations: LAZY });
        await verified(task, 96);
        await filled(task);
      }
      const random = generator(7);
      for (let round = 0; round < 3; round++) {
        await using task = await live.restore(several, command, { annotations: LAZY });
        await new Promise((resolve) => setTimeout(resolve, random() * 120));
        const file = join(task.bundle, "lazy-pages/guard");
        const daemon = existsSync(file) ? Number(readFileSync(file, "utf8").split(" ")[1]) : 0;
        if (daemon > 0 && isAlive(daemon)) process.kill(daemon, "SIGKILL");
        const state = await until(() => ["filled", "lost"].find((state) => state === lazy(task).state), {
          timeoutMs: 60_000,
        });
        if (state === "lost") expect(await task.wait()).toBe(137);
        expect(task.stdout.text).not.toContain("WRONG");
      }
      rmSync(several, { recursive: true });
    }, 120_000);

    once(
      "is one container, at a crash of cedanad between the steps",
      async () => {
        for (const boundary of [
          "restore.startPageDaemon.before",
          "restore.criuRestore.before",
          "restore.startPageDaemon.after",
        ]) {
          await using task = await live.create(args, { annotations: LAZY, criuImagePath: images });
          daemon.crashNextAt(boundary);
          await live.killCedanad();
          await task.status(); // a delivery to the one that is dying would count
          await task.start();
          expect(await task.nextNumber(), boundary).toBeGreaterThanOrEqual(last);
          await filled(task);
          expect(task.stdout.text).not.toContain("WRONG");
        }
      },
      120_000,
    );
  });
}

describe("a lazy restore that can't be had", () => {
  const engine = "runc";
  const args = ["pattern", "32", "5"];
  const record = (task: LiveTask) =>
    JSON.parse(readFileSync(join(task.bundle, "cedana-task.json"), "utf8")).lazy;

  /** A containerd whose shims find another criu first. */
  async function withCriu(install: (path: string) => Promise<void>, reason: RegExp): Promise<void> {
    const directory = mkdtempSync(join(tmpdir(), "criu-"));
    try {
      await install(join(directory, "criu"));
      await using live = await Live.start({ containerd: "1.7", engine, path: directory });
      let images: string;
      {
        await using task = await live.run(args);
        await task.nextNumber();
        images = await task.checkpoint({ exit: true });
      }
      {
        await using task = await live.restore(images, args, { annotations: LAZY });
        const now = await task.nextNumber();
        while ((await task.nextNumber()) < now + 32);
        expect(task.stdout.text).not.toContain("WRONG");
        expect(record(task)).toMatchObject({ state: "eager", reason: expect.stringMatching(reason) });
        expect(readdirSync(task.bundle).filter((name) => /^criu-restore$|lazy|attempt/.test(name))).toEqual(
          [],
        );
      }
      expect(live.cedanadLog()).toMatch(/restored eagerly, though cedana.io\/lazy asks/);
      live.expectNoLeftovers();
    } finally {
      rmSync(directory, { recursive: true });
    }
  }

  it("is an eager one where CRIU can't be guarded, and says so", async () => {
    await withCriu(async (path) => {
      writeFileSync(path, '#!/bin/sh\nexec /usr/sbin/criu "$@"\n', { mode: 0o755 });
    }, /script around CRIU/);
  });

  it("is an eager one where the restored processes are refused a userfaultfd: the output goes on, too", async () => {
    const source = join(import.meta.dirname, "programs/helpers/without-uffd.c");
    const program = await compileProgram(source);
    await withCriu(async (path) => copyFileSync(program, path), /userfault|uffd/i);
  });

  it("fills within the container's memory limit, and ends with it where that is too small", async (context) => {
    skipUnless(
      context,
      existsSync("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
      "no version 1 memory controller",
    );
    await using live = await Live.start({ containerd: "1.7", engine });
    const big = ["pattern", "96", "5"];
    let images: string;
    {
      await using task = await live.run(big);
      await task.nextNumber();
      images = await task.checkpoint({ exit: true });
    }
    {
      await using task = await live.restore(images, big, { annotations: LAZY, memoryLimit: 160 << 20 });
      await until(() => record(task)?.state === "filled", { timeoutMs: 60_000 });
      const cgroup = /^\d+:memory:(.*)$/m.exec(readFileSync(`/proc/${task.pid}/cgroup`, "utf8"))![1]!;
      const used = Number(readFileSync(`/sys/fs/cgroup/memory${cgroup}/memory.usage_in_bytes`, "utf8"));
      expect(used).toBeGreaterThan(96 << 20);
      expect(used).toBeLessThan(120 << 20);
    }
    await using task = await live.create(big, {
      annotations: LAZY,
      memoryLimit: 48 << 20,
      criuImagePath: images,
    });
    const failed = await task.start().then(
      () => false,
      () => true,
    );
    if (!failed) expect(await task.wait()).toBe(137);
    expect(task.stdout.text).not.toContain("WRONG");
  }, 60_000);
});
