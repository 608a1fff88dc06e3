import { type SpawnSyncReturns, spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { criuConfig } from "../../src/criu/option-file.ts";
import {
  AlreadyExists,
  CedanaError,
  InvalidRequest,
  NotFound,
  RuntimeFailed,
  Unavailable,
  Unsupported,
  WrongState,
} from "../../src/errors/index.ts";
import {
  Engine,
  type EngineCommand,
  type EngineFeatures,
  engineVersion,
  longOptions,
  parseVersion,
} from "../../src/runtime/engine.ts";
import { engineFailure, failureFrom, lastErrorIn, lastLogError } from "../../src/runtime/engine-failure.ts";

const common = { id: "c1", logFile: "/b/log.json" };
const runc = new Engine({ namespace: "k8s.io" });
const crun = new Engine({
  binary: "/opt/bin/crun",
  namespace: "default",
  root: "/run/own/",
  systemdCgroup: true,
});
const line = ({ argv }: EngineCommand) => argv.join(" ");

const runcGlobal = "runc --root /run/containerd/runc/k8s.io --log /b/log.json --log-format json";
const crunGlobal =
  "/opt/bin/crun --root /run/own/default --log /b/log.json --log-format json --systemd-cgroup";

describe("command lines", () => {
  it("name the state directory of containerd's own shim", () => {
    expect(runc.root).toBe("/run/containerd/runc/k8s.io");
    expect(crun.root).toBe("/run/own/default");
    expect([runc.name, crun.name]).toEqual(["runc", "crun"]);
  });

  it("create", () => {
    const paths = { ...common, bundle: "/b", pidFile: "/b/init.pid" };
    expect(line(runc.create(paths))).toBe(`${runcGlobal} create --bundle /b --pid-file /b/init.pid c1`);
    expect(line(crun.create({ ...paths, consoleSocket: "/b/s", noPivot: true, noNewKeyring: true }))).toBe(
      `${crunGlobal} create --bundle /b --pid-file /b/init.pid --console-socket /b/s --no-pivot --no-new-keyring c1`,
    );
  });

  it("start, delete, kill, update", () => {
    expect(line(runc.start(common))).toBe(`${runcGlobal} start c1`);
    expect(line(runc.delete(common))).toBe(`${runcGlobal} delete c1`);
    expect(line(crun.delete({ ...common, force: true }))).toBe(`${crunGlobal} delete --force c1`);
    expect(line(runc.kill({ ...common, signal: 15 }))).toBe(`${runcGlobal} kill c1 15`);
    expect(line(runc.kill({ ...common, signal: 9, all: true }))).toBe(`${runcGlobal} kill --all c1 9`);
    expect(line(runc.update({ ...common, resourcesFile: "/b/r.json" }))).toBe(
      `${runcGlobal} update --resources /b/r.json c1`,
    );
  });

  it("exec", () => {
    const paths = { ...common, processFile: "/b/p.json", pidFile: "/b/1.pid" };
    expect(line(runc.exec(paths))).toBe(
      `${runcGlobal} exec --process /b/p.json --detach --pid-file /b/1.pid c1`,
    );
    expect(line(runc.exec({ ...paths, detach: false, consoleSocket: "/b/s" }))).toBe(
      `${runcGlobal} exec --process /b/p.json --console-socket /b/s --pid-file /b/1.pid c1`,
    );
  });

  it("checkpoint", () => {
    expect(line(runc.checkpoint({ ...common, imagePath: "/i" }))).toBe(
      `${runcGlobal} checkpoint --image-path /i c1`,
    );
    const full = {
      ...common,
      imagePath: "/i",
      workPath: "/w",
      parentPath: "../parent",
      leaveRunning: true,
      tcpEstablished: true,
      extUnixSockets: true,
      shellJob: true,
      fileLocks: true,
      cgroupsMode: "strict",
    };
    const flags =
      "--image-path /i --work-path /w --tcp-established --ext-unix-sk --shell-job --file-locks --manage-cgroups-mode strict";
    expect(line(runc.checkpoint({ ...full, emptyNamespaces: ["network", "ipc"] }))).toBe(
      `${runcGlobal} checkpoint ${flags} --empty-ns network --empty-ns ipc --parent-path ../parent --leave-running c1`,
    );
    expect(line(crun.checkpoint(full))).toBe(
      `${crunGlobal} checkpoint ${flags} --parent-path ../parent --leave-running c1`,
    );
  });

  const paths = { ...common, imagePath: "/i", workPath: "/w", bundle: "/b", pidFile: "/b/init.pid" };

  it("restore", () => {
    expect(line(runc.restore({ ...paths, noPivot: true, consoleSocket: "/b/s", tcpEstablished: true }))).toBe(
      `${runcGlobal} restore --image-path /i --work-path /w --tcp-established --bundle /b --detach --pid-file /b/init.pid --console-socket /b/s --no-pivot --no-subreaper c1`,
    );
    expect(line(crun.restore(paths))).toBe(
      `${crunGlobal} restore --image-path /i --work-path /w --bundle /b --detach --pid-file /b/init.pid c1`,
    );
  });

  it("name the option that an engine lacks", () => {
    const refused = (build: () => unknown) => {
      try {
        return build();
      } catch (err) {
        expect(err).toBeInstanceOf(Unsupported);
        return (err as Error).message;
      }
    };
    expect(refused(() => crun.checkpoint({ ...common, imagePath: "/i", emptyNamespaces: ["network"] }))).toBe(
      "crun checkpoint --empty-ns",
    );
    expect(refused(() => crun.restore({ ...paths, noPivot: true }))).toBe("crun restore --no-pivot");
    expect(refused(() => runc.restore({ ...paths, tcpClose: true }))).toBe("runc restore --tcp-close");
    expect(refused(() => runc.checkpoint({ ...common, imagePath: "/i", tcpSkipInFlight: true }))).toBe(
      "runc checkpoint --tcp-skip-in-flight",
    );
  });

  it("say past the engine what only CRIU knows, by a configuration file", () => {
    const command = runc.restore({ ...paths, tcpClose: true, criuConfigFile: "/w/criu.conf" });
    expect(command.env).toEqual(["CRIU_CONFIG_FILE=/w/criu.conf"]);
    expect(command.argv).not.toContain("--tcp-close");
    expect(criuConfig({ tcpClose: true, leaveStopped: true })).toBe("tcp-close\nleave-stopped\n");
    expect(criuConfig({ skipInFlight: true })).toBe("skip-in-flight\n");
    const lazy = { ...paths, workPath: "/w", lazyPages: true, criuConfigFile: "/w/criu.conf" };
    expect(runc.restore(lazy).argv).toContain("--lazy-pages"); // it says to CRIU what it is not told as well
    expect(crun.restore(lazy).argv).not.toContain("--lazy-pages");
    expect(criuConfig({ lazyPages: true })).toBe("lazy-pages\n");
    const cgroupRoots = [
      ["", "/pod/new"],
      ["name=systemd", "/here"],
    ] as const;
    expect(criuConfig({ cgroupRoots })).toBe('cgroup-root ":/pod/new"\ncgroup-root "name=systemd:/here"\n');
    expect(criuConfig({ cgroupYard: "/sys/fs/cgroup" })).toBe('cgroup-yard "/sys/fs/cgroup"\n');
    expect(criuConfig({})).toBe("");
    expect(() => criuConfig({ pluginDirectory: '/w"\nlog-file "/x' })).toThrow(InvalidRequest);
    for (const path of ['/a"b', "/a\nexec-cmd", "/a\\"])
      expect(() => criuConfig({ cgroupRoots: [["", path]] })).toThrow(InvalidRequest);
  });

  it("use a newer engine's options", () => {
    const features: EngineFeatures = {
      name: "crun",
      version: "1.28",
      checkpoint: new Set(["image-path"]),
      restore: new Set(["image-path", "work-path", "bundle", "detach", "pid-file", "tcp-close"]),
    };
    const newer = new Engine({ binary: "/opt/engine", namespace: "x", features });
    expect(newer.name).toBe("crun");
    expect(newer.restore({ ...paths, tcpClose: true }).argv).toContain("--tcp-close");
    expect(() => newer.checkpoint({ ...common, imagePath: "/i", workPath: "/w" })).toThrow(
      "crun 1.28 checkpoint --work-path",
    );
  });

  it("refuse what an engine would take for something else", () => {
    for (const id of ["", "-rf", "a/b", "..", ".", "a b", "a\n"])
      expect(() => runc.start({ ...common, id })).toThrow(InvalidRequest);
    expect(runc.start({ ...common, id: "a.b-c_d+1" }).argv.at(-1)).toBe("a.b-c_d+1");
    expect(() => runc.create({ ...common, bundle: "b", pidFile: "/p" })).toThrow("bundle");
    expect(() => runc.checkpoint({ ...common, imagePath: "" })).toThrow("image path");
    expect(() => runc.checkpoint({ ...common, imagePath: "/i", parentPath: "/p" })).toThrow("relative");
    expect(() => runc.start({ id: "c", logFile: "log" })).toThrow("log file");
  });
});

describe("an engine's log", () => {
  it("ends with the error that counts", () => {
    expect(
      lastErrorIn(
        '{"level":"error","msg":"first","time":"x"}\n{"level":"error","msg":"last \\"one\\"","time":"x"}\n{"level":"info","msg":"later","time":"x"}\n',
      ),
    ).toBe('last "one"');
  });

  it("may be text", () => {
    expect(
      lastErrorIn('time="2026-11-23T00:36:51Z" level=error msg="flag provided but \\"not\\" defined: -x"\n'),
    ).toBe('flag provided but "not" defined: -x');
    expect(lastErrorIn("time=x level=fatal msg=broken\ntime=x level=info msg=fine\n")).toBe("broken");
    expect(lastErrorIn("chdir `/x` failed: No such file or directory\n\n")).toBe(
      "chdir `/x` failed: No such file or directory",
    );
    expect(lastErrorIn('{"level":"warning","msg":"only this"}\n')).toBeUndefined();
    expect(lastErrorIn('{"level":"err')).toBe('{"level":"err');
    expect(lastErrorIn("")).toBeUndefined();
  });

  it("may be missing, or long", async () => {
    const directory = mkdtempSync(join(tmpdir(), "cedana-log-"));
    try {
      const log = join(directory, "log.json");
      expect(await lastLogError(log)).toBeUndefined();
      expect(await lastLogError(directory)).toBeUndefined();
      writeFileSync(
        log,
        `${'{"level":"debug","msg":"x"}\n'.repeat(100_000)}{"level":"error","msg":"the end"}\n`,
      );
      expect(await lastLogError(log)).toBe("the end");
    } finally {
      rmSync(directory, { recursive: true });
    }
  });
});

describe("a failure", () => {
  // Words of runc 1.1.15 and crun 1.21, each seen.
  it.each<[action: string, words: string, meaning: unknown]>([
    ["start", "container does not exist", NotFound],
    ["exec", "exec failed: container does not exist", NotFound],
    ["state", "error opening file `/run/x/c1/status`: No such file or directory", NotFound],
    ["state", "error opening file '/run/x/c1/status': No such file or directory", NotFound],
    ["delete", "cannot open directory `/run/x/c1`: No such file or directory", NotFound],
    ["kill", "container not running", NotFound],
    ["kill", "os: process already finished", NotFound],
    ["kill", "unable to signal init: no such process", NotFound],
    ["create", "runc create failed: container with given ID already exists", AlreadyExists],
    ["create", "container with id exists: c1", AlreadyExists],
    ["create", "container `c1` already exists", AlreadyExists],
    ["pause", "container not running", WrongState],
    ["update", "container not running", WrongState],
    ["resume", "container not paused", WrongState],
    ["start", "cannot start an already running container", WrongState],
    ["start", "cannot start a container that has stopped", WrongState],
    ["start", "cannot open `/run/x/c1/exec.fifo`: No such file or directory", WrongState],
    ["exec", "exec failed: cannot exec in a stopped container", WrongState],
    ["exec", "exec failed: cannot exec in a paused container (use --ignore-paused to override)", WrongState],
    ["exec", "the container `c1` is paused", WrongState],
    ["exec", "fail startup", WrongState],
    ["delete", "cannot delete container c1 that is not stopped: running", WrongState],
    ["delete", "the container `c1` is not in `created` or `stopped` state", WrongState],
    ["checkpoint", "Container cannot be checkpointed in created state", WrongState],
    ["checkpoint", "criu failed: type NOTIFY errno 0\nlog file: /w/dump.log", RuntimeFailed],
    ["restore", "error opening file `/i/descriptors.json`: No such file or directory", RuntimeFailed],
    ["restore", "open /i/descriptors.json: no such file or directory", RuntimeFailed],
    [
      "exec",
      'exec failed: unable to start container process: exec: "/x": stat /x: no such file or directory',
      RuntimeFailed,
    ],
    ["create", "executable file `/bin/x` not found: No such file or directory", RuntimeFailed],
    ["kill", "send signal to pidfd: Invalid argument", RuntimeFailed],
    ["state", "error opening file `/run/x/other/status`: No such file or directory", RuntimeFailed],
  ])("of %s with `%s`", (action, words, meaning) => {
    const failure = failureFrom(action, "c1", 1, words);
    expect(failure).toBeInstanceOf(meaning);
    expect(failure.message).toBe(`${action} c1: ${words}`);
  });

  it("of a container with an odd id, as crun takes it", () => {
    for (const id of ["a(b", "a[b", "a$&", "a\\", "a|b"])
      expect(
        failureFrom("state", id, 1, `cannot open directory \`/r/${id}\`: No such file or directory`),
        id,
      ).toBeInstanceOf(NotFound);
  });

  it("without words has at least a status", async () => {
    const failure = await engineFailure("start", "c1", 137, "/nowhere/log.json");
    expect(failure).toBeInstanceOf(RuntimeFailed);
    expect(failure).toMatchObject({
      exitStatus: 137,
      message: "start c1: the engine ended with status 137 and said nothing",
    });
  });

  it("takes its words from the output where the log has none", async () => {
    const directory = mkdtempSync(join(tmpdir(), "cedana-log-"));
    try {
      writeFileSync(join(directory, "log.json"), "");
      writeFileSync(join(directory, "out"), "chdir `/x` failed: No such file or directory\n");
      const failure = await engineFailure(
        "create",
        "c1",
        1,
        join(directory, "log.json"),
        join(directory, "out"),
      );
      expect(failure.message).toBe("create c1: chdir `/x` failed: No such file or directory");
    } finally {
      rmSync(directory, { recursive: true });
    }
  });
});

describe("an engine's version", () => {
  it("is in the first line", () => {
    expect(parseVersion("runc version 1.1.15+ds1\ncommit: x\nspec: 1.2.0\n", "runc")).toEqual({
      name: "runc",
      version: "1.1.15+ds1",
    });
    expect(parseVersion("crun version 1.21\ncommit: x\n", "crun")).toEqual({ name: "crun", version: "1.21" });
    expect(() => parseVersion("what?\n", "/bin/x")).toThrow(Unavailable);
  });

  it("comes with the options in its help", () => {
    const runcHelp =
      "OPTIONS:\n   --image-path value  path\n   --bundle value, -b value  root --not-this\n   --detach, -d  x\n";
    expect([...longOptions(runcHelp)]).toEqual(["image-path", "bundle", "detach"]);
    const crunHelp = "  -b, --bundle=DIR   container\n      --tcp-close        close\n  -?, --help   help\n";
    expect([...longOptions(crunHelp)]).toEqual(["bundle", "tcp-close", "help"]);
  });

  it("is asked for once, until the file changes", async () => {
    const directory = mkdtempSync(join(tmpdir(), "cedana-engine-"));
    try {
      const [engine, count] = [join(directory, "engine"), join(directory, "count")];
      const write = (version: string) => {
        rmSync(engine, { force: true });
        writeFileSync(
          engine,
          `#!/bin/sh\necho x >> ${count}\ncase $1 in --version) echo runc version ${version};; *) echo "   --$1-only  x";; esac\n`,
        );
        chmodSync(engine, 0o755);
      };
      write("1.0");
      const [one, two] = await Promise.all([engineVersion(engine), engineVersion(engine)]);
      expect(one).toBe(two);
      expect(one).toMatchObject({ name: "runc", version: "1.0" });
      expect([...one.checkpoint, ...one.restore]).toEqual(["checkpoint-only", "restore-only"]);
      expect(readFileSync(count, "utf8")).toBe("x\n".repeat(3));
      write("2.0");
      expect((await engineVersion(engine)).version).toBe("2.0");
      writeFileSync(engine, "#!/bin/sh\nexit 1\n");
      await expect(engineVersion(engine)).rejects.toThrow(Unavailable);
    } finally {
      rmSync(directory, { recursive: true });
    }
  });

  it("of none is unavailable", async () => {
    await expect(engineVersion("no-such-engine")).rejects.toThrow("engine no-such-engine is not installed");
  });
});

// The real engines through a container's life. crun wants cgroup v2 alone, which a mount namespace of its own shows it.
const root = process.getuid?.() === 0;
const has = (program: string) => spawnSync("sh", ["-c", `command -v ${program}`]).status === 0;
const hybrid = existsSync("/sys/fs/cgroup/unified") || existsSync("/sys/fs/cgroup/freezer");

describe.each(["runc", "crun"] as const)("the real %s (as root, with busybox)", (name) => {
  const possible = root && has(name) && has("busybox");
  let directory: string;
  let engine: Engine;
  const id = `cedana-engine-${process.pid}`;

  function run({ argv, env = [] }: EngineCommand): SpawnSyncReturns<string> {
    const inV2 = name === "crun" && hybrid;
    const script = 'mount --make-rprivate / && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"';
    const full = inV2 ? ["unshare", "-m", "sh", "-c", script, "sh", ...argv] : argv;
    // The container keeps the engine's stdio: to a pipe, and spawnSync would wait for the container.
    const [program, ...rest] = full;
    rmSync(join(directory, "log.json"), { force: true });
    return spawnSync("/usr/bin/env", [...env, program!, ...rest], { stdio: "ignore", encoding: "utf8" });
  }

  async function succeeds(command: EngineCommand): Promise<void> {
    const { status } = run(command);
    if (status !== 0) throw await engineFailure("run", id, status ?? -1, join(directory, "log.json"));
  }

  async function failure(action: string, command: EngineCommand): Promise<CedanaError> {
    const { status } = run(command);
    expect(status).not.toBe(0);
    return engineFailure(action, id, status ?? -1, join(directory, "log.json"));
  }

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), "cedana-engine-"));
    engine = new Engine({ binary: name, namespace: "test", root: join(directory, "state") });
    mkdirSync(engine.root, { recursive: true });
    if (!possible) return;
    mkdirSync(join(directory, "rootfs/bin"), { recursive: true });
    for (const mountPoint of ["proc", "sys", "dev"]) mkdirSync(join(directory, "rootfs", mountPoint));
    spawnSync("sh", ["-c", `cp "$(command -v busybox)" ${directory}/rootfs/bin/sh`]);
    spawnSync("runc", ["spec"], { cwd: directory });
    if (!existsSync(join(directory, "config.json"))) spawnSync(name, ["spec"], { cwd: directory });
    const spec = JSON.parse(readFileSync(join(directory, "config.json"), "utf8"));
    spec.process.terminal = false;
    spec.process.args = [
      "/bin/sh",
      "-c",
      "i=0; while :; do i=$((i+1)); echo $i > /count; usleep 10000; done",
    ];
    spec.process.env = [];
    spec.root.readonly = false;
    writeFileSync(join(directory, "config.json"), JSON.stringify(spec));
  });

  afterEach(() => {
    if (possible) run(engine.delete({ id, logFile: join(directory, "log.json"), force: true }));
    rmSync(directory, { recursive: true });
  });

  it.skipIf(!possible)(
    "says what our table understands, from nothing to the end of a container",
    async () => {
      const common = { id, logFile: join(directory, "log.json") };
      const paths = { ...common, bundle: directory, pidFile: join(directory, "pid") };
      /** What we don't ask of engines, but others do. */
      const other = (action: string) => ({
        argv: engine.start(common).argv.map((word) => (word === "start" ? action : word)),
      });
      for (const action of ["start", "state", "pause", "delete"])
        expect(await failure(action, other(action))).toBeInstanceOf(NotFound);
      expect(await failure("kill", engine.kill({ ...common, signal: 15 }))).toBeInstanceOf(NotFound);
      await succeeds(engine.delete({ ...common, force: true }));

      await succeeds(engine.create(paths));
      const pid = Number(readFileSync(paths.pidFile, "utf8"));
      expect(existsSync(`/proc/${pid}`)).toBe(true);
      expect(existsSync(join(engine.root, id))).toBe(true);
      expect(await failure("create", engine.create(paths))).toBeInstanceOf(AlreadyExists);

      await succeeds(engine.start(common));
      expect(await failure("start", engine.start(common))).toBeInstanceOf(WrongState);
      expect(await failure("delete", engine.delete(common))).toBeInstanceOf(WrongState);
      await succeeds(other("pause"));
      const process_ = { args: ["/bin/sh", "-c", "exit 0"], cwd: "/", user: { uid: 0, gid: 0 } };
      writeFileSync(join(directory, "process.json"), JSON.stringify(process_));
      const exec = {
        ...common,
        processFile: join(directory, "process.json"),
        pidFile: join(directory, "exec.pid"),
      };
      expect(await failure("exec", engine.exec(exec))).toBeInstanceOf(WrongState);
      await succeeds(other("resume"));
      await succeeds(engine.exec(exec));
      writeFileSync(join(directory, "process.json"), JSON.stringify({ ...process_, args: ["/nothing"] }));
      const missing = await failure("exec", engine.exec(exec));
      expect(missing).toBeInstanceOf(RuntimeFailed);
      expect(missing.message).toContain("/nothing");
      writeFileSync(join(directory, "resources.json"), "{}");
      await succeeds(engine.update({ ...common, resourcesFile: join(directory, "resources.json") }));

      await succeeds(engine.kill({ ...common, signal: 9 }));
      while (existsSync(`/proc/${pid}`) && !/\) Z /.test(readFileSync(`/proc/${pid}/stat`, "utf8")))
        await sleep(5);
      if (name === "runc") {
        expect(await failure("kill", engine.kill({ ...common, signal: 9 }))).toBeInstanceOf(NotFound);
        expect(await failure("exec", engine.exec(exec))).toBeInstanceOf(WrongState);
      }
    },
  );

  it.skipIf(!possible || !has("criu"))(
    "goes on counting after a checkpoint and a restore",
    { timeout: 20_000 },
    async () => {
      // On a hybrid host CRIU sees the v1 hierarchies even where crun doesn't, and a restore that manages them leaves a cpuset
      // behind that takes the CPUs from every other container.
      const cgroupsMode = name === "crun" && hybrid ? "ignore" : undefined;
      const common = { id, logFile: join(directory, "log.json"), cgroupsMode };
      const paths = { ...common, bundle: directory, pidFile: join(directory, "pid") };
      const [imagePath, workPath] = [join(directory, "images"), join(directory, "work")];
      mkdirSync(workPath);
      const count = () => Number(readFileSync(join(directory, "rootfs/count"), "utf8"));
      await succeeds(engine.create(paths));
      await succeeds(engine.start(common));
      while (!existsSync(join(directory, "rootfs/count")) || count() < 3) await sleep(5);
      await succeeds(engine.checkpoint({ ...common, imagePath, workPath, leaveRunning: true }));
      await succeeds(engine.checkpoint({ ...common, imagePath, workPath }));
      const before = Math.max(count(), 3); // 0 when it stopped while the file was being written
      await succeeds(engine.delete({ ...common, force: true }));
      const criuConfigFile = join(directory, "criu.conf");
      writeFileSync(criuConfigFile, criuConfig({ leaveStopped: true }));
      await succeeds(engine.restore({ ...paths, imagePath, workPath, criuConfigFile }));
      const pid = Number(readFileSync(paths.pidFile, "utf8"));
      expect(readFileSync(`/proc/${pid}/stat`, "utf8")).toMatch(/\) T /);
      await succeeds(engine.kill({ ...common, signal: 18, all: true }));
      while (count() <= before) await sleep(5);
    },
  );

  it.skipIf(!possible)("has the options that we count on", async () => {
    const features = await engineVersion(name);
    expect(features.name).toBe(name);
    const least = engine.features;
    for (const command of ["checkpoint", "restore"] as const)
      expect([...least[command]].filter((option) => !features[command].has(option))).toEqual([]);
  });
});

it("every failure is one of ours", () => {
  expect(failureFrom("start", "c1", 1, "container does not exist")).toBeInstanceOf(CedanaError);
});
