import { type ChildProcess, spawn } from "node:child_process";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Readable, Writable } from "node:stream";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { CallerPlace, caller, missingCallers, type Side, sides, wrapper } from "./harness/callers.ts";
import { type EngineName, GO_SHIM, type Live } from "./harness/live.ts";
import { busyboxRootfs, IMAGE, imageTar, programs } from "./harness/programs.ts";
import { anyOf } from "./harness/proto.ts";
import { containerSpec, processSpec } from "./harness/spec.ts";
import { liveFor } from "./harness/suite.ts";
import { entries, isAlive } from "./harness/system.ts";
import { until } from "./harness/until.ts";

// Callers other than Podman and Docker. CRI-O is in no Debian release: its calls of conmon and of the runtime are replayed here with
// Debian's conmon, as its server/runtime_oci.go makes them.

const missing = missingCallers();
const because = missing ? ` (${missing})` : "";
const engines: EngineName[] = ["runc", "crun"];
const loop = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done";

describe.skipIf(missing).each(engines)(`CRI-O's calls over %s${because}`, (engine) => {
  let place: CallerPlace;
  beforeAll(async () => {
    place = await CallerPlace.start(engine);
    const testPrograms = await programs();
    for (const side of sides) {
      const bundle = join(place.dir, side);
      mkdirSync(join(bundle, "exits"), { recursive: true });
      busyboxRootfs(bundle, ["sh", "sleep", "cat", "echo"]);
      const args = ["sh", "-c", `read line; echo got $line; ${loop}`];
      const spec = containerSpec({
        args,
        cgroupsPath: place.cgroupsPath(side),
        programs: testPrograms,
      });
      writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
    }
  });
  afterEach(async () => await place.expectNoLeftovers((argv) => /cedanad/.test(argv)));
  afterAll(async () => await place?.stop());

  const root = (side: Side) => join(place.dir, side, "root");
  const runtime = (side: Side, ...args: string[]) =>
    place.run(place.runtime(side, "--root", root(side), ...args));
  const at = (side: Side, name: string) => join(place.dir, side, name);
  const exitAndPids = (side: Side) => [
    ...["--exit-dir", at(side, "exits")],
    ...["-P", at(side, "conmon-pidfile")],
    ...["-p", at(side, "pidfile")],
  ];

  /** conmon as CRI-O starts it: pipes by _OCI_SYNCPIPE and _OCI_STARTPIPE. @returns what conmon says of the container */
  async function conmon(side: Side, ...args: string[]): Promise<Record<string, unknown>> {
    const [program, ...rest] = place.runtime(side, "--root", root(side));
    const own = rest.filter((arg) => arg !== "--systemd-cgroup"); // conmon has an option of its own for that
    const argv = [
      caller("conmon"),
      ...[
        "-b",
        join(place.dir, side),
        "-c",
        "box",
        "-n",
        "k8s_box",
        "-u",
        "box",
        "-r",
        program === engine ? enginePath() : program!,
      ],
      ...["-l", at(side, "log"), "--log-level", "info", "--socket-dir-path", join(place.dir, side[0]!)],
      ...(rest.length > own.length ? ["--systemd-cgroup"] : []),
      ...["--persist-dir", join(place.dir, side), ...own.flatMap((arg) => ["--runtime-arg", arg]), ...args],
    ];
    mkdirSync(join(place.dir, side[0]!), { recursive: true });
    const [file, ...others] = place.inside(argv);
    const child = spawn(file!, others, {
      env: { ...place.env, _OCI_SYNCPIPE: "3", _OCI_STARTPIPE: "4" },
      cwd: join(place.dir, side),
      stdio: ["ignore", "ignore", "pipe", "pipe", "pipe"],
    });
    let errors = "";
    child.stderr!.on("data", (chunk) => (errors += chunk));
    (child.stdio[4] as Writable).end("\0"); // conmon waits for its cgroup
    return await firstLine(child, () => errors);
  }

  async function firstLine(child: ChildProcess, errors: () => string): Promise<Record<string, unknown>> {
    let text = "";
    for await (const chunk of child.stdio[3] as Readable) {
      text += chunk;
      if (text.includes("\n")) return JSON.parse(text);
    }
    throw new Error(`conmon said ${JSON.stringify(text)} and ${errors()}`);
  }
  const counted = () => place.hasController("pids");
  const enginePath = () => (engine === "runc" ? "/usr/sbin/runc" : "/usr/bin/crun");

  it("create, attach, start, exec, update, kill and delete a container", { timeout: 60_000 }, async () => {
    const said: Record<Side, unknown[]> = { engine: [], wrapper: [] };
    for (const side of sides) {
      const note = (value: unknown) => said[side].push(value);
      const created = await conmon(
        side,
        "--exit-dir",
        at(side, "exits"),
        "-P",
        at(side, "conmon-pidfile"),
        "-p",
        at(side, "pidfile"),
        "-i",
      );
      expect(created.pid).toBe(Number(readFileSync(at(side, "pidfile"), "utf8")));
      note(JSON.parse((await runtime(side, "state", "box")).stdout).status);
      // The container must be conmon's, or nobody learns how it ended.
      const conmonPid = readFileSync(at(side, "conmon-pidfile"), "utf8").trim();
      expect(readFileSync(`/proc/${created.pid}/stat`, "latin1").split(") ")[1]!.split(" ")[1]).toBe(
        conmonPid,
      );
      note((await runtime(side, "start", "box")).status);

      // Attach: packets, the first byte of each says which stream; ours are stdin.
      const socket = join(join(place.dir, side[0]!), "box", "attach");
      const attach = `use Socket; socket(S, PF_UNIX, SOCK_SEQPACKET, 0); connect(S, pack_sockaddr_un($ARGV[0])) or die "$!\\n";
        send(S, "hello\\n", 0); my $all = ""; while ($all !~ /up/) { recv(S, my $packet, 8192, 0); length $packet or last; $all .= substr($packet, 1) } print $all`;
      note((await place.run(["perl", "-e", attach, socket])).stdout);

      // Exec as CRI-O does it: alone, and with conmon (ExecSync).
      const processFile = at(side, "process.json");
      writeFileSync(
        processFile,
        JSON.stringify(processSpec({ args: ["sh", "-c", "echo in; echo err >&2; exit 4"] })),
      );
      note(await runtime(side, "exec", "--process", processFile, "box"));
      note(
        await conmon(
          side,
          "-e",
          "-p",
          at(side, "exec-pidfile"),
          "--exec-process-spec",
          processFile,
          "-T",
          "10",
          "-l",
          at(side, "exec-log"),
        ).then((answer) => typeof answer.pid),
      );
      await until(() => /F err|P err/.test(text(at(side, "exec-log"))), {
        what: () => `output of the exec: ${text(at(side, "exec-log"))}`,
      });
      note(text(at(side, "exec-log")).replaceAll(/^\S+ /gm, "T ").split("\n").sort());

      const updated = await updateByStdin(side);
      if (counted()) expect(updated).toBe(0);
      note(updated);
      const probe = await runtime(side, "restore", "--lsm-mount-context");
      if (side === "wrapper") expect(probe.stderr + probe.stdout).toContain("flag needs an argument");
      expect((await runtime(side, "checkpoint", "--help")).status).toBe(0);
      note((await runtime(side, "features")).status);

      note((await runtime(side, "kill", "box", "15")).status);
      note(await until(() => text(at(side, "exits/box")) || undefined, { what: () => "conmon's exit file" }));
      note((await runtime(side, "delete", "--force", "box")).status);
      note((await runtime(side, "state", "box")).status);
      note(text(at(side, "log")).replaceAll(/^\S+ /gm, "T "));
    }
    expect(said.wrapper).toEqual(said.engine);
    expect(said.engine[2]).toMatch(/got hello/);
    expect(String(said.engine[9]).trim(), JSON.stringify(said.engine)).toBe("7"); // conmon's exit file
  });

  // With crun alone no restore succeeds on a host that has cgroups of both versions; the engine's side is the control with runc.
  const restoring: Side[] = engine === "runc" ? [...sides] : ["wrapper"];
  it.each(restoring)(
    "checkpoint a container, and restore it below conmon, by the %s",
    { timeout: 60_000 },
    async (side) => {
      const bundle = join(place.dir, side);
      const spec = JSON.parse(readFileSync(join(bundle, "config.json"), "utf8"));
      const original = readFileSync(join(bundle, "config.json"));
      spec.process.args = ["/programs/counter", "20", "7"]; // ends with 7 at TERM
      writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
      const before = readFileSync(join(bundle, "config.json"), "utf8");
      try {
        const begin = exitAndPids(side);
        rmSync(at(side, "exits/box"), { force: true });
        writeFileSync(at(side, "log"), "");
        const first = await conmon(side, ...begin);
        expect((await runtime(side, "start", "box")).status).toBe(0);
        const numbers = () =>
          [...text(at(side, "log")).matchAll(/ F (\d+)$/gm)].map((match) => Number(match[1]));
        await until(() => numbers().length > 2);
        const images = at(side, "checkpoint");
        const checkpoint = ["checkpoint", "--file-locks", "--image-path", images, "--work-path", bundle];
        const left = await runtime(side, ...checkpoint, "--leave-running", "box");
        expect(left.status, left.stderr).toBe(0);
        expect(entries(bundle)).toEqual(expect.arrayContaining(["dump.log", "stats-dump"])); // it exports them
        expect(JSON.parse((await runtime(side, "state", "box")).stdout).status).toBe("running");
        const ended = await runtime(side, ...checkpoint, "box");
        expect(ended.status, ended.stderr).toBe(0);
        await until(() => text(at(side, "exits/box")) || undefined, { what: () => "conmon's exit file" });
        await until(() => !isAlive(first.pid as number));
        await runtime(side, "delete", "--force", "box");
        rmSync(at(side, "exits/box"));
        const count = numbers().length;
        // As CRI-O restores: conmon calls `restore --detach --image-path … --work-path …` itself.
        const second = await conmon(side, ...begin, "--restore", images);
        expect(second.pid, JSON.stringify(second)).toBeGreaterThan(0);
        expect(Number(readFileSync(at(side, "pidfile"), "utf8"))).toBe(second.pid);
        const parent = readFileSync(`/proc/${second.pid}/stat`, "latin1").split(") ")[1]!.split(" ")[1];
        expect(parent).toBe(readFileSync(at(side, "conmon-pidfile"), "utf8").trim());
        await until(() => numbers().length > count + 1, {
          what: () => `it to count on: ${text(at(side, "log"))}`,
        });
        expect(numbers()).toEqual(numbers().map((_, n) => n));
        expect(readFileSync(join(bundle, "config.json"), "utf8")).toBe(before); // the caller's bundle stays as it was
        expect((await runtime(side, "kill", "box", "15")).status).toBe(0);
        expect(
          (
            await until(() => text(at(side, "exits/box")) || undefined, { what: () => "conmon's exit file" })
          ).trim(),
        ).toBe("7");
        expect((await runtime(side, "delete", "box")).status).toBe(0);
      } finally {
        await runtime(side, "delete", "--force", "box");
        writeFileSync(join(bundle, "config.json"), original);
      }
    },
  );

  it("checkpoint a container instead of ending it, and create it from there: created, then started", {
    timeout: 60_000,
  }, async () => {
    const side = "wrapper";
    const bundle = join(place.dir, side);
    const original = readFileSync(join(bundle, "config.json"));
    const configure = (annotations: Record<string, string>): string => {
      const spec = JSON.parse(original.toString());
      spec.process.args = ["/programs/counter", "20", "7"]; // ends with 7 at TERM
      spec.annotations = annotations;
      writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
      return JSON.stringify(spec);
    };
    const begin = exitAndPids(side);
    const box = (...args: string[]) => runtime(side, ...args);
    const state = async () => JSON.parse((await box("state", "box")).stdout);
    const numbers = () => [...text(at(side, "log")).matchAll(/ F (\d+)$/gm)].map((match) => Number(match[1]));
    const exited = async () => {
      const status = await until(() => text(at(side, "exits/box")) || undefined, {
        what: () => "conmon's exit file",
      });
      rmSync(at(side, "exits/box"));
      return status.trim();
    };
    const restored = async () => {
      const created = await conmon(side, ...begin);
      expect(created.pid, JSON.stringify(created)).toBeGreaterThan(0);
      expect(await state()).toMatchObject({ status: "created", pid: created.pid, id: "box", bundle });
      return created;
    };
    try {
      rmSync(at(side, "exits/box"), { force: true });
      writeFileSync(at(side, "log"), "");
      configure({
        "cedana.io/checkpoint-on": "SIGTERM",
        "cedana.io/checkpoint-name": "box",
        "cedana.io/rootfs-diff": "false", // its root file system is a directory
      });
      await conmon(side, ...begin);
      expect((await box("start", "box")).status).toBe(0);
      await until(() => numbers().length > 2);
      expect((await box("kill", "box", "15")).status).toBe(0);
      expect(await exited(), place.cedanadLog()).toBe("143");
      expect((await box("delete", "box")).status).toBe(0);
      const before = configure({ "cedana.io/restore-from": "box" });

      // Deleted, or killed, before it was ever started: it is gone, and has done nothing.
      const count = numbers().length;
      await restored();
      expect((await box("delete", "box")).status).toBe(0);
      expect(await exited()).toBe("137");
      await restored();
      const refused = await box("checkpoint", "--image-path", at(side, "none"), "box");
      expect(refused).toMatchObject({ status: 1, stderr: expect.stringContaining("created state") });
      expect((await box("kill", "box", "TERM")).status).toBe(0);
      expect(await exited()).toBe("137");
      expect((await state()).status).toBe("stopped");
      expect((await box("start", "box")).status).not.toBe(0);
      expect((await box("delete", "box")).status).toBe(0);
      expect((await box("state", "box")).status).not.toBe(0);
      expect(numbers().length).toBe(count);

      const { pid } = await restored();
      expect(readFileSync(`/proc/${pid}/stat`, "latin1").split(") ")[1]!.split(" ")[1]).toBe(
        readFileSync(at(side, "conmon-pidfile"), "utf8").trim(),
      );
      const again = await box("create", "--bundle", bundle, "box"); // the id is taken
      expect(again.status).not.toBe(0);
      expect((await box("start", "box")).status).toBe(0);
      expect(await state()).toMatchObject({ status: "running", pid, bundle });
      expect((await box("start", "box")).status).not.toBe(0);
      await until(() => numbers().length > count + 1, { what: () => text(at(side, "log")) });
      expect(numbers()).toEqual(numbers().map((_, n) => n)); // nothing is missing, nothing comes twice
      expect((await box("delete", "box")).status).not.toBe(0); // it runs
      expect(readFileSync(join(bundle, "config.json"), "utf8")).toBe(before); // the caller's bundle stays as it was
      expect((await box("kill", "box", "15")).status).toBe(0);
      expect(await exited()).toBe("7");
      expect((await box("delete", "box")).status).toBe(0);
      for (const left of ["oci", "oci-bundles"]) expect(entries(join(place.runDir, left))).toEqual([]);

      // `run` is both at once; in the foreground it ends as the container does.
      // By real pipes: Node's are sockets, which CRIU can't put in the place of a pipe.
      const piped = ["bash", "-c", '"$@" 2>&1 | cat; exit $PIPESTATUS', "bash"];
      const run = place.spawn([
        ...piped,
        ...place.runtime(side, "--root", root(side), "run", "--bundle", bundle, "box"),
      ]);
      let said = "";
      run.stdout!.on("data", (chunk) => (said += chunk));
      await until(() => /\n/.test(said) && (/^\d/.test(said) || run.exitCode !== null), {
        what: () => `output of run (${run.exitCode}): ${said}\n${place.cedanadLog().slice(-3000)}`,
      });
      expect(Number(said.split("\n")[0]), said).toBeGreaterThan(1);
      // It speaks before crun has noted that it is there.
      await until(async () => /"running"/.test((await box("state", "box")).stdout), {
        what: () => "the state of run's container",
      });
      expect((await box("kill", "box", "15")).status).toBe(0);
      expect(await new Promise((resolve) => run.once("exit", resolve))).toBe(7);
      expect(await box("state", "box"), place.cedanadLog().slice(-1500)).toMatchObject({ status: 1 });
    } finally {
      await box("delete", "--force", "box");
      writeFileSync(join(bundle, "config.json"), original);
    }
  });

  it("restore a container with connections, for which CRI-O has no option", { timeout: 60_000 }, async () => {
    const side = "wrapper";
    const bundle = join(place.dir, side);
    const original = readFileSync(join(bundle, "config.json"));
    const spec = JSON.parse(original.toString());
    spec.process.args = ["/programs/tcp"];
    spec.annotations = { "cedana.io/tcp": "keep" };
    writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
    const begin = exitAndPids(side);
    const numbers = () => [...text(at(side, "log")).matchAll(/ F (\d+)\b/g)].map((match) => Number(match[1]));
    const more = async (count: number) =>
      await until(() => numbers().length > count, {
        what: () => `more than ${count}: ${text(at(side, "log"))}`,
      });
    try {
      rmSync(at(side, "exits/box"), { force: true });
      writeFileSync(at(side, "log"), "");
      const first = await conmon(side, ...begin);
      expect((await runtime(side, "start", "box")).status).toBe(0);
      await more(3);
      const images = at(side, "connected");
      const flags = ["--file-locks", "--leave-running", "--image-path", images, "--work-path", bundle];
      const dumped = await runtime(side, "checkpoint", ...flags, "box");
      expect(dumped.status, dumped.stderr).toBe(0);
      await more(numbers().length + 1); // it goes on with its connection
      expect((await runtime(side, "kill", "box", "9")).status).toBe(0);
      await until(() => !isAlive(first.pid as number));
      expect((await runtime(side, "delete", "--force", "box")).status).toBe(0);
      // The manifest tells the restore, also where the new container's annotations don't.
      spec.annotations = {};
      writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
      const count = numbers().length;
      const second = await conmon(side, ...begin, "--restore", images);
      expect(second.pid, JSON.stringify(second)).toBeGreaterThan(0);
      await more(count + 2);
      const [from, then] = numbers().slice(count);
      expect(from).toBeGreaterThan(1);
      expect(then).toBe(from! + 1);
    } finally {
      await runtime(side, "delete", "--force", "box");
      writeFileSync(join(bundle, "config.json"), original);
    }
  });

  it("are told why not by what conmon sends upward", { timeout: 60_000 }, async () => {
    const side = "wrapper";
    const bundle = join(place.dir, side);
    const original = readFileSync(join(bundle, "config.json"));
    const annotate = (annotations: Record<string, string>) =>
      writeFileSync(
        join(bundle, "config.json"),
        JSON.stringify({ ...JSON.parse(original.toString()), annotations }),
      );
    const begin = exitAndPids(side);
    try {
      annotate({ "cedana.io/kill-signal": "BLAH" });
      const refused = await conmon(side, ...begin);
      expect(refused.pid).toBeLessThan(0);
      expect(refused.message).toMatch(/kill-signal names "BLAH", which is no signal/);
      annotate({ "cedana.io/restore-from": "nothing" });
      expect(await conmon(side, ...begin)).toMatchObject({
        pid: expect.any(Number),
        message: expect.stringMatching(/nothing/),
      });
      annotate({});
      const images = at(side, "no-images");
      mkdirSync(images, { recursive: true });
      const empty = await conmon(side, ...begin, "--restore", images);
      expect(empty.pid).toBeLessThan(0);
      expect(empty.message).toContain(images);
      expect((await runtime(side, "state", "box")).status).not.toBe(0);
      expect(entries(join(place.runDir, "oci"))).toEqual([]);
    } finally {
      await runtime(side, "delete", "--force", "box");
      writeFileSync(join(bundle, "config.json"), original);
    }
  });

  /** `update --resources -`, which reads stdin. */
  async function updateByStdin(side: Side): Promise<number | null> {
    const child = place.spawn(
      place.runtime(side, "--root", root(side), "update", "--resources", "-", "box"),
      { input: true },
    );
    child.stdin!.end(JSON.stringify(counted() ? { pids: { limit: 50 } } : {}));
    return await new Promise((resolve) => child.once("exit", resolve));
  }
});

