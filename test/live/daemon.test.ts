// cedanad itself: where it lives, what started it, and what it tells containerd's log.

import { execFile, execFileSync, spawn } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import { describe, expect, it, type TestContext } from "vitest";
import { cedanadCgroup } from "./harness/cleanup.ts";
import { isControl, Live } from "./harness/live.ts";
import { skipUnless } from "./harness/matrix.ts";
import { repository } from "./harness/programs.ts";
import { anyOf } from "./harness/proto.ts";
import { cgroupRoots, isAlive, pidsInCgroups, removeCgroups } from "./harness/system.ts";
import { until } from "./harness/until.ts";

const run = promisify(execFile);

describe.skipIf(isControl)("cedanad", () => {
  it("and every container live on when the cgroup of whoever started it is killed", async () => {
    let name = "";
    let groups: string[] = [];
    try {
      await using live = await Live.start();
      name = `${live.namespace}-caller`;
      groups = cgroupRoots().map((root) => join(root, name));
      for (const group of groups) mkdirSync(group, { recursive: true });
      // containerd, and so whatever it starts from now on, is in that cgroup wherever the kernel lets it.
      for (const group of groups)
        try {
          writeFileSync(join(group, "cgroup.procs"), String(live.containerdPid));
        } catch {
          // a cpuset without cpus takes nobody
        }
      expect(pidsInCgroups(name)).toContain(live.containerdPid);
      await using task = await live.run(["counter", "20", "6"], { stdio: false });
      const { pid } = live.cedanad()!;
      const cgroups = readFileSync(`/proc/${pid}/cgroup`, "utf8");
      expect(cgroups).toContain(`/${cedanadCgroup(live.runDir)}\n`);
      expect(cgroups).not.toContain(name);
      expect(Number(readFileSync(`/proc/${pid}/oom_score_adj`, "utf8"))).toBeLessThanOrEqual(
        Number(readFileSync(`/proc/${live.containerdPid}/oom_score_adj`, "utf8")),
      );

      // As KillMode=process of containerd's unit: the keepers are the containers' parents, and stay.
      const keepers = live.shims().map((shim) => shim.pid);
      for (const victim of pidsInCgroups(name))
        if (!keepers.includes(victim)) process.kill(victim, "SIGKILL");
      await until(() => !isAlive(live.containerdPid), { what: () => "the end of containerd" });
      expect(isAlive(pid)).toBe(true);
      expect(isAlive(task.pid)).toBe(true);
      await live.startContainerd();
      expect(await task.status()).toBe("RUNNING");
      expect(live.cedanad()!.pid).toBe(pid);
      await task.kill(15);
      expect(await task.wait()).toBe(6);
    } finally {
      // The keeper was in them, until the end of `live`.
      for (const group of groups)
        await until(
          () => {
            if (existsSync(group)) removeCgroups(name);
            return !existsSync(group);
          },
          { what: () => `the removal of ${group}` },
        );
    }
  });

  it("writes a task's lines into containerd's log, in its form", async () => {
    await using live = await Live.start({ env: { CEDANA_DRAIN_LIMIT_MS: "100" } });
    const runtimeOptions = anyOf("runtimeoptions.v1.Options", {
      configBody: Buffer.from(`Colour = "red"\n`),
    });
    await using task = await live.run(["sleeper"], { runtimeOptions });
    const line = (pattern: RegExp) =>
      until(
        () =>
          live
            .containerdLog()
            .split("\n")
            .find((text) => pattern.test(text)),
        {
          what: () => `${pattern} in ${live.containerdLog().slice(-1000)}`,
        },
      );
    expect(await line(/unknown option Colour/)).toMatch(
      /^time="[^"]+" level=warning msg="runtime options" task="c1"/,
    );
    await using loud = await task.exec(["background", "60000"]);
    await loud.exited;
    await loud.delete();
    // A second one, later: containerd reads on.
    expect(await line(/output still open/)).toMatch(
      /^time="[^"]+" level=warning msg="output still open 100 ms .*" task="c1"/,
    );
  });

  describe("as systemd's units start it", () => {
    const units = join(repository, "packaging/systemd");

    it("is described as systemd understands it", async (context) => {
      skipUnless(context, existsSync("/usr/bin/systemd-analyze"), "no systemd-analyze on this machine");
      const directory = execFileSync("mktemp", ["-d"], { encoding: "utf8" }).trim();
      try {
        // The program that the service names is not installed here; everything else is as packaged.
        for (const name of ["cedanad.service", "cedanad.socket"])
          writeFileSync(
            join(directory, name),
            readFileSync(join(units, name), "utf8").replace(/^ExecStart=.*$/m, "ExecStart=/bin/true"),
          );
        const files = ["cedanad.service", "cedanad.socket"].map((name) => join(directory, name));
        const { stderr } = await run("systemd-analyze", ["verify", "--man=no", ...files]).catch(
          (error) => error,
        );
        expect(stderr.split("\n").filter((line: string) => line.includes("cedanad"))).toEqual([]);
      } finally {
        execFileSync("rm", ["-r", directory]);
      }
    });

    it("takes the socket that was made for it before anybody asked", async (context) => {
      skipUnlessActivated(context);
      await using live = await Live.start();
      await using activator = await activate(live);
      const inode = statSync(activator.socket).ino;
      const { status, stdout } = await live.runToEnd(["sh", "-c", "echo activated; exit 5"]);
      expect([status, stdout]).toEqual([5, "activated\n"]);
      expect(live.cedanad()!.pid).toBe(activator.pid); // it became cedanad
      expect(statSync(activator.socket).ino).toBe(inode);
    });

    it("takes over from one that was there before the units were, and no container notices", async (context) => {
      skipUnlessActivated(context);
      await using live = await Live.start();
      await using task = await live.run(["counter", "20", "6"], { stdio: false });
      const before = live.cedanad()!.pid;
      await using activator = await activate(live);
      expect(isAlive(before)).toBe(true); // nobody has asked yet
      const { status } = await live.runToEnd(["sh", "-c", "exit 5"]);
      expect(status).toBe(5);
      expect(live.cedanad()!.pid).toBe(activator.pid);
      await until(() => !isAlive(before), { what: () => "the end of the cedanad before" });
      expect(existsSync(activator.socket)).toBe(true);
      await task.kill(15);
      expect(await task.wait()).toBe(6);
    });
  });
});

