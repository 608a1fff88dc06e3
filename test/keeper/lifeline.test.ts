// The keeper's line to cedanad: what it says and in which order, a cedanad that hangs or can't start, and when it leaves.

import { spawn } from "node:child_process";
import fs from "node:fs";
import { beforeAll, describe, expect, it } from "vitest";
import { encodeMessage } from "../../src/shim/keeper-protocol.ts";
import { until } from "../live/harness/until.ts";
import { BUILD_TIMEOUT_MS, buildKeeper, type Ground, isAlive, kill, Pod, type } from "./harness.ts";

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

/** A process that is only there to be killed. */
function victim(pod: Ground): number {
  const child = spawn("sleep", ["1000"], { stdio: "ignore" });
  pod.pids.push(child.pid!);
  return child.pid!;
}

const empty = new Uint8Array();

describe.concurrent("a keeper", () => {
  it("says who it is", async () => {
    await using pod = await Pod.start();
    const hello = pod.link.log.find((message) => message.type === type.HELLO)!;
    expect([hello.int("versionMin"), hello.int("versionMax")]).toEqual([1, 2]);
    expect([hello.string("namespace"), hello.string("id"), hello.string("bundle")]).toEqual([
      "test",
      "c1",
      pod.bundle,
    ]);
    expect(hello.string("socketPath")).toBe(pod.socketPath);
    expect(hello.int("mountNs")).toBe(fs.statSync("/proc/self/ns/mnt").ino);
    expect(fs.readFileSync(`/proc/${pod.pid}/cmdline`, "utf8").replace(/\0+$/, "").split("\0")).toEqual([
      "containerd-shim-cedana-v2",
      "-namespace",
      "test",
      "-id",
      "c1",
      "-address",
      "/run/containerd.sock",
    ]);
  });

  it("tells a new cedanad its tasks, exits and requests, in this order, and that this was all", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    client.call("s", "M", empty).catch(() => {});
    await pod.link.take(type.REQUEST);
    pod.link.send(type.TASK, { id: "c1", bundle: pod.bundle, pid: 42, execPid: [43, 44] });
    pod.link.send(type.TASK, { id: "c2", bundle: pod.bundle, pid: 45 });
    pod.link.send(type.TASK_GONE, { id: "c2" });
    await pod.link.run({ argv: ["sh", "-c", "(sleep 0.01; exit 6) & exit 0"] });
    await pod.link.take(type.EXIT);
    const link = await pod.replaceCedanad();
    const told = link.log.filter((message) => message.type !== type.PING);
    expect(told.map((message) => message.type)).toEqual([
      type.HELLO,
      type.TASK,
      type.EXIT,
      type.REQUEST,
      type.END,
    ]);
    const task = told[1]!;
    expect([task.string("id"), task.string("bundle"), task.int("pid"), task.ints("execPid")]).toEqual([
      "c1",
      pod.bundle,
      42,
      [43, 44],
    ]);
  });

  it("goes on without a cedanad that speaks none of its versions", async () => {
    await using pod = await Pod.start();
    pod.cedanad.welcome = { errno: 71, message: "too old" };
    await pod.cedanad.die();
    await pod.cedanad.listen();
    await until(() => pod.log().includes("cedanad refuses this keeper: too old"), { what: () => "the log" });
    pod.cedanad.welcome = { version: 1, pid: 0 };
    await pod.replaceCedanad();
    expect(await pod.link.run({ argv: ["true"] })).toBe(0);
  });

  it("survives frames that are too long, cut short or unknown, and connects again", async () => {
    await using pod = await Pod.start();
    const unknown = Buffer.from(encodeMessage(type.PONG, { nonce: 7 }));
    unknown.writeUInt16LE(999, 4);
    pod.link.socket.write(unknown);
    expect(await pod.link.run({ argv: ["true"] })).toBe(0);
    const tooLong = Buffer.alloc(8);
    tooLong.writeUInt32LE(0x7fffffff, 0);
    const cutField = Buffer.from("0900000010000000" + "0100000008000000" + "00", "hex");
    for (const bytes of [tooLong, cutField]) {
      pod.link.socket.write(bytes);
      await pod.link.ended();
      await until(() => pod.cedanad.links.some((link) => !link.closed), { what: () => "a new connection" });
      pod.link = await pod.cedanad.keeper();
      await pod.link.take(type.END);
    }
    expect(pod.log()).toMatch(/unreadable frame from cedanad: Message too long[\s\S]*unreadable frame/);
  });
});