function text(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return "";
  }
}

describe.skipIf(missing)(`buildah${because}`, () => {
  let place: CallerPlace;
  beforeAll(async () => {
    place = await CallerPlace.start("runc");
    place.configureContainers();
    await place.ok([caller("buildah"), "pull", "--quiet", `docker-archive:${await imageTar()}`]);
  });
  afterAll(async () => await place?.stop());

  it("runs the steps of a build in either", async () => {
    const container = await place.ok([
      caller("buildah"),
      "from",
      "--pull-never",
      "--ulimit",
      "nofile=1024:1024",
      "--ulimit",
      "nproc=1024:1024",
      IMAGE,
    ]);
    const outcomes = [];
    for (const side of sides) {
      const flags =
        side === "engine"
          ? ["--runtime", "/usr/sbin/runc"]
          : ["--runtime", wrapper, "--runtime-flag", `cedana-config=${place.config}`];
      const run = (...args: string[]) =>
        place.run([
          caller("buildah"),
          "run",
          "--isolation",
          "oci",
          "--network",
          "host",
          ...flags,
          container,
          "--",
          ...args,
        ]);
      const outcome = await run("sh", "-c", "echo built >/file; cat /file; echo err >&2");
      outcomes.push([outcome, (await run("sh", "-c", "exit 5")).status, (await run("cat", "/file")).stdout]);
    }
    expect(outcomes[1]).toEqual(outcomes[0]);
    expect(outcomes[0]).toEqual([
      { status: 0, stdout: "built\n", stderr: expect.stringContaining("err\n") },
      5,
      "built\n",
    ]);
    await place.expectNoLeftovers();
  });
});

