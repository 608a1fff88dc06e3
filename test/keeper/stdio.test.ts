// Stdio: FIFOs, files, terminals, and how they end. Log programs have a file of their own.

import { execFileSync } from "node:child_process";
import fs from "node:fs";
import { beforeAll, describe, expect, it } from "vitest";
import { childrenOf } from "../../src/linux/proc.ts";
import type { FieldValues } from "../../src/shim/keeper-protocol.ts";
import { canFuse, deadFuse } from "../live/harness/dead-fuse.ts";
import { until } from "../live/harness/until.ts";
import { BUILD_TIMEOUT_MS, buildKeeper, isRoot, kill, Pod, type } from "./harness.ts";

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

const [none, fifo, file] = [0, 1, 2];
const ETIMEDOUT = 110;
const EEXIST = 17;
const EINVAL = 22;
const ECANCELED = 125;

/** A reader that is there for a while: what it has read so far. */
class Reader {
  readonly chunks: Buffer[] = [];
  readonly fd: number;
  readonly #done: Promise<void>;
  #open = true;

  constructor(path: string) {
    this.fd = fs.openSync(path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK);
    this.#done = this.#read();
  }

  async #read(): Promise<void> {
    const buffer = Buffer.alloc(1 << 16);
    while (this.#open) {
      let length = 0;
      try {
        length = fs.readSync(this.fd, buffer);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== "EAGAIN") throw error;
      }
      if (length > 0) this.chunks.push(Buffer.from(buffer.subarray(0, length)));
      else await new Promise((resolve) => setTimeout(resolve, 1));
    }
  }

  get text(): string {
    return Buffer.concat(this.chunks).toString();
  }

  get bytes(): number {
    return this.chunks.reduce((sum, chunk) => sum + chunk.length, 0);
  }

  async leave(): Promise<void> {
    this.#open = false;
    await this.#done;
    fs.closeSync(this.fd);
  }
}

async function open(pod: Pod, values: FieldValues): Promise<void> {
  const result = await pod.link.operate(type.IO_OPEN, values);
  if (result.int("errno") !== 0) throw new Error(result.string("message"));
}

/** Starts a container's process, so to speak. @returns what waits for its end */
function start(pod: Pod, io: string, script: string, more: FieldValues = {}) {
  const step = `run-${io}`;
  pod.link.send(type.SPAWN, { request: 0, step, io, argv: ["sh", "-c", script], ...more });
  return async () => (await pod.link.result(0, step)).int("waitStatus");
}

const drain = async (pod: Pod, io: string, timeoutMs = 10_000) =>
  (await pod.link.operate(type.IO_DRAIN, { io, timeoutMs })).int("errno");
const free = async (pod: Pod, io: string) => (await pod.link.operate(type.IO_FREE, { io })).int("errno");

const digits = (count: number) => Array.from({ length: count }, (_, i) => `${i}\n`).join("");
/** Lines of 128 bytes. */
const lines = (count: number) => `i=0; while [ $i -lt ${count} ]; do printf "%0127d\\n" $i; i=$((i+1)); done`;
const linesText = (count: number) =>
  Array.from({ length: count }, (_, i) => `${`${i}`.padStart(127, "0")}\n`).join("");

