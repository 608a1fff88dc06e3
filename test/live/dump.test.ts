// Checkpoints that we take by ourselves, into the store: `cedana dump containerd`, `cedana.io/checkpoint-every`.

import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { extractArchive, verifyArchive, verifyDirectory } from "../../src/checkpoint/archive/index.ts";
import { dumpSteps } from "../../src/checkpoint/dump.ts";
import { readManifest } from "../../src/checkpoint/manifest.ts";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { verifyImages } from "../../src/criu/image/index.ts";
import { boundariesOf } from "./harness/boundaries.ts";
import { BreakableDaemon } from "./harness/breakable.ts";
import { Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { liveFor } from "./harness/suite.ts";
import { entries } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const COUNTER = ["counter", "20", "7"];

interface Dumped {
  name: string;
  generation: string;
  path: string;
  bytes: number;
  frozenMs: number;
}

async function dump(task: LiveTask, ...flags: string[]): Promise<Dumped> {
  return JSON.parse(await task.live.cedana("dump", "containerd", task.id, "--json", ...flags)) as Dumped;
}

function storeOf(live: Live): CheckpointStore {
  return new CheckpointStore(join(live.dir, "var/checkpoints"));
}

function expectNothingLeft(task: LiveTask): void {
  const left = readdirSync(task.bundle).filter((name) => /dump|criu|frozen|attempt/.test(name));
  expect(left, task.bundle).toEqual([]);
  const owner = join(storeOf(task.live).root, task.live.namespace, "-");
  for (const name of entries(owner)) expect(entries(join(owner, name, "tmp")), name).toEqual([]);
}

async function expectGoesOn(task: LiveTask): Promise<void> {
  expect(await task.status()).toBe("RUNNING");
  task.stdout.skip();
  const before = await task.nextNumber();
  expect(await task.nextNumber()).toBe(before + 1);
}

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination);
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor(combination, (started) => {
      live = started;
    });

    it("takes a checkpoint into the store, the container runs on, and another one restores by its name", async () => {
      let last: number;
      {
        await using task = await live.run(COUNTER);
        last = await task.nextNumber();
        const dumped = await dump(task, "--name", "web");
        await expectGoesOn(task);
        const [found] = await storeOf(live).generations({ namespace: live.namespace }, "web");
        expect(found).toMatchObject({ path: dumped.path, generation: dumped.generation });
        expect((await verifyDirectory(dumped.path)).verified).toBeGreaterThan(10);
        expect((await verifyImages(join(dumped.path, "checkpoint"))).findings).toEqual([]);
        expect(dumped.frozenMs).toBeGreaterThan(0);
        expect(await readManifest(dumped.path)).toMatchObject({
          name: "web",
          trigger: "command",
          containerId: task.id,
          options: { leaveRunning: true },
          image: { name: live.image, digest: expect.stringMatching(/^sha256:/) },
          rootfsDiff: { source: "overlay" },
        });
        expectNothingLeft(task);
      }
      await using restored = await live.run(COUNTER, { annotations: { "cedana.io/restore-from": "web" } });
      expect(await restored.nextNumber()).toBeGreaterThan(last);
    });

    it("ends the container when it is told to, with whole images", async () => {
      await using task = await live.run(COUNTER);
      await task.nextNumber();
      const dumped = await dump(task, "--exit");
      expect(dumped.name).toBe(task.id);
      expect(await task.wait()).toBe(137);
      expect((await verifyDirectory(dumped.path)).manifest.options.leaveRunning).toBe(false);
      expectNothingLeft(task);
    });

    it("holds the files as they were when the memory was taken", async () => {
      await using task = await live.run(["files"], {
        annotations: { "cedana.io/rootfs-exclude": "*.log,/var/tmp" },
      });
      await task.nextNumber();
      const script =
        "rm /etc/passwd; mkdir -p /srv/a; echo kept >/srv/a/b; echo no >/srv/x.log; echo no >/var/tmp/y";
      expect((await task.execToEnd(["sh", "-c", script])).status).toBe(0);
      const { path } = await dump(task, "--name", "files");
      const root = mkdtempSync(join(live.dir, "root-"));
      execFileSync("tar", ["-C", root, "-xf", join(path, "rootfs-diff.tar")]);
      expect(readFileSync(join(root, "srv/a/b"), "utf8")).toBe("kept\n");
      expect(readdirSync(join(root, "srv"))).toEqual(["a"]);
      expect(existsSync(join(root, "var/tmp/y"))).toBe(false);
      expect(readdirSync(join(root, "etc"))).toEqual([".wh.passwd"]);
      expect(JSON.parse(readFileSync(join(path, "deleted.files"), "utf8"))).toEqual(["/etc/passwd"]);
      expect((await readManifest(path))?.rootfsDiff).toMatchObject({
        exclude: ["*.log", "/var/tmp"],
        deleted: 1,
      });
      // The file grows in each round of the program; CRIU has noted how long it was.
      const files = await live.cedana("image", "decode", join(path, "checkpoint/files.img"));
      const log = JSON.parse(files).entries.find(
        (one: { reg?: { name: string } }) => one.reg?.name === "/tmp/log",
      );
      expect(Number(log.reg.size)).toBe(statSync(join(root, "tmp/log")).size);
    });

    it("restores with the files that the container had changed", async () => {
      let last: number;
      {
        await using task = await live.run(["files"]);
        await task.nextNumber();
        expect((await task.execToEnd(["sh", "-c", "echo kept >/srv-file; rm /etc/group"])).status).toBe(0);
        await dump(task, "--name", "with-files");
        task.stdout.skip();
        last = await task.nextNumber();
      }
      // It ends when a file has another length, or other contents, than its memory says.
      await using restored = await live.run(["files"], {
        annotations: { "cedana.io/restore-from": "with-files" },
      });
      expect(await restored.nextNumber()).toBeGreaterThan(0);
      expect(last).toBeGreaterThan(0);
      await restored.nextNumber();
      expect((await restored.execToEnd(["sh", "-c", "cat /srv-file; ls /etc"])).stdout).toBe(
        "kept\npasswd\n",
      );
    });

    it("comes to nothing where CRIU can't dump it, and neither the container nor the store knows", async () => {
      await using task = await live.run(["tcp"]); // an established connection without a policy
      await task.nextNumber();
      await expect(dump(task, "--name", "never")).rejects.toMatchObject({
        stderr: expect.stringMatching(/can't be checkpointed as it is: .*cedana\.io\/tcp: keep/s),
      });
      await expectGoesOn(task);
      expect(await storeOf(live).generations({ namespace: live.namespace }, "never")).toEqual([]);
      expectNothingLeft(task);
    });
  });
}

