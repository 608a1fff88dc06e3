import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { missingCallers, Podman } from "./harness/callers.ts";
import type { EngineName } from "./harness/live.ts";
import { IMAGE, programs } from "./harness/programs.ts";
import { entries } from "./harness/system.ts";
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
      await start("first", {
        "checkpoint-on": "TERM",
        "checkpoint-name": name,
      });
      const before = (await numbers("first", 3)).at(-1)!;
      await ok("stop", "--time", "20", "first");
      expect(await ok("wait", "first")).toBe("143");
      await ok("rm", "first");
      return before;
    }

    it("are checkpointed instead of being ended, and end with the signal's status", {
      timeout: 60_000,
    }, async () => {
      await start("c", { "checkpoint-on": "SIGTERM" }, ["/programs/counter", "20", "7"]); // 7 is what TERM makes of it
      await numbers("c", 3);
      await ok("kill", "--signal", "TERM", "c");
      expect(await ok("wait", "c")).toBe("143");
      const id = await ok("inspect", "--format", "{{.Id}}", "c");
      const [checkpoint, ...more] = await store.generations(owner, id);
      expect(more, podman.place.cedanadLog()).toEqual([]);
      expect(checkpoint, podman.place.cedanadLog()).toBeDefined();
      const manifest = JSON.parse(readFileSync(join(checkpoint!.path, "cedana.json"), "utf8"));
      expect(manifest).toMatchObject({ name: id, trigger: "signal", namespace: "oci" });
    });

    it("go on from a checkpoint by its name, with create and start apart", { timeout: 90_000 }, async () => {
      const last = await checkpointInto("web");
      await ok(
        "create",
        "--name",
        "c",
        ...flags({ "restore-from": "web" }),
        IMAGE,
        "/programs/counter",
        "20",
      );
      await ok("init", "c"); // the runtime's create, without its start
      expect(await status("c")).toBe("initialized");
      expect(await ok("logs", "c")).toBe("");
      await ok("start", "c");
      expect((await numbers("c", 2))[0]).toBeGreaterThan(last);
      await ok("exec", "c", "true");
      await ok("stop", "--time", "0", "c");
      // The same container again, and another one beside it: a checkpoint by name is there for everybody.
      await ok("start", "c");
      await start("d", { "restore-from": "web" });
      expect((await numbers("d", 2))[0]).toBeGreaterThan(last);
      expect(
        await ok(
          "run",
          "--rm",
          ...flags({ "restore-from": "web" }),
          "--name",
          "e",
          "--detach",
          IMAGE,
          "true",
        ),
      ).toMatch(/^\w+$/);
    });
  },
);
