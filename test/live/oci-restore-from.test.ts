import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { missingCallers, Podman } from "./harness/callers.ts";
import type { EngineName } from "./harness/live.ts";
import { IMAGE, programs } from "./harness/programs.ts";
import { entries, isAlive } from "./harness/system.ts";
import { until } from "./harness/until.ts";

// Containers of cedana-runtime that go on where a checkpoint was taken, because their annotations ask for it: restore-from, and a
// checkpoint instead of the end (checkpoint-on) with the next container that continues from it (auto-resume). Under Podman.

const missing = missingCallers();
const owner = { namespace: "oci" };

describe.skipIf(missing).each<EngineName>(["runc", "crun"])(
  `podman's containers over %s${missing ? ` (${missing})` : ""}`,
  (engine) => {
    let podman: Podman;
    let testPrograms: string;
    let store: CheckpointStore;
    beforeAll(async () => {
      [podman, testPrograms] = [await Podman.start(engine), await programs()];
      store = new CheckpointStore(join(podman.place.dir, "var/checkpoints"));
    });
    afterEach(async () => {
      await podman.on("wrapper", "rm", "--all", "--force", "--time", "0");
      expect(entries(`${podman.place.runDir}/oci`)).toEqual([]); // no marker without its container
      expect(entries(`${podman.place.runDir}/oci-bundles`)).toEqual([]);
      await podman.place.expectNoLeftovers((argv) => /cedanad/.test(argv));
    });
    afterAll(async () => await podman?.stop());

    const on = (...args: string[]) => podman.on("wrapper", ...args);
    async function ok(...args: string[]): Promise<string> {
      const { status, stdout, stderr } = await on(...args);
      const log = podman.place.cedanadLog().slice(-3000);
      expect(status, `podman ${args.join(" ")}: ${stderr}\n${log}`).toBe(0);
      return stdout.trim();
    }
    const _file = (name: string) => join(podman.place.dir, name);
    const flags = (annotations: Record<string, string>) => [
      ...Object.entries(annotations).flatMap(([key, value]) => ["--annotation", `cedana.io/${key}=${value}`]),
      "--volume",
      `${testPrograms}:/programs:ro`,
    ];
    const start = (
      name: string,
      annotations: Record<string, string>,
      command = ["/programs/counter", "20"],
    ) => ok("run", "--detach", "--name", name, ...flags(annotations), IMAGE, ...command);
    async function numbers(name: string, more = 1): Promise<number[]> {
      return await until(
        async () => {
          const lines = (await ok("logs", name)).split("\n").filter((line) => /^\d+$/.test(line));
          return lines.length >= more && lines.map(Number);
        },
        { everyMs: 50, what: () => `numbers of ${name}` },
      );
    }
    const status = async (name: string) => await ok("inspect", "--format", "{{.State.Status}}", name);

    /** A checkpoint of a counter, by its name in the store. @returns the last number at least */
    async function checkpointInto(name: string): Promise<number> {
      await start("first", { "checkpoint-on": "TERM", "checkpoint-name": name }, [
        "sh",
        "-c",
        "echo kept >/file; exec /programs/counter 20",
      ]);
      const before = (await numbers("first", 3)).at(-1)!;
      await ok("stop", "--time", "20", "first");
      expect(await ok("wait", "first")).toBe("143");
      await ok("rm", "first");
      return before;
    }

    const oci = (name: string) => entries(join(podman.place.dir, "var/checkpoints/oci/-", name));
    const attempts = (name: string) => oci(`${name}/tmp`);
    /** @param known  earlier attempts */
    const underWay = async (name: string, known: readonly string[] = []) =>
      await until(() => attempts(name).some((one) => !known.includes(one)), {
        everyMs: 1,
        what: () => "a checkpoint under way",
      });

    it("are checkpointed instead of being ended, and end with the signal's status; the next of the key goes on, once", {
      timeout: 90_000,
    }, async () => {
      const keyed = { "checkpoint-on": "SIGTERM", "auto-resume": "key" };
      await start("c", keyed, ["/programs/counter", "20", "7"]); // 7 is what TERM makes of it
      const before = (await numbers("c", 3)).at(-1)!;
      await ok("kill", "--signal", "TERM", "c");
      expect(await ok("wait", "c")).toBe("143");
      const [checkpoint, ...more] = await store.generations(owner, "key");
      expect(more).toEqual([]);
      const manifest = JSON.parse(readFileSync(join(checkpoint!.path, "cedana.json"), "utf8"));
      expect(manifest).toMatchObject({ name: "key", trigger: "signal", namespace: "oci" });
      await start("d", keyed);
      expect((await numbers("d"))[0]).toBeGreaterThan(before);
      await start("e", keyed);
      expect((await numbers("e"))[0]).toBe(0);
      // podman stop waits for it, and the same container goes on where it was.
      const second = (await numbers("d", 3)).at(-1)!;
      await ok("stop", "--time", "30", "d");
      expect(await ok("wait", "d")).toBe("143");
      // One that is removed before its start has not continued from anything.
      await ok("create", "--name", "f", ...flags(keyed), IMAGE, "/programs/counter", "20");
      await ok("init", "f");
      await ok("rm", "--force", "f");
      await ok("start", "d");
      const count = (await numbers("d")).length;
      const all = await numbers("d", count + 2);
      expect(all.at(-1)).toBeGreaterThan(second);
      expect(all).toEqual(Array.from({ length: all.length }, (_, at) => all[0]! + at)); // nothing is missing, nothing comes twice
    });

    it("go on from a checkpoint by its name, with create and start apart", { timeout: 90_000 }, async () => {
      const last = await checkpointInto("web");
      const flagsOf = flags({ "restore-from": "web" });
      await ok("create", "--name", "c", ...flagsOf, IMAGE, "/programs/counter", "20");
      await ok("init", "c"); // the runtime's create, without its start
      expect(await status("c")).toBe("initialized");
      expect(await ok("logs", "c")).toBe("");
      await ok("start", "c");
      expect((await numbers("c", 2))[0]).toBeGreaterThan(last);
      expect(await ok("exec", "c", "cat", "/file")).toBe("kept"); // what it had changed comes along
      await ok("stop", "--time", "0", "c");
      // The same container again, and another one beside it: a checkpoint by name is there for everybody.
      await ok("start", "c");
      await start("d", { "restore-from": "web" });
      expect((await numbers("d", 2))[0]).toBeGreaterThan(last);
      // One that is removed before its start has not run.
      await ok("create", "--name", "e", ...flagsOf, IMAGE, "/programs/counter", "20");
      await ok("init", "e");
      await ok("rm", "--force", "e");
      // A checkpoint of a restored one.
      await ok("container", "checkpoint", "d");
      await ok("container", "restore", "d");
      await ok("exec", "d", "true");
    });

    // What the engine has no part in is tried with one.
    it.skipIf(engine === "crun")(
      "fail, or start afresh, as their annotation says",
      { timeout: 60_000 },
      async () => {
        const missingName = { "restore-from": "nothing" };
        const refused = await on("run", ...flags(missingName), "--name", "c", IMAGE, "true");
        expect(refused.status).not.toBe(0);
        expect(refused.stderr).toMatch(/checkpoint nothing of namespace oci does not exist/);
        await ok("rm", "c");
        await start("c", { ...missingName, "on-restore-failure": "fresh" });
        expect((await numbers("c"))[0]).toBe(0);
        // Of the right size, so that only CRIU sees it.
        await checkpointInto("broken");
        const { path } = (await store.generations(owner, "broken"))[0]!;
        for (const name of entries(join(path, "checkpoint")).filter((one) => /^pagemap-/.test(one))) {
          const file = join(path, "checkpoint", name);
          writeFileSync(file, readFileSync(file).fill(0xff, 8));
        }
        const broken = await on("run", ...flags({ "restore-from": "broken" }), "--name", "d", IMAGE, "true");
        expect(broken.status).not.toBe(0);
        expect(broken.stderr).toMatch(/CRIU: /);
        await ok("rm", "d");
        await start("d", { "restore-from": "broken", "on-restore-failure": "fresh" });
        expect((await numbers("d", 2)).slice(0, 2)).toEqual([0, 1]);
        const wrong = await on("run", ...flags({ "restore-from": "/etc" }), IMAGE, "true");
        expect(wrong.stderr).toMatch(/this node allows only names of checkpoints/);
      },
    );

    it.skipIf(engine === "crun")(
      "get the signal when the dump fails, and end at a KILL in the middle of it",
      {
        timeout: 90_000,
      },
      async () => {
        const keyed = { "checkpoint-on": "TERM", "auto-resume": "no" };
        await start("locks", { ...keyed, "kill-signal": "KILL" }, ["/programs/locks"]); // a lock that nobody has allowed for
        await numbers("locks");
        await ok("kill", "--signal", "TERM", "locks");
        expect(await ok("wait", "locks")).toBe("137");
        await start("big", keyed, ["/programs/memory", "256"]);
        await until(async () => (await ok("logs", "big")) !== "", { everyMs: 50 });
        await ok("kill", "--signal", "TERM", "big");
        await underWay("no");
        await ok("kill", "--signal", "KILL", "big");
        expect(await ok("wait", "big")).toBe("137");
        await until(() => oci("no/tmp").length === 0, { what: () => `nothing half: ${oci("no/tmp")}` });
        expect(await store.generations(owner, "no")).toEqual([]);
      },
    );

    it.skipIf(engine === "crun").each([
      ["are checkpointed by the next cedanad when one is killed in the middle", 1, 143],
      ["get the signal when their dump has taken two cedanads along", 2, 137],
    ] as const)("%s", { timeout: 90_000 }, async (_, kills, ends) => {
      const name = `cut-${kills}`;
      const annotations = { "checkpoint-on": "TERM", "checkpoint-name": name, "kill-signal": "KILL" };
      await start("big", annotations, ["/programs/memory", "256"]);
      await until(async () => (await ok("logs", "big")) !== "", { everyMs: 50 });
      await ok("kill", "--signal", "TERM", "big");
      const known: string[] = [];
      for (let killed = 0; killed < kills; killed++) {
        await underWay(name, known);
        const pid = podman.place.cedanadPid();
        process.kill(pid, "SIGKILL");
        await until(() => !isAlive(pid));
        known.push(...attempts(name));
        await on("kill", "--signal", "CONT", "big"); // whatever needs cedanad starts it
      }
      expect(await ok("wait", "big")).toBe(String(ends));
      await until(async () => (await store.generations(owner, name)).length === (ends === 143 ? 1 : 0), {
        what: () => "the checkpoint in its place, or none",
      });
    });
  },
);
