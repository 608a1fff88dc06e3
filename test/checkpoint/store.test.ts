import { randomUUID } from "node:crypto";
import { chmodSync, existsSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { Staging } from "../../src/checkpoint/staging.ts";
import { CheckpointStore, generationAt } from "../../src/checkpoint/store.ts";
import { CheckpointUse } from "../../src/checkpoint/use.ts";
import { InvalidRequest, NotFound, PermissionDenied } from "../../src/errors/index.ts";

let directory: string;
let store: CheckpointStore;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "store-"));
  store = new CheckpointStore(join(directory, "checkpoints"));
});
afterEach(() => rmSync(directory, { recursive: true }));

const alice = { namespace: "default" };
const bob = { namespace: "other" };
const at = (second: number) => new Date(Date.UTC(2026, 10, 25, 19, 15, second, 7));

/** A whole checkpoint. */
async function make(owner: typeof alice, name: string, date: Date): Promise<string> {
  const path = await store.placeFor(owner, name, date);
  mkdirSync(path, { mode: 0o700 });
  writeFileSync(join(path, "cedana.json"), "{}");
  return path;
}

describe("a store of checkpoints", () => {
  it("finds the newest of a name, or a certain one", async () => {
    const first = await make(alice, "web", at(1));
    const second = await make(alice, "web", at(2));
    expect((await store.find(alice, "web")).path).toBe(second);
    expect((await store.find(alice, `web@${generationAt(at(1))}`)).path).toBe(first);
    expect(await store.list(alice)).toHaveLength(2);
    expect(await store.owners()).toEqual([alice]);
  });

  it("counts on when two come in one millisecond, also past nine", async () => {
    const paths: string[] = [];
    for (let n = 0; n < 12; n++) paths.push(await make(alice, "web", at(1)));
    expect((await store.generations(alice, "web")).map(({ path }) => path)).toEqual(paths);
  });

  it("doesn't take for a checkpoint what has no manifest, is staged, or is a link", async () => {
    const place = await store.placeFor(alice, "web", at(1));
    mkdirSync(place);
    expect(await store.list(alice)).toEqual([]);
    await expect(store.find(alice, "web")).rejects.toBeInstanceOf(NotFound);
    symlinkSync("/etc/passwd", join(place, "cedana.json"));
    expect(await store.list(alice)).toEqual([]);
  });

  it("keeps owners apart", async () => {
    await make(alice, "web", at(1));
    await expect(store.find(bob, "web")).rejects.toBeInstanceOf(NotFound);
    const pod = { namespace: "default", podNamespace: "team" };
    await expect(store.find(pod, "web")).rejects.toBeInstanceOf(NotFound);
    await make(pod, "web", at(3));
    expect((await store.find(alice, "web")).generation).toBe(generationAt(at(1)));
    expect(await store.owners()).toEqual([alice, pod]);
  });

  it.each([
    "../web",
    "web/../../other",
    "/etc",
    "..",
    ".",
    "",
    "tmp",
    "-",
    "web\0",
    "web@",
    "web@../x",
    "web@1@2",
    ".hidden",
    "a".repeat(129),
  ])("refuses %j as a name", async (reference) => {
    await make(alice, "web", at(1));
    await expect(store.find(alice, reference)).rejects.toBeInstanceOf(InvalidRequest);
    await expect(
      store.directoryFor({ namespace: reference.split("@")[0] || "../x" }, "../x"),
    ).rejects.toBeInstanceOf(InvalidRequest);
  });

  it("refuses directories that are links, or that others may write", async () => {
    const path = await make(bob, "web", at(1));
    mkdirSync(join(store.root, "default/-"), { recursive: true, mode: 0o700 });
    symlinkSync(join(path, ".."), join(store.root, "default/-/web"));
    await expect(store.find(alice, "web")).rejects.toThrow(/is not a directory/);
    await expect(store.directoryFor(alice, "web")).rejects.toBeInstanceOf(PermissionDenied);
    chmodSync(store.root, 0o777);
    await expect(store.find(bob, "web")).rejects.toThrow(/can be written by others \(mode 777\)/);
  });

  it("keeps what is in use: a removal says so, a pruning leaves it for the next one", async () => {
    const paths: string[] = [];
    for (let n = 1; n <= 3; n++) paths.push(await make(alice, "web", at(n)));
    {
      using _first = await CheckpointUse.use(paths[0]!);
      using _second = await CheckpointUse.use(paths[0]!);
      const [oldest] = await store.generations(alice, "web");
      await expect(store.remove(oldest!)).rejects.toThrow(/is in use/);
      expect((await store.prune(alice, "web", 1)).map(({ path }) => path)).toEqual([paths[1]]);
      expect(paths.map((path) => existsSync(path))).toEqual([true, false, true]);
    }
    expect((await store.prune(alice, "web", 1)).map(({ path }) => path)).toEqual([paths[0]]);
    await expect(CheckpointUse.use(paths[0]!)).rejects.toThrow(NotFound);
  });

  it("prunes the oldest, and never the last", async () => {
    const paths = [];
    for (let n = 1; n <= 4; n++) paths.push(await make(alice, "web", at(n)));
    const removed = await store.prune(alice, "web", 2);
    expect(removed.map(({ path }) => path)).toEqual(paths.slice(0, 2));
    expect(paths.map((path) => existsSync(path))).toEqual([false, false, true, true]);
    await store.prune(alice, "web", 0);
    expect(await store.generations(alice, "web")).toHaveLength(1);
  });

  it("is swept of what crashes have left, and of nothing that somebody works on", async () => {
    const whole = await make(alice, "web", at(1));
    const left = join(whole, "../tmp", randomUUID());
    const removed = join(whole, "../tmp/removed-20260101T000000000Z-1");
    for (const directory of [left, removed]) mkdirSync(directory, { recursive: true, mode: 0o700 });
    await using living = await Staging.beside(join(whole, ".."), generationAt(at(2)));
    mkdirSync(left, { recursive: true, mode: 0o700 }); // the new one has swept it
    expect(await store.sweep()).toBe(2);
    expect([whole, living.path, left, removed].map((path) => existsSync(path))).toEqual([
      true,
      true,
      false,
      false,
    ]);
  });
});
