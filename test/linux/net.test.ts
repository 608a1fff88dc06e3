import { type ChildProcess, spawn } from "node:child_process";
import { afterEach, describe, expect, it } from "vitest";
import { SyscallFailed } from "../../src/errors/index.ts";
import { hasNetworkSockets, parseSockstat } from "../../src/linux/net.ts";

let child: ChildProcess | undefined;
afterEach(() => {
  child?.kill("SIGKILL");
  child = undefined;
});

/** A process in a network namespace of its own that has executed this Python. @returns its pid */
async function inOwnNetwork(python: string): Promise<number> {
  const program = `import socket, os\nos.system("ip link set lo up")\n${python}\nprint("ready", flush=True)\ninput()`;
  child = spawn("unshare", ["--net", "python3", "-c", program], { stdio: ["pipe", "pipe", "inherit"] });
  const text = await new Promise<string>((resolve) => {
    child!.stdout!.once("data", (data: Buffer) => resolve(data.toString()));
    child!.once("exit", () => resolve(""));
  });
  expect(text).toMatch(/ready/);
  return child.pid!;
}

const make = (family: string, type: string, protocol = 0) =>
  `s = socket.socket(socket.${family}, socket.${type}, ${protocol})`;
const listen = (family: string) => `${make(family, "SOCK_STREAM")}; s.bind(("", 0)); s.listen()`;

describe("sockets that a packet can reach", () => {
  it.each([
    ["none at all", "pass", false],
    ["a unix and a netlink socket", `a, b = socket.socketpair(); ${make("AF_NETLINK", "SOCK_RAW")}`, false],
    ["TCP that is neither bound nor connected", make("AF_INET", "SOCK_STREAM"), false],
    ["TCP that listens", listen("AF_INET"), true],
    ["TCP over IPv6 that listens", listen("AF_INET6"), true],
    ["UDP", `${make("AF_INET", "SOCK_DGRAM")}; s.bind(("", 0))`, true],
    ["UDP over IPv6", `${make("AF_INET6", "SOCK_DGRAM")}; s.bind(("", 0))`, true],
    ["raw", make("AF_INET", "SOCK_RAW", 1), true],
    ["raw over IPv6", make("AF_INET6", "SOCK_RAW", 58), true],
    ["packet", make("AF_PACKET", "SOCK_RAW", 768), true],
    [
      "a connection that was closed and waits",
      `${listen("AF_INET")}; c = socket.create_connection(s.getsockname()); p, _ = s.accept(); p.close(); c.close(); s.close()`,
      true,
    ],
  ])("%s", async (_what, python, expected) => {
    expect(hasNetworkSockets(await inOwnNetwork(python))).toBe(expected);
  });

  it("are none of a process that has ended: an error", () => {
    expect(() => hasNetworkSockets(2 ** 22 - 1)).toThrow(SyscallFailed);
  });

  it("are counted by the kernel, by protocol", () => {
    const text = "sockets: used 3\nTCP: inuse 2 orphan 0 tw 1 alloc 4 mem 0\nFRAG: inuse 0 memory 0\n";
    expect([...parseSockstat(text)]).toEqual([
      ["sockets used", 3],
      ["TCP inuse", 2],
      ["TCP orphan", 0],
      ["TCP tw", 1],
      ["TCP alloc", 4],
      ["TCP mem", 0],
      ["FRAG inuse", 0],
      ["FRAG memory", 0],
    ]);
  });
});
