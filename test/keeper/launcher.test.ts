// The launcher, as containerd executes it.

import { execFileSync } from "node:child_process";
import fs from "node:fs";
import { createServer } from "node:net";
import path from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import { task as tasks } from "../../src/proto/index.ts";
import { processStat } from "../live/harness/system.ts";
import { until } from "../live/harness/until.ts";
import {
  BUILD_TIMEOUT_MS,
  buildKeeper,
  Ground,
  isAlive,
  isRoot,
  keeperBinary,
  Pod,
  type,
} from "./harness.ts";

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

/** The keeper that a `start` has made. */
async function keeperOf(ground: Ground): Promise<number> {
  const link = await ground.cedanad.keeper();
  const pid = (await link.take(type.HELLO)).int("pid");
  ground.pids.push(pid);
  return pid;
}

async function ready(env: Record<string, string> = {}): Promise<Ground> {
  const ground = new Ground(env);
  await ground.cedanad.listen();
  return ground;
}

const question = async (ground: Ground) =>
  await until(() => ground.cedanad.links.flatMap((link) => link.log).find((m) => m.type === type.START), {
    what: () => "the launcher's question",
  });

describe.concurrent("start", () => {
  it("takes flags with one dash, with two, and with an equals sign", async () => {
    for (const flags of [
      ["-namespace", "n", "-id", "i", "-address", "/a", "-publish-binary", "/p", "-debug"],
      ["--namespace", "n", "--id", "i", "--address", "/a", "--publish-binary", "/p", "--debug"],
      ["--namespace=n", "-id=i", "-address=/a", "--publish-binary=/p", "-debug=true"],
    ]) {
      await using ground = await ready({ MAX_SHIM_VERSION: "3" });
      const { code, stdout, stderr } = await ground.launch([...flags, "start"], {
        stdin: Buffer.from("options"),
      });
      expect([code, stdout.toString(), stderr]).toEqual([0, `unix://${ground.socketPath}`, ""]);
      const start = await question(ground);
      const names = [
        "namespace",
        "id",
        "containerdAddress",
        "publishBinary",
        "bundle",
        "ttrpcAddress",
      ] as const;
      expect(names.map((name) => start.string(name))).toEqual([
        "n",
        "i",
        "/a",
        "/p",
        ground.bundle,
        ground.env.TTRPC_ADDRESS,
      ]);
      expect([start.string("options"), start.int("maxShimVersion")]).toEqual(["options", 3]);
      await keeperOf(ground);
      expect(fs.readFileSync(path.join(ground.bundle, "address"), "utf8")).toBe(
        `unix://${ground.socketPath}`,
      );
      expect(fs.statSync(ground.socketPath).mode & 0o777).toBe(0o600);
    }
  });

  it("refuses what it doesn't know, and names that would be paths", async () => {
    await using ground = await ready();
    for (const [flags, message] of [
      [["-namespace", "n", "-id", "i", "-colour", "red", "start"], "flag -colour is unknown"],
      [["-namespace", "n", "-id"], "flag -id needs a value"],
      [["-namespace", "n", "-id", "../i", "start"], "-id is missing, or not a name"],
      [["-id", "i", "start"], "-namespace is missing, or not a name"],
      [["-namespace", "n", "-id", "i", "start", "delete"], "one action is expected, not start and delete"],
      [["-namespace", "n", "-id", "i"], "the action must be start or delete"],
    ] as const) {
      const { code, stdout, stderr } = await ground.launch(flags);
      expect([code, stdout.length, stderr]).toEqual([1, 0, expect.stringContaining(message)]);
    }
  });

  it("takes its options from stdin whole: none, up to 10 MiB, not more; and doesn't wait for ever for their end", async () => {
    await using ground = await ready();
    const tooLong = await ground.launch([...ground.flags(), "start"], {
      stdin: Buffer.alloc((10 << 20) + 1),
    });
    expect([tooLong.code, tooLong.stderr]).toEqual([1, expect.stringContaining("longer than 10 MiB")]);
    expect(ground.cedanad.links.length).toBe(0);
    const large = await ground.launch([...ground.flags(), "start"], { stdin: Buffer.alloc(10 << 20, 7) });
    expect(large.code).toBe(0);
    expect((await question(ground)).bytes("options").length).toBe(10 << 20);
    await keeperOf(ground);
  });

  it.each(["closed", "open"] as const)("works with a stdin that is %s", async (stdin) => {
    await using ground = await ready();
    const { code, stdout } = await ground.launch([...ground.flags(), "start"], { stdin });
    expect([code, stdout.toString()]).toEqual([0, `unix://${ground.socketPath}`]);
    const pid = await keeperOf(ground);
    const link = await ground.cedanad.keeper();
    expect(await link.run({ argv: ["true"] })).toBe(0);
    expect(isAlive(pid)).toBe(true);
  });

  it("leaves a keeper that has nothing of its caller's: no stdout, no stderr, no other fd, no directory, no process group", async () => {
    await using ground = await ready();
    // An fd too many, as containerd may leave one.
    const { code } = await ground.launch(
      ["-c", `exec 7</etc/passwd 9>&1; exec "$0" "$@"`, ground.launcher, ...ground.flags(), "start"],
      {
        program: "/bin/sh",
      },
    );
    expect(code).toBe(0); // close has come: nobody holds the pipes
    const pid = await keeperOf(ground);
    const fds = fs.readdirSync(`/proc/${pid}/fd`).map((fd) => fs.readlinkSync(`/proc/${pid}/fd/${fd}`));
    expect(fds.filter((name) => name !== "/dev/null" && !/^(socket|anon_inode):/.test(name))).toEqual([]);
    expect(fs.readlinkSync(`/proc/${pid}/cwd`)).toBe("/");
    const stat = fs.readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]!.split(" ");
    expect(Number(stat[2])).toBe(pid); // process group
    expect(Number(stat[3])).not.toBe(pid); // and no session to lead: a terminal could become its own, and it a scheduling group
    expect(fs.readFileSync(`/proc/${pid}/comm`, "utf8")).toBe("containerd-shim\n");
  });

  it("starts no second keeper where one serves, and replaces the socket of one that is gone", async () => {
    await using pod = await Pod.start();
    const second = path.join(pod.dir, "second");
    fs.mkdirSync(second);
    const { code, stdout } = await pod.launch([...pod.flags("c2"), "start"], { cwd: second });
    expect([code, stdout.toString()]).toEqual([0, `unix://${pod.socketPath}`]);
    expect(fs.readFileSync(path.join(second, "address"), "utf8")).toBe(`unix://${pod.socketPath}`);
    expect(pod.cedanad.links.flatMap((link) => link.log).filter((m) => m.type === type.HELLO).length).toBe(1);
    process.kill(pod.pid, "SIGKILL");
    await pod.gone();
    expect((await pod.launch([...pod.flags("c3"), "start"], { cwd: second })).code).toBe(0);
    expect(await keeperOf(pod)).not.toBe(pod.pid);
  });

  it("passes on what cedanad has against it, asks again when cedanad goes away, and gives up in time", async () => {
    await using ground = await ready({ CEDANA_KEEPER_PATIENCE_MS: "700" });
    Object.assign(ground.cedanad.startAnswer, { errno: 22, message: "bundle is broken" });
    const refused = await ground.launch([...ground.flags(), "start"]);
    expect([refused.code, refused.stderr]).toEqual([1, "containerd-shim-cedana-v2: bundle is broken\n"]);
    ground.cedanad.alive = false;
    const holder = await ground.lockHolder();
    const hung = await ground.launch([...ground.flags(), "start"]);
    expect([hung.code, hung.stderr]).toEqual([
      1,
      expect.stringMatching(/UNAVAILABLE: cedanad at .* gave no answer: .*its log is/),
    ]);
    await until(() => !isAlive(holder), { what: () => "the end of the cedanad that hangs" });
    Object.assign(ground.cedanad.startAnswer, { errno: 0 });
    await ground.cedanad.die();
    await ground.cedanad.listen();
    const asked = ground.launch([...ground.flags(), "start"]);
    await question(ground);
    await ground.cedanad.die();
    ground.cedanad.alive = true;
    await ground.cedanad.listen();
    expect((await asked).code).toBe(0);
    await keeperOf(ground);
  });

  it("starts a cedanad when none is there, by one starter, with the socket and the lock", async () => {
    await using ground = new Ground();
    ground.cedanad.releaseLock();
    const program = ground.script(
      "cedanad",
      `echo $$ >> ${ground.path("starts")}; env > ${ground.path("env")}.$$; ls -l /proc/$$/fd > ${ground.path("fds")}.$$; exec sleep 1000`,
    );
    const env = { CEDANA_DAEMON: program, CEDANA_KEEPER_PATIENCE_MS: "1500", SECRET: "no" };
    const launched = [1, 2, 3].map(() => ground.launch([...ground.flags(), "start"], { env }));
    const starts = () => {
      const file = ground.path("starts");
      return fs.existsSync(file) ? fs.readFileSync(file, "utf8").trim().split("\n").map(Number) : [];
    };
    const pid = await until(() => starts()[0] || undefined, { what: () => "a cedanad" });
    await new Promise((resolve) => setTimeout(resolve, 200)); // a second one would come meanwhile
    expect(starts()).toEqual([pid]);
    expect(fs.readFileSync(`${ground.cedanad.socketPath}.lock`, "utf8")).toBe(`${pid}\n`);
    // It never answers: whoever gives up ends it.
    for (const { code, stderr } of await Promise.all(launched))
      expect([code, stderr]).toEqual([1, expect.stringContaining("UNAVAILABLE")]);
    // Another starter may have been quick: the last one's pid is in the lock file before its program runs.
    ground.pids.push(...starts(), Number(fs.readFileSync(`${ground.cedanad.socketPath}.lock`, "utf8")));
    expect(isAlive(pid)).toBe(false);
    const environment = fs.readFileSync(ground.path(`env.${pid}`), "utf8");
    expect(environment).toContain("LISTEN_FDS=1\n");
    expect(environment).toContain(`LISTEN_PID=${pid}\n`);
    expect(environment).not.toContain("SECRET");
    expect(fs.readFileSync(ground.path(`fds.${pid}`), "utf8")).toMatch(/ 3 -> socket:[\s\S]* 4 -> .*\.lock/);
  });

  it("doesn't start one after another when they end at once", async () => {
    await using ground = new Ground();
    ground.cedanad.releaseLock();
    const program = ground.script("cedanad", `echo started >> ${ground.path("starts")}; exit 1`);
    const env = { CEDANA_DAEMON: program, CEDANA_KEEPER_PATIENCE_MS: "1000" };
    expect((await ground.launch([...ground.flags(), "start"], { env })).code).toBe(1);
    expect(fs.readFileSync(ground.path("starts"), "utf8").split("\n").length).toBeLessThan(22); // 10 by the clock; 50 ms apart there would be 24 and more
  });

  it("works when its file is copied elsewhere: cedanad is found beside it, or where CEDANA_DAEMON says", async () => {
    await using ground = await ready();
    const copy = path.join(ground.dir, "elsewhere-shim");
    fs.copyFileSync(keeperBinary, copy);
    expect((await ground.launch([...ground.flags(), "start"], { program: copy })).code).toBe(0);
    await keeperOf(ground);
    await using other = new Ground({ CEDANA_DAEMON: "", CEDANA_KEEPER_PATIENCE_MS: "200" });
    other.cedanad.releaseLock();
    fs.copyFileSync(keeperBinary, other.path("shim"));
    other.script("cedanad", `echo $$ > ${other.path("pid")}; exec sleep 1000`);
    expect((await other.launch([...other.flags(), "start"], { program: other.path("shim") })).code).toBe(1);
    other.pids.push(Number(fs.readFileSync(other.path("pid"), "utf8")));
  });
});

