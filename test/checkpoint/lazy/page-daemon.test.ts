// The page daemon and its guard, with a restore that never comes, a CRIU that can't be used, and ends of every kind. That memory is
// right afterwards is for test/live/lazy.test.ts.

import { type ChildProcess, spawn } from "node:child_process";
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from "vitest";
import { PageDaemon, type PageDaemonHost } from "../../../src/checkpoint/lazy/page-daemon.ts";
import { whyNotLazy } from "../../../src/checkpoint/lazy/suitable.ts";
import { CheckpointUse } from "../../../src/checkpoint/use.ts";
import { CriuWorker } from "../../../src/criu/worker.ts";
import { SyscallFailed } from "../../../src/errors/index.ts";
import { isAlive } from "../../../src/linux/proc.ts";
import { Victim, Workplace, whyNoDump } from "../../criu/harness.ts";

const reason = whyNoDump();

/** Of a process, dumped once. */
let dumped: Workplace;
beforeAll(async () => {
  if (reason) return;
  dumped = new Workplace();
  await using victim = await Victim.program("memory");
  await using worker = await CriuWorker.start();
  await worker.dump({ pid: victim.pid, imagesDir: dumped.path, shellJob: true, leaveRunning: true });
});
afterAll(() => dumped?.[Symbol.dispose]());

let base: string;
let started: ChildProcess[];
let host: PageDaemonHost & { env: string[]; path: string };

beforeEach(() => {
  base = mkdtempSync(join(tmpdir(), "lazy-"));
  mkdirSync(join(base, "work"));
  if (!reason) cpSync(dumped.path, join(base, "images"), { recursive: true });
  started = [];
  host = {
    env: [],
    path: process.env.PATH ?? "",
    spawn: ({ argv, env, outputPath, onSpawned }) => {
      const output = openSync(outputPath, "w");
      const variables = [...env, ...host.env].map((entry) => entry.split(/=(.*)/s).slice(0, 2));
      const child = spawn(argv[0]!, argv.slice(1), {
        env: { PATH: host.path, ...Object.fromEntries(variables) },
        stdio: ["ignore", output, output],
      });
      started.push(child);
      if (child.pid) onSpawned(child.pid);
      return new Promise((resolve, reject) => {
        child.once("error", reject);
        child.once("exit", (code, signal) => resolve({ exitStatus: code ?? (signal ? 137 : 255) }));
      });
    },
    signal: async (pid, signal) => {
      try {
        process.kill(pid, signal);
      } catch (error) {
        throw SyscallFailed.from(error);
      }
    },
  };
});
afterEach(async () => {
  for (const child of started) child.kill("SIGTERM"); // where a test has failed; a guard takes its daemon along
  await nobodyLives();
  rmSync(base, { recursive: true });
});

const start = (repeated = false) =>
  PageDaemon.start(host, {
    directory: join(base, "lazy-pages"),
    imagePath: join(base, "images"),
    checkpointPath: join(base, "images"),
    workPath: join(base, "work"),
    repeated,
  });

