// cedana.io/restore-from: a container that is created in the ordinary way goes on where a checkpoint was taken.

import { mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { Live } from "./harness/live.ts";

const COUNTER = ["counter", "20", "7"];

describe("cedana.io/restore-from", () => {
  let live: Live;
  let store: CheckpointStore;
  let allowed: string;

  beforeAll(async () => {
    // Read at each Create that has an annotation of ours.
    live = await Live.start({
      containerd: "1.7",
      engine: "runc",
      env: { CEDANA_CONFIG: "/run/cedana-restore-from.json" },
    });
    store = new CheckpointStore(join(live.dir, "var/checkpoints"));
    allowed = join(live.dir, "allowed");
    mkdirSync(allowed, { mode: 0o700 });
    configure({ restoreFromPaths: [allowed] });
  });
  afterEach(() => live.expectNoLeftovers());
  afterAll(async () => {
    await live?.stop();
    rmSync("/run/cedana-restore-from.json", { force: true });
  });

  function configure(configuration: object): void {
    writeFileSync("/run/cedana-restore-from.json", JSON.stringify(configuration), { mode: 0o600 });
  }

  /** Dumps a counter that has come to some number. @returns that number, at least */
  async function checkpointInto(imagePath: string): Promise<number> {
    await using task = await live.run(COUNTER);
    let last = await task.nextNumber();
    while (last < 5) last = await task.nextNumber();
    await task.checkpoint({ imagePath });
    return last;
  }

  it("restores the newest checkpoint of a name of the container's own namespace, under any id, and again", async () => {
    await checkpointInto(await store.placeFor({ namespace: live.namespace }, "web"));
    const last = await checkpointInto(await store.placeFor({ namespace: live.namespace }, "web"));
    for (let round = 0; round < 2; round++) {
      await using task = await live.run(COUNTER, { annotations: { "cedana.io/restore-from": "web" } });
      expect(await task.nextNumber()).toBeGreaterThan(last);
      expect((await task.execToEnd(["sh", "-c", "exit 3"])).status).toBe(3);
      await task.kill(15);
      expect(await task.wait()).toBe(7);
    }
  });

  it("restores for ctr, which knows nothing of it", async () => {
    const last = await checkpointInto(await store.placeFor({ namespace: live.namespace }, "cli"));
    const id = live.newId("ctr");
    const output = live.ctr(
      ...["run", "--rm", ...live.ctrRuntimeFlags(), "--annotation", "cedana.io/restore-from=cli"],
      ...["--mount", `type=bind,src=${live.programs},dst=/programs,options=rbind:ro`],
      ...[live.image, id, "/programs/counter", "20", "0"],
    );
    await live.events.waitFor(id, "start");
    await new Promise((resolve) => setTimeout(resolve, 200)); // some numbers
    await live.ctr("task", "kill", "-s", "SIGKILL", id);
    const text = await output.catch((error: { stdout: string }) => error.stdout);
    expect(Number(text.split("\n")[0])).toBeGreaterThan(last);
  });

  it("does not find what belongs to another namespace, whatever the name's spelling", async () => {
    const other = { namespace: "somebody-else" };
    await checkpointInto(await store.placeFor(other, "web2"));
    for (const name of [
      "web2",
      "../somebody-else/-/web2",
      `${live.namespace}/../somebody-else/-/web2`,
      "..",
      "web2@..",
    ]) {
      const failed = live.create(COUNTER, { annotations: { "cedana.io/restore-from": name } });
      await expect(failed, name).rejects.toThrow(/does not exist|is not a name|is not the name/);
    }
  });

  it("takes a path only where the administrator allows it, links looked through", async () => {
    const inside = join(allowed, "cp");
    const outside = join(live.dir, "outside");
    const last = await checkpointInto(inside);
    await checkpointInto(outside);
    {
      await using task = await live.run(COUNTER, { annotations: { "cedana.io/restore-from": inside } });
      expect(await task.nextNumber()).toBeGreaterThan(last);
    }
    symlinkSync(outside, join(allowed, "link"));
    for (const path of [
      outside,
      join(allowed, "link"),
      join(allowed, "../outside"),
      `${allowed}/../outside`,
      "/",
    ]) {
      const failed = live.create(COUNTER, { annotations: { "cedana.io/restore-from": path } });
      await expect(failed, path).rejects.toThrow(/this node allows paths below/);
    }
    await expect(
      live.create(COUNTER, { annotations: { "cedana.io/restore-from": join(allowed, "missing") } }),
    ).rejects.toMatchObject({ status: "NOT_FOUND" });
  });

  it("fails, or starts afresh, as the container says", async () => {
    const missing = { "cedana.io/restore-from": "nothing" };
    await expect(live.create(COUNTER, { annotations: missing })).rejects.toMatchObject({
      status: "NOT_FOUND",
    });
    const fresh = { ...missing, "cedana.io/on-restore-failure": "fresh" };
    await using task = await live.run(COUNTER, { annotations: fresh });
    expect(await task.nextNumber()).toBe(0);
    await expect(
      live.create(COUNTER, { annotations: { ...missing, "cedana.io/on-restore-failure": "maybe" } }),
    ).rejects.toThrow(/may be fail, fresh/);
  });

  it("starts afresh also when CRIU finds the images broken, with the same stdio", async () => {
    const place = await store.placeFor({ namespace: live.namespace }, "broken");
    await checkpointInto(place);
    // Of the right size, so that only CRIU sees it.
    const pages = join(place, "pagemap-1.img");
    const bytes = readFileSync(pages);
    bytes.fill(0xff, 8);
    writeFileSync(pages, bytes);
    const annotations = { "cedana.io/restore-from": "broken", "cedana.io/on-restore-failure": "fresh" };
    {
      await using task = await live.run(COUNTER, { annotations });
      expect(await task.nextNumber()).toBe(0);
      await task.kill(15);
      expect(await task.wait()).toBe(7);
      await live.events.waitFor(task.id, "exit");
      expect(live.events.summary(task.id)).toEqual(["create", "start", "exit 7"]);
    }
    const failing = live.run(COUNTER, { annotations: { "cedana.io/restore-from": "broken" } });
    await expect(failing).rejects.toThrow(/CRIU/);
  });

  it("is an error where the administrator denies it", async () => {
    configure({ annotations: { deny: ["restore-from"] } });
    const annotations = { "cedana.io/restore-from": "web", "cedana.io/on-restore-failure": "fresh" };
    await expect(live.create(COUNTER, { annotations })).rejects.toThrow(
      /denied by this node's configuration/,
    );
    configure({ restoreFromPaths: [allowed] });
  });
});