describe.concurrent("delete", () => {
  const decode = (bytes: Buffer) => tasks.DeleteResponse.decode(bytes);

  /** An engine's note and state, as cedanad leaves them in the bundle. */
  function container(ground: Ground, engine: string): void {
    fs.mkdirSync(ground.path("root/c1"), { recursive: true });
    fs.writeFileSync(path.join(ground.bundle, "cedana-engine"), `${engine}\n${ground.path("root")}\nc1\n`);
  }

  it("answers with what cedanad knows of the end", async () => {
    await using ground = await ready();
    const launched = ground.launch([...ground.flags(), "delete"]);
    const link = await until(() => ground.cedanad.links[0], { what: () => "the launcher" });
    expect((await link.take(type.DELETE)).string("bundle")).toBe(ground.bundle);
    link.send(type.DELETE_ANSWER, { flags: 1, pid: 42, status: 7, atNs: 1_700_000_000_000_000_005n });
    const { code, stdout, stderr } = await launched;
    expect([code, stderr]).toEqual([0, ""]);
    expect(decode(stdout)).toMatchObject({
      pid: 42,
      exitStatus: 7,
      exitedAt: { seconds: 1_700_000_000n, nanos: 5 },
    });
  });

  it("cleans up alone where no cedanad is: engine, address, 137; and starts none", async () => {
    await using ground = new Ground();
    container(ground, ground.script("engine", `echo "$@" > ${ground.path("called")}`));
    fs.mkdirSync(path.dirname(ground.socketPath));
    const server = createServer().listen(ground.socketPath);
    await new Promise((resolve) => server.once("listening", resolve));
    fs.renameSync(ground.socketPath, `${ground.socketPath}.kept`); // close() removes the name it was bound to
    await new Promise((resolve) => server.close(resolve));
    fs.renameSync(`${ground.socketPath}.kept`, ground.socketPath);
    fs.writeFileSync(path.join(ground.bundle, "address"), `unix://${ground.socketPath}`);
    const { code, stdout, stderr } = await ground.launch(
      [...ground.flags(), "-bundle", ground.bundle, "delete"],
      { cwd: "/" },
    );
    expect([code, stderr]).toEqual([0, ""]);
    expect(decode(stdout)).toMatchObject({ pid: 0, exitStatus: 137 });
    expect(fs.readFileSync(ground.path("called"), "utf8")).toBe(
      `--root ${ground.path("root")} delete --force c1\n`,
    );
    expect(fs.existsSync(ground.socketPath)).toBe(false);
    expect(ground.log()).toBe("");
  });

  it("takes no longer than 4 s when cedanad hangs and the engine too, which it leaves to finish", async () => {
    await using ground = await ready();
    ground.cedanad.alive = false;
    container(
      ground,
      ground.script("engine", `trap '' TERM; sleep 1000 & echo $! > ${ground.path("pid")}; wait`),
    );
    const start = Date.now();
    const { code, stdout, stderr } = await ground.launch([...ground.flags(), "delete"]);
    expect(Date.now() - start).toBeLessThan(6_000); // 3.5 s and what a loaded machine adds
    expect([code, stderr]).toEqual([0, expect.stringContaining("takes longer than 1800 ms: left to itself")]);
    expect(decode(stdout).exitStatus).toBe(137);
    const pid = Number(fs.readFileSync(ground.path("pid"), "utf8"));
    expect(isAlive(pid)).toBe(true);
    const engine = processStat(pid)!.ppid;
    process.kill(-engine, "SIGKILL");
    await until(() => !isAlive(pid), { what: () => "the end of the engine's child" });
  });

  it("says which engine could not be executed", async () => {
    await using ground = new Ground();
    container(ground, "/no/such/engine");
    const { code, stderr } = await ground.launch([...ground.flags(), "delete"]);
    expect([code, stderr]).toEqual([
      0,
      expect.stringContaining("execute /no/such/engine to delete c1: No such file"),
    ]);
  });

  it.skipIf(!isRoot)(
    "unmounts the rootfs, also where the bundle is named through a symbolic link",
    async () => {
      await using ground = new Ground();
      const rootfs = path.join(ground.bundle, "rootfs");
      fs.mkdirSync(rootfs);
      for (let i = 0; i < 2; i++) execFileSync("mount", ["-t", "tmpfs", "keeper-test", rootfs]);
      fs.symlinkSync(ground.bundle, ground.path("link"));
      const { code } = await ground.launch([...ground.flags(), "-bundle", ground.path("link"), "delete"], {
        cwd: "/",
      });
      expect(code).toBe(0);
      expect(fs.readFileSync("/proc/self/mountinfo", "utf8")).not.toContain(ground.dir);
    },
  );
});

