import fs from "node:fs";
import path from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { createArchive } from "../../src/checkpoint/archive/index.ts";
import { cpuFacts } from "../../src/checkpoint/cpu.ts";
import type { CheckpointManifest } from "../../src/checkpoint/manifest.ts";
import { writeManifest } from "../../src/checkpoint/manifest-files.ts";
import { type CheckpointReport, verifyCheckpoint } from "../../src/checkpoint/verify.ts";
import { CriuWorker } from "../../src/criu/worker.ts";
import { NotFound } from "../../src/errors/index.ts";
import { Victim, Workplace, whyNoDump } from "../criu/harness.ts";
import { sampleManifest } from "./sample.ts";

const reason = whyNoDump();

let original: Workplace;
let place: Workplace;
let checkpoint: string;
const images = (name: string) => path.join(checkpoint, "checkpoint", name);

function patch(name: string, change: (bytes: Buffer) => void): void {
  const bytes = fs.readFileSync(images(name));
  change(bytes);
  fs.writeFileSync(images(name), bytes);
}

function editManifest(change: (manifest: CheckpointManifest) => void): void {
  const file = path.join(checkpoint, "cedana.json");
  const manifest = JSON.parse(fs.readFileSync(file, "utf8"));
  change(manifest);
  fs.writeFileSync(file, JSON.stringify(manifest));
}

const faultsOf = ({ findings }: CheckpointReport) =>
  findings.map(({ fault, file, kind, severity }) => [severity, kind, fault, file].filter(Boolean).join(" "));
const oneLike = (pattern: RegExp) =>
  fs.readdirSync(path.join(checkpoint, "checkpoint")).find((name) => pattern.test(name))!;

