import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { receiveError, sendError } from "../../../src/checkpoint/worker/messages.ts";
import { MAX_WORKERS, runJob } from "../../../src/checkpoint/worker/pool.ts";
import { BrokenImage, Cancelled, SyscallFailed } from "../../../src/errors/index.ts";

let directory: string;
beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "pool-"));
  fs.writeFileSync(path.join(directory, "small"), "x");
  fs.writeFileSync(path.join(directory, "endless"), "");
  fs.truncateSync(path.join(directory, "endless"), 2 ** 40);
});
afterEach(() => fs.rmSync(directory, { recursive: true }));

const hash = (name: string, signal?: AbortSignal) =>
  runJob("hashFiles", { directory, files: [{ path: name, algorithm: "xxh128" }] }, signal);

describe("the pool of worker threads", () => {
  it("does many jobs, few at a time", async () => {
    const threads = () => fs.readdirSync("/proc/self/task").length;
    await hash("small"); // whatever threads the process itself needs are there
    const before = threads();
    const results = await Promise.all(Array.from({ length: 50 }, () => hash("small")));
    expect(new Set(results.map(([file]) => file!.digest)).size).toBe(1);
    // A thread of Node brings a few of its own along.
    expect(threads() - before).toBeLessThanOrEqual(MAX_WORKERS * 4);
  });

  it("goes on after a job that failed, whose error keeps its class and cause", async () => {
    await expect(hash("nothing")).rejects.toThrow(BrokenImage);
    await expect(hash("nothing")).rejects.toMatchObject({
      message: "nothing is missing",
      cause: expect.objectContaining({ code: "ENOENT", syscall: "openat2" }),
    });
    expect(await hash("small")).toHaveLength(1);
  });

  it("gives a job up that runs, and one that waits for its turn, and closes what they had open", async () => {
    const stop = new AbortController();
    const running = Array.from({ length: MAX_WORKERS + 2 }, () => hash("endless", stop.signal));
    const settled = Promise.allSettled(running);
    const opened = () =>
      fs.readdirSync("/proc/self/fd").filter((fd) => {
        try {
          return fs.readlinkSync(`/proc/self/fd/${fd}`).startsWith(directory);
        } catch {
          return false; // the one that lists them
        }
      }).length;
    while (opened() === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    stop.abort();
    for (const result of await settled)
      expect(result).toMatchObject({ status: "rejected", reason: expect.any(Cancelled) });
    expect(opened()).toBe(0);
    expect(await hash("small")).toHaveLength(1);
  });
});

describe("an error that crosses threads", () => {
  it("is what it was, with its causes", () => {
    const system = Object.assign(new Error("ENOSPC: no space"), {
      code: "ENOSPC",
      errno: -28,
      syscall: "write",
    });
    const received = receiveError(structuredClone(sendError(new BrokenImage("broken", { cause: system }))));
    expect(received).toBeInstanceOf(BrokenImage);
    expect(received.cause).toBeInstanceOf(SyscallFailed);
    expect(received.cause).toMatchObject({ code: "ENOSPC", errno: 28, message: "ENOSPC: no space" });
    expect(receiveError(sendError(new RangeError("other")))).toMatchObject({
      name: "RangeError",
      message: "other",
    });
    expect(receiveError(sendError("text")).message).toBe("text");
  });

  it("has a thread for what a container stands still for, whatever else is in work", async () => {
    const stop = new AbortController();
    const busy = Promise.allSettled(
      Array.from({ length: MAX_WORKERS * 2 }, () => hash("endless", stop.signal)),
    );
    await runJob("prepareRootfsDiff", { changes: { upper: "/", lowers: undefined } });
    stop.abort();
    await busy;
  });
});
