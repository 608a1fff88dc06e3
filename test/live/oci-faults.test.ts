// CRIU, the engine or cedanad is killed in the middle of what Podman asks of cedana-runtime: the container runs on, or the restore has
// failed and nothing of it is left.

import { existsSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { missingCallers, Podman } from "./harness/callers.ts";
import { DeadlyCriu, type Victim } from "./harness/deadly-criu.ts";
import { IMAGE, programs } from "./harness/programs.ts";
import { cgroupsOf, entries, pidsInCgroups } from "./harness/system.ts";
import { until } from "./harness/until.ts";

const missing = missingCallers();
const victims = ["criu", "engine", "cedanad"] as const;

describe.skipIf(missing)(`podman${missing ? ` (${missing})` : ""}: killed in the middle`, () => {
  let deadly: DeadlyCriu;
  let podman: Podman;
  beforeAll(async () => {
    deadly = new DeadlyCriu();
    podman = await Podman.start("runc", { first: deadly.directory });
  });
  beforeEach(async () => {
    const volume = `${await programs()}:/programs:ro`;
    await ok("run", "--detach", "--name", "c", "--volume", volume, IMAGE, "/programs/counter");
    await countsOn();
    await ok("container", "checkpoint", "--leave-running", "c"); // cedanad runs, and isn't below conmon
  });
  afterEach(async () => {
    await on("rm", "--all", "--force", "--time", "0");
    await podman.place.expectNoLeftovers((argv) => /cedanad/.test(argv));
    await until(() => entries(join(podman.place.runDir, "c")).length === 0, {
      what: () => `no scratch: ${entries(join(podman.place.runDir, "c"))}`,
    });
    expect(entries(join(podman.place.runDir, "oci"))).toEqual([]);
  });
  afterAll(async () => {
    await podman?.stop();
    deadly?.[Symbol.dispose]();
  });

  const on = (...args: string[]) => podman.on("wrapper", ...args);
  async function ok(...args: string[]): Promise<string> {
    const { status, stdout, stderr } = await on(...args);
    expect(status, `podman ${args.join(" ")}: ${stderr}\n${podman.place.cedanadLog().slice(-2000)}`).toBe(0);
    return stdout.trim();
  }
  const numbers = async () =>
    (await ok("logs", "c"))
      .split("\n")
      .filter((line) => /^\d+\b/.test(line))
      .map(Number);
  /** None is missing, none comes twice. */
  async function countsOn(): Promise<void> {
    const before = (await numbers()).at(-1) ?? -1;
    const all = await until(
      async () => {
        const read = await numbers();
        return (read.at(-1) ?? -1) > before && read;
      },
      { everyMs: 50, what: () => `more than ${before}` },
    );
    expect(all).toEqual(all.map((_, at) => at));
  }
  const inspect = async (what: string) => await ok("inspect", "--format", `{{.State.${what}}}`, "c");
  const cedanad = () => podman.place.cedanadPid();
  const victimOf = (name: (typeof victims)[number]): Victim => (name === "cedanad" ? cedanad() : name);
  /** Of the container, wherever: conmon's own cgroup is another one. */
  const left = () => cgroupsOf(podman.place.namespace).filter((path) => /\/libpod-[0-9a-f]{64}$/.test(path));

  it.each(victims)(
    "a dump without its %s leaves the container running, or is whole",
    { timeout: 60_000 },
    async (name) => {
      for (const moment of ["pre-dump", "post-dump"] as const) {
        deadly.killNextAt(moment, victimOf(name));
        const { status, stderr } = await on("container", "checkpoint", "c");
        expect(deadly.killed(), moment).toBeDefined();
        // An engine's CRIU goes on alone, and the end of the container is in its images; an engine goes on without its cedanad.
        if (name === "cedanad") expect(status, stderr).toBe(0);
        if (status === 0) expect(name, moment).not.toBe("criu");
        else expect(stderr, moment).toMatch(/CRIU|cedanad at .* ended in the middle of it|the engine/);
        if (status === 0) await ok("container", "restore", "c");
        expect(await inspect("Status"), moment).toBe("running");
        await countsOn();
      }
    },
  );

  it("a dump without its cedanad is made again of a container that runs on", {
    timeout: 60_000,
  }, async () => {
    for (const moment of ["pre-dump", "post-dump"] as const) {
      deadly.killNextAt(moment, cedanad());
      await ok("container", "checkpoint", "--leave-running", "c");
      expect(deadly.killed(), moment).toBeDefined();
      expect(await inspect("Status"), moment).toBe("running");
      await countsOn();
    }
  });

  it.each(victims)(
    "a restore without its %s fails, and the next one succeeds",
    { timeout: 90_000 },
    async (name) => {
      const moments = ["post-setup-namespaces", "post-restore", "post-resume"] as const;
      for (const moment of name === "cedanad" ? moments.slice(1, 2) : moments) {
        await ok("container", "checkpoint", "--keep", "c");
        const last = (await numbers()).at(-1)!;
        deadly.killNextAt(moment, victimOf(name));
        const { status } = await on("container", "restore", "--keep", "c");
        expect(deadly.killed(), moment).toBeDefined();
        expect(status, moment).not.toBe(0);
        await until(() => pidsInCgroups(podman.place.namespace).every((pid) => !runsProgram(pid)), {
          what: () => `no process of it (${moment}): ${left()}`,
        });
        expect(await inspect("Status"), moment).toBe("exited");
        await ok("container", "restore", "--keep", "c");
        await countsOn();
        expect((await numbers()).indexOf(last), moment).toBe(last);
      }
    },
  );

  function runsProgram(pid: number): boolean {
    return existsSync(`/proc/${pid}/root/programs/counter`);
  }
});
