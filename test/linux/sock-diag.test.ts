import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readdirSync, readlinkSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { apart, findAddon, kcmp, netlinkDump, socketOf } from "../../src/linux/addon.ts";
import { inodeInBrackets, namespaceInode } from "../../src/linux/proc.ts";
import {
  formatIpv6,
  inetRequest,
  messagesOf,
  netlinkRequest,
  packetRequest,
  parseInet,
  parseNetlink,
  parsePacket,
  parseUnix,
  readSockets,
  unixRequest,
} from "../../src/linux/sock-diag.ts";

// The messages are a kernel's own (6.18), of sockets that stood as the expectations say.

describe("socket diagnostics", () => {
  it("asks in the kernel's format", () => {
    const body = (message: Buffer) =>
      message
        .subarray(16)
        .toString("hex")
        .replace(/(00)+$/, "");
    expect(inetRequest(2, 6).subarray(0, 16).toString("hex")).toBe("48000000140001030000000000000000");
    expect(inetRequest(2, 6)).toHaveLength(72);
    expect(body(inetRequest(2, 6))).toBe("02060200ffffffff");
    expect(body(inetRequest(10, 17))).toBe("0a110000ffffffff");
    expect(unixRequest()).toHaveLength(40);
    expect(body(unixRequest())).toBe("01000000ffffffff000000001d");
    expect(body(netlinkRequest())).toBe("10ff00000000000003");
    expect(body(packetRequest())).toBe("11");
  });

  const zeros = (bytes: number) => "00".repeat(bytes);

  it("reads TCP sockets", () => {
    const listening = `020a00008e3900007f000001${zeros(32)}a468000000000000${zeros(4)}00000000080000000000000018893600`;
    const message = Buffer.from(listening.replace(zeros(32), zeros(12) + zeros(16) + zeros(4)), "hex");
    expect(parseInet(message, "tcp")).toEqual({
      family: "inet",
      protocol: "tcp",
      inode: 0x368918,
      state: "LISTEN",
      local: "127.0.0.1:36409",
      remote: "0.0.0.0:0",
      receiveQueue: 0,
      sendQueue: 8,
    });
    const established =
      "02010000a5128e397f0000010000000000000000000000007f00000100000000000000000000000000000000a5680000000000000000000000000000000000000000000019893600" +
      "05000800000000000c0015000100000000000000" +
      "1000138008000100746c73000400020000000000";
    expect(parseInet(Buffer.from(established, "hex"), "tcp")).toMatchObject({
      inode: 0x368919,
      state: "ESTABLISHED",
      local: "127.0.0.1:42258",
      remote: "127.0.0.1:36409",
      upperProtocol: "tls",
    });
  });

  it("reads unix sockets with names, peers and who waits for them", () => {
    const waitedFor =
      "01010a000a9a36000376000000000000190000002f746d702f686f6c642d31323032362e736f636b00000000080003000b9a36000c00040001000000080000000500060000000000";
    expect(parseUnix(Buffer.from(waitedFor, "hex"))).toEqual({
      family: "unix",
      type: "stream",
      inode: 0x369a0a,
      state: "LISTEN",
      name: "/tmp/hold-12026.sock",
      pendingInodes: [0x369a0b],
      receiveQueue: 1,
    });
    const connected = "01020100918b3600ed75000000000000080002008a8b36000800000000780079";
    expect(parseUnix(Buffer.from(connected, "hex"))).toMatchObject({
      type: "dgram",
      state: "ESTABLISHED",
      peerInode: 0x368b8a,
      name: "@x@y",
    });
  });

  it("reads netlink and packet sockets", () => {
    const unread = `100300076f2c00000000000000000000ed903600a96800000000000028000000${"00810000"}${zeros(32)}`;
    expect(parseNetlink(Buffer.from(unread, "hex"))).toEqual({
      family: "netlink",
      protocol: 0,
      inode: 0x3690ed,
      receiveQueue: 0x8100,
      groups: [],
    });
    const joined = `${unread}${"0c000100" + "0100000001000000"}`;
    expect(parseNetlink(Buffer.from(joined, "hex"))).toMatchObject({ groups: [1, 33] });
    expect(parsePacket(Buffer.from("110303002c8e3600b968000000000000", "hex"))).toEqual({
      family: "packet",
      type: "raw",
      inode: 0x368e2c,
    });
  });

  it("takes an answer apart, and doesn't trust its lengths", () => {
    const one = `14000000${zeros(12)}01020304`;
    const odd = `13000000${zeros(12)}05060700`;
    expect([...messagesOf(Buffer.from(one + odd, "hex"))].map((message) => message.toString("hex"))).toEqual([
      "01020304",
      "050607",
    ]);
    expect(() => [...messagesOf(Buffer.from(`ff000000${zeros(12)}`, "hex"))]).toThrow(RangeError);
    expect(() => [...messagesOf(Buffer.from(`04000000${zeros(12)}`, "hex"))]).toThrow(RangeError);
  });

  it("writes IPv6 addresses as people do", () => {
    const write = (groups: string) => formatIpv6(Buffer.from(groups.replaceAll(":", ""), "hex"));
    expect(write("0000:0000:0000:0000:0000:0000:0000:0000")).toBe("::");
    expect(write("0000:0000:0000:0000:0000:0000:0000:0001")).toBe("::1");
    expect(write("2001:0db8:0000:0000:0001:0000:0000:0001")).toBe("2001:db8::1:0:0:1");
    expect(write("fe80:0000:0000:0000:0000:0000:0000:0000")).toBe("fe80::");
    expect(write("2001:0db8:0000:0001:0001:0001:0001:0001")).toBe("2001:db8:0:1:1:1:1:1");
    expect(write("0000:0000:0000:0000:0000:ffff:7f00:0001")).toBe("::ffff:127.0.0.1");
  });
});

