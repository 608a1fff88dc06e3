import { spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  beginClaim,
  claimCheckpoint,
  offerCheckpoint,
  returnClaim,
  withdrawOffer,
} from "../../src/checkpoint/resume.ts";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { WrongState } from "../../src/errors/index.ts";
import { startTime } from "../../src/linux/proc.ts";

describe("a checkpoint that can be continued from", () => {
  const owner = { namespace: "here" };
  let store: CheckpointStore;
  beforeEach(() => {
    store = new CheckpointStore(mkdtempSync(join(tmpdir(), "cedana-resume-")));
  });
  afterEach(() => rmSync(store.root, { recursive: true, force: true }));

  const ended = { pid: process.pid, startTime: 1 }; // of a process before us that had our pid
  async function left(key: string, offer: typeof ended | null = ended): Promise<string> {
    const path = await store.placeFor(owner, key);
    mkdirSync(path, { mode: 0o700 });
    writeFileSync(join(path, "cedana.json"), "{}");
    if (offer) await offerCheckpoint(path, offer);
    return path;
  }
  const claim = async (key: string, by: string) => await claimCheckpoint(store, owner, key, by);
  /** A claim of another boot. */
  function age(path: string, begun: boolean): void {
    writeFileSync(`${path}.claim`, JSON.stringify({ by: "old", bootId: "another", begun }));
  }

  it("is its claimer's alone, however many ask at once; the same one gets it again", async () => {
    const path = await left("key");
    const askers = Array.from({ length: 8 }, (_, n) => `c${n}`);
    const got = await Promise.all(askers.map((by) => claim("key", by)));
    expect(got.filter(Boolean)).toHaveLength(1);
    const winner = askers[got.findIndex(Boolean)]!;
    expect(await claim("key", winner)).toEqual({ path, claim: { path, by: winner } });
    expect(await claim("key", "another")).toBeUndefined();
  });

  it("is there for others when it is given back, and for nobody once its processes may have run", async () => {
    await left("key");
    const first = (await claim("key", "a"))!;
    await returnClaim(first.claim);
    const second = (await claim("key", "b"))!;
    await expect(beginClaim(first.claim)).rejects.toBeInstanceOf(WrongState); // its claimer has given it away
    await returnClaim(first.claim); // of no effect: it is another's
    await beginClaim(second.claim);
    for (const by of ["a", "b", "c"]) expect(await claim("key", by)).toBeUndefined();
  });

  it("is the newest that is left, of those that were made for it", async () => {
    const older = await left("key");
    const newer = await left("key");
    await left("key", null); // one of another kind: its container runs on
    expect((await claim("key", "a"))!.path).toBe(newer);
    expect((await claim("key", "b"))!.path).toBe(older);
    await left("gone");
    await withdrawOffer((await store.generations(owner, "gone"))[0]!.path);
    expect(await claim("gone", "a")).toBeUndefined();
    expect(await claim("nothing", "a")).toBeUndefined();
    expect(await claimCheckpoint(store, { namespace: "there" }, "key", "a")).toBeUndefined();
  });

  it("isn't given out while the process that it was taken of lives", async () => {
    const child = spawn("sleep", ["60"]);
    const path = await left("key", { pid: child.pid!, startTime: startTime(child.pid!)! });
    const claimed = claim("key", "a");
    child.kill("SIGKILL");
    expect((await claimed)!.path).toBe(path);
    expect(child.signalCode ?? "SIGKILL").toBe("SIGKILL");
  });

  it("of another boot is free if its claimer never ran, else used up", async () => {
    const path = await left("key");
    age(path, true);
    expect(await claim("key", "a")).toBeUndefined();
    age(path, false);
    expect((await claim("key", "a"))!.path).toBe(path);
    await store.remove((await store.generations(owner, "key"))[0]!);
    expect(readdirSync(join(path, "..")).filter((name) => name !== "tmp")).toEqual([]);
  });
});
