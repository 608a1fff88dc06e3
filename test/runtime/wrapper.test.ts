import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { encodeMessage, type Message, MessageReader, messageType } from "../../src/shim/keeper-protocol.ts";
import { daemonSocketName } from "../../src/shim/socket-name.ts";
import { cedanadCgroup } from "../live/harness/cleanup.ts";
import { removeCgroups } from "../live/harness/system.ts";
import { until } from "../live/harness/until.ts";

// The wrapper itself, with ordinary programs for an engine: what they see must be what they see without us.

const wrapper = resolve(import.meta.dirname, "../../bin/cedana-runtime");
const work = mkdtempSync(join(tmpdir(), "cedana-wrapper-"));
afterAll(() => {
  rmSync(work, { recursive: true, force: true });
  // Where the kernel lets us, a cedanad gets a cgroup, also one that ends at once.
  removeCgroups(cedanadCgroup(join(work, "unreachable")));
});
const isRoot = process.getuid!() === 0;

// The machine's own configuration must not decide here.
const config = file("none.json", "{}");
const base = { PATH: process.env.PATH!, CEDANA_RUN_DIR: join(work, "run") };

function file(name: string, text: string, mode = 0o644): string {
  const path = join(work, name);
  writeFileSync(path, text);
  chmodSync(path, mode);
  return path;
}

interface Outcome {
  status: number | null;
  signal: string | null;
  stdout: string;
  stderr: string;
}

function call(argv: string[], env: Record<string, string> = {}, cwd = work): Outcome {
  const { status, signal, stdout, stderr } = spawnSync(argv[0]!, argv.slice(1), {
    env: { ...base, ...env },
    cwd,
    encoding: "utf8",
  });
  return { status, signal, stdout, stderr };
}

const wrapped = (...args: string[]) => call([wrapper, "--cedana-config", config, ...args]);