describe.concurrent("FIFOs", () => {
  it("carry stdout and stderr apart, whole, and drained before IO_DRAIN is answered", async () => {
    await using pod = await Pod.start();
    const [stdout, stderr] = [pod.mkfifo("out"), pod.mkfifo("err")];
    const readers = [new Reader(stdout), new Reader(stderr)];
    await open(pod, { io: "a", stdout, stderr, stdoutKind: fifo, stderrKind: fifo });
    const ended = start(pod, "a", "seq 0 9999; echo oops >&2; exit 3");
    expect(await ended()).toBe(3 << 8);
    expect(await drain(pod, "a")).toBe(0);
    await until(() => readers[0]!.text.endsWith("9999\n") && readers[1]!.text !== "", {
      what: () => "both outputs, which each of our readers takes in its own time",
    });
    expect(readers[0]!.text).toBe(digits(10_000));
    expect(readers[1]!.text).toBe("oops\n");
    expect(await free(pod, "a")).toBe(0);
    for (const reader of readers) await reader.leave();
  });

  it("wait for the readers that a client is about to be, with all that has been written meanwhile, and with the end", async () => {
    await using pod = await Pod.start();
    const [stdout, stderr] = [pod.mkfifo("out"), pod.mkfifo("err")];
    const values = { io: "a", stdout, stderr, stdoutKind: fifo, stderrKind: fifo };
    pod.link.send(type.IO_OPEN, { request: 0, step: "open", timeoutMs: 60_000, ...values });
    let opened = false;
    const opening = pod.link.result(0, "open").then((result) => {
      opened = true;
      return result.int("errno");
    });
    const ended = start(pod, "a", "echo early; echo bad >&2"); // the object is there already
    expect(await ended()).toBe(0);
    const draining = drain(pod, "a");
    const [out] = [new Reader(stdout)];
    await new Promise((resolve) => setTimeout(resolve, 60)); // one of the two is not enough
    expect(opened).toBe(false);
    const text = execFileSync("cat", [stderr], { encoding: "utf8" }); // a reader that waits in open(2), and then for the end
    expect(text).toBe("bad\n");
    expect(await opening).toBe(0);
    expect(await draining).toBe(0);
    await until(() => out.text === "early\n", { what: () => "the output" });
    await free(pod, "a");
    await out.leave();
  });

  it("don't wait for ever for readers, nor when they are freed first, nor for what has been removed", async () => {
    await using pod = await Pod.start();
    const values = (name: string) => ({ io: name, stdout: pod.mkfifo(name), stdoutKind: fifo });
    await open(pod, { ...values("a"), timeoutMs: 30 });
    pod.link.send(type.IO_OPEN, { request: 0, step: "open", timeoutMs: 60_000, ...values("b") });
    expect(await free(pod, "b")).toBe(0);
    expect((await pod.link.result(0, "open")).int("errno")).toBe(ECANCELED);
    const gone = values("c");
    pod.link.send(type.IO_OPEN, { request: 0, step: "open-c", timeoutMs: 60_000, ...gone });
    await start(pod, "c", `rm ${gone.stdout}; echo nowhere`)();
    expect((await pod.link.result(0, "open-c")).int("errno")).toBe(0);
    expect(await drain(pod, "c")).toBe(0);
  });

  it("carry large blocks and small lines in turn, and lose no byte of either", async () => {
    await using pod = await Pod.start();
    const stdout = pod.mkfifo("out");
    const reader = new Reader(stdout);
    await open(pod, { io: "a", stdout, stdoutKind: fifo });
    const block = `head -c 1000000 /dev/zero | tr '\\0' x`;
    const ended = start(pod, "a", `${lines(200)}; ${block}; ${lines(200)}; ${block}; ${lines(200)}`);
    await ended();
    expect(await drain(pod, "a")).toBe(0);
    const wanted = [200, 0, 200, 0, 200].map((n) => (n ? linesText(n) : "x".repeat(1_000_000))).join("");
    await until(() => reader.bytes >= wanted.length, { what: () => `${reader.bytes} bytes` });
    expect(reader.text === wanted).toBe(true);
    await reader.leave();
  });

  it("take at least what a FIFO and a pipe of 64 KiB take while no reader is there, in lines of 12 bytes as well", async () => {
    await using pod = await Pod.start();
    const stdout = pod.mkfifo("out");
    await open(pod, { io: "a", stdout, stdoutKind: fifo });
    // Slowly at first: each line is a piece of its own for the keeper.
    const count = Math.ceil((128 * 1024) / 12) - 80;
    const line = 'printf "%011d\\n" $i; i=$((i+1))';
    const script = `i=0; while [ $i -lt 60 ]; do ${line}; sleep 0.005; done; while [ $i -lt ${count} ]; do ${line}; done`;
    const ended = start(pod, "a", script);
    expect(await ended()).toBe(0); // nobody has read: it didn't have to wait
    const reader = new Reader(stdout);
    expect(await drain(pod, "a")).toBe(0);
    await until(() => reader.bytes === 12 * count, { what: () => `${reader.bytes} bytes` });
    expect(reader.text).toBe(
      Array.from({ length: count }, (_, i) => `${`${i}`.padStart(11, "0")}\n`).join(""),
    );
    await reader.leave();
  });

  it("lose nothing when the reader leaves and another comes, and cost no time while there is none", async () => {
    await using pod = await Pod.start();
    const stdout = pod.mkfifo("out");
    const first = new Reader(stdout);
    await open(pod, { io: "a", stdout, stdoutKind: fifo });
    const ended = start(pod, "a", "seq 0 99999");
    await until(() => first.bytes > 10_000, { what: () => "the first bytes" });
    await first.leave();
    await until(() => /\) S/.test(fs.readFileSync(`/proc/${pod.pid}/stat`, "utf8")));
    const before = cpuTicks(pod.pid);
    await new Promise((resolve) => setTimeout(resolve, 300));
    expect(cpuTicks(pod.pid) - before).toBeLessThanOrEqual(2);
    const second = new Reader(stdout);
    await ended();
    expect(await drain(pod, "a")).toBe(0);
    const wanted = digits(100_000);
    await until(() => first.bytes + second.bytes >= wanted.length, {
      what: () =>
        `the rest: ${first.bytes} and ${second.bytes} of ${wanted.length} bytes; ${JSON.stringify([first.text.slice(-30), second.text.slice(0, 30), second.text.slice(-30)])}`,
    });
    expect(first.text + second.text === wanted).toBe(true);
    await second.leave();
  });

  it("keep what nobody has read though the process has ended, and show its end to whoever comes then", async () => {
    await using pod = await Pod.start();
    const [stdout, other] = [pod.mkfifo("out"), pod.mkfifo("other")];
    const before = fdsOf(pod.pid).length;
    await open(pod, { io: "a", stdout, stdoutKind: fifo });
    await open(pod, { io: "b", stdout: other, stdoutKind: fifo });
    await Promise.all([start(pod, "a", "echo late")(), start(pod, "b", "echo never")()]);
    expect([await drain(pod, "a"), await drain(pod, "b")]).toEqual([0, 0]);
    // A blocking read to the end of file: it comes only when the keeper has closed its own.
    expect(execFileSync("cat", [stdout], { encoding: "utf8" })).toBe("late\n");
    expect([await free(pod, "a"), await free(pod, "b")]).toEqual([0, 0]);
    expect(fdsOf(pod.pid).length).toBe(before);
  });

  it("are given up by IO_DRAIN in time when a background process holds them, and end with IO_FREE", async () => {
    await using pod = await Pod.start();
    const stdout = pod.mkfifo("out");
    const reader = new Reader(stdout);
    await open(pod, { io: "a", stdout, stdoutKind: fifo });
    const ended = start(pod, "a", `sleep 1000 & echo $! > ${pod.path("pid")}; echo said`);
    await ended();
    const holder = Number(fs.readFileSync(pod.path("pid"), "utf8"));
    pod.pids.push(holder);
    expect(await drain(pod, "a", 100)).toBe(ETIMEDOUT);
    expect(reader.text).toBe("said\n");
    pod.link.send(type.IO_DRAIN, { request: 0, step: "second", io: "a", timeoutMs: 60_000 });
    kill(holder);
    expect((await pod.link.result(0, "second")).int("errno")).toBe(0);
    expect(await free(pod, "a")).toBe(0);
    expect(await free(pod, "a")).toBe(0);
    expect(await drain(pod, "a")).toBe(0);
    await reader.leave();
  });

  it("of a process that was never started are drained at once", async () => {
    await using pod = await Pod.start();
    await open(pod, { io: "a", stdout: pod.mkfifo("out"), stdoutKind: fifo });
    expect(await drain(pod, "a")).toBe(0);
  });

  it("carry stdin; its end comes when client and keeper have closed it", async () => {
    await using pod = await Pod.start();
    const [stdin, stdout] = [pod.mkfifo("in"), pod.mkfifo("out")];
    const reader = new Reader(stdout);
    await open(pod, { io: "a", stdin, stdout, stdoutKind: fifo });
    const ended = start(pod, "a", "cat; echo end");
    for (const word of ["one\n", "two\n"]) {
      const writer = fs.openSync(stdin, "w");
      fs.writeSync(writer, word);
      fs.closeSync(writer); // a client that leaves is no end of stdin
      await until(() => reader.text.endsWith(word), { what: () => word });
    }
    const writer = fs.openSync(stdin, "w");
    expect((await pod.link.operate(type.IO_CLOSE_STDIN, { io: "a" })).int("errno")).toBe(0);
    fs.writeSync(writer, "three\n");
    await until(() => reader.text.endsWith("three\n"), { what: () => "three" });
    fs.closeSync(writer);
    await ended();
    expect(await drain(pod, "a")).toBe(0);
    await until(() => reader.text.endsWith("end\n"), { what: () => "the end" });
    await reader.leave();
  });

  it("must be FIFOs, must be there, and a key is taken once", async () => {
    await using pod = await Pod.start();
    fs.writeFileSync(pod.path("plain"), "");
    const message = async (values: FieldValues) =>
      (await pod.link.operate(type.IO_OPEN, values)).string("message");
    expect(await message({ io: "a", stdout: pod.path("no"), stdoutKind: fifo })).toMatch(
      /open .*no: No such file/,
    );
    expect(await message({ io: "a", stdout: pod.path("plain"), stdoutKind: fifo })).toMatch(
      /plain is not a FIFO/,
    );
    expect(await message({ io: "a", stdin: pod.path("plain") })).toMatch(/plain is not a FIFO/);
    expect(await message({ stdin: pod.path("plain") })).toBe("io without a key");
    // A FIFO named as a file must not make everybody wait for its reader.
    expect(await message({ io: "a", stdout: pod.mkfifo("f"), stdoutKind: file })).toMatch(
      /open .*f: No such device/,
    );
    await open(pod, { io: "a" });
    expect((await pod.link.operate(type.IO_OPEN, { io: "a" })).int("errno")).toBe(EEXIST);
    expect(fdsOf(pod.pid).filter((name) => name.startsWith(pod.dir))).toEqual([]);
  });

  it("leave no fd open after IO_FREE, however far it had come", async () => {
    await using pod = await Pod.start();
    const [stdin, stdout, stderr] = [pod.mkfifo("in"), pod.mkfifo("out"), pod.mkfifo("err")];
    const before = fdsOf(pod.pid).length;
    for (const script of [undefined, "echo hi; exit 0", "exec sleep 1000"]) {
      await open(pod, { io: "a", stdin, stdout, stderr, stdoutKind: fifo, stderrKind: fifo });
      if (script) {
        start(pod, "a", script);
        pod.pids.push((await pod.link.take(type.SPAWNED)).int("pid"));
      }
      await free(pod, "a");
      expect(fdsOf(pod.pid).length).toBe(before);
    }
    for (const pid of pod.pids.slice(1)) kill(pid);
  });

  it("of a loud container don't keep cedanad's frames waiting", async () => {
    await using pod = await Pod.start();
    await open(pod, { io: "a", stdout: "/dev/null", stdoutKind: none });
    const stdout = pod.mkfifo("out");
    const reader = new Reader(stdout);
    await open(pod, { io: "b", stdout, stdoutKind: fifo });
    start(pod, "b", "exec cat /dev/zero");
    const loud = (await pod.link.take(type.SPAWNED)).int("pid");
    pod.pids.push(loud);
    await until(() => reader.bytes > 1 << 20, { what: () => "the noise" });
    for (let i = 0; i < 20; i++) expect(await free(pod, "nothing")).toBe(0);
    kill(loud);
    await pod.link.result(0, "run-b");
    await free(pod, "b");
    await reader.leave();
  });
});

