// Processes: spawned ones, adopted ones, signals.

import fs from "node:fs";
import { beforeAll, describe, expect, it } from "vitest";
import { sealedCopy } from "../../src/linux/addon.ts";
import { exitStatusOf } from "../../src/shim/keeper-protocol.ts";
import { until } from "../live/harness/until.ts";
import { BUILD_TIMEOUT_MS, buildKeeper, isAlive, Pod, type } from "./harness.ts";

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

const ESRCH = 3;
const ENOENT = 2;
const ETIMEDOUT = 110;

describe.concurrent("a spawned program", () => {
  it("is reported with its pid, then its end, and between them nothing of it gets lost", async () => {
    await using pod = await Pod.start();
    for (let round = 0; round < 20; round++) {
      const result = await pod.link.operate(type.SPAWN, { argv: ["sh", "-c", `exit ${round}`] });
      const types = pod.link.log.slice(-2).map((message) => message.type);
      expect(types).toEqual([type.SPAWNED, type.RESULT]);
      expect(result.int("pid")).toBe((await pod.link.take(type.SPAWNED)).int("pid"));
      expect(exitStatusOf(result.int("waitStatus"))).toBe(round);
    }
    expect(pod.link.count(type.EXIT)).toBe(0);
  });

  it("has its arguments, environment, directory and output file, no fd of the keeper, and no ignored signal", async () => {
    await using pod = await Pod.start({ NOTIFY_SOCKET: "/run/systemd/notify", KEPT: "1", CHANGED: "old" });
    const outputPath = pod.path("out");
    const script =
      'echo "$0 $1"; echo $KEPT $CHANGED $(printenv NOTIFY_SOCKET || echo none); pwd; ls -l /proc/self/fd; grep Sig /proc/self/status';
    const status = await pod.link.run({
      argv: ["sh", "-c", script, "a b", ""],
      env: ["CHANGED=new"],
      cwd: pod.bundle,
      outputPath,
    });
    expect(status).toBe(0);
    const lines = fs.readFileSync(outputPath, "utf8").split("\n");
    expect(lines.slice(0, 3)).toEqual(["a b ", "1 new none", pod.bundle]);
    const fds = lines.flatMap((line) => / (\d+) -> (\S+)/.exec(line)?.slice(1, 3).join(" ") ?? []);
    expect(fds.filter((fd) => !fd.includes("/proc/"))).toEqual([
      "0 /dev/null",
      `1 ${outputPath}`,
      `2 ${outputPath}`,
    ]);
    for (const what of ["SigBlk", "SigIgn"])
      expect(lines.find((line) => line.startsWith(what))).toMatch(/:\t0000000000000000$/);
    expect(fs.statSync(outputPath).mode & 0o777).toBe(0o600);
  });

  it("that can't be started is an error, and no orphan's end", async () => {
    await using pod = await Pod.start();
    for (const [values, errno, why] of [
      [{ argv: ["/no/such"] }, ENOENT, "execute /no/such: No such file or directory"],
      [{ argv: ["no-such"] }, ENOENT, "execute no-such: No such file or directory"],
      [{ argv: ["true"], cwd: "/no/such" }, ENOENT, "execute true: No such file or directory"],
      [{ argv: ["true"], outputPath: "/no/such" }, ENOENT, "open /no/such: No such file or directory"],
      [{ argv: ["true"], io: "none" }, ENOENT, "no such io object"],
      [{}, 22, "spawn without argv"],
    ] as const) {
      const result = await pod.link.operate(type.SPAWN, values);
      expect([result.int("errno"), result.string("message")]).toEqual([errno, why]);
    }
    expect(await pod.link.run({ argv: ["true"] })).toBe(0);
    expect(pod.link.count(type.EXIT)).toBe(0);
  });

  it("runs from a sealed copy of its file as long as it is one, else from the file", async () => {
    await using pod = await Pod.start();
    pod.cedanad.welcome = { version: 2, pid: process.pid }; // whose descriptors are meant
    await pod.replaceCedanad();
    const program = pod.path("program"); // says what it runs from
    fs.copyFileSync("/bin/readlink", program);
    const { fd, of } = await sealedCopy(program, "copied", 2 ** 20);
    const outputPath = pod.path("out");
    const runsFrom = async (values: object) => {
      expect(await pod.link.run({ argv: [program, "/proc/self/exe"], outputPath, ...values })).toBe(0);
      return fs.readFileSync(outputPath, "utf8").trim();
    };
    const unsealed = fs.openSync(program, "r");
    try {
      expect(await runsFrom({ sealedFd: fd, sealedOf: of })).toBe("/memfd:copied (deleted)");
      expect(await runsFrom({})).toBe(program);
      expect(await runsFrom({ sealedFd: unsealed, sealedOf: of })).toBe(program);
      expect(await runsFrom({ sealedFd: 1_000_000, sealedOf: of })).toBe(program);
      expect(await runsFrom({ sealedFd: -1, sealedOf: of })).toBe(program);
      expect(await runsFrom({ sealedFd: fd, sealedOf: `${of}0` })).toBe(program);
      fs.utimesSync(program, 1, 1); // an upgrade
      expect(await runsFrom({ sealedFd: fd, sealedOf: of })).toBe(program);
      expect(() => fs.writeSync(fd, "x")).toThrow(/EPERM/);
    } finally {
      fs.closeSync(fd);
      fs.closeSync(unsealed);
    }
  });

  it("is killed with what it has started when it takes too long", async () => {
    await using pod = await Pod.start();
    const result = await pod.link.operate(type.SPAWN, {
      argv: ["sh", "-c", `sleep 1000 & echo $! > ${pod.path("pid")}; wait`],
      timeoutMs: 200,
    });
    expect([result.int("errno"), result.string("message")]).toEqual([ETIMEDOUT, "killed: it took too long"]);
    const pid = Number(fs.readFileSync(pod.path("pid"), "utf8"));
    await until(() => !isAlive(pid), { what: () => "the end of its child" });
  });
});