describe("an engine behind cedana-runtime", () => {
  it("gets the arguments as they were, without ours", () => {
    const args = [
      "-c",
      'for a; do echo "<$a>"; done',
      "sh",
      "--root",
      "/x y",
      "--root=",
      "",
      "-",
      "--",
      "é\n",
    ];
    expect(wrapped("--engine", "/bin/sh", ...args)).toEqual(call(["/bin/sh", ...args]));
    expect(wrapped("--engine=/bin/sh", ...args).stdout).toBe(call(["/bin/sh", ...args]).stdout);
    // Behind the command, they are the engine's.
    const behind = ["/bin/echo", "create", "--engine", "x"];
    expect(wrapped("--engine", ...behind).stdout).toBe("create --engine x\n");
  });

  it("gets the environment as it was", () => {
    const env = {
      NOTIFY_SOCKET: "/run/n",
      LISTEN_FDS: "2",
      LISTEN_PID: "1",
      _OCI_SYNCPIPE: "3",
      _OCI_STARTPIPE: "4",
      CEDANA_ENGINE: "/usr/bin/env",
      "ODD name": "x=y\nz",
    };
    const bare = call(["/usr/bin/env", "-0"], env);
    expect(call([wrapper, "--cedana-config", config, "-0"], env)).toEqual(bare);
  });

  it("gets the fds as they were, and no other", () => {
    const list = (argv: string[]) =>
      spawnSync(argv[0]!, argv.slice(1), {
        env: { ...base, LISTEN_FDS: "3" },
        encoding: "utf8",
        stdio: ["ignore", "pipe", "pipe", "pipe", "ignore", "ignore", "pipe"],
      }).stdout;
    const args = ["-c", "ls /proc/self/fd | tr '\\n' ' '"];
    expect(list([wrapper, "--cedana-config", config, "--engine", "/bin/sh", ...args])).toBe(
      list(["/bin/sh", ...args]),
    );
  });

  it("is the same process, with the same working directory, group, session, umask and signal dispositions", () => {
    const args = [
      "-c",
      "pwd; umask; ps -o pgid=,sid= -p $$; grep -E 'Sig(Blk|Ign|Cgt)|NoNewPrivs|Seccomp:' /proc/self/status",
    ];
    const normal = (outcome: Outcome) => outcome.stdout.replaceAll(/\d{3,}(?= )/g, "P");
    expect(normal(wrapped("--engine", "/bin/sh", ...args))).toBe(normal(call(["/bin/sh", ...args])));
    const pids = wrapped("--engine", "/bin/sh", "-c", "echo $$ $PPID").stdout.trim().split(" ");
    expect(Number(pids[1])).toBe(process.pid);
  });

  it("ends with its own status, or by its own signal", () => {
    for (const status of [0, 1, 3, 64, 255])
      expect(wrapped("--engine", "/bin/sh", "-c", `exit ${status}`).status).toBe(status);
    expect(wrapped("--engine", "/bin/sh", "-c", "kill -USR1 $$").signal).toBe("SIGUSR1");
  });

  it("gets the signals that are sent to us", async () => {
    const child = spawn(
      wrapper,
      [
        "--cedana-config",
        config,
        "--engine",
        "/bin/sh",
        "-c",
        "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done",
      ],
      { env: base, stdio: ["ignore", "pipe", "inherit"] },
    );
    await new Promise((ready) => child.stdout.once("data", ready));
    child.kill("SIGTERM");
    expect(await new Promise((ended) => child.once("exit", ended))).toBe(7);
  });

  it.skipIf(!isRoot)("need not look for what it has deleted already", () => {
    mkdirSync(join(work, "engines"));
    mkdirSync(join(work, "state/there"), { recursive: true });
    const [runc, crun] = ["runc", "crun"].map((name) =>
      file(`engines/${name}`, '#!/bin/sh\necho asked "$@"\n', 0o755),
    );
    const root = join(work, "state");
    const asked = (...args: string[]) => wrapped("--engine", runc!, "--root", root, ...args);
    for (const args of [
      ["--force", "gone"],
      ["gone", "--force"],
      ["-f", "gone"],
    ])
      expect(asked("delete", ...args)).toEqual({ status: 0, signal: null, stdout: "", stderr: "" });
    expect(asked("--systemd-cgroup", "delete", "--force", "gone").stdout).toBe("");
    // What is there, or not quite that call, is the engine's.
    for (const args of [
      ["delete", "--force", "there"],
      ["delete", "gone"],
      ["delete", "--force", "gone", "and another"],
      ["delete", "--force", "../state"],
      ["delete", "--force", ""],
      ["delete", "--force", "--", "gone"],
      ["--log", join(work, "log"), "delete", "--force", "gone"],
      ["--debug", "delete", "--force", "gone"],
      ["kill", "--force", "gone"],
    ])
      expect(asked(...args).stdout).toContain("asked");
    expect(wrapped("--engine", crun!, "--root", root, "delete", "--force", "gone").stdout).toContain("asked");
  });

  it("is found by --engine, then CEDANA_ENGINE, then the configuration", () => {
    const named = file("named.json", JSON.stringify({ engine: "/bin/echo" }));
    expect(call([wrapper, "--cedana-config", named, "from file"]).stdout).toBe("from file\n");
    expect(
      call([wrapper, "--cedana-config", named, "-c", "echo env"], { CEDANA_ENGINE: "/bin/sh" }).stdout,
    ).toBe("env\n");
    const both = [wrapper, "--cedana-config", named, "--engine", "true", "x"];
    expect(call(both, { CEDANA_ENGINE: "/bin/sh" })).toEqual({
      status: 0,
      signal: null,
      stdout: "",
      stderr: "",
    });
  });
});

const traced = spawnSync("strace", ["-o", "/dev/null", "true"]).status === 0;