describe("with runc", () => {
  let live: Live;
  const directory = mkdtempSync(join(tmpdir(), "dump-")); // root's, and nobody else's, as a configuration must be
  const configuration = join(directory, "config.json");
  beforeAll(async () => {
    writeFileSync(configuration, JSON.stringify({ checkpoints: { shortestInterval: "300ms" } }), {
      mode: 0o600,
    });
    live = await Live.start({ containerd: "1.7", engine: "runc", env: { CEDANA_CONFIG: configuration } });
  });
  afterEach(() => live.expectNoLeftovers());
  afterAll(async () => {
    await live?.stop();
    rmSync(directory, { recursive: true });
  });

  it("leaves a paused container paused", async () => {
    await using task = await live.run(COUNTER);
    await task.nextNumber();
    await task.pause();
    await dump(task);
    expect(await task.status()).toBe("PAUSED");
    await task.resume();
    await expectGoesOn(task);
  });

  it("lets a container be deleted that is killed while it stands still", async () => {
    const task = await live.run(COUNTER);
    await task.nextNumber();
    const dumped = dump(task).catch((error: Error) => error);
    await until(() => existsSync(join(task.bundle, "cedana-dump/cedana-frozen")), {
      what: () => "the freeze",
      everyMs: 1,
    });
    await task.kill(9);
    expect(await task.wait()).toBe(137);
    await dumped; // it may have been whole just before
    await task.delete();
    await task.destroy();
  });

  it.each(["none", "gzip", "lz4", "zstd"])("makes one file of it, compressed by %s", async (compression) => {
    await using task = await live.run(COUNTER);
    await task.nextNumber();
    const { path } = await dump(task, "--compression", compression);
    const manifest = (await readManifest(path))!;
    expect(manifest.archive).toMatchObject({ compression, encrypted: false });
    expect(readdirSync(path).sort()).toEqual(["cedana.json", manifest.archive!.file]);
    expect((await verifyDirectory(path)).verified).toBe(1);
    expect((await verifyArchive(join(path, manifest.archive!.file))).verified).toBeGreaterThan(10);
    expectNothingLeft(task);
  });

  it("encrypts that file, and refuses to encrypt what is none", async () => {
    await using task = await live.run(COUNTER);
    await task.nextNumber();
    const key = join(live.dir, "key");
    writeFileSync(key, "of some length", { mode: 0o600 });
    const { path } = await dump(task, "--compression", "zstd", "--encrypt-key-file", key);
    const archive = join(path, (await readManifest(path))!.archive!.file);
    await expect(verifyArchive(archive)).rejects.toThrow(/encrypted/);
    const copy = join(live.dir, "copy");
    await extractArchive(archive, copy, { secret: readFileSync(key) });
    expect((await verifyImages(join(copy, "checkpoint"))).findings).toEqual([]);
    await expect(dump(task, "--encrypt-key-file", key)).rejects.toThrow(/compression/);
  });

  it("knows a container by its namespace", async () => {
    await using task = await live.run(COUNTER);
    await task.nextNumber();
    const dumped = await dump(task, "--namespace", live.namespace, "--name", "ns");
    expect(dumped.path).toContain(`/${live.namespace}/-/ns/`);
    await expect(dump(task, "--namespace", "elsewhere")).rejects.toMatchObject({
      stderr: expect.stringMatching(/no container .* in namespace elsewhere/),
    });
    expect(await storeOf(live).generations({ namespace: "elsewhere" }, "ns")).toEqual([]);
    await expect(dump(task, "--name", "../x")).rejects.toMatchObject({
      stderr: expect.stringMatching(/not a name/),
    });
  });

  it("takes no more of changed files than the container, or the administrator, allows", async () => {
    await using task = await live.run(COUNTER, { annotations: { "cedana.io/rootfs-max-bytes": "1Mi" } });
    await task.nextNumber();
    expect((await task.execToEnd(["sh", "-c", "head -c 2000000 /dev/urandom >/big"])).status).toBe(0);
    await expect(dump(task)).rejects.toMatchObject({
      stderr: expect.stringMatching(/more than the allowed 1048576 bytes.*big/s),
    });
    await expectGoesOn(task);
    expectNothingLeft(task);
  });

  it("follows cedana.io/checkpoint-every over the ends of cedanad, and keeps the last ones", async () => {
    const annotations = {
      "cedana.io/checkpoint-every": "400ms",
      "cedana.io/keep-last": "2",
      "cedana.io/checkpoint-name": "every",
    };
    const owner = { namespace: live.namespace };
    const newest = async () => (await storeOf(live).generations(owner, "every")).at(-1)?.generation ?? "";
    {
      await using task = await live.run(COUNTER, { annotations });
      await until(async () => (await newest()) !== "", { what: () => "the first checkpoint" });
      await live.killCedanad();
      for (let round = 0; round < 3; round++) {
        const last = await newest();
        await until(async () => (await newest()) > last, { what: () => "the next checkpoint" });
      }
      await until(async () => (await storeOf(live).generations(owner, "every")).length <= 2, {
        what: () => "the end of older ones",
      });
      await expectGoesOn(task);
    }
    const kept = await storeOf(live).generations(owner, "every");
    expect(kept.length).toBeGreaterThan(0);
    for (const { path } of kept) expect((await verifyDirectory(path)).manifest.trigger).toBe("schedule");
  });

  it("says in the task's log when cedana.io/checkpoint-every fails, and goes on", async () => {
    await using task = await live.run(["tcp"], { annotations: { "cedana.io/checkpoint-every": "300ms" } });
    const failures = () =>
      live.containerdLog().match(/checkpoint-every failed[^\n]*can't be checkpointed/g)?.length ?? 0;
    await until(() => failures() >= 2, { what: () => "two failures" });
    await expectGoesOn(task);
  });

  it("refuses an interval that is none before the container is made", async () => {
    const annotations = { "cedana.io/checkpoint-every": "often" };
    await expect(live.create(COUNTER, { annotations })).rejects.toThrow(
      /checkpoint-every is "often"; it may be a time/,
    );
  });
});

describe("a crash of cedanad while it takes a checkpoint of its own will", () => {
  const boundaries = [
    ...boundariesOf("dump", dumpSteps),
    "triggered.archive.before",
    "triggered.prune.before",
    "triggered.done.before",
  ];

  /** A node of its own for these boundaries. */
  const crashAtEach = async (boundaries: readonly string[]) => {
    using daemon = new BreakableDaemon();
    await using live = await Live.start({ engine: "runc", env: daemon.env });
    await using task = await live.run(COUNTER);
    await task.nextNumber();
    const all = () => storeOf(live).generations({ namespace: live.namespace }, "web");
    for (const [index, boundary] of boundaries.entries()) {
      daemon.crashNextAt(boundary);
      await live.killCedanad();
      await task.status();
      await expect(dump(task, "--name", "web"), boundary).rejects.toThrow();
      await until(async () => (await all()).length === index + 1, {
        what: () => `the checkpoint after ${boundary}`,
      });
      await until(() => !existsSync(join(task.bundle, "cedana-dump")), {
        what: () => `the end of ${boundary}`,
      });
      await expectGoesOn(task);
      expectNothingLeft(task);
      await verifyDirectory((await all()).at(-1)!.path);
    }
  };

  it("leaves the container running, and the next cedanad finishes, at each boundary", {
    timeout: 300_000,
  }, async () => {
    // Each is four programs that start one after another, and waits for three of them: two nodes at the same time.
    const half = (rest: number) => boundaries.filter((_, index) => index % 2 === rest);
    await Promise.all([crashAtEach(half(0)), crashAtEach(half(1))]);
  });

  it("keeps the images of a container that has ended with them", async () => {
    using daemon = new BreakableDaemon();
    await using live = await Live.start({ engine: "runc", env: daemon.env });
    for (const boundary of [
      "dump.criuDump.before",
      "dump.criuDump.after",
      "dump.freeze.after",
      "dump.openStaging.after",
    ]) {
      const known = dumpSteps.some(({ name }) => boundary.includes(name));
      expect(known).toBe(true);
      await using task = await live.run(COUNTER);
      await task.nextNumber();
      daemon.crashNextAt(boundary);
      await live.killCedanad();
      await task.status();
      await expect(dump(task, "--name", "last", "--exit"), boundary).rejects.toThrow();
      expect(await task.wait(), boundary).toBe(137);
      await until(() => !existsSync(join(task.bundle, "cedana-dump")), {
        what: () => `the end of ${boundary}`,
      });
      const [last] = (await storeOf(live).generations({ namespace: live.namespace }, "last")).slice(-1);
      expect((await verifyDirectory(last!.path)).manifest.containerId, boundary).toBe(task.id);
      expectNothingLeft(task);
    }
  });

  it("never leaves unencrypted what runs on, and encrypts again where the node has the key", async () => {
    using daemon = new BreakableDaemon();
    const directory = mkdtempSync(join(tmpdir(), "encrypted-"));
    try {
      const keyFile = join(directory, "key");
      writeFileSync(keyFile, "the key of this node", { mode: 0o600 });
      const configuration = join(directory, "config.json");
      writeFileSync(
        configuration,
        JSON.stringify({ checkpoints: { compression: "zstd", keyFile, shortestInterval: "1s" } }),
        {
          mode: 0o600,
        },
      );
      await using live = await Live.start({
        engine: "runc",
        env: { ...daemon.env, CEDANA_CONFIG: configuration },
      });
      const all = (name: string) => storeOf(live).generations({ namespace: live.namespace }, name);
      const crash = async (task: LiveTask) => {
        daemon.crashNextAt("triggered.archive.before");
        await live.killCedanad();
        await task.status();
      };
      const ended = (task: LiveTask) =>
        until(() => !existsSync(join(task.bundle, "cedana-dump")), { what: () => "the end of a dump" });
      const flags = ["--name", "web", "--compression", "zstd", "--encrypt-key-file", keyFile];
      {
        await using task = await live.run(COUNTER);
        await task.nextNumber();
        await crash(task);
        await expect(dump(task, ...flags)).rejects.toThrow();
        await ended(task);
        expect(await all("web")).toEqual([]);
        await expectGoesOn(task);
        expectNothingLeft(task);
        await crash(task);
        await expect(dump(task, "--exit", ...flags)).rejects.toThrow();
        expect(await task.wait()).toBe(137);
        await ended(task);
        const [last] = await all("web"); // all that is left of it
        expect((await verifyDirectory(last!.path)).manifest.archive).toBeUndefined();
        expect(live.cedanadLog()).toContain("it is there unencrypted");
      }
      await using task = await live.run(COUNTER, {
        annotations: { "cedana.io/checkpoint-every": "1s", "cedana.io/checkpoint-name": "every" },
      });
      await crash(task);
      const [first] = await until(
        async () => ((await all("every")).length > 0 ? await all("every") : undefined),
        {
          what: () => "a checkpoint of the schedule",
        },
      );
      await until(async () => (await readManifest(first!.path))?.archive !== undefined, {
        what: () => "its archive",
      });
      expect((await readManifest(first!.path))!.archive).toMatchObject({ encrypted: true });
      expect(live.cedanadLog()).toContain("finished a checkpoint that a crash of cedanad had cut off");
    } finally {
      rmSync(directory, { recursive: true });
    }
  });
});