describe.concurrent("a cedanad that hangs", () => {
  it("is killed when it doesn't answer within a second while something is asked of it, and another is looked for", async () => {
    await using pod = await Pod.start({ CEDANA_KEEPER_PONG_MS: "1000" });
    const pid = victim(pod);
    pod.cedanad.welcome = { version: 2, pid };
    const link = await pod.replaceCedanad();
    link.alive = false;
    const client = await pod.client();
    const outcome = client.call("s", "M", empty);
    await until(() => !isAlive(pid), { what: () => "its end" });
    await link.ended();
    pod.link = await pod.cedanad.keeper();
    pod.link.respond(await pod.link.take(type.REQUEST), "answer");
    expect(Buffer.from(await outcome).toString()).toBe("answer");
    expect(pod.log()).toMatch(new RegExp(`cedanad \\(pid ${pid}\\) has not answered for \\d+ ms: killed`));
  });

  it("is left alone while nothing is asked of it", async () => {
    await using pod = await Pod.start({ CEDANA_KEEPER_PONG_MS: "200" });
    const pid = victim(pod);
    pod.cedanad.welcome = { version: 2, pid };
    const link = await pod.replaceCedanad();
    link.alive = false;
    await new Promise((resolve) => setTimeout(resolve, 500));
    expect([isAlive(pid), link.closed]).toEqual([true, false]);
  });

  it("isn't taken for another process when it has ended by itself: a pid that is somebody else's now stays alive", async () => {
    await using pod = await Pod.start({ CEDANA_KEEPER_PONG_MS: "300" });
    const pid = victim(pod);
    pod.cedanad.welcome = { version: 2, pid };
    const link = await pod.replaceCedanad();
    link.alive = false;
    const client = await pod.client();
    client.call("s", "M", empty).catch(() => {});
    await link.take(type.PING);
    // The keeper is late: cedanad is gone, and the end of its connection not yet seen, when its second is over.
    kill(pod.pid, "SIGSTOP");
    await pod.cedanad.die();
    await new Promise((resolve) => setTimeout(resolve, 500));
    kill(pod.pid, "SIGCONT");
    await pod.returnCedanad();
    expect(isAlive(pid)).toBe(true);
  });

  it("and never says who it is: the process that holds the lock is killed, and no other", async () => {
    await using pod = await Pod.start({ CEDANA_KEEPER_PATIENCE_MS: "300" });
    const innocent = victim(pod);
    pod.cedanad.welcome = undefined;
    fs.writeFileSync(`${pod.cedanad.socketPath}.lock`, `${innocent}\n`); // of an earlier one
    await pod.cedanad.die();
    await pod.cedanad.listen();
    const first = await pod.cedanad.keeper();
    await first.ended();
    expect(isAlive(innocent)).toBe(true);
    // Ours is held by this process; one that has the lock file open and is named there stands for a cedanad.
    const holder = await pod.lockHolder();
    await until(() => !isAlive(holder), { what: () => "its end" });
    pod.cedanad.welcome = { version: 2, pid: 0 };
    await pod.cedanad.die();
    await pod.returnCedanad();
  });
});

describe.concurrent("a cedanad that can't be executed", () => {
  it("is tried ever more slowly, and said so each time", async () => {
    await using pod = await Pod.start();
    await pod.cedanad.die();
    pod.cedanad.releaseLock();
    await new Promise((resolve) => setTimeout(resolve, 1_200)); // 100 + 200 + 400 + 800
    const lines = pod.log().match(/execute .*no-cedanad: No such file/g)?.length ?? 0;
    expect(lines).toBeGreaterThanOrEqual(2);
    expect(lines).toBeLessThanOrEqual(6);
    expect(fs.existsSync(pod.cedanad.socketPath)).toBe(false);
  });
});