describe.skipIf(!traced)(`what is passed through${traced ? "" : " (no strace here, or no ptrace)"}`, () => {
  const bundle = join(work, "traced");
  mkdirSync(bundle);
  writeFileSync(join(bundle, "config.json"), JSON.stringify({ annotations: { "cedana.io/tcp": "keep" } }));

  /** System calls between the start of cedana-runtime and that of the engine: on files, on the network, of processes. */
  function callsOf(...args: string[]): string[] {
    const trace = join(work, "trace");
    const argv = [wrapper, "--cedana-config", config, "--engine", "/bin/true", "--root", "/nowhere", ...args];
    const strace = ["strace", "-f", "-o", trace, "-e", "trace=file,network,process", ...argv];
    expect(call(strace).status, args.join(" ")).toBe(0);
    const lines = readFileSync(trace, "utf8").split("\n");
    const starts = lines.flatMap((line, at) => (/ execve\(.*= 0$/.test(line) ? [at] : []));
    expect(starts.length, lines.join("\n")).toBe(2);
    return lines.slice(starts[0]! + 1, starts[1]).map((line) => line.replace(/^\d+ +/, ""));
  }
  const pathIn = (line: string) => /"([^"]*)"/.exec(line)?.[1] ?? line;
  const opened = (calls: string[]) => calls.filter((line) => /^open/.test(line)).map(pathIn);
  const looked = (calls: string[]) => calls.filter((line) => !/^open/.test(line)).map(pathIn);
  const marker = /\/run\/oci\/[0-9a-f]{16}-x$/;
  const always = [work, "/bin/true", "/proc/self/exe"]; // the configuration's directory, the engine, ourselves

  it.each([
    ["exec", "x", "true"],
    ["ps", "x"],
    ["update", "x"],
    ["--version"],
    ["features"],
    ["--unknown", "state", "x"],
    ["unknown", "x"],
  ])("opens the configuration, and nothing else: %s", (...args) => {
    const calls = callsOf(...args);
    expect(opened(calls)).toEqual([config]);
    expect(looked(calls)).toEqual(always);
  });

  it.each(["start", "state", "kill", "delete"])("looks for the marker at %s, by one stat", (command) => {
    const calls = callsOf(command, "x");
    expect(opened(calls)).toEqual([config]);
    expect(looked(calls)).toEqual([...always, expect.stringMatching(marker)]);
  });

  it("looks for it by the state directory that the engine goes by", () => {
    const engines = join(work, "engines");
    mkdirSync(engines, { recursive: true });
    for (const name of ["runc", "crun"]) call(["ln", "-s", "/bin/true", join(engines, name)]);
    const markerOf = (engine: string, env: Record<string, string>, ...flags: string[]) => {
      const argv = [
        wrapper,
        "--cedana-config",
        config,
        "--engine",
        join(engines, engine),
        ...flags,
        "state",
        "x",
      ];
      const trace = join(work, "trace");
      call(["strace", "-o", trace, "-e", "trace=stat", ...argv], env);
      return /"([^"]*-x)"/.exec(readFileSync(trace, "utf8"))?.[1];
    };
    const login = { XDG_RUNTIME_DIR: "/run/user/0" };
    expect(markerOf("crun", {})).toBe(markerOf("crun", login, "--root", "/run/crun"));
    expect(markerOf("crun", login)).toBe(markerOf("crun", {}, "--root=/run/user/0/crun/"));
    const here = markerOf("runc", {}, "--root", join(work, "state"));
    for (const relative of ["state", "./state", ".//state/"])
      expect(markerOf("runc", {}, "--root", relative)).toBe(here);
    // runc goes by it for others than root alone, who have no markers.
    expect(markerOf("runc", login)).toBe(markerOf("runc", {}, "--root", "/run/runc"));
    expect(markerOf("runc", {})).not.toBe(markerOf("crun", {}));
  });

  it.each(["create", "run"])("reads the bundle's config.json at %s, and looks for a marker", (command) => {
    const calls = callsOf(command, "--bundle", bundle, "x");
    expect(opened(calls)).toEqual([config, join(bundle, "config.json")]);
    expect(looked(calls)).toEqual([...always, expect.stringMatching(marker)]);
  });
});