describe.each(engines)("containerd's own shim, with cedana-runtime over %s for a BinaryName", (engine) => {
  let live: Live;
  liveFor({ engine, runtime: GO_SHIM, env: { CEDANA_ENGINE: engine } }, (started) => {
    live = started;
  });

  it("runs, execs, pauses, kills and deletes", async () => {
    const runtimeOptions = anyOf("containerd.runc.v1.Options", { binaryName: wrapper });
    expect(await live.runToEnd(["sh", "-c", "echo hello; exit 7"], { runtimeOptions })).toMatchObject({
      status: 7,
      stdout: "hello\n",
    });
    await using task = await live.run(["counter", "20", "42"], { runtimeOptions });
    expect(await task.nextNumber()).toBe(0);
    const asked = await task.execToEnd(["sh", "-c", "echo in; echo err >&2; exit 4"]);
    expect(asked).toEqual({ status: 4, stdout: "in\n", stderr: "err\n" });
    await task.pause();
    expect(await task.state()).toMatchObject({ status: "PAUSED" });
    await task.resume();
    await task.kill(15);
    expect(await task.wait()).toBe(42);
    expect(await task.delete()).toBe(42);
    await expect(live.run(["no-such-program"], { runtimeOptions })).rejects.toThrow(
      /OCI runtime create failed.*no-such-program/,
    );
  });

  // go-runc's way: options with one dash, some of them twice, the log read after the end, and the message's first line shown.
  it("checkpoints and restores, and says why not", async () => {
    const runtimeOptions = anyOf("containerd.runc.v1.Options", { binaryName: wrapper });
    const task = await live.run(["counter", "20", "42"], { runtimeOptions });
    let image: string;
    let last: number;
    try {
      await task.nextNumber();
      await task.checkpoint();
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1); // it runs on
      image = await task.checkpoint({ exit: true });
      expect(await task.wait()).toBe(137);
      await task.stdout.end();
      last = Number(task.stdout.text.trim().split("\n").at(-1));
      await expect(task.checkpoint()).rejects.toThrow(/stopped|not running/);
    } finally {
      await task.destroy();
    }
    const options = { binaryName: wrapper, criuImagePath: image };
    const restored = await live.run(["counter", "20", "42"], {
      runtimeOptions: anyOf("containerd.runc.v1.Options", options),
    });
    try {
      expect(await restored.nextNumber()).toBe(last + 1);
      await restored.kill(15);
      expect(await restored.wait()).toBe(42);
      expect(await restored.delete()).toBe(42);
    } finally {
      await restored.destroy();
    }
    await using locks = await live.run(["locks"], { runtimeOptions });
    await locks.nextNumber();
    await expect(locks.checkpoint()).rejects.toThrow(/file-locks: .*cedana\.io\/file-locks/);
    await locks.nextNumber();
  });
});