/** A `criu` that does something of its own, before or instead of CRIU. */
function fakeCriu(script: string): void {
  mkdirSync(join(base, "bin"));
  writeFileSync(join(base, "bin/criu"), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
  host.path = `${join(base, "bin")}${delimiter}${host.path}`;
}

const nobodyLives = () =>
  vi.waitUntil(() =>
    started.every((child) => !child.pid || child.exitCode !== null || child.signalCode !== null),
  );

describe.skipIf(reason)(`the page daemon${reason ? ` (${reason})` : ""}`, () => {
  it("listens, locks the checkpoint as long as it lives, and is gone when it is stopped", async () => {
    const daemon = await start();
    const { guard, daemon: pages } = daemon.record;
    expect(existsSync(join(base, "work/lazy-pages.socket"))).toBe(true);
    expect(readFileSync(`/proc/${guard.pid}/cmdline`, "latin1")).toMatch(/^cedana-pages\0+$/);
    expect(readFileSync(`/proc/${pages.pid}/cmdline`, "latin1")).toMatch(/^criu\0lazy-pages\0/);
    expect(await CheckpointUse.remove(join(base, "images"))).toBeUndefined();
    await daemon.stop();
    expect(await daemon.ended).toMatchObject({ filled: false });
    expect([guard, pages].map(({ pid }) => isAlive(pid))).toEqual([false, false]);
    // The holder has the lock, too, and ends by itself.
    (await vi.waitUntil(async () => await CheckpointUse.remove(join(base, "images"))))[Symbol.dispose]();
    expect(existsSync(join(base, "lazy-pages"))).toBe(false);
  });

  it("is ended by its guard when no restore comes to it, also when nobody looks", async () => {
    host.env = ["CEDANA_PAGES_DEADLINE_MS=300"];
    const daemon = await start();
    expect(await daemon.ended).toEqual({
      filled: false,
      why: expect.stringMatching(/^was ended: no restore came/),
    });
    expect(isAlive(daemon.record.daemon.pid)).toBe(false);
    await daemon.stop();
  });

  it.each([
    ["daemon", /^was ended by signal 9/],
    ["guard", /^has lost its guard/],
  ] as const)("tells of a SIGKILL of the %s", async (who, why) => {
    const daemon = await start();
    const { pid } = daemon.record[who];
    process.kill(pid, "SIGKILL");
    expect(await daemon.ended).toEqual({ filled: false, why: expect.stringMatching(why) });
    await daemon.stop();
    expect(isAlive(daemon.record.daemon.pid)).toBe(false);
  });

  it("is ended by the deadline also when it has gone on to another program, which nobody guards", async () => {
    fakeCriu("exec sleep 1000");
    host.env = ["CEDANA_PAGES_DEADLINE_MS=200"];
    await expect(start()).rejects.toThrow(/no restore came/);
  });

  it("goes on with what a cedanad before has started, and says how it has ended", async () => {
    const first = await start();
    const revived = PageDaemon.revive(host, JSON.parse(JSON.stringify(first.record)));
    process.kill(first.record.daemon.pid, "SIGKILL");
    const end = { filled: false, why: expect.stringMatching(/signal 9/) };
    expect(await revived.ended).toEqual(end);
    const [{ spawn }, spawned] = [host, started.length];
    host.spawn = () => Promise.resolve({ exitStatus: 1 }); // as a keeper answers a repetition
    const repeated = await start(true);
    expect(await repeated.ended).toEqual(end);
    expect(started).toHaveLength(spawned);
    host.spawn = spawn;
    await repeated.stop();
  });

  it("is refused with a reason, and nothing left, when CRIU can't be started, or guarded", async () => {
    host.path = "/nonexistent";
    await expect(start()).rejects.toThrow(/start criu lazy-pages/);
    host.path = process.env.PATH ?? "";
    fakeCriu("echo 'no such thing' >&2; exit 3");
    await expect(start()).rejects.toThrow(/ended with status 3: no such thing/);
    writeFileSync(join(base, "bin/criu"), `#!/bin/sh\nPATH=${process.env.PATH} exec criu "$@"\n`);
    await expect(start()).rejects.toThrow(/is a script around CRIU/);
    writeFileSync(
      join(base, "bin/criu"),
      `#!/bin/sh\nunset LD_PRELOAD\nPATH=${process.env.PATH} exec criu "$@"\n`,
    );
    await expect(start()).rejects.toThrow(/script around CRIU|without the guard/);
    rmSync(join(base, "images"), { recursive: true });
    host.path = process.env.PATH ?? "";
    await expect(start()).rejects.toThrow(/lock the checkpoint: it is gone/);
    await nobodyLives();
    expect(existsSync(join(base, "lazy-pages"))).toBe(false);
  }, 60_000);
});

describe.skipIf(reason)("a container can't be restored lazily", () => {
  it("when it has a user namespace, or images that build on others, or none of its memory waits", async () => {
    const images = join(base, "images");
    expect(await whyNotLazy(images, false)).toBeUndefined();
    expect(await whyNotLazy(images, true)).toMatch(/user namespace/);
    const empty = join(base, "work");
    expect(await whyNotLazy(empty, false)).toMatch(/no lazy pages/);
    mkdirSync(join(images, "parent"));
    expect(await whyNotLazy(images, false)).toMatch(/pre-dump/);
  });
});