describe("the configuration", () => {
  const refused: [name: string, text: string, words: RegExp][] = [
    ["empty", "", /an object is expected/],
    ["not JSON", "engine = runc", /an object is expected/],
    ["a list", "[]", /an object is expected/],
    ["a trailing comma", '{"engine": "runc",}', /a string is expected/],
    ["something behind it", '{"engine": "runc"} x', /something follows/],
    ["no end", '{\n"engine": "runc"', /line 2: a comma or the end/],
    ["an unknown key", '{\n\n"motor": "runc"}', /line 3: unknown key "motor"/],
    ["a number for a name", '{"engine": 5}', /a string is expected/],
    ["an empty name", '{"engine": ""}', /must be a name such as runc/],
    ["a relative path", '{"engine": "bin/runc"}', /or an absolute path/],
    ["a relative run directory", '{"runDirectory": "run"}', /must be an absolute path/],
    ["a NUL", '{"engine": "ru\\u0000nc"}', /doesn't allow/],
    ["half a surrogate", '{"engine": "\\ud800"}', /doesn't allow/],
    ["a control character", '{"engine": "a\tb"}', /doesn't allow/],
    ["too much", `{"engine": "${"x".repeat(70_000)}"}`, /longer than 64 KiB/],
  ];
  it.each(refused)("with %s is an error of every command", (name, text, words) => {
    const path = file(`bad ${name}.json`, text);
    const outcome = call([wrapper, "--cedana-config", path, "--version"]);
    expect(outcome.status).toBe(1);
    expect(outcome.stdout).toBe("");
    expect(outcome.stderr).toMatch(words);
    expect(outcome.stderr).toContain(path);
  });

  it("may be in Unicode and escapes", () => {
    const path = file("escapes.json", '{"engine": "\\/bin\\/\\u0065cho"}');
    expect(call([wrapper, "--cedana-config", path, "x"]).stdout).toBe("x\n");
  });

  it("that others may write, or replace, is refused", () => {
    for (const mode of [0o666, 0o664]) {
      const path = file("loose.json", "{}", mode);
      expect(call([wrapper, "--cedana-config", path, "--version"]).stderr).toMatch(
        /may be written by others/,
      );
    }
    const directory = join(work, "open");
    mkdirSync(directory);
    writeFileSync(join(directory, "runtime.json"), "{}");
    chmodSync(directory, 0o777);
    const outcome = call([wrapper, "--cedana-config", join(directory, "runtime.json"), "--version"]);
    expect(outcome.stderr).toMatch(/open, where the configuration runtime.json is, may be written by others/);
    expect(outcome.status).toBe(1);
  });

  it("that is missing though named, or no file, is an error", () => {
    expect(call([wrapper, "--cedana-config", join(work, "nowhere"), "--version"]).stderr).toMatch(
      /No such file/,
    );
    const fifo = join(work, "fifo");
    call(["mkfifo", "-m", "600", fifo]);
    expect(call([wrapper, "--cedana-config", fifo, "--version"]).stderr).toMatch(/is not a file/);
  });
});

describe("cedana-runtime's own errors", () => {
  it("name an engine that is not installed, and where its name is from", () => {
    const outcome = call([wrapper, "--cedana-config", config, "state", "x"], {
      CEDANA_ENGINE: "no-such-engine",
    });
    expect(outcome.status).toBe(1);
    expect(outcome.stderr).toMatch(/the engine no-such-engine \(from CEDANA_ENGINE\) is not installed/);
  });

  it("say that it would execute itself, also by a link", () => {
    const link = join(work, "runc");
    call(["ln", "-sf", wrapper, link]);
    for (const engine of [wrapper, link]) {
      const outcome = wrapped("--engine", engine, "--version");
      expect(outcome.status).toBe(1);
      expect(outcome.stderr).toMatch(/is cedana-runtime itself/);
    }
    // … and by the name in PATH, where it stands in runc's place.
    expect(call([wrapper, "--cedana-config", config, "state", "x"], { PATH: work }).stderr).toMatch(
      /\(from the default\).*itself/,
    );
  });

  it.each(["json", "text"])("go to the --log file as runc writes them, in %s", (format) => {
    const log = join(work, `log.${format}`);
    const args = ["--log", log, `--log-format=${format}`, "--root", "/x", "checkpoint", "--bogus", 'a"b'];
    const ours = wrapped("--engine", "/bin/true", ...args);
    expect(ours.status).toBe(1);
    expect(ours.stderr).toBe("flag provided but not defined: -bogus\n");
    const line = readFileSync(log, "utf8");
    if (format === "json") {
      const entry = JSON.parse(line);
      expect(Object.keys(entry)).toEqual(["level", "msg", "time"]);
      expect(entry).toMatchObject({ level: "error", msg: "flag provided but not defined: -bogus" });
      expect(entry.time).toMatch(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/);
    } else expect(line).toMatch(/^time="[^"]+Z" level=error msg="flag provided but not defined: -bogus"\n$/);
  });
});

describe("checkpoint and restore", () => {
  it("answer CRI-O's probes without anybody's help", () => {
    const help = wrapped("--engine", "/bin/false", "checkpoint", "--help");
    expect(help.status).toBe(0);
    expect(help.stderr).toBe("");
    for (const option of ["--image-path value", "--leave-running", "--network-lock value", "--link-remap"])
      expect(help.stdout).toContain(option);
    const probe = wrapped("--engine", "/bin/false", "restore", "--lsm-mount-context");
    expect(probe.status).toBe(1);
    expect(probe.stderr).toContain("flag needs an argument");
  });

  it.each([
    ["checkpoint", [], /"checkpoint" requires exactly 1 argument/],
    ["checkpoint", ["a", "b"], /"checkpoint" requires exactly 1 argument/],
    ["checkpoint", [""], /container id is empty/],
    ["restore", ["--detach=perhaps", "a"], /^invalid boolean value "perhaps" for -detach: parse error$/m],
    ["restore", ["--image-path", "x", "--work-path"], /^flag needs an argument: -work-path$/m],
    ["checkpoint", ["--detach", "a"], /not defined: -detach/],
    ["restore", ["--leave-running", "a"], /not defined: -leave-running/],
  ])("%s %j is refused before anything is started", (command, args, words) => {
    const outcome = wrapped("--engine", "/bin/false", command, ...args);
    expect(outcome.status).toBe(1);
    expect(outcome.stderr).toMatch(words);
  });

  it("take what Go and what argp take for options, in either form", () => {
    // The checks are over, when cedanad is asked: nobody can be reached there.
    const env = {
      CEDANA_DAEMON: "/bin/false",
      CEDANA_KEEPER_PATIENCE_MS: "1",
      CEDANA_RUN_DIR: join(work, "unreachable"),
    };
    for (const args of [
      ["checkpoint", "-leave-running", "--tcp-established=1", "--file-locks=False", "--image-path=x", "a"],
      ["checkpoint", "--pre-dump=t", "-parent-path", "../x", "--status-fd", "-1", "a"],
      // go-runc at a restore: a single dash, and what it adds twice.
      [
        "restore",
        "--image-path",
        "i",
        "-no-subreaper",
        "--detach",
        "--no-subreaper",
        "--detach",
        "-b",
        "b",
        "a",
      ],
      ["restore", "-d", "--bundle=b", "--pid-file", "p", "--", "a"],
    ]) {
      const { status, stderr } = call(
        [wrapper, "--cedana-config", config, "--engine", "/bin/false", ...args],
        env,
      );
      expect(status, args.join(" ")).toBe(1);
      if (isRoot) expect(stderr, args.join(" ")).toMatch(/cedanad .*(?:could not be reached|gave no answer)/);
    }
    for (const flag of ["-h", "--help", "-?", "--usage"]) {
      const { status, stdout } = wrapped("--engine", "/bin/false", "restore", flag);
      expect([status, stdout.includes("--lsm-profile value")], flag).toEqual([0, true]);
    }
  });

  it.runIf(isRoot)("say to a rootless caller why not, and pass the rest of its commands through", () => {
    const asNobody = (...args: string[]) => {
      // Not below our 0700 directory, and not by --cedana-config: nobody reads neither.
      const copy = mkdtempSync(join(tmpdir(), "cedana-nobody-"));
      chmodSync(copy, 0o755);
      writeFileSync(join(copy, "cedana-runtime"), readFileSync(wrapper), { mode: 0o755 });
      const { status, stdout, stderr } = spawnSync(join(copy, "cedana-runtime"), args, {
        env: { PATH: process.env.PATH! },
        uid: 65534,
        gid: 65534,
        cwd: "/",
        encoding: "utf8",
      });
      rmSync(copy, { recursive: true });
      return { status, stdout, stderr };
    };
    expect(asNobody("--engine", "/bin/echo", "ps", "x")).toEqual({ status: 0, stdout: "ps x\n", stderr: "" });
    const refused = asNobody("--engine", "/bin/echo", "checkpoint", "x");
    expect(refused.status).toBe(1);
    expect(refused.stderr).toMatch(/checkpoint needs root on the host.*it is not root/s);
    const inNamespace = call([
      "unshare",
      "-Ur",
      wrapper,
      "--cedana-config",
      config,
      "--engine",
      "/bin/echo",
      "restore",
      "x",
    ]);
    expect(inNamespace.stderr).toMatch(/restore needs root on the host.*user namespace/s);
  });

  it.runIf(isRoot)(
    "and a rootless caller's commands go by root's configuration, also in a user namespace",
    () => {
      const place = mkdtempSync(join(tmpdir(), "cedana-rootless-"));
      chmodSync(place, 0o755);
      const [program, settings] = [join(place, "cedana-runtime"), join(place, "runtime.json")];
      writeFileSync(program, readFileSync(wrapper), { mode: 0o755 });
      writeFileSync(settings, '{"engine": "/bin/echo"}', { mode: 0o644 });
      // As Podman's are: of another user, who is root in a namespace of his own where the host's root is nobody.
      const asUser = (...argv: string[]) =>
        spawnSync(argv[0]!, argv.slice(1), {
          env: { PATH: process.env.PATH! },
          uid: 65533,
          gid: 65533,
          cwd: "/",
          encoding: "utf8",
        });
      const inNamespace = () => asUser("unshare", "-Ur", program, "--cedana-config", settings, "ps", "x");
      if (asUser("unshare", "-Ur", "true").status !== 0) return rmSync(place, { recursive: true }); // the kernel forbids it
      expect(asUser(program, "--cedana-config", settings, "ps", "x").stdout).toBe("ps x\n");
      expect(inNamespace().stdout, inNamespace().stderr).toBe("ps x\n");
      chmodSync(settings, 0o666); // who may write it is no matter of who is nobody
      expect(inNamespace().stderr).toMatch(/may be written by others/);
      rmSync(place, { recursive: true });
    },
  );
});

describe("create and run", () => {
  const bundle = (name: string, spec: unknown) => {
    const path = join(work, `bundle-${name}`);
    mkdirSync(path, { recursive: true });
    writeFileSync(join(path, "config.json"), typeof spec === "string" ? spec : JSON.stringify(spec));
    return path;
  };
  // Nobody can be reached there, so that what isn't passed through fails, at once.
  const env = {
    CEDANA_DAEMON: "/bin/false",
    CEDANA_KEEPER_PATIENCE_MS: "1",
    CEDANA_RUN_DIR: join(work, "unreachable"),
  };
  const create = (path: string, ...flags: string[]) =>
    call([wrapper, "--cedana-config", config, "--engine", "/bin/echo", "create", ...flags, path, "x"], env);

  it.each([
    ["no annotations", {}],
    ["annotations that act at a checkpoint only", { annotations: { "cedana.io/tcp": "keep", cedana: "x" } }],
    ["annotations of null", { annotations: null, hostname: "cedana.io/kill-signal" }],
    ["a broken spec", '{"annotations": {"cedana.io/kill-signal": "x"'],
  ])("pass %s through", (name, spec) => {
    const path = bundle(name, spec);
    expect(create(path, "--bundle").stdout).toBe(`create --bundle ${path} x\n`);
  });

  it("ask cedanad about annotations that act, of the pod's container too", () => {
    for (const key of ["cedana.io/kill-signal", "cedana.io/restore-from.web", "cedana.io/auto-resume"]) {
      const path = bundle("acting", {
        mounts: [{ a: [1, -2.5e3, true, null, "x"] }],
        annotations: { [key]: "HUP" },
      });
      const outcome = create(path, "-b");
      expect(outcome.stdout).toBe("");
      expect(outcome.status).toBe(1);
      expect(outcome.stderr).toMatch(/cedanad .*(?:could not be reached|gave no answer)/);
    }
  });

  it("find the bundle in the working directory, and in --bundle=", () => {
    const path = bundle("here", { annotations: { "cedana.io/kill-signal": "HUP" } });
    const args = [wrapper, "--cedana-config", config, "--engine", "/bin/echo", "run"];
    expect(call([...args, "x"], env, path).status).toBe(1);
    expect(call([...args, `--bundle=${path}`, "x"], env).status).toBe(1);
    expect(call([...args, "x"], env).status).toBe(0);
  });
});

describe.skipIf(!isRoot)("a command that cedanad is at", () => {
  it("has each option once, a flag as it was said last", async () => {
    const run = mkdtempSync(join(work, "run-"));
    let asked: Message | undefined;
    const server = createServer((socket) => {
      const reader = new MessageReader();
      socket.on("error", () => {});
      socket.on("data", (data: Buffer) => {
        for (const message of reader.push(data)) {
          asked ??= message;
          socket.write(encodeMessage(messageType.RUNTIME_ANSWER, { status: 5 }));
        }
      });
    });
    server.listen(join(run, daemonSocketName()));
    await once(server, "listening");
    const flags = [
      "--leave-running",
      "--file-locks=F",
      "--leave-running=false",
      "--pre-dump=0",
      "--pre-dump",
    ];
    const argv = [
      "--cedana-config",
      config,
      "--engine",
      "/bin/echo",
      "checkpoint",
      ...flags,
      "--image-path",
      "i",
      "x",
    ];
    const child = spawn(wrapper, argv, { env: { ...base, CEDANA_RUN_DIR: run }, stdio: "ignore" });
    try {
      expect(await once(child, "exit")).toEqual([5, null]);
      expect(asked?.strings("argv")).toEqual(["checkpoint", "--pre-dump", "--image-path=i", "--", "x"]);
    } finally {
      child.kill("SIGKILL");
      server.close();
    }
  });

  it("ends by the signal that it gets while no program of it runs", async () => {
    const run = mkdtempSync(join(work, "run-"));
    const server = createServer((socket) => {
      socket.on("error", () => {});
      socket.once("data", () => socket.write(encodeMessage(messageType.RUNTIME_WORKING, {})));
    });
    const asked = once(server, "connection");
    server.listen(join(run, daemonSocketName()));
    await once(server, "listening");
    const child = spawn(wrapper, ["--cedana-config", config, "--engine", "/bin/echo", "checkpoint", "x"], {
      env: { ...base, CEDANA_RUN_DIR: run },
      stdio: "ignore",
    });
    const exited = once(child, "exit");
    try {
      const [socket] = (await asked) as [Socket];
      const gone = once(socket, "close");
      const status = () => readFileSync(`/proc/${child.pid}/status`, "utf8");
      // It catches signals when it waits for cedanad's word.
      await until(() => /^SigCgt:\s*0*[1-9a-f]/m.test(status()), { what: () => "the handlers" });
      child.kill("SIGTERM");
      expect(await exited).toEqual([null, "SIGTERM"]);
      await gone; // and so cedanad knows
    } finally {
      child.kill("SIGKILL");
      server.close();
    }
  });
});
