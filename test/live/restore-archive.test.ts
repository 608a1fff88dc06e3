// cedana.io/restore-from with checkpoints that are archives, and with the files that the container had changed.

import { execFileSync } from "node:child_process";
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { createArchive } from "../../src/checkpoint/archive/index.ts";
import { type CheckpointManifest, readManifest } from "../../src/checkpoint/manifest.ts";
import { writeManifest } from "../../src/checkpoint/manifest-files.ts";
import { overlayLayers, takeRootfsDiff } from "../../src/checkpoint/rootfs-diff/index.ts";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { Live } from "./harness/live.ts";
import type { LiveTask } from "./harness/task.ts";

const COUNTER = ["counter", "20", "7"];
const CONFIGURATION = "/run/cedana-restore-archive.json";

describe("cedana.io/restore-from of an archive", () => {
  let live: Live;
  let allowed: string;
  let keyFile: string;
  /** a checkpoint in our layout, with a rootfs diff */
  let good: string;
  let manifest: CheckpointManifest;

  beforeAll(async () => {
    live = await Live.start({ containerd: "1.7", engine: "runc", env: { CEDANA_CONFIG: CONFIGURATION } });
    allowed = join(live.dir, "allowed");
    mkdirSync(allowed, { mode: 0o700 });
    keyFile = join(live.dir, "key");
    writeFileSync(keyFile, "the key of this node", { mode: 0o600 });
    configure({});
    good = join(allowed, "good");
    mkdirSync(good, { mode: 0o700 });
    await using task = await live.run(COUNTER);
    await task.nextNumber();
    await sh(task, "echo changed > /added; mkdir -p /d/e; echo deep > /d/e/f; rm /etc/passwd");
    await task.pause();
    await task.checkpoint({ imagePath: join(good, "checkpoint") });
    await takeRootfsDiff(await overlayLayers("/", task.pid), good);
    await task.resume();
    manifest = (await readManifest(join(good, "checkpoint")))!;
    rmSync(join(good, "checkpoint/cedana.json"));
    await writeManifest(good, manifest, { digests: true });
  });
  afterEach(() => live.expectNoLeftovers());
  afterAll(async () => {
    await live?.stop();
    rmSync(CONFIGURATION, { force: true });
  });

  function configure(restore: object): void {
    const configuration = { restoreFromPaths: [allowed], restore };
    writeFileSync(`${CONFIGURATION}.new`, JSON.stringify(configuration), { mode: 0o600 });
    renameSync(`${CONFIGURATION}.new`, CONFIGURATION);
  }

  async function sh(task: LiveTask, script: string): Promise<string> {
    return (await task.execToEnd(["sh", "-c", script])).stdout;
  }

  const unpacked = () => {
    const directory = join(live.dir, "var/unpacked");
    return existsSync(directory) ? readdirSync(directory).filter((name) => name !== "tmp") : [];
  };

  const from = (source: string, onFailure?: string) => ({
    annotations: {
      "cedana.io/restore-from": source,
      ...(onFailure && { "cedana.io/on-restore-failure": onFailure }),
    },
  });

  /** The counter goes on, in the files that it had. */
  async function restores(source: string): Promise<void> {
    await using task = await live.run(COUNTER, from(source));
    expect(await task.nextNumber()).toBeGreaterThan(0);
    expect(await sh(task, "cat /added /d/e/f; ls -d /etc/passwd 2>&1")).toMatch(
      /^changed\ndeep\n.*No such file/,
    );
    expect(unpacked()).toEqual([]); // all of it has been read
  }

  it("applies the changed files before the engine starts, from a directory", async () => {
    await restores(good);
  });

  it("takes an encrypted archive with the key that the administrator has named", async () => {
    const archive = join(allowed, "cp.tar.zst");
    await createArchive(good, archive, { compression: "zstd", secret: readFileSync(keyFile) });
    await expect(live.create(COUNTER, from(archive))).rejects.toThrow(/key/);
    const other = join(live.dir, "other-key");
    writeFileSync(other, "another key of a node", { mode: 0o600 });
    configure({ keyFile: other });
    await expect(live.create(COUNTER, from(archive))).rejects.toThrow(/key/);
    expect(unpacked()).toEqual([]);
    configure({ keyFile });
    await restores(archive);
    // A flipped bit in the middle fails closed.
    const bytes = readFileSync(archive);
    bytes[bytes.length >> 1]! ^= 1;
    writeFileSync(archive, bytes);
    await expect(live.create(COUNTER, from(archive))).rejects.toThrow(/archive/);
    expect(unpacked()).toEqual([]);
  });

  it("takes a checkpoint of the store that is kept as an archive, and gives up what is not restored", async () => {
    const store = new CheckpointStore(join(live.dir, "var/checkpoints"));
    const place = await store.placeFor({ namespace: live.namespace }, "kept");
    mkdirSync(place, { mode: 0o700 });
    await createArchive(good, join(place, "checkpoint.tar.gz"), { compression: "gzip" });
    const archive = { file: "checkpoint.tar.gz", compression: "gzip", encrypted: false } as const;
    await writeManifest(place, { ...manifest, archive });
    await restores("kept");
    const task = await live.create(COUNTER, from("kept"));
    expect(unpacked().length).toBe(2);
    await task.delete();
    expect(unpacked()).toEqual([]);
    await task.destroy();
  });

  it("applies nothing that leads out of the root file system", async () => {
    const outside = join(live.dir, "outside");
    mkdirSync(outside);
    // tar(1) writes what it is told: a link out, and a file below it.
    const evil = join(allowed, "evil");
    await createArchive(good, join(allowed, "copy.tar"), { compression: "none" });
    const source = mkdtempSync(join(live.dir, "evil-"));
    execFileSync("sh", [
      "-c",
      `cp -a ${good} ${evil} && cd ${source} && ln -s ${outside} way && tar cf ${evil}/rootfs-diff.tar way && rm way && mkdir way && echo x > way/out && tar rf ${evil}/rootfs-diff.tar way/out`,
    ]);
    rmSync(join(evil, "cedana.json"));
    await writeManifest(evil, manifest, { digests: true });
    const failing = live.run(COUNTER, from(evil));
    await expect(failing).rejects.toThrow(/rootfs diff: .*(symbolic link|no directory)/);
    expect(readdirSync(outside)).toEqual([]);
  });

  it("names a file that the changed ones don't bring, before CRIU runs", async () => {
    const partial = join(allowed, "partial");
    mkdirSync(partial, { mode: 0o700 });
    const command = ["sh", "-c", "echo open >/opened; exec counter 20 7 9</opened"];
    {
      await using task = await live.run(command);
      await task.nextNumber();
      await task.pause();
      await task.checkpoint({ imagePath: join(partial, "checkpoint") });
      await takeRootfsDiff(await overlayLayers("/", task.pid), partial, { exclude: ["/opened"] });
      await task.resume();
    }
    const refused = /can't be restored as this container: \/opened is missing/;
    await expect(live.run(command, from(partial))).rejects.toThrow(refused);
    await using task = await live.run(command, from(partial, "fresh"));
    expect(await task.nextNumber()).toBe(0);
  });

  it("gives a container that starts afresh its own files", async () => {
    const broken = join(allowed, "broken");
    execFileSync("sh", ["-c", `cp -a ${good} ${broken}`]);
    const pagemap = join(broken, "checkpoint/pagemap-1.img");
    const bytes = readFileSync(pagemap);
    writeFileSync(pagemap, bytes.fill(0xff, 8));
    {
      await using task = await live.run(COUNTER, from(broken, "fresh"));
      expect(await task.nextNumber()).toBe(0);
      expect(await sh(task, "ls -d /added /d /etc/passwd 2>/dev/null")).toBe("/etc/passwd\n");
      expect(await sh(task, "echo mine > /added; cat /added")).toBe("mine\n");
    }
    // Of the right size: digests tell, where the administrator wants them looked at.
    configure({ verifyDigests: true });
    await expect(live.create(COUNTER, from(broken))).rejects.toThrow(/pagemap-1.img has the digest/);
    await restores(good);
    appendFileSync(pagemap, "x");
    await expect(live.create(COUNTER, from(broken))).rejects.toThrow(/pagemap-1.img has \d+ bytes/);
    configure({});
  });
});
