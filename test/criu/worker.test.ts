import { execFileSync } from "node:child_process";
import {
  closeSync,
  constants,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  readSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CriuWorker } from "../../src/criu/worker.ts";
import { CriuFailed, InvalidRequest, Unavailable } from "../../src/errors/index.ts";
import { until } from "../live/harness/until.ts";
import { Victim, Workplace, whyNoDump } from "./harness.ts";

const reason = whyNoDump();

/** Numbers of descriptors, and what children there are: nothing of a conversation may be left. */
function openFds(): string[] {
  return readdirSync("/proc/self/fd")
    .map((fd) => {
      try {
        return `${fd} ${readlinkSync(`/proc/self/fd/${fd}`)}`;
      } catch {
        return ""; // the directory's own
      }
    })
    .filter((fd) => /socket|cedana-criu/.test(fd));
}
const children = () => readFileSync(`/proc/self/task/${process.pid}/children`, "utf8").trim();
const stateOf = (pid: number) => readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]![0];

describe.skipIf(reason)(`a conversation with CRIU${reason ? ` (${reason})` : ""}`, () => {
  let place: Workplace;
  let images: string;
  let fdsBefore: string[];
  let childrenBefore: string;
  beforeEach(() => {
    place = new Workplace();
    images = join(place.path, "images");
    mkdirSync(images);
    fdsBefore = openFds();
    childrenBefore = children();
  });
  afterEach(() => {
    place[Symbol.dispose]();
    expect(openFds()).toEqual(fdsBefore);
    expect(children()).toBe(childrenBefore);
  });

  it("says version and features, one after another", async () => {
    await using worker = await CriuWorker.start();
    expect(await worker.version()).toMatchObject({
      majorNumber: expect.any(Number),
      minorNumber: expect.any(Number),
    });
    expect(await worker.features()).toEqual({
      memTrack: expect.any(Boolean),
      lazyPages: expect.any(Boolean),
      pidfdStore: expect.any(Boolean),
    });
    expect((await worker.version()).majorNumber).toBeGreaterThanOrEqual(3);
  });

  it("dumps, notifying in order, and restores under the same pid", async () => {
    const events: string[] = [];
    const note = (name: string) => ({ [name]: () => void events.push(name) });
    await using victim = await Victim.program("sleeper");
    {
      await using worker = await CriuWorker.start();
      const notifications = {
        ...note("pre-dump"),
        ...note("network-lock"),
        ...note("post-dump"),
        ...note("network-unlock"),
      };
      await worker.dump({ pid: victim.pid, imagesDir: images, leaveRunning: false }, { notifications });
    }
    expect(await victim.ended()).toBe("SIGKILL");
    expect(events).toEqual(["pre-dump", "post-dump"]);
    expect(existsSync(join(images, "inventory.img"))).toBe(true);

    let told: number | undefined;
    await using worker = await CriuWorker.start();
    const pid = await worker.restore(
      { imagesDir: images },
      {
        notifications: {
          "post-restore": ({ pid }) => {
            told = pid;
          },
        },
      },
    );
    try {
      expect(pid).toBe(victim.pid);
      expect(told).toBe(pid);
      expect("SRD").toContain(stateOf(pid));
    } finally {
      process.kill(pid, "SIGKILL");
    }
  });

  it("restores as our own child when asked", async () => {
    {
      await using victim = await Victim.program("sleeper");
      await using worker = await CriuWorker.start();
      await worker.dump({ pid: victim.pid, imagesDir: images });
    }
    // In a process of its own, because nobody here would reap it.
    const source = JSON.stringify(join(import.meta.dirname, "../../src/criu/worker.ts"));
    const code = `import { readFileSync } from "node:fs";
      const { CriuWorker } = await import(${source});
      await using worker = await CriuWorker.start();
      const pid = await worker.restore({ imagesDir: ${JSON.stringify(images)}, sibling: true });
      const parent = Number(readFileSync(\`/proc/\${pid}/stat\`, "latin1").split(") ")[1].split(" ")[1]);
      process.kill(pid, "SIGKILL");
      console.log(parent === process.pid);`;
    const output = execFileSync(process.execPath, ["--input-type=module", "-e", code], { encoding: "utf8" });
    expect(output).toBe("true\n");
  });

  it("leaves the task running when a notification is refused, and says whose fault it was", async () => {
    await using victim = await Victim.program("sleeper");
    await using worker = await CriuWorker.start();
    const refuse = () => Promise.reject(new Error("the disk is somebody else's"));
    const failed = worker.dump(
      { pid: victim.pid, imagesDir: images },
      { notifications: { "post-dump": refuse } },
    );
    await expect(failed).rejects.toThrow(CriuFailed);
    await expect(failed).rejects.toThrow(/dump of process \d+ failed.*the disk is somebody else's/);
    expect("SR").toContain(stateOf(victim.pid));
  });

  it("explains a failure by CRIU's log and by what is known of it", async () => {
    await using victim = await Victim.zoo(place.path, "-odd");
    await using worker = await CriuWorker.start();
    const options = {
      pid: victim.pid,
      imagesDir: images,
      leaveRunning: true,
      linkRemap: true,
      logFile: "my.log",
    };
    const failed = worker.dump(options);
    await expect(failed).rejects.toThrow(/Connected TCP socket|Some file locks.*file-locks/);
    await expect(failed).rejects.toThrow(/tcp-established|file-locks/);
    const error = (await failed.catch((error) => error)) as CriuFailed;
    expect(error.log).toContain("Dumping FAILED");
    expect(existsSync(join(images, "my.log"))).toBe(true);
  });

  it("doesn't blame an earlier call's log", async () => {
    const old =
      "(00.01) Error (criu/x.c:1): inet: Connected TCP socket, consider using --tcp-established option.\n";
    writeFileSync(join(images, "restore.log"), old);
    utimesSync(join(images, "restore.log"), 1, 1);
    await using worker = await CriuWorker.start();
    // CRIU refuses this before it opens its log.
    const failed = worker.restore({
      imagesDir: images,
      joinNamespaces: [{ kind: "flux", file: "/nowhere" }],
    });
    await expect(failed).rejects.toThrow(/restore failed \(errno \d+\)/);
    await expect(failed).rejects.not.toThrow(/tcp/);
    expect(readFileSync(join(images, "restore.log"), "utf8")).toBe(old);
  });

  it("refuses options that CRIU would not explain", async () => {
    await using worker = await CriuWorker.start();
    for (const [options, why] of [
      [{ pid: 0 }, /no process/],
      [{ pid: process.pid }, /ourselves/],
      [{ pid: 1, logFile: "../x" }, /without a directory/],
      [{ pid: 1, parentImages: "/abs" }, /relative/],
      [{ pid: 1, ghostLimitBytes: 2 ** 32 }, /4 GiB/],
      [{ pid: 1, leaveRunning: true, leaveStopped: true }, /not both/],
      [{ pid: 1, pageServer: { fd: 99 } }, /not given to CRIU/],
      [{ pid: 1, external: ["x".repeat(1_000_000)] }, /too long/],
    ] as const)
      await expect(worker.dump({ imagesDir: images, ...options }), `${why}`).rejects.toThrow(why);
    await expect(worker.dump({ pid: 1, imagesDir: join(place.path, "none") })).rejects.toThrow(
      InvalidRequest,
    );
    // It still talks.
    expect((await worker.version()).majorNumber).toBeGreaterThan(2);
  });

  it("ends with an abort: a notification that waits is refused, and the task runs on", async () => {
    await using victim = await Victim.program("sleeper");
    const abort = new AbortController();
    await using worker = await CriuWorker.start({ signal: abort.signal });
    const failed = worker.dump(
      { pid: victim.pid, imagesDir: images },
      {
        notifications: {
          "post-dump": () => {
            abort.abort(new Error("enough"));
            return new Promise(() => {});
          },
        },
      },
    );
    await expect(failed).rejects.toMatchObject({ name: "Cancelled" });
    expect("SR").toContain(stateOf(victim.pid));
  });

  it("ends with a timeout, though a callback never answers", async () => {
    await using victim = await Victim.program("sleeper");
    await using worker = await CriuWorker.start();
    const failed = worker.dump(
      { pid: victim.pid, imagesDir: images },
      { timeoutMs: 300, notifications: { "pre-dump": () => new Promise(() => {}) } },
    );
    await expect(failed).rejects.toMatchObject({ name: "TimedOut" });
    expect("SR").toContain(stateOf(victim.pid));
  });

  it("notices that CRIU dies", async () => {
    await using victim = await Victim.program("sleeper");
    await using worker = await CriuWorker.start();
    const failed = worker.dump(
      { pid: victim.pid, imagesDir: images },
      { notifications: { "post-dump": () => void process.kill(worker.pid, "SIGKILL") } },
    );
    await expect(failed).rejects.toThrow(/killed by SIGKILL in the middle of its dump/);
  });

  it("kills and reaps a worker that nobody asked anything", async () => {
    let pid: number;
    {
      await using worker = await CriuWorker.start();
      pid = worker.pid;
      expect(existsSync(`/proc/${pid}`)).toBe(true);
    }
    expect(existsSync(`/proc/${pid}`)).toBe(false);
  });

  it("hands descriptors on to what is restored", async () => {
    const path = join(place.path, "fifo");
    execFileSync("mkfifo", [path, `${path}2`]);
    const [before, after] = [openSync(path, "r+"), openSync(`${path}2`, "r+")];
    const numbers = (fd: number) => {
      const buffer = Buffer.alloc(4096); // the read waits for a line
      return buffer.toString("latin1", 0, readSync(fd, buffer)).trim().split("\n").map(Number);
    };
    const rest = (fd: number) => {
      const now = openSync(`/proc/self/fd/${fd}`, constants.O_RDONLY | constants.O_NONBLOCK);
      try {
        return numbers(now);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== "EAGAIN") throw error;
        return []; // it had written nothing more when it was dumped
      } finally {
        closeSync(now);
      }
    };
    const key = path.slice(1); // as CRIU calls the file in its images
    try {
      await using victim = await Victim.program("counter", before);
      let last = numbers(before).at(-1)!;
      {
        await using worker = await CriuWorker.start();
        await worker.dump({ pid: victim.pid, imagesDir: images });
      }
      await victim.ended();
      last = rest(before).at(-1) ?? last;
      await using worker = await CriuWorker.start({ fds: [after] });
      const unknown = worker.restore({ imagesDir: images, inheritFds: [{ key, fd: before }] });
      await expect(unknown).rejects.toThrow(/not given to CRIU/);
      const pid = await worker.restore({
        imagesDir: images,
        inheritFds: [{ key, fd: after }],
      });
      try {
        expect(numbers(after)[0]).toBe(last + 1);
      } finally {
        process.kill(pid, "SIGKILL");
      }
    } finally {
      closeSync(before);
      closeSync(after);
    }
  });

  it("pre-dumps, and dumps on top of it", async () => {
    mkdirSync(join(images, "pre"));
    mkdirSync(join(images, "full"));
    await using victim = await Victim.program("sleeper");
    const failed = await (async () => {
      await using worker = await CriuWorker.start();
      return await worker
        .preDump({ pid: victim.pid, imagesDir: join(images, "pre") })
        .catch((error: Error) => error.message);
    })();
    if (failed) {
      expect(failed, "a kernel without dirty tracking").toMatch(/[Mm]emory|track|dirty/i);
      return;
    }
    await using worker = await CriuWorker.start();
    await worker.dump({
      pid: victim.pid,
      imagesDir: join(images, "full"),
      trackMemory: true,
      parentImages: "../pre",
    });
    expect(readlinkSync(join(images, "full/parent"))).toBe("../pre");
  });

  it("checks the machine", async () => {
    await using worker = await CriuWorker.start();
    await worker.check({ imagesDir: images, logLevel: 4 });
    expect(readFileSync(join(images, "check.log"), "utf8")).toContain("Version");
  });

  it("describes this machine's CPU and finds that it is as described", async () => {
    {
      await using worker = await CriuWorker.start();
      await worker.dumpCpu({ imagesDir: images });
    }
    await using worker = await CriuWorker.start();
    await worker.checkCpu({ imagesDir: images });
  });

  it("ends a page server that nobody has used", async () => {
    let pid: number;
    {
      await using worker = await CriuWorker.start();
      ({ pid } = await worker.pageServer({ imagesDir: images, pageServer: { address: "127.0.0.1" } }));
      expect("SR").toContain(stateOf(pid));
    }
    // Its parent is gone: whoever adopts orphans reaps it.
    await until(() => !existsSync(`/proc/${pid}`) || stateOf(pid) === "Z");
  });

  it("receives pages from elsewhere", async () => {
    await using worker = await CriuWorker.start();
    const server = await worker.pageServer({ imagesDir: images, pageServer: { address: "127.0.0.1" } });
    expect(server.port).toBeGreaterThan(0);
    await using victim = await Victim.program("sleeper");
    mkdirSync(join(place.path, "rest"));
    {
      await using dumper = await CriuWorker.start();
      await dumper.dump({
        pid: victim.pid,
        imagesDir: join(place.path, "rest"),
        pageServer: { address: "127.0.0.1", port: server.port },
      });
    }
    await server.finished();
    expect(readdirSync(images).some((name) => name.startsWith("pages-"))).toBe(true);
  });
});

describe("starting CRIU", () => {
  it("says when there is none", async () => {
    await expect(CriuWorker.start({ criu: "/nowhere/criu" })).rejects.toThrow(Unavailable);
    await expect(CriuWorker.start({ criu: "/nowhere/criu" })).rejects.toThrow(/\/nowhere\/criu.*ENOENT/);
  });

  it("doesn't begin when the call is over", async () => {
    const signal = AbortSignal.abort(new Error("enough"));
    await expect(CriuWorker.start({ signal })).rejects.toMatchObject({ name: "Cancelled" });
  });

  it("gets the last words of a program that isn't CRIU", async () => {
    using place = new Workplace();
    const script = join(place.path, "criu");
    writeFileSync(script, "#!/bin/sh\necho 'this is no CRIU' >&2\nexit 3\n", { mode: 0o755 });
    await using worker = await CriuWorker.start({ criu: script });
    const failed = worker.version();
    await expect(failed).rejects.toThrow(
      /ended with exit status 3 in the middle of its version: this is no CRIU/,
    );
    await expect(failed).rejects.toMatchObject({ exitStatus: 3 });
  });
});
