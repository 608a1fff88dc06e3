// A restore's engine is started while the checkpoint is still looked at, and its CRIU waits at a gate. Whatever comes out otherwise, whoever
// dies meanwhile, and wherever the engine goes instead: nothing of it is left, and the caller hears what cedana says alone.

import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { childrenOf } from "../../src/linux/proc.ts";
import { CallerPlace, missingCallers } from "./harness/callers.ts";
import { Holder } from "./harness/holder.ts";
import { busyboxRootfs, programs } from "./harness/programs.ts";
import { containerSpec } from "./harness/spec.ts";
import { entries, processesOf, systemdRuns } from "./harness/system.ts";
import { until } from "./harness/until.ts";

const missing = missingCallers(); // for the mount namespace and the reaper

const REAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

describe.skipIf(missing).each(["runc", "crun"] as const)(
  "the early engine of a restore over %s",
  (engine) => {
    let place: CallerPlace;
    let bundle: string;
    let holder: Holder;
    let mounted: string;
    const started: ChildProcess[] = [];
    beforeAll(async () => {
      mounted = await programs();
      place = await CallerPlace.start(engine);
      bundle = at("b");
      busyboxRootfs(bundle);
      holder = new Holder(at("plugins"));
      writeFileSync(place.env.CEDANA_CONFIG!, JSON.stringify({ plugins: holder.configuration }), {
        mode: 0o600,
      });
      // The engine is a script, which tests change without changing its file.
      const script = `#!/bin/sh\n. ${at("how")}\nexec ${engine} "$@"\n`;
      writeFileSync(at(`${engine}-script`), script, { mode: 0o755 });
      const configuration = JSON.parse(readFileSync(place.config, "utf8"));
      writeFileSync(place.config, JSON.stringify({ ...configuration, engine: at(`${engine}-script`) }));
    });
    beforeEach(async () => {
      goes("");
      configure("one");
      counting("run");
      await until(() => numbers().length > 2, { what: () => `it to count: ${output()}` });
      await checkpoint();
      await restore(); // a cedanad knows from now on that this engine comes to its gate
      await checkpoint();
    });
    afterEach(async () => {
      await runtime("delete", "--force", "box");
      for (const child of started.splice(0)) child.kill("SIGKILL");
      for (const name of ["images", "out", "log", "root"]) rmSync(at(name), { recursive: true, force: true });
      holder.reset();
      await place.expectNoLeftovers((argv) => /cedanad/.test(argv));
      for (const name of ["c", "oci", "oci-bundles"])
        await until(() => entries(join(place.runDir, name)).length === 0, {
          what: () => `nothing in ${name}: ${entries(join(place.runDir, name))}`,
        });
    });
    afterAll(async () => {
      await place?.stop();
    });

    const at = (name: string) => join(place.dir, name);
    const runtime = (...args: string[]) => place.run(place.runtime("wrapper", "--root", at("root"), ...args));
    /** What the engine's script does before it calls the engine. */
    const goes = (line: string) => writeFileSync(at("how"), `${line}\n`);
    const output = () => (existsSync(at("out")) ? readFileSync(at("out"), "utf8") : "");
    const numbers = () =>
      output()
        .split("\n")
        .filter((line) => /^\d+$/.test(line))
        .map(Number);
    function configure(hostname: string, cgroup = "early"): void {
      const spec = containerSpec({
        args: ["counter", "20"],
        cgroupsPath: place.cgroupsPath(cgroup),
        programs: mounted,
        edit: (edited) => Object.assign(edited, { hostname }),
      });
      writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
    }
    /** A container's output by a real pipe: Node's are sockets, which CRIU can't put in the place of a pipe. */
    function counting(...args: string[]): ChildProcess {
      return countingWith({}, ...args);
    }
    function countingWith(env: Record<string, string>, ...args: string[]): ChildProcess {
      const options = ["--root", at("root"), "--log", at("log"), "--log-format", "json"];
      const line = place.runtime("wrapper", ...options, ...args, "--detach", "--bundle", bundle, "box");
      const script = `"$@" 2>&1 3>&- | cat >>${at("out")} 3>&-`;
      const [program, ...rest] = place.inside(["sh", "-c", script, "sh", ...line]);
      const child = spawn(program!, rest, { env: { ...place.env, ...env }, cwd: place.dir, stdio: "ignore" });
      started.push(child);
      return child;
    }
    async function checkpoint(): Promise<void> {
      rmSync(at("images"), { recursive: true, force: true });
      const { status, stderr } = await runtime("checkpoint", "--image-path", at("images"), "box");
      expect(status, stderr).toBe(0);
    }
    const begin = () => counting("restore", "--image-path", at("images"));
    /** It counts on, and no number is missing or comes twice. */
    async function goesOn(before = numbers().length): Promise<void> {
      await until(() => numbers().length > before + 1, {
        what: () => `it to go on: ${output().slice(-2000)}`,
      });
      expect(numbers()).toEqual(numbers().map((_, at) => at));
    }
    async function restore(): Promise<void> {
      const before = numbers().length;
      begin();
      await goesOn(before);
    }

    interface Held {
      child: ChildProcess;
      wrapper: number;
      /** undefined: it isn't started early */
      engine: number | undefined;
      release(): void;
    }
    async function held(start = begin): Promise<Held> {
      holder.hold();
      const child = start();
      await holder.isHeld(() => `a held restore: ${output()}`);
      const wrapper = processesOf(place).find(
        ({ argv }) => argv[0]?.endsWith("cedana-runtime") && argv.includes("restore"),
      )!.pid;
      return { child, wrapper, engine: childrenOf(wrapper)[0], release: () => holder.release() };
    }
    /** … whose engine stands at the gate. */
    async function atGate(): Promise<Held & { engine: number }> {
      const one = await held();
      expect(one.engine, "it is started early").toBeDefined();
      await until(() => processesOf(place).some(({ argv }) => argv[0] === "criu"), {
        what: () => "CRIU at the gate",
      });
      return { ...one, engine: one.engine! };
    }
    const engines = () =>
      processesOf(place).filter(({ argv }) => argv[0]?.endsWith(engine) || argv[0] === "criu");
    async function failed(child: ChildProcess): Promise<string> {
      const before = output().length;
      await until(() => child.exitCode !== null || child.signalCode !== null, { what: () => "its end" });
      expect(numbers().length).toBe(numbersOf(output().slice(0, before)));
      await until(() => engines().length === 0, { what: () => `no engine: ${JSON.stringify(engines())}` });
      await until(() => !existsSync(at("root/box")), { what: () => `no state: ${entries(at("root/box"))}` });
      const scratches = () => entries(join(place.runDir, "c")); // while it is undone, the id is taken
      await until(() => scratches().length === 0, { what: () => `the end of the restore: ${scratches()}` });
      return output();
    }
    const numbersOf = (text: string) => text.split("\n").filter((line) => /^\d+$/.test(line)).length;

    it("waits with nothing made but the directory of its state, and is let go", {
      timeout: 60_000,
    }, async () => {
      const before = numbers().length;
      const files = entries(join(bundle, "rootfs"));
      const one = await atGate();
      expect(entries(at("root/box"))).toEqual(engine === "crun" ? ["config.json"] : []);
      const mounts = readFileSync(`/proc/${one.engine}/mountinfo`, "utf8");
      expect(mounts).not.toContain("criu-root");
      expect(entries(join(bundle, "rootfs"))).toEqual(files);
      one.release();
      await goesOn(before);
      expect(place.cedanadLog()).not.toContain("past cedana's gate");
    });

    it("is ended when the restore is refused, and only cedana is heard", { timeout: 60_000 }, async () => {
      rmSync(at("log"));
      const said = output().length;
      holder.refuse();
      const one = await atGate();
      one.release();
      await failed(one.child);
      expect(output().slice(said)).toBe("the test has refused it (step holder:hold)\n");
      const lines = readFileSync(at("log"), "utf8").trim().split("\n");
      expect(lines.map((line) => JSON.parse(line).msg)).toEqual([
        expect.stringContaining("the test has refused it"),
      ]);
      await restore();
      await checkpoint();

      // By what is looked at beside it, however far it has come.
      for (const name of ["descriptors.json", "pstree.img"]) {
        const from = output().length;
        renameSync(join(at("images"), name), at("aside"));
        await failed(begin());
        expect(output().slice(from)).toContain(name);
        expect(output().slice(from).trim().split("\n")).toHaveLength(1);
        renameSync(at("aside"), join(at("images"), name));
      }
      await restore();
    });

    it.each(["wrapper", "engine", "cedanad"] as const)(
      "leaves nothing when %s is killed meanwhile",
      { timeout: 60_000 },
      async (victim) => {
        const one = await atGate();
        process.kill({ ...one, cedanad: place.cedanadPid() }[victim], "SIGKILL");
        one.release();
        await failed(one.child);
        await restore();
      },
    );

    it("is ended with all below it where the script waits for it", { timeout: 60_000 }, async () => {
      goes(`${engine} "$@"; exit $?`);
      holder.refuse();
      const one = await atGate();
      one.release();
      await failed(one.child);
      expect(output()).toMatch(/^the test has refused it \(step holder:hold\)\n$/m);
      await restore();
    });

    it.each([true, false])(
      "leaves alone what has got the id meanwhile, refused: %s",
      { timeout: 60_000 },
      async (refused) => {
        if (refused) holder.refuse();
        const one = await atGate();
        const theirs = (...args: string[]) =>
          place.run(place.runtime("engine", "--root", at("root"), ...args, "box"));
        expect((await theirs("delete", "--force")).status).toBe(0);
        const before = numbers().length;
        configure("one", systemdRuns ? "theirs" : "early"); // a scope's name is free when systemd has seen that it is empty
        const script = `"$@" >>${at("out")} 2>&1`;
        const run = place.runtime(
          "engine",
          "--root",
          at("root"),
          "run",
          "--detach",
          "--bundle",
          bundle,
          "box",
        );
        expect((await place.run(["sh", "-c", script, "sh", ...run])).status).toBe(0);
        one.release();
        await until(() => one.child.exitCode !== null, { what: () => "the end of the restore" });
        expect(output()).toMatch(refused ? "the test has refused it" : /container .*already exists/);
        await until(() => numbers().length > before + 3, { what: () => `it to count on: ${output()}` });
        expect(JSON.parse((await theirs("state")).stdout).status).toBe("running");
        expect(numbers().slice(before, before + 3)).toEqual([0, 1, 2]);
      },
    );

    it("has CRIU read what the caller's own environment names", { timeout: 60_000 }, async () => {
      const config = at("callers.conf");
      const restoring = (CRIU_CONFIG_FILE: string) =>
        countingWith({ CRIU_CONFIG_FILE }, "restore", "--image-path", at("images"));
      await failed(restoring(config));
      expect(output()).toMatch(/read CRIU_CONFIG_FILE \S*callers.conf: .*ENOENT/);
      writeFileSync(config, "no-such-option\n");
      await failed(restoring(config));
      expect(output()).toContain("--no-such-option");
      writeFileSync(config, "tcp-close\n");
      const before = numbers().length;
      restoring(config);
      await goesOn(before);
    });

    it.runIf(engine === "runc")(
      "is not started early with a CRIU of its own, which it finds past the gate",
      {
        timeout: 60_000,
      },
      async () => {
        const options = ["--criu", "/usr/sbin/criu", "restore", "--image-path", at("images")];
        const one = await held(() => counting(...options));
        expect(one.engine).toBe(undefined);
        one.release();
        await goesOn();
      },
    );

    it("is started again where the images are to be others'", { timeout: 60_000 }, async () => {
      configure("two");
      const before = numbers().length;
      const one = await atGate();
      one.release();
      await goesOn(before);
      const { stdout } = await runtime("exec", "box", "/bin/sh", "-c", "/bin/busybox hostname");
      expect(stdout.trim()).toBe("two");
    });

    it("is started again when it finds its CRIU past PATH, and then waits for the end of the looking", {
      timeout: 60_000,
    }, async () => {
      goes(`PATH=${REAL_PATH}`);
      const before = numbers().length;
      begin();
      await goesOn(before);
      await checkpoint();
      const later = await held();
      expect(later.engine).toBe(undefined);
      later.release();
      await goesOn();
      goes("");
      await checkpoint();
      await restore();
      await checkpoint();
      (await atGate()).release();
      await goesOn();
    });

    it("is undone when it restores past the gate what is refused then", { timeout: 60_000 }, async () => {
      goes(`exec env -i PATH=${REAL_PATH} ${engine} "$@"`);
      holder.refuse();
      const one = await held();
      await until(() => childrenOf(one.wrapper).length === 0, { what: () => "the engine's end" });
      one.release();
      await until(() => one.child.exitCode !== null, { what: () => "its end" });
      expect(output()).toContain("the test has refused it");
      await until(() => !existsSync(at("root/box")), { what: () => "no state of it" });

      const before = numbers().length;
      goes("");
      await restoreAfter(before);
    });

    /** The counter may have got on before it was ended. */
    async function restoreAfter(before: number): Promise<void> {
      begin();
      await until(() => numbers().length > before + 1, {
        what: () => `it to go on: ${output().slice(-2000)}`,
      });
    }
  },
);