function skipUnlessActivated(context: TestContext): void {
  const program = existsSync("/usr/bin/systemd-socket-activate");
  skipUnless(context, program, "no systemd-socket-activate on this machine");
}

/** As the unit: directory 0700, socket 0600, made before anybody asks, in the place of one that is there. */
async function activate(live: Live): Promise<AsyncDisposable & { pid: number; socket: string }> {
  mkdirSync(live.runDir, { recursive: true, mode: 0o700 });
  const socket = join(live.runDir, socketName());
  const inode = () => (existsSync(socket) ? statSync(socket).ino : undefined);
  const before = inode();
  const activator = spawn(
    "systemd-socket-activate",
    ["--listen", socket, ...environment(live), join(repository, "bin/cedanad")],
    { stdio: "ignore" },
  );
  await until(() => ![before, undefined].includes(inode()), { what: () => "the socket" });
  chmodSync(socket, 0o600);
  return {
    pid: activator.pid!,
    socket,
    [Symbol.asyncDispose]: async () => {
      const exit = new Promise((resolve) => activator.once("exit", resolve));
      if (activator.kill("SIGTERM")) await exit;
    },
  };
}

function environment(live: Live): string[] {
  return Object.entries(live.environment())
    .filter(([name]) => name.startsWith("CEDANA_"))
    .flatMap(([name, value]) => ["--setenv", `${name}=${value}`]);
}

/** As the launcher names it. */
function socketName(): string {
  const own = statSync("/proc/self/ns/mnt").ino;
  try {
    if (statSync("/proc/1/ns/mnt").ino === own) return "cedanad.sock";
  } catch {
    // not allowed to look: the name with the inode
  }
  return `cedanad-${own}.sock`;
}
