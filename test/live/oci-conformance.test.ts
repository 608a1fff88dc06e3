import { spawn, spawnSync } from "node:child_process";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { CallerPlace, wrapper } from "./harness/callers.ts";
import { busyboxRootfs, programs } from "./harness/programs.ts";
import { containerSpec } from "./harness/spec.ts";
import { cgroupsOf, entries } from "./harness/system.ts";

// The same commands to the engine and to cedana-runtime, in a bundle and a state directory each: what they print, log and end with
// must be the same, also of a container that is cedanad's to decide about. Nothing here knows what is right: the engine does.

const cases = [
  { engine: "runc", kind: "an unannotated container", annotations: {} },
  {
    engine: "runc",
    kind: "a container that has our marker",
    annotations: { "cedana.io/kill-signal": "TERM" },
  },
  { engine: "crun", kind: "an unannotated container", annotations: {} },
  {
    engine: "crun",
    kind: "a container that has our marker",
    annotations: { "cedana.io/kill-signal": "TERM" },
  },
] as const;

describe.each(cases)("cedana-runtime over $engine, with $kind", ({ engine, annotations }) => {
  let place: CallerPlace;
  let dir: string;
  let namespace: string;
  let env: Record<string, string>;
  const sides = ["engine", "wrapper"] as const;
  type Side = (typeof sides)[number];

  beforeAll(async () => {
    place = await CallerPlace.start(engine);
    ({ dir, namespace } = place);
    const { LD_LIBRARY_PATH: _, ...rest } = place.env;
    env = { ...rest, CEDANA_ENGINE: engine };
    const testPrograms = await programs();
    for (const side of sides)
      for (const id of ["a", "b"]) {
        const bundle = join(dir, side, id);
        busyboxRootfs(bundle, ["sh", "sleep", "cat", "true", "echo"]);
        const args =
          id === "a"
            ? ["sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.05; done"]
            : ["sh", "-c", "exit 3"];
        const spec = containerSpec({
          args,
          cgroupsPath: `/${namespace}/${side}-${id}`,
          programs: testPrograms,
        });
        spec.annotations = { "org.example.key": "value", ...annotations };
        writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
      }
  });
  afterAll(async () => {
    for (const side of sides) for (const id of ["a", "b"]) run(side, "delete", "--force", id);
    await place.stop();
    expect(cgroupsOf(namespace)).toEqual([]);
  });

  interface Outcome {
    status: number | null;
    stdout: string;
    stderr: string;
    log: string;
  }

  function argv(side: Side, args: string[], format = "json"): string[] {
    const program = side === "engine" ? engine : wrapper;
    const flags = [
      "--root",
      join(dir, side, "root"),
      "--log",
      join(dir, side, "log"),
      "--log-format",
      format,
    ];
    return place.inside(["env", "-C", join(dir, side), program, ...flags, ...args]); // nsenter forgets where we were
  }

  /** What both sides say, made comparable: their paths, pids and times. */
  function normal(text: string, side: Side): string {
    return text
      .replaceAll(join(dir, side), "DIR")
      .replaceAll(`/${namespace}/${side}-`, "/CGROUP-")
      .replaceAll(/\d{4}-\d\d-\d\dT[\d:.]+Z/g, "TIME")
      .replaceAll(/time="[^"]*"/g, "time=TIME")
      .replaceAll(/("pid": ?)\d+/g, "$1PID")
      .replaceAll(/\b\d{3,}\b/g, "NUMBER")
      .replaceAll(/NUMBER(,\s*NUMBER)+/g, "NUMBER"); // pids: a loop has just begun a process, or not
  }

  function run(side: Side, ...args: string[]): Outcome {
    rmSync(join(dir, side, "log"), { force: true });
    const [file, ...rest] = argv(side, args);
    // stdio of a `create` must not hold the container's end open.
    const out = spawnSync(file!, rest, {
      env,
      encoding: "utf8",
      stdio: args.includes("create") ? "ignore" : "pipe",
    });
    let log = "";
    try {
      log = readFileSync(join(dir, side, "log"), "utf8");
    } catch {
      // crun makes none where it has nothing to say
    }
    return {
      status: out.status,
      stdout: normal(out.stdout ?? "", side),
      stderr: normal(out.stderr ?? "", side),
      log: normal(log, side),
    };
  }

  /** Runs it on both sides and returns what both said. */
  function same(...args: string[]): Outcome {
    const bare = run("engine", ...args);
    const ours = run("wrapper", ...args.map((arg) => arg.replaceAll("/engine/", "/wrapper/")));
    expect(ours, args.join(" ")).toEqual(bare);
    return bare;
  }

  it("refuses what is wrong in the engine's words", () => {
    expect(same("state", "nobody").status).toBe(1);
    for (const command of ["start", "kill", "delete", "pause", "resume", "ps", "exec", "update"])
      expect(same(command, "nobody").status, command).not.toBe(0);
    for (const args of [
      ["state"],
      ["kill"],
      ["create"],
      ["bogus"],
      ["--bogus"],
      ["create", "--bundle", "/nowhere", "x"],
      ["start", "../x"],
    ])
      expect(same(...args).status, args.join(" ")).not.toBe(0);
    expect(same("delete", "--force", "nobody").status).toBeTypeOf("number");
    expect(same("create", "--bundle", "a", "bad/id").status).not.toBe(0);
  });

  it("says what it is, and what it can, as the engine", () => {
    for (const args of [
      ["--version"],
      ["--help"],
      ["features"],
      ["list"],
      ["list", "--format", "json"],
      ["create", "--help"],
      ["spec", "--help"],
    ])
      same(...args);
  });

  it("passes a container's life through: states, refusals and ends are the engine's", async () => {
    expect(same("create", "--bundle", "a", "--pid-file", "a.pid", "a").status).toBe(0);
    const created = JSON.parse(same("state", "a").stdout.replaceAll("PID", "1"));
    expect(created).toMatchObject({
      id: "a",
      status: "created",
      annotations: { "org.example.key": "value" },
    });
    expect(same("create", "--bundle", "a", "a").status, "the same id twice").not.toBe(0);
    expect(same("delete", "a").status, "delete what is created").toBeTypeOf("number");
    // runc deletes a created container, crun too; from here on a new one.
    if (same("state", "a").status !== 0)
      expect(same("create", "--bundle", "a", "--pid-file", "a.pid", "a").status).toBe(0);
    expect(same("start", "a").status).toBe(0);
    expect(JSON.parse(same("state", "a").stdout.replaceAll("PID", "1")).status).toBe("running");
    expect(same("start", "a").status, "start twice").not.toBe(0);
    expect(same("delete", "a").status, "delete a running one").not.toBe(0);
    expect(same("exec", "a", "echo", "hello")).toMatchObject({ status: 0, stdout: "hello\n" });
    expect(same("exec", "a", "sh", "-c", "exit 42").status).toBe(42);
    expect(same("exec", "a", "no-such-program").status).not.toBe(0);
    expect(same("kill", "a", "NOSUCHSIGNAL").status).not.toBe(0);
    expect(same("ps", "--format", "json", "a").status).toBe(0);
    expect(same("kill", "a", "TERM").status).toBe(0);
    for (const side of sides) await ended(side, "a");
    expect(JSON.parse(same("state", "a").stdout.replaceAll("PID", "1")).status).toBe("stopped");
    expect(same("kill", "a", "KILL").status, "kill a stopped one").toBeTypeOf("number");
    expect(same("start", "a").status, "start a stopped one").not.toBe(0);
    expect(same("exec", "a", "true").status, "exec in a stopped one").not.toBe(0);
    expect(same("delete", "a").status).toBe(0);
    expect(same("delete", "a").status, "delete twice").not.toBe(0);
    expect(same("state", "a").status).not.toBe(0);
  });

  it("runs in the foreground with the container's status, stdin and stdout", () => {
    expect(same("run", "--bundle", "b", "b").status).toBe(3);
    for (const side of sides) {
      const spec = JSON.parse(readFileSync(join(dir, side, "b/config.json"), "utf8"));
      spec.process.args = ["cat"];
      writeFileSync(join(dir, side, "b/config.json"), JSON.stringify(spec));
      const [file, ...rest] = argv(side, ["run", "--bundle", "b", "b"]);
      const input = "line\n".repeat(50_000);
      const out = spawnSync(file!, rest, {
        env,
        input,
        encoding: "utf8",
        maxBuffer: 1 << 20,
      });
      expect(out.status, out.stderr).toBe(0);
      expect(out.stdout).toBe(input);
    }
  });

  it("hands fds on to the container: of socket activation, of --preserve-fds, and no others", () => {
    const outcomes = sides.map((side) => {
      const spec = JSON.parse(readFileSync(join(dir, side, "b/config.json"), "utf8"));
      const look =
        'for n in 3 4 5 6; do (eval ": <&$n") 2>/dev/null && echo fd $n; done; echo $LISTEN_FDS $LISTEN_PID';
      spec.process.args = ["sh", "-c", look];
      writeFileSync(join(dir, side, "b/config.json"), JSON.stringify(spec));
      // As systemd and conmon do it: LISTEN_PID is the pid of whom they start.
      const started =
        'LISTEN_FDS=1 LISTEN_PID=$$; export LISTEN_FDS LISTEN_PID; exec "$@" 3</dev/null 4</dev/null 5</dev/null';
      const [file, ...rest] = place.inside([
        ...["env", "-C", join(dir, side), "sh", "-c", started, "sh"],
        ...[side === "engine" ? engine : wrapper, "--root", join(dir, side, "root")],
        ...["run", "--preserve-fds", "1", "--bundle", "b", "b"],
      ]);
      const { status, stdout, stderr } = spawnSync(file!, rest, { env, encoding: "utf8" });
      return { status, stdout, stderr };
    });
    expect(outcomes[1]).toEqual(outcomes[0]);
    const said = engine === "runc" ? "fd 3\nfd 4\n1 1\n" : "fd 3\nfd 4\n1\n"; // crun tells no LISTEN_PID
    expect(outcomes[0]!.stdout, outcomes[0]!.stderr).toBe(said);
  });

  it("runs in the foreground until a signal ends it", async () => {
    const outcomes = await Promise.all(
      sides.map(async (side) => {
        const [file, ...rest] = argv(side, ["run", "--bundle", "a", "a"]);
        const child = spawn(file!, rest, { env, stdio: "ignore" });
        const end = new Promise<unknown[]>((resolve) =>
          child.once("exit", (status, signal) => resolve([status, signal])),
        );
        await state(side, "a", "running");
        // Until it is heard: it may come before the program, which is pid 1 and so deaf without it, has its handler.
        const again = setInterval(() => child.kill("SIGTERM"), 100);
        child.kill("SIGTERM");
        return await end.finally(() => clearInterval(again));
      }),
    );
    expect(outcomes[1]).toEqual(outcomes[0]);
    for (const side of sides) run(side, "delete", "--force", "a");
  });

  it.runIf("cedana.io/kill-signal" in annotations)(
    "a container that run keeps is ours until its delete",
    () => {
      const file = join(dir, "wrapper/b/config.json");
      const original = readFileSync(file, "utf8");
      const spec = JSON.parse(original);
      spec.process.args = ["sh", "-c", "exit 3"];
      writeFileSync(file, JSON.stringify(spec));
      expect(run("wrapper", "run", "--keep", "--bundle", "b", "b").status).toBe(3);
      expect(entries(join(dir, "run/oci"))).toHaveLength(1);
      expect(run("wrapper", "state", "b").stdout).toMatch(/"status": *"stopped"/);
      expect(run("wrapper", "delete", "b").status).toBe(0);
      expect(entries(join(dir, "run/oci"))).toEqual([]);
      writeFileSync(file, original);
    },
  );

  it.runIf("cedana.io/kill-signal" in annotations)(
    "a container's policy ends with it, also where somebody deletes it past us",
    async () => {
      const file = join(dir, "wrapper/a/config.json");
      const original = readFileSync(file, "utf8");
      const annotate = (own: Record<string, string>) =>
        writeFileSync(file, JSON.stringify({ ...JSON.parse(original), annotations: own }));
      annotate({ "cedana.io/kill-signal": "HUP" }); // for which it has no handler
      expect(run("wrapper", "create", "--bundle", "a", "a").status).toBe(0);
      await place.ok([engine, "--root", join(dir, "wrapper/root"), "delete", "--force", "a"]);
      annotate({});
      expect(run("wrapper", "create", "--bundle", "a", "a").status).toBe(0);
      expect(entries(join(dir, "run/oci"))).toEqual([]); // nothing is asked of us for it
      expect(run("wrapper", "start", "a").status).toBe(0);
      // Until it is heard, which the first process does from its trap on.
      const again = setInterval(() => run("wrapper", "kill", "a", "TERM"), 50);
      await ended("wrapper", "a").finally(() => clearInterval(again));
      expect(run("wrapper", "delete", "a").status).toBe(0);
      expect(entries(join(dir, "run/oci"))).toEqual([]);
      writeFileSync(file, original);
    },
  );

  async function state(side: Side, id: string, wanted: string): Promise<void> {
    for (let attempt = 0; attempt < 500; attempt++) {
      if (run(side, "state", id).stdout.includes(wanted)) return;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    throw new Error(`${id} of ${side} is not ${wanted}: ${run(side, "state", id).stdout}`);
  }
  const ended = (side: Side, id: string) => state(side, id, "stopped");
});
