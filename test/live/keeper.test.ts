// Keepers under containerd: one of the protocol's first version, and what only the keeper does.

import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeAll, describe, expect, it } from "vitest";
import { containerdBinaries, Live, lacksMemoryCgroup } from "./harness/live.ts";
import { until } from "./harness/until.ts";

const repository = join(import.meta.dirname, "../..");
const directories: string[] = [];
const directory = () => {
  directories.push(mkdtempSync(join(tmpdir(), "keeper-")));
  return directories.at(-1)!;
};
afterEach(() => {
  for (const path of directories.splice(0)) rmSync(path, { recursive: true });
});

describe("a keeper that speaks only version 1 of the protocol", () => {
  beforeAll(() => {
    execFileSync("make", ["-s", "-C", join(repository, "addon/keeper"), "version1"]);
  }, 120_000);

  it("lives its whole life under this cedanad, out-of-memory kill included", async () => {
    const old = directory();
    symlinkSync(
      join(repository, "build/keeper-version1/cedana-keeper"),
      join(old, "containerd-shim-cedana-v2"),
    );
    const binaries = containerdBinaries("1.7")!;
    await using live = await Live.start({
      containerd: "1.7",
      engine: "runc",
      env: {
        PATH: `${old}:${binaries}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin`,
        CEDANA_DAEMON: join(repository, "bin/cedanad"),
      },
    });
    {
      await using task = await live.run(["counter", "20", "5"]);
      const found = await task.execToEnd(["sh", "-c", "echo in; exit 9"]);
      expect([found.stdout, found.status]).toEqual(["in\n", 9]);
      await live.killCedanad();
      const before = await task.nextNumber();
      expect(await task.nextNumber()).toBe(before + 1);
      await task.kill(15);
      expect(await task.wait()).toBe(5);
      expect(await task.delete()).toBe(5);
    }
    expect(live.cedanadLog()).toMatch(/"version":1,"msg":"a keeper has come"/);
    expect(live.cedanadLog()).not.toMatch(/"version":2,"msg":"a keeper has come"/);
    const lacking = lacksMemoryCgroup();
    if (lacking) return console.warn(`no out-of-memory kill: ${lacking}`);
    await using eater = await live.run(["eater"], { memoryLimit: 32 << 20 });
    expect(await eater.wait()).toBe(137);
    await eater.delete();
    await live.events.waitFor(eater.id, "delete");
    expect(live.events.summary(eater.id)).toContain("oom");
  });
});

describe("a log program", () => {
  it("has written everything when Delete answers, also across a cedanad that is killed", async () => {
    const place = directory();
    const program = join(place, "logger");
    writeFileSync(
      program,
      `#!/bin/sh
echo "$CONTAINER_NAMESPACE $@" > ${place}/told
exec 5>&-
cat <&4 > ${place}/err &
cat <&3 > ${place}/out; exec 3<&- 4<&-
wait; sleep 0.3; echo done >> ${place}/told
`,
      { mode: 0o755 },
    );
    await using live = await Live.start({ containerd: "1.7", engine: "runc" });
    await using task = await live.run(["sh", "-c", "echo one; echo two >&2; sleep 0.3; echo three"], {
      stdio: `binary://${program}?key=value`,
    });
    await live.killCedanad();
    expect(await task.wait()).toBe(0);
    expect(await task.delete()).toBe(0);
    expect(readFileSync(`${place}/told`, "utf8")).toBe(`${live.namespace} key value\ndone\n`);
    expect(readFileSync(`${place}/out`, "utf8")).toBe("one\nthree\n");
    expect(readFileSync(`${place}/err`, "utf8")).toBe("two\n");
    await live.expectNoLeftovers();
  });

  it("that is not ready keeps its own process waiting and nothing else of the pod", async () => {
    const program = join(directory(), "logger");
    writeFileSync(program, "#!/bin/sh\nexec sleep 1000\n", { mode: 0o755 });
    await using live = await Live.start({ containerd: "1.7", engine: "runc" });
    await using task = await live.run(["counter"]);
    const failed = expect(task.exec(["true"], { stdio: `binary://${program}` })).rejects.toThrow(
      /log program .* ended before it was ready \(signal 9\)/,
    );
    const logger = await until(() => live.processes().find((info) => info.argv.join(" ") === "sleep 1000"), {
      what: () => "the log program",
    });
    expect(await task.status()).toBe("RUNNING");
    expect((await task.execToEnd(["sh", "-c", "exit 3"])).status).toBe(3);
    process.kill(logger.pid, "SIGKILL"); // it has been waited for all the time
    await failed;
  });
});
