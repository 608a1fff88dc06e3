import { spawn } from "node:child_process";
import { once } from "node:events";
import { describe, expect, it } from "vitest";
import { SyscallFailed } from "../../src/errors/index.ts";
import { countsAny, hasNetworkSockets } from "../../src/linux/net.ts";

/** A process in a network namespace of its own that has run some code. */
async function inNewNetwork(code: string, look: (pid: number) => Promise<void>): Promise<void> {
  const script = `const done = () => console.log("ready"); ${code}; setInterval(() => {}, 1000);`;
  const child = spawn(
    "unshare",
    ["-n", "sh", "-c", 'ip link set lo up; exec "$0" -e "$1"', process.execPath, script],
    {
      stdio: ["ignore", "pipe", "inherit"],
    },
  );
  try {
    await once(child.stdout, "data");
    await look(child.pid!);
  } finally {
    child.kill("SIGKILL");
    await once(child, "exit");
  }
}

describe.skipIf(process.getuid!() !== 0)("sockets that a packet could reach", () => {
  it.each([
    ["none", "done()", false],
    ["a unix socket", 'require("net").createServer().listen("\\0x" + process.pid, done)', false],
    ["TCP that listens", 'require("net").createServer().listen(0, "127.0.0.1", done)', true],
    ["TCP over IPv6", 'require("net").createServer().listen(0, "::1", done)', true],
    ["UDP", 'require("dgram").createSocket("udp4").bind(0, "127.0.0.1", done)', true],
    ["UDP over IPv6", 'require("dgram").createSocket("udp6").bind(0, "::1", done)', true],
  ])("are found: %s", async (_what, code, expected) => {
    await inNewNetwork(code, async (pid) => expect(hasNetworkSockets(pid)).toBe(expected));
  });

  it("are not to be found of a process that has ended", () => {
    expect(() => hasNetworkSockets(2 ** 22 + 1)).toThrow(SyscallFailed);
  });
});

describe("the kernel's counts", () => {
  it.each([
    [
      "sockets: used 71\nTCP: inuse 0 orphan 3 tw 0 alloc 9 mem 194\nUDP: inuse 0 mem 7\nRAW: inuse 0\n",
      false,
    ],
    ["TCP: inuse 10 orphan 0 tw 0 alloc 1 mem 0\n", true],
    ["TCP: inuse 0 orphan 0 tw 2 alloc 1 mem 0\n", true],
    ["TCP6: inuse 0\nUDP6: inuse 1\n", true],
    ["RAW6: inuse 1\nFRAG6: inuse 0 memory 0\n", true],
    ["", false],
  ])("%j", (text, expected) => expect(countsAny(text)).toBe(expected));
});