describe.concurrent("log files", () => {
  it("are made with their directories and appended to, stdout and stderr together", async () => {
    await using pod = await Pod.start();
    const log = pod.path("deep/er/log");
    for (const io of ["a", "b"]) {
      await open(pod, { io, stdout: log, stderr: log, stdoutKind: file, stderrKind: file });
      const ended = start(pod, io, `echo ${io}; sleep 0.05; echo ${io}2 >&2`);
      await ended();
      expect(await drain(pod, io)).toBe(0);
      await free(pod, io);
    }
    expect(fs.readFileSync(log, "utf8")).toBe("a\na2\nb\nb2\n");
  });

  it.skipIf(!isRoot)(
    "on a full disk make the container wait, not end, and go on when there is room",
    async () => {
      await using pod = await Pod.start();
      const disk = pod.path("disk");
      fs.mkdirSync(disk);
      execFileSync("mount", ["-t", "tmpfs", "-o", "size=256k", "keeper-test", disk]);
      try {
        fs.writeFileSync(`${disk}/ballast`, Buffer.alloc(200 << 10));
        await open(pod, { io: "a", stdout: `${disk}/log`, stdoutKind: file });
        const ended = start(pod, "a", "seq 0 30000");
        await until(() => pod.log().includes("No space left on device; its output waits"), {
          what: () => "the log",
        });
        expect(await drain(pod, "a", 50)).toBe(ETIMEDOUT);
        fs.rmSync(`${disk}/ballast`);
        expect(await ended()).toBe(0);
        expect(await drain(pod, "a")).toBe(0);
        expect(fs.readFileSync(`${disk}/log`, "utf8") === digits(30_001)).toBe(true);
        await free(pod, "a");
      } finally {
        execFileSync("umount", ["-l", disk]);
      }
    },
  );
});

