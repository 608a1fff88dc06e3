// The container's own hooks, and what it is told after a restore, through cedana-runtime below Podman.

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { CheckpointStore } from "../../src/checkpoint/store.ts";
import { missingCallers, type Outcome, Podman } from "./harness/callers.ts";
import type { EngineName } from "./harness/live.ts";
import { IMAGE, programs } from "./harness/programs.ts";
import { until } from "./harness/until.ts";

const missing = missingCallers();

describe.skipIf(missing).each<EngineName>(["runc", "crun"])(
  `podman with %s${missing ? ` (${missing})` : ""}`,
  (engine) => {
    let podman: Podman;
    beforeAll(async () => {
      podman = await Podman.start(engine);
      writeFileSync(join(podman.place.dir, "config.json"), JSON.stringify({ annotations: { hooks: true } }), {
        mode: 0o600,
      });
      // Neither Podman nor conmon pass the environment on that names the configuration: a cedanad is started that has it.
      await podman.place.run(podman.place.runtime("wrapper", "checkpoint", "nobody"));
    });
    afterEach(async () => {
      await podman.on("wrapper", "rm", "--all", "--force", "--time", "0");
      await podman.place.expectNoLeftovers((argv) => /cedanad/.test(argv));
    });
    afterAll(async () => await podman?.stop());

    async function ok(...args: string[]): Promise<string> {
      const { status, stdout, stderr } = await podman.on("wrapper", ...args);
      expect(status, `podman ${args.join(" ")}: ${stderr}\n${podman.place.cedanadLog().slice(-2000)}`).toBe(
        0,
      );
      return stdout.trim();
    }

    async function fails(words: RegExp, ...args: string[]): Promise<Outcome> {
      const outcome = await podman.on("wrapper", ...args);
      expect(outcome.status, `podman ${args.join(" ")}`).not.toBe(0);
      expect(outcome.stderr).toMatch(words);
      return outcome;
    }

    async function run(name: string, annotations: Record<string, string>): Promise<void> {
      const flags = Object.entries(annotations).map(
        ([key, value]) => `--annotation=cedana.io/${key}=${value}`,
      );
      const volume = `${await programs()}:/programs:ro`;
      await ok("run", "--detach", "--name", name, "--volume", volume, ...flags, IMAGE, "/programs/counter");
      await until(async () => (await ok("logs", name)) !== "", {
        everyMs: 20,
        what: () => "its first number",
      });
    }

    const status = async (name: string) => await ok("inspect", "--format", "{{.State.Status}}", name);
    const told = async (name: string) =>
      JSON.parse(await ok("exec", name, "cat", "/run/cedana/restore.json"));

    it("runs them in the container, and counts the restores", async () => {
      await run("c", {
        "hook.pre-dump": "echo $CEDANA_HOOK >> /tmp/told",
        "hook.post-restore": "echo $CEDANA_HOOK $CEDANA_GENERATION >> /tmp/told",
      });
      await ok("container", "checkpoint", "--leave-running", "c");
      await ok("container", "checkpoint", "c");
      await ok("container", "restore", "c");
      expect(await ok("exec", "c", "cat", "/tmp/told")).toBe("pre-dump\npre-dump\npost-restore 1");
      const id = await ok("inspect", "--format", "{{.Id}}", "c");
      expect(await told("c")).toMatchObject({
        generation: 1,
        why: "caller",
        old: { containerId: id, namespace: "oci" },
        new: { containerId: id, hostname: expect.any(String) },
      });
      const archive = join(podman.place.dir, "c.tar");
      await ok("container", "checkpoint", "--export", archive, "c");
      await ok("rm", "c");
      await ok("container", "restore", "--import", archive, "--name", "d");
      expect(await told("d")).toMatchObject({ generation: 2, old: { containerId: id } });
      expect((await told("d")).new.containerId).toBe(await ok("inspect", "--format", "{{.Id}}", "d"));
    });

    it("fails with them, and leaves the container as it was, or nothing", async () => {
      await run("c", {
        "hook.pre-dump": "[ -e /tmp/ready ] || { echo not ready; exit 3; }",
        "hook.post-restore": "sleep 4321",
        "hook-timeout": "1500ms",
      });
      await fails(/pre-dump hook.*status 3; it printed: not ready/, "container", "checkpoint", "c");
      expect(await status("c")).toBe("running");
      await ok("exec", "c", "touch", "/tmp/ready");
      await ok("container", "checkpoint", "c");
      await fails(/post-restore hook.*did not end within 1500 ms/, "container", "restore", "c");
      expect(await status("c")).toBe("exited");
      expect(podman.place.living().filter((argv) => /4321|counter/.test(argv))).toEqual([]);
    });

    it("run in start for a container that was restored at its creation by its annotations", async () => {
      await run("c", { "checkpoint-on": "TERM", "checkpoint-name": "web", "hook.pre-dump": "sleep 0.1" });
      await ok("stop", "--time", "20", "c");
      const store = new CheckpointStore(join(podman.place.dir, "var/checkpoints"));
      const [checkpoint] = await store.generations({ namespace: "oci" }, "web");
      const { timings } = JSON.parse(readFileSync(join(checkpoint!.path, "cedana.json"), "utf8"));
      expect(timings.preDumpHook).toBeGreaterThan(100); // frozen for the end of it, and running for its hook
      await ok("rm", "c");
      const volume = `${await programs()}:/programs:ro`;
      const create = async (name: string, hook: string) => {
        const flags = ["restore-from=web", `hook.post-restore=${hook}`].map(
          (one) => `--annotation=cedana.io/${one}`,
        );
        await ok("create", "--name", name, "--volume", volume, ...flags, IMAGE, "/programs/counter");
        await ok("init", name); // the runtime's create, without its start
      };
      await create("d", "echo $CEDANA_GENERATION $CEDANA_WHY > /tmp/told");
      await ok("start", "d");
      expect(await ok("exec", "d", "cat", "/tmp/told")).toBe("1 annotation");
      expect(await told("d")).toMatchObject({ generation: 1, why: "annotation" });
      await create("e", "exit 5");
      await fails(/post-restore hook.*status 5/, "start", "e");
      const counters = () => podman.place.living().filter((argv) => /programs\/counter/.test(argv));
      await until(() => counters().length === 1, { what: () => `the end of e; there are ${counters()}` });
    });

    it("are refused at the creation where the administrator doesn't allow them", async () => {
      const path = join(podman.place.dir, "config.json");
      const before = readFileSync(path);
      writeFileSync(path, "{}");
      try {
        const flag = "--annotation=cedana.io/hook.pre-dump=true";
        await fails(/hook.pre-dump is not allowed on this node/, "run", "--rm", flag, IMAGE, "true");
      } finally {
        writeFileSync(path, before);
      }
    });
  },
);
