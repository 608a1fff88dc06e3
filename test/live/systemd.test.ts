// Containers in scopes that systemd makes, and cedanad in its units, as Kubernetes and Podman have them on a host where systemd is process 1 and all cgroups
// are of version 2: what Debian is. Elsewhere scripts/with-systemd.sh makes such a host; `npm test` runs these in it. A limit is
// only asked for where the host's version 2 has its controller.

import { execFileSync, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { missingCallers, Podman } from "./harness/callers.ts";
import { Pod } from "./harness/cri.ts";
import { type ContainerdVersion, type EngineName, isControl, Live, type RunOptions } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { numbersIn } from "./harness/output.ts";
import { IMAGE, repository } from "./harness/programs.ts";
import { liveFor } from "./harness/suite.ts";
import { until } from "./harness/until.ts";

const COUNTER = ["/programs/counter", "20", "7"];
const MEMORY = 64 << 20;
const slice = "/sys/fs/cgroup/system.slice";

const controllers = existsSync("/sys/fs/cgroup/cgroup.controllers")
  ? readFileSync("/sys/fs/cgroup/cgroup.controllers", "utf8").trim().split(" ")
  : [];
const limits = {
  ...(controllers.includes("memory") && { memoryLimit: MEMORY }),
  ...(controllers.includes("pids") && { pidsLimit: 40 }),
};

const lacks = !existsSync("/run/systemd/system")
  ? "systemd doesn't run here"
  : existsSync("/sys/fs/cgroup/cgroup.controllers")
    ? undefined
    : "the host's cgroups are of version 1";

// Of version 2; a host in namespaces has its machine's hierarchies of version 1 in there, too.
const unified = (text: string) => text.match(/^0::.*$/gm) ?? [];
const isActive = (unit: string) => spawnSync("systemctl", ["is-active", "--quiet", unit]).status === 0;
const cgroupOf = (pid: number) => unified(readFileSync(`/proc/${pid}/cgroup`, "utf8"))[0];

for (const combination of enginesForCheckpoints) {
  const missing = missingFor(combination) ?? lacks;
  describe.skipIf(missing)(`${combination.engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor(combination, (started) => {
      live = started;
    });

    // crun makes a cgroup of its own in the scope.
    const own = combination.engine === "crun" ? "/container" : "";
    const scopeOf = (id: string) => `${live.namespace}-${id}.scope`;
    const readOf = (id: string, file: string) => readFileSync(join(slice, scopeOf(id), file), "utf8").trim();
    const inScope = (id: string, runtimeOptions: { criuImagePath?: string } = {}): RunOptions => ({
      id,
      ...limits,
      runtimeOptions: live.engineOptions({ systemdCgroup: true, ...runtimeOptions }),
      edit: (spec) => {
        spec.linux.cgroupsPath = `system.slice:${live.namespace}:${id}`;
      },
    });
    const expectLimits = (id: string) => {
      if (limits.memoryLimit) expect(readOf(id, "memory.max")).toBe(`${MEMORY}`);
      if (limits.pidsLimit) expect(readOf(id, "pids.max")).toBe("40");
    };
    const scopeIsGone = (id: string) =>
      until(() => !existsSync(join(slice, scopeOf(id))), { what: () => `the end of ${scopeOf(id)}` });

    it("lives in its scope: limits, execs, pause and resume, exit code", async () => {
      await using task = await live.run(["counter"], inScope("life"));
      expect(cgroupOf(task.pid)).toBe(`0::/system.slice/${scopeOf("life")}${own}`);
      expectLimits("life");
      const { status, stdout } = await task.execToEnd(["cat", "/proc/1/cgroup", "/proc/self/cgroup"]);
      expect(status).toBe(0);
      const [init, exec] = unified(stdout);
      expect(exec).toBe(init);
      await task.pause();
      expect(readOf("life", `.${own}/cgroup.events`)).toMatch(/^frozen 1$/m);
      expect(await task.status()).toBe("PAUSED");
      await task.resume();
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
      await task.kill(9);
      expect(await task.wait()).toBe(137);
      await task.delete();
      await scopeIsGone("life");
    });

    it("lives in its scope also where only the path of its cgroup says so, as Docker's does", async () => {
      const { edit } = inScope("docker");
      await using task = await live.run(["counter"], {
        id: "docker",
        runtimeOptions: live.engineOptions({}),
        edit,
      });
      expect(cgroupOf(task.pid)).toBe(`0::/system.slice/${scopeOf("docker")}${own}`);
      await task.kill(9);
      expect(await task.wait()).toBe(137);
      await task.delete();
      await scopeIsGone("docker");
    });

    it("is restored into a scope of its own, with its limits, and again from there", async () => {
      let task = await live.run(["counter"], inScope("gen0"));
      let last = await task.nextNumber();
      for (const id of ["gen1", "gen2"]) {
        const image = await task.checkpoint({ exit: true });
        expect(await task.wait()).toBe(137);
        await task.stdout.end().catch(() => undefined);
        last = numbersIn(task.stdout.text).at(-1) ?? last;
        await task.destroy();
        await scopeIsGone(task.id);
        task = await live.restore(image, ["counter"], inScope(id, { criuImagePath: image }));
        expect(await task.nextNumber()).toBe(last + 1);
        expect(cgroupOf(task.pid)).toBe(`0::/system.slice/${scopeOf(id)}${own}`);
        expectLimits(id);
      }
      expect((await task.execToEnd(["true"])).status).toBe(0);
      await task.kill(9);
      expect(await task.wait()).toBe(137);
      await task.delete();
      await scopeIsGone(task.id);
    });
  });
}

const missing = missingCallers() ?? lacks;

describe.skipIf(missing).each<EngineName>(["runc", "crun"])(
  `podman over %s${missing ? ` (${missing})` : ""}`,
  (engine) => {
    let podman: Podman;
    beforeAll(async () => {
      podman = await Podman.start(engine);
    });
    afterEach(async () => await podman.place.expectNoLeftovers((argv) => /cedanad/.test(argv)));
    afterAll(async () => await podman?.stop());

    const own = engine === "crun" ? "/container" : "";
    const ok = async (...args: string[]) => {
      const { status, stdout, stderr } = await podman.on("wrapper", ...args);
      expect(status, `podman ${args.join(" ")}: ${stderr}`).toBe(0);
      return stdout.trim();
    };
    /** The init's cgroup below the parent, which must be the scope of the container's name that systemd has. */
    const expectInScope = async (name: string, parent: string) => {
      const [id, pid] = (await ok("inspect", "--format", "{{.Id}} {{.State.Pid}}", name)).split(" ");
      const scope = `libpod-${id}.scope`;
      expect(cgroupOf(Number(pid))).toBe(`0::/${parent}/${scope}${own}`);
      expect(isActive(scope)).toBe(true);
      return scope;
    };
    const counts = async (name: string, from: number) =>
      await until(
        async () => {
          const last = Number((await ok("logs", "--tail", "1", name)) || -1);
          return last > from && last;
        },
        { everyMs: 50, what: () => `${name} to count on from ${from}` },
      );
    const counter = ["sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done"];

    it("restores into the scope of the new container, again and again, and leaves none behind", async () => {
      const parent = podman.place.namespace;
      const archive = join(podman.place.dir, "c.tar.gz");
      await ok("run", "--detach", "--name", "gen0", IMAGE, ...counter);
      const scopes = [await expectInScope("gen0", parent)];
      let last = await counts("gen0", 2);
      for (const [from, to] of [
        ["gen0", "gen1"],
        ["gen1", "gen2"],
      ] as const) {
        await ok("container", "checkpoint", "--export", archive, from);
        await until(() => !isActive(scopes.at(-1)!), {
          what: () => `the end of ${scopes.at(-1)}`,
        });
        await ok("rm", from);
        await ok("container", "restore", "--import", archive, "--name", to);
        scopes.push(await expectInScope(to, parent));
        last = await counts(to, last);
      }
      // Dumped where it was restored, and restored where it was.
      await ok("container", "checkpoint", "gen2");
      await ok("container", "restore", "gen2");
      expect(await expectInScope("gen2", parent)).toBe(scopes.at(-1));
      await counts("gen2", last);
      await ok("rm", "--force", "--time", "0", "gen2");
      for (const scope of scopes) {
        expect(isActive(scope)).toBe(false);
        expect(existsSync(join("/sys/fs/cgroup", parent, scope)), scope).toBe(false);
      }
    });
  },
);

for (const { containerd, engine } of [
  { containerd: "1.7", engine: "runc" },
  { containerd: "2.1", engine: "crun" },
] satisfies { containerd: ContainerdVersion; engine: EngineName }[]) {
  const cpu = controllers.includes("cpu")
    ? undefined
    : "no cpu controller of version 2, which CRI's pods use";
  const missing = missingFor({ containerd, engine }) ?? lacks ?? cpu;
  const why = missing ? ` (${missing})` : "";
  describe.skipIf(isControl || missing)(`a pod with ${engine} under containerd ${containerd}${why}`, () => {
    it("is checkpointed when it is stopped, and its successor goes on in a scope of its own", async () => {
      // Both ways in which a configuration may name us.
      const cri = containerd === "1.7" ? "type" : "path";
      await using live = await Live.start({ containerd, engine, cri, systemdCgroup: true });
      const slice = `${live.namespace.replaceAll("-", "")}.slice`; // as the kubelet names a pod's
      const expectInScope = ({ id }: { id: string }) => {
        const scope = `cri-containerd-${id}.scope`;
        const own = engine === "crun" ? "container" : "";
        expect(readFileSync(join("/sys/fs/cgroup", slice, scope, own, "cgroup.procs"), "utf8")).toMatch(/\d/);
        expect(isActive(scope)).toBe(true);
        return scope;
      };
      try {
        const annotations = { "cedana.io/checkpoint-on": "SIGTERM", "cedana.io/auto-resume": "drained" };
        await using pod = await Pod.run(live, { annotations, slice });
        const first = await pod.run(COUNTER);
        await first.numberAfter(3);
        expect(await first.exec(["sh", "-c", "exit 3"])).toMatchObject({ exitCode: 3 });
        const scope = expectInScope(first);
        await first.stop(60);
        expect(await first.status()).toMatchObject({ state: "EXITED", exitCode: 143 });
        const last = Number(first.lines().at(-1));
        await first.remove();
        await until(() => !isActive(scope), { what: () => `the end of ${scope}` });
        const successor = await pod.run(COUNTER);
        await successor.numberAfter(last);
        expect(Number(successor.lines()[0])).toBe(last + 1);
        expectInScope(successor);
      } finally {
        spawnSync("systemctl", ["stop", slice]);
      }
      expect(existsSync(join("/sys/fs/cgroup", slice))).toBe(false);
    });
  });
}

describe.skipIf(isControl || lacks)(`cedanad in its unit${lacks ? ` (${lacks})` : ""}`, () => {
  const units = "/run/systemd/system";
  const systemctl = (...args: string[]) => execFileSync("systemctl", args, { encoding: "utf8" }).trim();
  const mainPid = () => Number(systemctl("show", "--value", "--property=MainPID", "cedanad.service"));
  /** As packaged, with what is not installed here, and directories of our own, in a file beside. */
  function install(live: Live): void {
    for (const name of ["cedanad.service", "cedanad.socket"])
      writeFileSync(join(units, name), readFileSync(join(repository, "packaging/systemd", name)));
    const environment = Object.entries(live.environment())
      .filter(([name]) => name.startsWith("CEDANA_"))
      .map(([name, value]) => `Environment=${name}=${value}\n`);
    const own = {
      "cedanad.service": `[Service]\nExecStart=\nExecStart=${repository}/bin/cedanad\n${environment.join("")}`,
      "cedanad.socket": `[Socket]\nListenStream=\nListenStream=${live.runDir}/cedanad.sock\n`,
    };
    for (const [name, text] of Object.entries(own)) {
      mkdirSync(join(units, `${name}.d`), { recursive: true });
      writeFileSync(join(units, `${name}.d/own.conf`), text);
    }
    systemctl("daemon-reload");
  }
  function uninstall(): void {
    systemctl("stop", "cedanad.socket", "cedanad.service");
    for (const name of readdirSync(units).filter((name) => name.startsWith("cedanad.")))
      rmSync(join(units, name), { recursive: true });
    systemctl("daemon-reload");
  }

  it("is started by its socket, and can be killed, restarted and stopped while containers run", async () => {
    await using live = await Live.start();
    install(live);
    try {
      systemctl("start", "cedanad.socket");
      expect(mainPid()).toBe(0);
      await using task = await live.run(["counter"]);
      const first = mainPid();
      expect(live.cedanad()!.pid).toBe(first);
      expect(cgroupOf(first)).toBe("0::/system.slice/cedanad.service");
      expect(cgroupOf(task.pid)).not.toContain("cedanad");
      // Without CAP_SYS_RESOURCE systemd lets it be.
      const mayLower =
        BigInt(`0x${/CapEff:\t(\w+)/.exec(readFileSync("/proc/self/status", "utf8"))![1]}`) & (1n << 24n);
      expect(readFileSync(`/proc/${first}/oom_score_adj`, "utf8")).toBe(mayLower ? "-500\n" : "0\n");

      process.kill(first, "SIGKILL");
      await until(() => mainPid() !== first && mainPid() !== 0, { what: () => "systemd's next cedanad" });
      expect((await task.execToEnd(["true"])).status).toBe(0);
      const second = mainPid();
      expect(live.cedanad()!.pid).toBe(second);

      systemctl("restart", "cedanad.service");
      expect(mainPid()).not.toBe(second);
      expect((await task.execToEnd(["sh", "-c", "exit 3"])).status).toBe(3);
      const image = await task.checkpoint({ exit: false });
      expect(existsSync(image)).toBe(true);
      expect(live.cedanad()!.pid).toBe(mainPid());

      // Without its units the first who needs one starts it.
      systemctl("stop", "cedanad.socket", "cedanad.service");
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
      expect((await task.execToEnd(["true"])).status).toBe(0);
      expect(mainPid()).toBe(0);

      // Where the units come back, systemd's takes over from that one.
      const without = live.cedanad()!.pid;
      systemctl("start", "cedanad.socket");
      await using other = await live.run(["counter"], { id: "other" });
      expect(await other.nextNumber()).toBe(0);
      expect(live.cedanad()!.pid).toBe(mainPid());
      await until(() => !existsSync(`/proc/${without}`), { what: () => "the end of the one before" });
      await task.kill(9);
      expect(await task.wait()).toBe(137);
    } finally {
      uninstall();
    }
  });
});