describe.concurrent("whoever writes a log file", () => {
  /** The processes that do, of a pod. */
  const nameOf = (pid: number) => {
    try {
      return fs.readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0")[0];
    } catch {
      return undefined; // it has just ended
    }
  };
  const writersOf = (pod: Pod) => childrenOf(pod.pid).filter((pid) => nameOf(pid) === "cedana-log");

  it("waits for a disk alone: the pod's exits are told and its frames answered, and nobody waits for him", async () => {
    await using pod = await Pod.start();
    await open(pod, { io: "a", stdout: pod.path("log"), stdoutKind: file });
    const [writer] = writersOf(pod);
    process.kill(writer!, "SIGSTOP"); // as in a write(2) to a disk that takes its time
    const ended = start(pod, "a", "seq 0 30000; sleep 1000");
    const loud = (await pod.link.take(type.SPAWNED)).int("pid");
    pod.pids.push(loud);
    const stdout = pod.mkfifo("out");
    const reader = new Reader(stdout);
    await open(pod, { io: "b", stdout, stdoutKind: fifo });
    expect(await start(pod, "b", "echo served")()).toBe(0);
    await until(() => reader.text === "served\n", { what: () => "the other's output" });
    kill(loud);
    expect(await ended()).not.toBe(0);
    expect(await drain(pod, "a", 50)).toBe(ETIMEDOUT);
    expect(await free(pod, "a")).toBe(0);
    await until(() => writersOf(pod).length === 0, { what: () => "the end of who writes" });
    await free(pod, "b");
    await reader.leave();
  });

  it.skipIf(!canFuse)(
    "is given up when the file can't even be opened, and keeps nobody from being served",
    async () => {
      await using pod = await Pod.start();
      fs.mkdirSync(pod.path("dead"));
      using _dead = deadFuse(pod.path("dead"));
      const values = { io: "a", stdout: pod.path("dead/log"), stdoutKind: file, timeoutMs: 300 };
      const opening = pod.link.operate(type.IO_OPEN, values);
      await open(pod, { io: "b" });
      expect(await start(pod, "b", "exit 3")()).toBe(3 << 8);
      const message = await opening;
      expect(message.int("errno")).toBe(ETIMEDOUT);
      expect(message.string("message")).toMatch(
        /open the log file .*dead\/log: its file system does not answer/,
      );
      await until(() => writersOf(pod).length === 0, { what: () => "the end of who waits" });
      await free(pod, "b");
    },
  );

  it("has another one follow when he is killed, who goes on", async () => {
    await using pod = await Pod.start();
    const log = pod.path("log");
    await open(pod, { io: "a", stdout: log, stderr: log, stdoutKind: file, stderrKind: file });
    fs.writeFileSync(pod.path("wait"), "");
    const before = fdsOf(pod.pid).length;
    const ended = start(
      pod,
      "a",
      `echo one; while [ -e ${pod.path("wait")} ]; do sleep 0.02; done; echo two >&2`,
    );
    await until(() => fs.existsSync(log) && fs.readFileSync(log, "utf8") === "one\n", { what: () => "one" });
    const [first] = writersOf(pod);
    kill(first!);
    await until(() => writersOf(pod).some((pid) => pid !== first), { what: () => "another one" });
    expect(fdsOf(pod.pid).length).toBeLessThanOrEqual(before);
    fs.rmSync(pod.path("wait"));
    expect(await ended()).toBe(0);
    expect(await drain(pod, "a")).toBe(0);
    expect(fs.readFileSync(log, "utf8")).toBe("one\ntwo\n");
    expect(pod.log()).toMatch(
      /what writes the log file .*log \(pid \d+\) ended with signal 9: another one follows/,
    );
    await free(pod, "a");
  });

  it("is tried again ever less often when the file can't be opened any more, and goes on when it can", async () => {
    await using pod = await Pod.start();
    const [directory, log] = [pod.path("logs"), pod.path("logs/log")];
    await open(pod, { io: "a", stdout: log, stdoutKind: file });
    fs.writeFileSync(pod.path("wait"), "");
    const ended = start(pod, "a", `while [ -e ${pod.path("wait")} ]; do sleep 0.02; done; echo late`);
    fs.rmSync(directory, { recursive: true });
    fs.writeFileSync(directory, "no directory");
    const killedMs = performance.now();
    kill(writersOf(pod)[0]!);
    const attempts = () => pod.log().match(/another one follows/g)?.length ?? 0;
    await until(() => attempts() >= 5, { what: () => `the fifth end of who writes in ${pod.log()}` });
    expect(performance.now() - killedMs).toBeGreaterThan(1_400); // pauses of 100, 200, 400, 800 ms
    expect(pod.log()).toMatch(/open \S+logs\/log: Not a directory; the output waits/);
    fs.rmSync(directory);
    fs.rmSync(pod.path("wait"));
    expect(await ended()).toBe(0);
    expect(await drain(pod, "a")).toBe(0);
    expect(fs.readFileSync(log, "utf8")).toBe("late\n");
    await free(pod, "a");
  });

  it.each(["relative-log", ""])("is not started for %j, which is no absolute path", async (path) => {
    await using pod = await Pod.start();
    const values = { io: "a", stdout: path, stdoutKind: file };
    const message = await pod.link.operate(type.IO_OPEN, values);
    expect(message.int("errno")).toBe(EINVAL);
    expect(message.string("message")).toBe(`log file "${path}": not an absolute path`);
    expect(writersOf(pod)).toEqual([]);
    expect(fs.existsSync("/relative-log")).toBe(false);
    await open(pod, { io: "a" }); // nothing is left of it
    await free(pod, "a");
  });

  it("is no part of a FIFO's or a terminal's way", async () => {
    await using pod = await Pod.start();
    const stdout = pod.mkfifo("out");
    const reader = new Reader(stdout);
    await open(pod, { io: "a", stdout, stdoutKind: fifo, stderr: pod.path("log"), stderrKind: file });
    expect(await start(pod, "a", "echo out; echo err >&2")()).toBe(0);
    expect(await drain(pod, "a")).toBe(0);
    await until(() => reader.text === "out\n", { what: () => "the FIFO's" });
    expect(fs.readFileSync(pod.path("log"), "utf8")).toBe("err\n");
    await free(pod, "a");
    await reader.leave();
  });
});

