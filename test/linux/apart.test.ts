// What is asked of a file system that never answers costs neither the event loop nor a thread of the pool.

import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import {
  closeSync,
  constants,
  fstatSync,
  mkdirSync,
  mkdtempSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { open, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { findAddon } from "../../src/linux/addon.ts";
import { canFuse, deadFuse } from "../live/harness/dead-fuse.ts";
import { until } from "../live/harness/until.ts";

vi.stubEnv("CEDANA_FILE_PATIENCE_MS", "100");
const { expectAnswer, isServed, O_PATH, openApart, openBeneathApart, openInRootApart, readApart, statApart } =
  await import("../../src/linux/apart.ts");

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "cedana-apart-"));
});
afterEach(() => rmSync(directory, { recursive: true }));

describe("a call in a thread of its own", () => {
  it("reads a file, and what procfs shows", async () => {
    const path = join(directory, "file");
    writeFileSync(path, "x".repeat(10_000));
    expect((await readApart(path, 10_000)).toString()).toBe("x".repeat(10_000));
    expect((await readApart("/proc/self/status", 65_536)).toString()).toMatch(/^Name:/);
    writeFileSync(path, "");
    expect(await readApart(path, 0)).toEqual(Buffer.alloc(0));
  });

  it("refuses what is no file or too big, and waits for no FIFO", async () => {
    const path = join(directory, "file");
    writeFileSync(path, "12345");
    await expect(readApart(path, 4)).rejects.toMatchObject({ code: "EFBIG" });
    await expect(readApart(directory, 4)).rejects.toMatchObject({ code: "EISDIR" });
    await expect(readApart(join(directory, "none"), 4)).rejects.toMatchObject({ code: "ENOENT" });
    execFileSync("mkfifo", [join(directory, "fifo")]);
    await expect(readApart(join(directory, "fifo"), 4)).rejects.toMatchObject({ code: "EINVAL" });
    closeSync(await openApart(join(directory, "fifo"), constants.O_RDONLY));
  });

  it("opens in a root, beneath a directory, and a path alone", async () => {
    mkdirSync(join(directory, "a"));
    symlinkSync("/a", join(directory, "link"));
    writeFileSync(join(directory, "a/file"), "12345");
    const root = await openApart(directory, constants.O_RDONLY | constants.O_DIRECTORY);
    try {
      const file = await openInRootApart(root, "link/file", O_PATH);
      expect(fstatSync(file).size).toBe(5);
      closeSync(file);
      await expect(openBeneathApart(root, "link/file", constants.O_RDONLY)).rejects.toMatchObject({
        code: "ELOOP",
      });
      const made = await openBeneathApart(root, "new", constants.O_WRONLY | constants.O_CREAT, 0o600);
      expect(fstatSync(made).mode & 0o777).toBe(0o600);
      closeSync(made);
    } finally {
      closeSync(root);
    }
    expect(await statApart(join(directory, "a/file"))).toMatchObject([constants.S_IFREG | 0o644, 0, 1, 5, 8]);
  });

  it("says of what is not there yet whether the directory above answers", async () => {
    await expectAnswer(join(directory, "not/there/yet"));
    expect(await isServed(join(directory, "not/there/yet"))).toBe(false);
    await expectAnswer(join(directory, "file/under/a/file")); // whoever uses it will say so
  });
});

describe.skipIf(!canFuse)("a file system that doesn't answer", () => {
  it("costs a thread each, which nobody else needs, and is not asked again meanwhile", async () => {
    {
      using _dead = deadFuse(directory);
      const since = performance.now();
      const asking = Promise.allSettled(
        [1, 2, 3, 4, 5, 6].flatMap((n) => [
          readApart(join(directory, `a${n}`), 100),
          statApart(join(directory, `b${n}`)),
          openApart(join(directory, `c${n}`), constants.O_RDONLY),
          expectAnswer(join(directory, `d${n}`)),
        ]),
      );
      // The pool's threads are all there.
      expect((await stat("/")).isDirectory()).toBe(true);
      expect(performance.now() - since).toBeLessThan(5_000);
      const outcomes = await asking;
      for (const outcome of outcomes)
        expect(outcome).toMatchObject({
          status: "rejected",
          reason: { message: expect.stringMatching(/: no answer within 0.1 s: the server/) },
        });
      await expect(readApart(join(directory, "a1"), 100)).rejects.toThrow("an earlier call still waits");
    }
    // They have all come back with the server's end: the same is asked again.
    await until(
      async () => (await readApart(join(directory, "a1"), 100).catch((error) => error)).code === "ENOENT",
      { what: () => "the end of the waiting" },
    );
    await (await open(directory)).close();
  });

  it("that is asked with ever other paths keeps nobody from reading a file elsewhere", async () => {
    const elsewhere = mkdtempSync(join(tmpdir(), "cedana-apart-"));
    writeFileSync(join(elsewhere, "file"), "12345");
    try {
      using _dead = deadFuse(directory);
      const questions = Array.from({ length: 256 }, (_, n) => expectAnswer(join(directory, `${n}`)));
      for (const { status } of await Promise.allSettled(questions)) expect(status).toBe("rejected");
      await expect(expectAnswer(join(directory, "one more"))).rejects.toThrow(
        /one more: not tried: 256 file operations before it have not come back/,
      );
      expect((await readApart(join(elsewhere, "file"), 5)).toString()).toBe("12345");
    } finally {
      rmSync(elsewhere, { recursive: true });
    }
    await until(
      () =>
        expectAnswer(directory).then(
          () => true,
          () => false,
        ),
      { what: () => "the end of the waiting" },
    );
  });

  it("lets a thread of JavaScript end that waits for it, and the call come back after that", async () => {
    // In a process of its own: the mistake would end it.
    const script = `
      const { Worker } = require("node:worker_threads");
      const { once } = require("node:events");
      const waits = \`
        const loaded = { exports: {} };
        process.dlopen(loaded, process.env.ADDON);
        for (const name of "abcdefgh") loaded.exports.readApart(process.env.DEAD + "/" + name, 10);
        require("node:worker_threads").parentPort.postMessage("asked");
      \`;
      (async () => {
        const worker = new Worker(waits, { eval: true });
        await once(worker, "message");
        await worker.terminate();
        console.log("ended");
        process.stdin.once("data", () => setTimeout(() => process.exit(0), 200)); // the calls have come back
      })();`;
    const env = { ...process.env, ADDON: findAddon(), DEAD: directory };
    const child = spawn(process.execPath, ["-e", script], { env, stdio: ["pipe", "pipe", "inherit"] });
    const ended = once(child, "exit");
    try {
      using _dead = deadFuse(directory);
      await once(child.stdout, "data");
    } finally {
      child.stdin.end("the server has gone");
    }
    expect(await ended).toEqual([0, null]);
  });
});
