// What a crash has left of a dump, in whose images the container may be alone.

import { randomUUID } from "node:crypto";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import type { Attempt, ManifestDraft } from "../../src/checkpoint/dump/context.ts";
import type { DumpRequest, DumpTarget } from "../../src/checkpoint/dump/target.ts";
import { abandonAttempt, dump } from "../../src/checkpoint/dump.ts";
import { readManifest } from "../../src/checkpoint/manifest.ts";
import { writeManifest } from "../../src/checkpoint/manifest-files.ts";
import { Staging } from "../../src/checkpoint/staging.ts";
import { Unavailable } from "../../src/errors/index.ts";

let root: string;
let owner: string;
let images: string;
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), "cedana-dump-"));
  [owner, images] = [join(root, "owner"), join(root, "images")];
  mkdirSync(owner);
});
afterEach(() => rmSync(root, { recursive: true }));

const quiet = { info() {}, warn() {}, error() {} };
const draft: ManifestDraft = {
  createdAt: "2026-01-02T03:04:05.678Z",
  containerId: "c",
  namespace: "n",
  terminal: false,
  engine: { name: "runc", version: "1.1.15", path: "/usr/sbin/runc" },
  specDigest: "0".repeat(64),
  kernel: "6.1",
  options: {
    fileLocks: false,
    extUnix: false,
    shellJob: false,
    emptyNamespaces: [],
    leaveRunning: false,
  },
};

/** A dump as it is on disk when its cedanad is killed: nobody has a lock. */
function cutOff(phase: Attempt["phase"]): Attempt {
  const staged = join(images, `.cedana-${randomUUID()}`);
  for (const part of ["new", "old"]) mkdirSync(join(staged, part), { recursive: true, mode: 0o700 });
  writeFileSync(join(staged, "new/inventory.img"), "the container");
  const attempt: Attempt = {
    key: "k",
    staging: { kind: "inside", root: staged, finalPath: images },
    phase,
    leaveRunning: false,
    whole: { draft, workPath: join(root, "work"), withFiles: false },
  };
  writeFileSync(join(owner, "checkpoint-attempt.json"), JSON.stringify(attempt));
  return attempt;
}

const dead = async () => true;

function repeated(target: Partial<DumpTarget>, request: Partial<DumpRequest> = {}): Promise<unknown> {
  const whole = {
    what: "container c",
    directory: owner,
    hasEnded: true,
    log: quiet,
    ...target,
  } as DumpTarget;
  return dump(whole, {
    key: "k",
    repeated: true,
    place: { imagePath: images },
    leaveRunning: false,
    policy: { fileLocks: false, extUnix: false, shellJob: false, emptyNamespaces: [], cgroupsMode: "" },
    digests: "afterwards",
    ...request,
  });
}

const inTheWay = () => {
  const file = join(root, "file");
  writeFileSync(file, "");
  return file;
};

it.each([
  [
    "before the images are opened",
    () => ({ wholeMemory: async () => Promise.reject(new Unavailable("no")) }),
    {},
  ],
  ["behind that", () => ({}), () => ({ workPath: join(inTheWay(), "work") })],
] as const)(
  "a repetition that fails %s keeps the images of a container that has ended",
  async (_where, target, request) => {
    cutOff("dumped");
    const failure = await repeated(target(), typeof request === "function" ? request() : request).catch(
      (error: Error) => error,
    );
    const kept = /What was made is kept in (.*)$/.exec((failure as Error).message)?.[1];
    expect(kept, String(failure)).toBeDefined();
    expect(readFileSync(join(kept!, "inventory.img"), "utf8")).toBe("the container");
    expect(existsSync(join(owner, "checkpoint-attempt.json"))).toBe(false);
  },
);

it("a repetition that fails leaves nothing of a container that runs on", async () => {
  cutOff("begun");
  await expect(repeated({ wholeMemory: async () => Promise.reject(new Unavailable("no")) })).rejects.toThrow(
    "no",
  );
  expect(readdirSync(images)).toEqual([]);
});

it("one that nobody repeats is finished", async () => {
  cutOff("dumped");
  expect(await abandonAttempt(owner, dead, quiet)).toEqual({ finished: images });
  expect(await readManifest(images)).toMatchObject({ createdAt: draft.createdAt });
  expect(readdirSync(images).sort()).toEqual(["cedana.json", "inventory.img"]);
});

it("one that was in its place already is known to be", async () => {
  const attempt = cutOff("committing");
  {
    const staging = Staging.resume(attempt.staging)!;
    await writeManifest(staging.path, { ...draft, timings: { totalMs: 1 } });
    await staging.commit();
  }
  expect(await abandonAttempt(owner, dead, quiet)).toEqual({ finished: images });
  expect(readFileSync(join(images, "inventory.img"), "utf8")).toBe("the container");
});

it("an older checkpoint in its place isn't taken for it", async () => {
  const attempt = cutOff("committing");
  rmSync(attempt.staging.root, { recursive: true });
  writeFileSync(join(images, "inventory.img"), "another");
  await writeManifest(images, { ...draft, createdAt: "2025-01-01T00:00:00.000Z", timings: { totalMs: 1 } });
  expect(await abandonAttempt(owner, dead, quiet)).toBeUndefined();
});