describe.skipIf(reason)(`verifying a checkpoint without restoring it${reason ? ` (${reason})` : ""}`, () => {
  beforeAll(async () => {
    original = new Workplace();
    const directory = path.join(original.path, "checkpoint");
    fs.mkdirSync(directory);
    {
      await using victim = await Victim.program("counter");
      await using worker = await CriuWorker.start();
      await worker.dump({ pid: victim.pid, imagesDir: directory, leaveRunning: true, shellJob: true });
    }
    fs.writeFileSync(path.join(directory, "descriptors.json"), "[]");
    const cpu = await cpuFacts();
    await writeManifest(original.path, { ...sampleManifest, cpu, criuVersion: "4.0" }, { digests: true });
  });
  afterAll(() => original[Symbol.dispose]());
  beforeEach(() => {
    place = new Workplace();
    checkpoint = path.join(place.path, "cp");
    fs.cpSync(original.path, checkpoint, { recursive: true });
  });
  afterEach(() => place[Symbol.dispose]());

  it("finds nothing in a whole one, and says what was looked at", async () => {
    const report = await verifyCheckpoint(checkpoint);
    expect(report.findings).toEqual([]);
    expect(report).toMatchObject({ ok: true, images: { tasks: 1 } });
    expect(report.digests).toBe(report.manifest!.files.length);
    expect((await verifyCheckpoint(checkpoint, { digests: false })).digests).toBe(0);
  });

  it.each<[what: string, damage: () => void, faults: (string | RegExp)[]]>([
    [
      "a page that has changed",
      () => patch("pages-1.img", (bytes) => bytes.writeUInt8(bytes[100]! ^ 1, 100)),
      ["error checkpoint digest checkpoint/pages-1.img"],
    ],
    [
      "memory pages cut short",
      () => fs.truncateSync(images("pages-1.img"), 4096),
      ["error checkpoint size checkpoint/pages-1.img"],
    ],
    [
      "magic words that are another image's",
      () => patch("pstree.img", (bytes) => bytes.fill(0x11, 0, 8)),
      ["error checkpoint digest checkpoint/pstree.img", "error checkpoint magic pstree.img"],
    ],
    [
      "bytes that are no message",
      () => patch("pstree.img", (bytes) => bytes.fill(0xff, 12)),
      ["error checkpoint digest checkpoint/pstree.img", "error checkpoint message pstree.img"],
    ],
    [
      "an image that is missing",
      () => fs.rmSync(images("files.img")),
      ["error checkpoint missing checkpoint/files.img"],
    ],
    [
      "an image that is a link",
      () => {
        fs.renameSync(images("files.img"), path.join(place.path, "files.img"));
        fs.symlinkSync(path.join(place.path, "files.img"), images("files.img"));
      },
      ["error checkpoint type checkpoint/files.img"],
    ],
    [
      "a file that is nobody's",
      () => fs.writeFileSync(images("more.txt"), ""),
      ["error checkpoint extra checkpoint/more.txt"],
    ],
    [
      "no descriptors",
      () => {
        fs.rmSync(images("descriptors.json"));
        editManifest((manifest) => {
          manifest.files = manifest.files.filter(({ path: file }) => !file.endsWith("descriptors.json"));
        });
      },
      ["error checkpoint descriptors"],
    ],
    [
      "a pre-dump that has gone",
      () => editManifest((manifest) => Object.assign(manifest.options, { parentPath: "../before" })),
      ["error checkpoint parent"],
    ],
    [
      "another pre-dump in its place",
      () => {
        fs.mkdirSync(images("../before"));
        fs.writeFileSync(images("../before/inventory.img"), "another");
        fs.symlinkSync("../before", images("parent"));
        editManifest((manifest) => {
          Object.assign(manifest.options, {
            parentPath: "../before",
            parentDigests: [`xxh128:${"0".repeat(32)}`],
          });
          manifest.files.push({ path: "before/inventory.img", size: 7 });
        });
      },
      ["error checkpoint parent"],
    ],
    [
      "a manifest that is none",
      () => fs.writeFileSync(path.join(checkpoint, "cedana.json"), "{"),
      ["error checkpoint manifest"],
    ],
    [
      "a manifest of the future",
      () => editManifest((manifest) => Object.assign(manifest, { version: 99 })),
      ["error checkpoint manifest"],
    ],
    ["no inventory", () => fs.rmSync(images("inventory.img")), ["error checkpoint missing"]],
    [
      "another architecture",
      () => editManifest((manifest) => Object.assign(manifest.cpu!, { architecture: "s390x" })),
      ["error node cpu"],
    ],
    [
      "instructions that this CPU lacks",
      () => editManifest((manifest) => manifest.cpu!.features.push("avx512_of_the_future")),
      ["error node cpu"],
    ],
    [
      "a CRIU that is too new",
      () => editManifest((manifest) => Object.assign(manifest, { criuVersion: "99.0" })),
      ["error node criu"],
    ],
    [
      "a kernel that is newer",
      () => editManifest((manifest) => Object.assign(manifest, { kernel: "99.1.0-test" })),
      ["warning node kernel"],
    ],
  ])("names %s", async (_what, damage, faults) => {
    damage();
    const report = await verifyCheckpoint(checkpoint);
    expect(faultsOf(report).filter((fault) => !/ stray /.test(fault))).toEqual(faults);
    expect(report.ok).toBe(faults.every((fault) => /^warning/.test(String(fault))));
  });

  it("names pages that don't add up, where there is no manifest to say so", async () => {
    fs.rmSync(path.join(checkpoint, "cedana.json"));
    fs.truncateSync(images("pages-1.img"), 4096);
    fs.rmSync(images(oneLike(/^mm-/)));
    const faults = faultsOf(await verifyCheckpoint(checkpoint));
    expect(faults).toContain("warning checkpoint manifest");
    expect(faults.join("\n")).toMatch(/error checkpoint pages .*\.img/);
    expect(faults.join("\n")).toMatch(/error checkpoint missing .*\.img/);
  });

  it("looks into an archive, an encrypted one too, and leaves nothing", async () => {
    const archive = path.join(place.path, "cp.tar.zst");
    const secret = Buffer.from("a secret of some length");
    await createArchive(checkpoint, archive, { compression: "zstd", secret });
    const scratch = path.join(place.path, "scratch");
    const whole = await verifyCheckpoint(archive, { secret, scratch });
    expect(whole.findings).toEqual([]);
    expect(whole).toMatchObject({ ok: true, archive: { encrypted: true, compression: "zstd" } });
    expect(whole.images!.tasks).toBe(1);
    expect(whole.digests).toBeGreaterThan(10);
    expect((await verifyCheckpoint(archive, { secret })).ok).toBe(true);
    expect(faultsOf(await verifyCheckpoint(archive, { secret: Buffer.from("another secret") }))).toEqual([
      "error checkpoint archive",
    ]);
    const bytes = fs.readFileSync(archive);
    bytes[bytes.length >> 1]! ^= 1;
    fs.writeFileSync(archive, bytes);
    expect(faultsOf(await verifyCheckpoint(archive, { secret, scratch }))).toEqual([
      "error checkpoint archive",
    ]);
    expect(fs.readdirSync(scratch).filter((name) => name !== "tmp")).toEqual([]);
  });

  it("looks into a checkpoint of the store that is kept as an archive", async () => {
    const stored = path.join(place.path, "stored");
    fs.mkdirSync(stored);
    await createArchive(checkpoint, path.join(stored, "checkpoint.tar.zst"), { compression: "zstd" });
    const archive = { file: "checkpoint.tar.zst", compression: "zstd", encrypted: false } as const;
    await writeManifest(stored, { ...sampleManifest, archive });
    expect((await verifyCheckpoint(stored)).findings).toEqual([]);
    fs.appendFileSync(path.join(stored, "checkpoint.tar.zst"), "x");
    expect(faultsOf(await verifyCheckpoint(stored))).toEqual(["error checkpoint size checkpoint.tar.zst"]);
  });

  it("throws where there is nothing", async () => {
    await expect(verifyCheckpoint(path.join(place.path, "nothing"))).rejects.toThrow(NotFound);
  });
});