describe.concurrent("an adopted process", () => {
  it("is reported with status and times, kept, and told again until it is acknowledged", async () => {
    await using pod = await Pod.start();
    const start = Date.now();
    await pod.link.run({ argv: ["sh", "-c", "(sleep 0.02; exit 7) & exit 0"] });
    const exit = await pod.link.take(type.EXIT);
    expect([exit.int("sequence"), exitStatusOf(exit.int("waitStatus"))]).toEqual([1, 7]);
    const atMs = Number(exit.bigint("atNs") / 1_000_000n);
    expect(atMs).toBeGreaterThanOrEqual(start);
    expect(atMs).toBeLessThanOrEqual(Date.now());
    expect(exit.int("maxRssKb")).toBeGreaterThan(0);
    await pod.link.run({ argv: ["sh", "-c", "(sleep 0.02; kill -9 $$; exec sh -c 'kill -9 $$') & exit 0"] });
    const second = await pod.link.take(type.EXIT);
    expect(exitStatusOf(second.int("waitStatus"))).toBe(137);
    let link = await pod.replaceCedanad();
    const again = link.log.filter((message) => message.type === type.EXIT);
    expect(again.map((message) => message.int("sequence"))).toEqual([1, 2]);
    expect([again[0]!.int("pid"), again[0]!.bigint("atNs")]).toEqual([exit.int("pid"), exit.bigint("atNs")]);
    link.send(type.ACK, { sequence: 1 });
    link.send(type.ACK, { sequence: 99 });
    expect(await link.run({ argv: ["true"] })).toBe(0);
    link = await pod.replaceCedanad();
    expect(link.log.filter((m) => m.type === type.EXIT).map((m) => m.int("sequence"))).toEqual([2]);
    link.send(type.ACK, { sequence: 2 });
    expect(await link.run({ argv: ["true"] })).toBe(0);
    await link.run({ argv: ["sh", "-c", "(exit 1) & exit 0"] }); // its list was empty: the next is its first
    link = await pod.replaceCedanad();
    expect(link.count(type.EXIT)).toBeLessThanOrEqual(1);
  });

  it("of a storm is reported each, once, and none stays a zombie", async () => {
    await using pod = await Pod.start();
    const script = "i=0; while [ $i -lt 300 ]; do (exit 3 &); i=$((i+1)); done; exit 0";
    await pod.link.run({ argv: ["sh", "-c", script] });
    await until(() => pod.link.count(type.EXIT) === 300, {
      what: () => `300 ends, ${pod.link.count(type.EXIT)}`,
    });
    const exits = pod.link.log.filter((message) => message.type === type.EXIT);
    expect(exits.map((exit) => exit.int("sequence"))).toEqual(exits.map((_, at) => at + 1));
    expect(new Set(exits.map((exit) => exit.int("pid"))).size).toBe(300);
    expect(childrenOf(pod.pid)).toEqual([]);
  });

  it("that nobody knows is forgotten when there are too many for a cedanad that doesn't come; a task's never", async () => {
    await using pod = await Pod.start();
    const storm = async (rounds: number, each: number) =>
      await pod.link.run({
        argv: [
          "sh",
          "-c",
          `i=0; while [ $i -lt ${rounds} ]; do (${":&".repeat(each)}); i=$((i+1)); done; exit 0`,
        ],
      });
    await storm(1, 1);
    const first = await pod.link.take(type.EXIT);
    pod.link.send(type.TASK, { id: "c1", bundle: pod.bundle, pid: first.int("pid") });
    await storm(42, 100);
    const link = await pod.replaceCedanad();
    // What ends while it is being told comes behind END.
    const past = link.log.slice(
      0,
      link.log.findIndex((message) => message.type === type.END),
    );
    const told = past.filter((message) => message.type === type.EXIT).map((exit) => exit.int("sequence"));
    expect(told.length).toBe(4_096);
    expect(told[0]).toBe(1);
    expect(told[1]).toBeGreaterThan(2);
    expect(pod.log()).toMatch(/ends of more than 4096 orphans wait/);
  }, 60_000);
});

describe.concurrent("a signal", () => {
  it("reaches a child, and never a process that is none", async () => {
    await using pod = await Pod.start();
    pod.link.send(type.SPAWN, { request: 0, step: "s", argv: ["sleep", "1000"] });
    const pid = (await pod.link.take(type.SPAWNED)).int("pid");
    const errno = async (values: { pid: number; signal: number }) =>
      (await pod.link.operate(type.SIGNAL, values)).int("errno");
    expect(await errno({ pid: process.pid, signal: 15 })).toBe(ESRCH);
    expect(await errno({ pid: 1, signal: 15 })).toBe(ESRCH);
    expect(await errno({ pid: -1, signal: 15 })).toBe(ESRCH);
    expect(await errno({ pid: 0, signal: 15 })).toBe(ESRCH);
    expect(await errno({ pid, signal: 15 })).toBe(0);
    expect(exitStatusOf((await pod.link.result(0, "s")).int("waitStatus"))).toBe(143);
    expect(await errno({ pid, signal: 15 })).toBe(ESRCH);
  });
});

function childrenOf(pid: number): number[] {
  return fs
    .readFileSync(`/proc/${pid}/task/${pid}/children`, "utf8")
    .split(" ")
    .filter((text) => text !== "")
    .map(Number);
}
