// Output and input through the whole stack: log files, log programs, slow readers and readers that go away, pipes that stay open.

import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import type { Live } from "./harness/live.ts";
import { oursOnly } from "./harness/matrix.ts";
import { Output } from "./harness/output.ts";
import { liveFor } from "./harness/suite.ts";
import { isAlive, pidsInCgroups } from "./harness/system.ts";
import { until } from "./harness/until.ts";

const MIB = 1 << 20;

describe("stdio", () => {
  let live: Live;
  liveFor({ env: { CEDANA_DRAIN_LIMIT_MS: "700" } }, (started) => {
    live = started;
  });

  const logFile = () => join(live.dir, `${live.newId("log")}.txt`);
  const text = (path: string) => readFileSync(path, "utf8");

  describe("to a client that opens its FIFOs late", () => {
    it("is whole, however short the process lives", async () => {
      for (const round of [1, 2, 3]) {
        const creating = live.create(["sh", "-c", `echo short ${round}`], { readOutput: false });
        const io = await until(
          () => readdirSync(live.ioDir).find((name) => existsSync(join(live.ioDir, name, "stderr"))),
          { what: () => "the FIFOs" },
        );
        const stdout = new Output(join(live.ioDir, io, "stdout"), { open: false });
        await new Promise((resolve) => setTimeout(resolve, 100)); // Create waits for us, or would have begun by now
        stdout.open();
        const stderr = new Output(join(live.ioDir, io, "stderr"));
        const task = await creating;
        await task.start();
        await task.exited;
        await task.delete();
        await stdout.end();
        expect(stdout.text).toBe(`short ${round}\n`);
        await stderr.leave();
        await stdout.leave();
        await task.destroy();
        rmSync(join(live.ioDir, io), { recursive: true });
      }
    });
  });

  describe("to a file", () => {
    it("is appended to it, both streams, of the init and of an exec", async () => {
      const file = logFile();
      writeFileSync(file, "before\n");
      const { status } = await live.runToEnd(["sh", "-c", "echo out; echo err >&2; exit 3"], {
        stdio: `file://${file}`,
      });
      expect(status).toBe(3);
      expect(text(file)).toBe("before\nout\nerr\n");
      await using task = await live.run(["sleeper"], { stdio: `file://${file}` });
      await task.execToEnd(["echo", "exec"], { stdio: `file://${file}` });
      expect(text(file)).toBe("before\nout\nerr\nexec\n");
    });

    it("goes there from a terminal too, into directories that are made for it", async (context) => {
      oursOnly(context, "does not write a terminal's output to a file");
      const file = join(live.dir, live.newId("dir"), "deep/log.txt");
      await live.runToEnd(["sh", "-c", "test -t 1 && echo terminal"], {
        stdio: `file://${file}`,
        terminal: true,
      });
      expect(text(file)).toBe("terminal\r\n");
    });
  });

  describe("to a log program", () => {
    const program = (file: string, query = "") => `binary://${live.programs}/logger?file=${file}${query}`;

    it("comes line by line from both streams, before the program sees the end", async () => {
      const file = logFile();
      const { id, status } = await live.runToEnd(["sh", "-c", "echo one; echo bad >&2; echo two; exit 4"], {
        stdio: program(file),
      });
      expect(status).toBe(4);
      await until(() => text(file).endsWith("end\n"), { what: () => `the end in ${text(file)}` });
      const [owner, ...lines] = text(file).trim().split("\n");
      expect(owner).toBe(`container ${id} in ${live.namespace}`);
      expect(lines.filter((line) => line.startsWith("out:"))).toEqual(["out: one", "out: two"]);
      expect(lines).toContain("err: bad");
    });

    it("waits for the program to be ready: the container isn't created before", async () => {
      const file = logFile();
      await using task = await live.create(["sleeper"], { stdio: program(file, "&delay=300") });
      expect(text(file)).toMatch(/^container /);
      expect(await task.status()).toBe("CREATED");
    });

    it("goes there from a terminal, and from an exec", async () => {
      const [file, execFile] = [logFile(), logFile()];
      await using task = await live.run(["sh", "-c", "echo on a tty; exec sleeper"], {
        stdio: program(file),
        terminal: true,
      });
      await until(() => text(file).includes("out: on a tty"), { what: () => text(file) });
      await task.execToEnd(["sh", "-c", "echo in exec"], { stdio: program(execFile) });
      await until(() => text(execFile).endsWith("end\n"), { what: () => text(execFile) });
      expect(text(execFile)).toContain("out: in exec");
    });

    it("goes on while cedanad is killed", async (context) => {
      oursOnly(context, "has no cedanad");
      const file = logFile();
      await using task = await live.run(["counter", "10"], { stdio: program(file) });
      await until(() => text(file).includes("out: 3\n"), { what: () => text(file) });
      await live.killCedanad();
      const seen = text(file).split("\n").length;
      await until(() => text(file).split("\n").length > seen + 3, { what: () => "more lines" });
      await task.kill(9);
      await task.wait();
      await until(() => text(file).endsWith("end\n"), { what: () => text(file).slice(-200) });
      const numbers = [...text(file).matchAll(/^out: (\d+)$/gm)].map(([, number]) => Number(number));
      expect(numbers).toEqual(numbers.map((_, index) => index));
    });
  });

  describe("to a FIFO", () => {
    const total = 8 * MIB;
    const block = 65_536;
    /** The hash of what `writer` writes. */
    function expectedDigest(): string {
      const bytes = Buffer.alloc(block);
      let x = 2463534242;
      for (let i = 0; i < block; i++) {
        x ^= x << 13;
        x ^= x >>> 17;
        x ^= x << 5;
        bytes[i] = 97 + ((x >>> 0) % 26);
      }
      bytes[block - 1] = 10;
      const hash = createHash("sha256");
      for (let done = 0; done < total; done += block) hash.update(bytes);
      return hash.digest("hex");
    }

    it("waits for a reader that is slow, and for one that leaves and returns; every byte arrives once", async () => {
      await using task = await live.run(["writer", String(total), String(block)], { keepOutput: false });
      await task.stdout.reach(MIB);
      task.stdout.pause();
      expect(await task.status()).toBe("RUNNING");
      task.stdout.resume();
      await task.stdout.reach(3 * MIB);
      await task.stdout.leave();
      expect(await task.status()).toBe("RUNNING"); // neither SIGPIPE nor an error: it stands still
      task.stdout.open();
      expect(await task.wait()).toBe(0);
      await task.delete();
      await task.stdout.end();
      expect(task.stdout.bytes).toBe(total);
      expect(task.stdout.digest()).toBe(expectedDigest());
    });

    it("waits for the first reader; the container writes meanwhile as much as a pipe holds", async (context) => {
      oursOnly(context, "waits for the reader itself");
      const script = "writer 65536 4096; echo done >&2; exec sleeper";
      await using task = await live.run(["sh", "-c", script], { readOutput: false });
      task.stderr.open();
      expect(await task.stderr.line()).toBe("done");
      task.stdout.open();
      await task.stdout.reach(65_536);
    });
  });

  describe("of a process that leaves a child behind", () => {
    it("is drained before its deletion is answered", async () => {
      await using task = await live.run(["sleeper"]);
      const { status, stdout } = await task.execToEnd(["background", "200"]);
      expect(status).toBe(5);
      expect(stdout).toBe("first\nlate\n");
    });

    it("is waited for no longer than the limit, and the exit is told at once", async (context) => {
      oursOnly(context, "waits 10 s");
      await using task = await live.run(["sleeper"]);
      const exec = await task.exec(["background", "60000"]);
      expect(await exec.stdout.line()).toBe("first");
      expect((await exec.exited!).exitStatus).toBe(5);
      await live.events.waitFor(task.id, "exit", { execId: exec.execId });
      const child = pidsInCgroups(`${live.namespace}/${task.id}`).find((pid) => pid !== task.pid)!;
      expect(await exec.delete()).toBe(5);
      expect(isAlive(child)).toBe(true); // so its pipe was open still
      await exec.stdout.end();
      await exec.io.close();
    });
  });

  it("of an exec takes input, and its end by CloseIO; a terminal's is closed with the client's end", async () => {
    await using task = await live.run(["sleeper"]);
    await using exec = await task.exec(["sh", "-c", "wc -c; exit 6"], { stdin: true });
    exec.write("x".repeat(30_000));
    await exec.closeStdin();
    expect(await exec.stdout.line()).toBe("30000");
    expect(await exec.wait()).toBe(6);
    await using shell = await task.exec(["sh"], { stdin: true, terminal: true });
    await shell.resize(132, 43);
    shell.write("stty size; exit 7\n");
    await shell.stdout.lineMatching(/^43 132$/);
    expect(await shell.wait()).toBe(7);
  });
});
