// restore.json in a container that serves its own /run, and doesn't answer.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync, mkdtempSync, openSync, rmdirSync } from "node:fs";
import { stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, it, vi } from "vitest";
import { TimedOut } from "../../src/errors/index.ts";
import { canFuse } from "../live/harness/dead-fuse.ts";

vi.stubEnv("CEDANA_FILE_PATIENCE_MS", "200");
const { writeRestoredFile } = await import("../../src/checkpoint/restored-file.ts");

/** Its own mount namespace, a root of its own, and a file system that nobody serves on top of what it is told. */
const CONTAINER = `
import os, subprocess, sys
root, served = sys.argv[1:]
subprocess.check_call(["mount", "--make-rprivate", "/"])
subprocess.check_call(["mount", "-t", "tmpfs", "container", root])
os.makedirs(root + served)
options = "fd=3,rootmode=40000,user_id=0,group_id=0,allow_other"
subprocess.check_call(["mount", "-i", "-t", "fuse", "-o", options, "cedana-test", root + served], pass_fds=[3])
os.chroot(root)
os.chdir("/")
print("ready", flush=True)
sys.stdin.read()
`;

it.skipIf(!canFuse).each(["/run", "/run/cedana"])(
  "is not waited for where %s doesn't answer",
  async (served) => {
    const root = mkdtempSync(join(tmpdir(), "cedana-restored-file-"));
    const server = openSync("/dev/fuse", "r+");
    const container = spawn("unshare", ["-m", "python3", "-c", CONTAINER, root, served], {
      stdio: ["pipe", "pipe", "inherit", server],
    });
    closeSync(server);
    try {
      await once(container.stdout!, "data");
      const who = { id: "c1" };
      const attempts = Array.from({ length: 6 }, () =>
        writeRestoredFile(container.pid!, {
          version: 1,
          generation: 1,
          why: "caller",
          restoredAt: "",
          new: who as never,
        }),
      );
      const outcomes = Promise.allSettled(attempts);
      expect((await stat("/")).isDirectory()).toBe(true);
      for (const outcome of await outcomes)
        expect(outcome).toMatchObject({ status: "rejected", reason: expect.any(TimedOut) });
      expect((await stat("/")).isDirectory()).toBe(true);
    } finally {
      container.kill("SIGKILL"); // the last one that has the server's descriptor
      await once(container, "exit");
      rmdirSync(root);
    }
  },
);