describe.concurrent("terminals", () => {
  const python = "/usr/bin/python3";
  /** Sends a pty's master as runc does, then lives on the slave like a container. */
  const sendMaster = (script: string) => `
import os, pty, socket, sys, subprocess
master, slave = pty.openpty()
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
socket.send_fds(s, [b"/dev/ptmx"], [master]); s.close(); os.close(master)
subprocess.Popen(["sh", "-c", ${JSON.stringify(script)}], stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
`;

  it.skipIf(!fs.existsSync(python))(
    "come by the console socket, carry both ways, follow the size, and end with the process",
    async () => {
      await using pod = await Pod.start();
      const [stdin, stdout] = [pod.mkfifo("in"), pod.mkfifo("out")];
      const reader = new Reader(stdout);
      await open(pod, { io: "t", terminal: 1, stdin, stdout, stdoutKind: fifo });
      const consoleSocket = pod.path("c/sock");
      const resize = async (width: number, height: number) =>
        (await pod.link.operate(type.IO_RESIZE, { io: "t", width, height })).string("message");
      expect(await resize(80, 24)).toBe("Inappropriate ioctl for device");
      const script = "stty -echo; echo ready; while read line; do echo got $line; stty size; done; echo over";
      const status = await pod.link.run({
        argv: [python, "-c", sendMaster(script), consoleSocket],
        io: "t",
        consoleSocket,
      });
      expect(status).toBe(0);
      expect(fs.existsSync(consoleSocket)).toBe(false);
      await until(() => reader.text.includes("ready\r\n"), { what: () => "the shell" });
      expect(await resize(97, 41)).toBe("");
      const writer = fs.openSync(stdin, "w");
      fs.writeSync(writer, "hello\n");
      await until(() => reader.text.includes("got hello\r\n41 97\r\n"), {
        what: () => `its answer: ${reader.text}`,
      });
      fs.writeSync(writer, "\x04");
      expect(await drain(pod, "t")).toBe(0);
      await until(() => reader.text.endsWith("over\r\n"), { what: () => "the end" });
      fs.closeSync(writer);
      await free(pod, "t");
      await reader.leave();
    },
  );

  it.skipIf(!fs.existsSync(python))(
    "survive whoever else connects to the console socket, and says nothing or sends too much",
    async () => {
      await using pod = await Pod.start();
      const stdout = pod.mkfifo("out");
      const reader = new Reader(stdout);
      await open(pod, { io: "t", terminal: 1, stdout, stdoutKind: fifo });
      const consoleSocket = pod.path("c/sock");
      const before = fdsOf(pod.pid).length;
      const stranger = `
import os, socket, sys
mute = socket.socket(socket.AF_UNIX); mute.connect(sys.argv[1])
for fds in [[], [0, 0], [0, 0, 0, 0]]:
    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); socket.send_fds(s, [b"x"], fds); s.close()
${sendMaster("echo here").trim()}
`;
      const status = await pod.link.run({
        argv: [python, "-c", stranger, consoleSocket],
        io: "t",
        consoleSocket,
      });
      expect(status).toBe(0);
      expect(await drain(pod, "t")).toBe(0);
      await until(() => reader.text === "here\r\n", { what: () => `the output: ${reader.text}` });
      await free(pod, "t");
      expect(fdsOf(pod.pid).length).toBeLessThanOrEqual(before);
      await reader.leave();
    },
  );

  it("say when there is no place to listen at", async () => {
    await using pod = await Pod.start();
    await open(pod, { io: "t", terminal: 1 });
    const consoleSocket = pod.path("x".repeat(120));
    const result = await pod.link.operate(type.SPAWN, { argv: ["true"], io: "t", consoleSocket });
    expect(result.string("message")).toBe(`listen for the terminal at ${consoleSocket}: File name too long`);
  });
});

function cpuTicks(pid: number): number {
  const stat = fs.readFileSync(`/proc/${pid}/stat`, "utf8");
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return Number(fields[11]) + Number(fields[12]);
}

function fdsOf(pid: number): string[] {
  return fs.readdirSync(`/proc/${pid}/fd`).flatMap((fd) => {
    try {
      return [fs.readlinkSync(`/proc/${pid}/fd/${fd}`)];
    } catch {
      return []; // closed meanwhile
    }
  });
}