describe.concurrent("leaving", () => {
  it("is done when cedanad says so: the socket is gone at once, the process when all is answered and sent", async () => {
    await using pod = await Pod.start();
    const client = await pod.client();
    const outcome = client.call("s", "Shutdown", empty);
    const request = await pod.link.take(type.REQUEST);
    pod.link.send(type.LEAVE);
    await until(() => !fs.existsSync(pod.socketPath), { what: () => "the end of the socket" });
    expect(isAlive(pod.pid)).toBe(true);
    pod.link.respond(request, "bye");
    expect(Buffer.from(await outcome).toString()).toBe("bye");
    await pod.gone();
    await pod.link.ended();
  });

  it("is not delayed for more than two seconds, nor by a cedanad that is gone", async () => {
    await using pod = await Pod.start();
    (await pod.client()).call("s", "M", empty).catch(() => {});
    await pod.link.take(type.REQUEST);
    pod.link.send(type.LEAVE);
    await pod.gone();
    await using second = await Pod.start();
    second.link.send(type.LEAVE);
    await second.cedanad.die();
    await second.gone();
  });

  it("is done alone when no task comes, but not while there is one or a request waits", async () => {
    await using pod = await Pod.start({ CEDANA_KEEPER_LONELY_MS: "1000" });
    pod.link.send(type.TASK, { id: "c1", bundle: pod.bundle, pid: 42 });
    await new Promise((resolve) => setTimeout(resolve, 1_300));
    expect(isAlive(pod.pid)).toBe(true);
    const client = await pod.client();
    client.call("s", "M", empty).catch(() => {});
    const request = await pod.link.take(type.REQUEST);
    pod.link.send(type.TASK_GONE, { id: "c1" });
    await new Promise((resolve) => setTimeout(resolve, 1_300));
    expect(isAlive(pod.pid)).toBe(true);
    pod.link.respond(request);
    await pod.gone();
    expect(fs.existsSync(pod.socketPath)).toBe(false);
  });

  it("is done alone after a Create that has failed, of which only an out-of-memory watch is known", async () => {
    await using pod = await Pod.start({ CEDANA_KEEPER_LONELY_MS: "1000" });
    fs.writeFileSync(pod.path("memory.events"), "oom_kill 0\n");
    await pod.link.operate(type.WATCH_OOM, { id: "c1", path: pod.dir, flags: 2 });
    await pod.gone();
  });

  it("leaves no console socket behind", async () => {
    await using pod = await Pod.start();
    await pod.link.operate(type.IO_OPEN, { io: "t", terminal: 1 });
    const consoleSocket = pod.path("c/console");
    pod.link.send(type.SPAWN, { request: 0, step: "x", io: "t", consoleSocket, argv: ["sleep", "1000"] });
    pod.pids.push((await pod.link.take(type.SPAWNED)).int("pid"));
    expect(fs.existsSync(consoleSocket)).toBe(true);
    pod.link.send(type.LEAVE);
    await pod.gone();
    expect(fs.existsSync(consoleSocket)).toBe(false);
  });
});

describe.concurrent("an out-of-memory watch", () => {
  it("tells that more processes were killed, those of one moment together, and nothing else that is noted there", async () => {
    await using pod = await Pod.start();
    const file = pod.path("memory.events");
    const note = (max: number, kills: number) =>
      fs.writeFileSync(file, `max ${max}\noom ${kills}\noom_kill ${kills}\noom_group_kill 0\n`, {
        flag: "r+",
      });
    fs.writeFileSync(file, "");
    note(1000, 0);
    await pod.link.operate(type.WATCH_OOM, { id: "c1", path: pod.dir, flags: 2 });
    for (let n = 1; n < 100; n++) note(1000 + n, 0);
    expect(await pod.link.run({ argv: ["true"] })).toBe(0);
    expect(pod.link.count(type.OOM)).toBe(0);
    // Within a tenth of a second, or a little more where the machine is slow.
    for (let n = 1; n < 100; n++) note(1100, 100 + n);
    await until(() => pod.link.count(type.OOM) > 0, { what: () => "the first" });
    await new Promise((resolve) => setTimeout(resolve, 250)); // the rest follows, if there is one
    const told = pod.link.count(type.OOM);
    expect(told).toBeLessThanOrEqual(4);
    note(1200, 500);
    await until(() => pod.link.count(type.OOM) === told + 1, { what: () => "the next" });
  });

  it("tells each change of memory.events, until the task is gone", async () => {
    await using pod = await Pod.start();
    const file = pod.path("memory.events");
    fs.writeFileSync(file, "oom_kill 0\n");
    const note = (kills: number) => fs.writeFileSync(file, `oom_kill ${kills}\n`, { flag: "r+" });
    expect((await pod.link.operate(type.WATCH_OOM, { id: "c1", path: pod.dir, flags: 2 })).int("errno")).toBe(
      0,
    );
    note(1);
    expect((await pod.link.take(type.OOM)).string("id")).toBe("c1");
    pod.link.send(type.TASK_GONE, { id: "c1" });
    expect(await pod.link.run({ argv: ["true"] })).toBe(0);
    const before = pod.link.count(type.OOM);
    note(2);
    expect(await pod.link.run({ argv: ["true"] })).toBe(0);
    expect(pod.link.count(type.OOM)).toBe(before);
    const missing = await pod.link.operate(type.WATCH_OOM, { id: "c1", path: pod.path("no"), flags: 2 });
    expect(missing.string("message")).toBe(`watch ${pod.path("no")}: No such file or directory`);
  });
});