const built = (() => {
  try {
    return findAddon() !== "";
  } catch {
    return false;
  }
})();
const never = () => undefined;

function socketOfOurs(): void {
  expect(() => socketOf(process.pid, 1 << 20)).toThrow();
}

describe.skipIf(!built)("sockets of processes (needs `npm run build`)", () => {
  it("lists a socket of ours, in our own network namespace", async () => {
    const server = createServer().listen(0, "127.0.0.1");
    await once(server, "listening");
    const { fd } = (server as unknown as { _handle: { fd: number } })._handle;
    const inode = inodeInBrackets(readlinkSync(`/proc/self/fd/${fd}`))!;
    const { port } = server.address() as { port: number };
    const { byInode } = await readSockets(process.pid, never);
    expect(byInode.get(inode)).toMatchObject({
      protocol: "tcp",
      state: "LISTEN",
      local: `127.0.0.1:${port}`,
    });
    expect(socketOf(process.pid, fd)).toEqual({
      family: 2,
      type: 1,
      protocol: 6,
      listening: 1,
      passCredentials: 0,
      state: 10,
      networkNamespace: namespaceInode("self", "net"),
    });
    server.close();
  });

  it.skipIf(process.getuid?.() !== 0)("looks into another network namespace, and stays in ours", async () => {
    const before = namespaceInode("self", "net");
    const child = spawn("unshare", ["--net", "sleep", "60"], { stdio: "ignore" });
    await once(child, "spawn");
    while (namespaceInode(child.pid!, "net") === before)
      await new Promise((resolve) => setTimeout(resolve, 5));
    const { byInode } = await readSockets(child.pid!, never);
    // Nobody has made one there yet; netlink shows the kernel's own.
    expect([...byInode.values()].filter(({ family }) => family !== "netlink")).toEqual([]);
    expect(byInode.size).toBeGreaterThan(0);
    expect(namespaceInode("self", "net")).toBe(before);
    for (const thread of ["self", "thread-self"])
      expect(readlinkSync(`/proc/${thread}/ns/net`)).toContain(`${before}`);
    child.kill("SIGKILL");
    await once(child, "exit");
  });

  it("leaves no descriptor and no thread behind", async () => {
    const count = (what: string) => readdirSync(`/proc/self/${what}`).length;
    await readSockets(process.pid, never); // the pool's threads are made at its first use
    const [fds, threads] = [count("fd"), count("task")];
    await Promise.all(Array.from({ length: 40 }, () => readSockets(process.pid, never)));
    for (let i = 0; i < 40; i++) socketOfOurs();
    expect(count("fd")).toBe(fds);
    expect(count("task")).toBeLessThanOrEqual(threads + 3); // up to four of the pool's
  });

  it("says which system call failed", async () => {
    await expect(readSockets(2 ** 22 + 1, never)).rejects.toMatchObject({ code: "ENOENT", syscall: "open" });
    const none = await netlinkDump(-1, 4, [inetRequest(99, 6)]);
    expect(none).toEqual([expect.any(Number)]);
    expect(() => socketOf(process.pid, 1 << 20)).toThrow(
      expect.objectContaining({ code: "EBADF", syscall: "pidfd_getfd" }),
    );
    expect(() => socketOf(2 ** 22 + 1, 0)).toThrow(
      expect.objectContaining({ code: "ESRCH", syscall: "pidfd_open" }),
    );
    await expect(async () => netlinkDump(-1, 4, ["x" as unknown as Buffer])).rejects.toThrow(TypeError);
  });

  it("tells processes that share memory from others", async () => {
    const child = spawn("sleep", ["60"], { stdio: "ignore" });
    await once(child, "spawn");
    expect(kcmp(process.pid, process.pid, "memory")).toBe(0);
    const order = [kcmp(process.pid, child.pid!, "memory"), kcmp(child.pid!, process.pid, "memory")];
    expect(order.sort()).toEqual([1, 2]);
    child.kill("SIGKILL");
    await once(child, "exit");
  });

  it("says when a file handle leads nowhere", async () => {
    const directory = mkdtempSync(join(tmpdir(), "cedana-handle-"));
    expect(await apart.tryHandle(directory, 1, Buffer.alloc(8))).not.toBe(0);
    expect(await apart.tryHandle(join(directory, "missing"), 1, Buffer.alloc(8))).toBe(2);
    rmSync(directory, { recursive: true });
    expect(() => apart.tryHandle("/", 1, Buffer.alloc(4096))).toThrow(TypeError);
  });
});
