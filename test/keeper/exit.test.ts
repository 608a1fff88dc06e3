// cedana-exit: a process ends with a status that it never asked for.

import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { text } from "node:stream/consumers";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { BUILD_TIMEOUT_MS, buildKeeper, keeperBinary } from "./harness.ts";

let directory: string;
beforeAll(buildKeeper, BUILD_TIMEOUT_MS);
beforeAll(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "cedana-exit-"));
});
afterAll(() => fs.rmSync(directory, { recursive: true }));

/** A static program for 32-bit x86: pause(2) again and again. */
function pauseI386(): Buffer {
  const code = Buffer.from("b81d000000cd80ebf7", "hex"); // mov eax, 29; int 0x80; jmp to the first
  const [base, start] = [0x08048000, 84];
  const header = Buffer.alloc(start);
  header.write("\x7fELF\x01\x01\x01", 0, "latin1");
  header.writeUInt16LE(2, 16); // an executable
  header.writeUInt16LE(3, 18); // for EM_386
  header.writeUInt32LE(1, 20);
  header.writeUInt32LE(base + start, 24); // entry
  header.writeUInt32LE(52, 28); // program headers
  for (const [at, size] of [
    [40, 52],
    [42, 32],
    [44, 1],
  ] as const)
    header.writeUInt16LE(size, at);
  const segment = [1, 0, base, base, start + code.length, start + code.length, 5, 0x1000];
  for (const [index, value] of segment.entries()) header.writeUInt32LE(value, 52 + 4 * index);
  return Buffer.concat([header, code]);
}

async function endWith(victim: ChildProcess, status: number) {
  const exited = once(victim, "exit");
  const helper = spawn(keeperBinary, [String(victim.pid), String(status)], { argv0: "cedana-exit" });
  const [[code], words] = await Promise.all([once(helper, "exit"), text(helper.stderr)]);
  victim.kill("SIGKILL"); // where it failed
  return { helper: code, words, exit: await exited };
}

describe.skipIf(process.arch !== "x64" || process.getuid?.() !== 0)("cedana-exit", () => {
  it("ends a process with the status", async () => {
    const victim = spawn("sleep", ["1000"]);
    expect(await endWith(victim, 143)).toEqual({ helper: 0, words: "", exit: [143, null] });
  });

  it("ends a process with many threads, of which some run", async () => {
    const busy =
      "import threading\nfor _ in range(8): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nprint(1, flush=True)";
    const victim = spawn("python3", ["-c", busy]);
    await once(victim.stdout, "data");
    expect(await endWith(victim, 7)).toEqual({ helper: 0, words: "", exit: [7, null] });
  });

  it("ends a 32-bit process, too", async (context) => {
    const program = path.join(directory, "pause");
    fs.writeFileSync(program, pauseI386(), { mode: 0o755 });
    const victim = spawn(program);
    try {
      await once(victim, "spawn");
    } catch (error) {
      context.skip(`the kernel runs no 32-bit programs: ${error}`);
    }
    expect(await endWith(victim, 143)).toEqual({ helper: 0, words: "", exit: [143, null] });
  });
});