describe.concurrent("-v and -info", () => {
  it.each(["-v", "-version", "--version"])("%s says versions without asking anybody", async (flag) => {
    await using ground = new Ground();
    const { code, stdout } = await ground.launch([flag]);
    expect(code).toBe(0);
    expect(stdout.toString()).toMatch(/Version: {2}\S+\n {2}Revision: \S+\n {2}Protocol: 1 to 2\n/);
  });

  it("-info prints cedanad's answer to the options on stdin", async () => {
    await using ground = await ready();
    const launched = ground.launch(["-info"], { stdin: Buffer.from("options") });
    const link = await until(() => ground.cedanad.links[0], { what: () => "the launcher" });
    expect((await link.take(type.INFO)).string("options")).toBe("options");
    link.send(type.INFO_ANSWER, { answer: Buffer.from([0, 1, 2]) });
    const { code, stdout, stderr } = await launched;
    expect([code, [...stdout], stderr]).toEqual([0, [0, 1, 2], ""]);
  });
});

describe.concurrent("cedana-loopback", () => {
  it("doesn't wait for ever for a state that nobody writes", async () => {
    await using ground = new Ground({ CEDANA_LOOPBACK_PATIENCE_MS: "50" });
    const program = ground.path("cedana-loopback");
    fs.symlinkSync(keeperBinary, program);
    const { code, stderr } = await ground.launch([], { program, stdin: "open" });
    expect(code).toBe(1);
    expect(stderr).toMatch(/cedana-loopback: read the container's state from stdin: .*timed out/i);
  });
});
