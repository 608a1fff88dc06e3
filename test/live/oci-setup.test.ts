import { execFile } from "node:child_process";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { apply, type Place, planRegistration, planUndo } from "../../src/cli/registration.ts";
import type { Target } from "../../src/cli/targets.ts";
import { CallerPlace, caller, Docker, missingCallers } from "./harness/callers.ts";
import { containerdBinaries } from "./harness/live.ts";
import { IMAGE, repository } from "./harness/programs.ts";

// What `cedana setup` writes, read by those it is written for.

const run = promisify(execFile);
const missing = missingCallers();

describe.skipIf(missing)(`cedana setup${missing ? ` (${missing})` : ""}`, () => {
  let place: CallerPlace;
  beforeAll(async () => {
    place = await CallerPlace.start("runc");
    place.configureContainers();
  });
  afterAll(async () => await place?.stop());

  /** The command line itself, once; starting it takes longer than all that it does. */
  async function command(target: string, ...flags: string[]): Promise<string> {
    const args = ["setup", "--target", target, "--root", join(place.dir, "root"), ...flags];
    return (await run(join(repository, "bin/cedana"), args)).stdout;
  }
  function setup(target: Target, undo = false): void {
    const where: Place = {
      root: join(place.dir, "root"),
      programs: join(repository, "bin"),
      packaging: join(repository, "packaging"),
      stateDirectory: "/var/lib/cedana",
    };
    apply(target, where, undo ? planUndo(target, where) : planRegistration(target, where), undo);
  }
  const at = (path: string) => join(place.dir, "root", path);

  it.each(["1.6", "1.7", "2.1"] as const)("is understood by containerd %s", async (version) => {
    const binaries = containerdBinaries(version);
    if (!binaries) return;
    rmSync(at("etc/containerd"), { recursive: true, force: true });
    mkdirSync(at("etc/containerd"), { recursive: true });
    // As containerd would write it for somebody who changes a few lines; and as Debian has it, which names no runtime.
    const { stdout } = await run(join(binaries, "containerd"), ["config", "default"], { maxBuffer: 1 << 20 });
    const short = `version = ${version === "2.1" ? 3 : 2}\n`;
    for (const before of [stdout, short]) {
      writeFileSync(at("etc/containerd/config.toml"), before);
      setup("containerd");
      const dump = (
        await run(
          join(binaries, "containerd"),
          ["--config", at("etc/containerd/config.toml"), "config", "dump"],
          { maxBuffer: 1 << 20 },
        )
      ).stdout;
      expect(dump).toMatch(/containerd\.runtimes\.cedana\]\s/);
      expect(dump).toContain("io.containerd.cedana.v2");
      expect(dump).toContain("containerd.runtimes.runc]"); // theirs is still there
      setup("containerd", true);
      expect(readFileSync(at("etc/containerd/config.toml"), "utf8")).toBe(before);
    }
  });

  it("is understood by Docker", async () => {
    mkdirSync(at("etc/docker"), { recursive: true });
    writeFileSync(at("etc/docker/daemon.json"), '{"log-driver": "local"}');
    setup("docker");
    const { status, stderr } = await place.run([
      caller("dockerd"),
      "--validate",
      "--config-file",
      at("etc/docker/daemon.json"),
    ]);
    expect(status, stderr).toBe(0);
    const { runtimes } = JSON.parse(readFileSync(at("etc/docker/daemon.json"), "utf8"));
    setup("docker", true);
    expect(readFileSync(at("etc/docker/daemon.json"), "utf8")).toBe('{"log-driver": "local"}');
    const docker = await Docker.start(runtimes);
    try {
      for (const name of ["cedana", "cedana-shim"])
        expect(
          await docker.ok("run", "--rm", "--runtime", name, "--network", "none", IMAGE, "echo", name),
        ).toBe(name);
    } finally {
      await docker.stop();
    }
  });

  it("is understood by Podman and Buildah", async () => {
    expect(await command("podman", "--dry-run")).toContain("+[engine.runtimes]");
    await command("podman");
    place.env.CONTAINERS_CONF_OVERRIDE = at("etc/containers/containers.conf.d/50-cedana.conf");
    const podman = [
      caller("podman"),
      "--tmpdir",
      join(place.dir, "libpod"),
      "--runtime",
      "cedana",
      "info",
      "--format",
    ];
    expect(await place.ok([...podman, "{{.Host.OCIRuntime.Name}} {{.Host.OCIRuntime.Path}}"])).toBe(
      `cedana ${join(repository, "bin/cedana-runtime")}`,
    );
    delete place.env.CONTAINERS_CONF_OVERRIDE;
    expect(await command("podman", "--undo")).toContain("removed");
  });
});
