import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import {
  closeSync,
  constants,
  fstatSync,
  ftruncateSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Worker } from "node:worker_threads";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  findAddon,
  flock,
  getXattr,
  listXattrs,
  makeNode,
  openBeneath,
  Pidfd,
  peerCredentials,
  removeXattr,
  renameAt,
  Seqpacket,
  seek,
  setCloexec,
  setTimes,
  setXattr,
} from "../../src/linux/addon.ts";
import { until } from "../live/harness/until.ts";

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "cedana-addon-"));
});
afterEach(() => rmSync(directory, { recursive: true }));

const built = (() => {
  try {
    return findAddon() !== "";
  } catch {
    return false;
  }
})();

/** Close-on-exec is bit 02000000 of `flags` in fdinfo. */
function isCloexec(fd: number): boolean {
  const flags = /^flags:\s*(\d+)$/m.exec(readFileSync(`/proc/self/fdinfo/${fd}`, "utf8"))![1]!;
  return (Number.parseInt(flags, 8) & 0o2000000) !== 0;
}

describe.skipIf(!built)("the addon (needs `npm run build`)", () => {
  it("says who is at the other end of a socket", async () => {
    const path = join(directory, "socket");
    const server = createServer().listen(path);
    await once(server, "listening");
    const accepted = once(server, "connection") as Promise<[Socket]>;
    const client = connect(path);
    const [socket] = await accepted;
    const { fd } = (socket as unknown as { _handle: { fd: number } })._handle;
    expect(peerCredentials(fd)).toEqual({ pid: process.pid, uid: process.getuid!(), gid: process.getgid!() });
    client.destroy();
    socket.destroy();
    server.close();
    const file = openSync("/dev/null", "r");
    expect(() => peerCredentials(file)).toThrow(
      expect.objectContaining({ code: "ENOTSOCK", syscall: "getsockopt", errno: -88 }),
    );
    closeSync(file);
  });

  it("sets and clears close-on-exec", () => {
    const fd = openSync("/dev/null", "r");
    expect(isCloexec(fd)).toBe(true);
    setCloexec(fd, false);
    expect(isCloexec(fd)).toBe(false);
    setCloexec(fd, true);
    expect(isCloexec(fd)).toBe(true);
    closeSync(fd);
    expect(() => setCloexec(fd, true)).toThrow(expect.objectContaining({ code: "EBADF", syscall: "fcntl" }));
  });

  it("holds on to a process", async () => {
    const child = spawn("sleep", ["60"], { stdio: "ignore" });
    await once(child, "spawn");
    const exit = once(child, "exit");
    using pidfd = Pidfd.open(child.pid!);
    expect(isCloexec(pidfd.fd)).toBe(true);
    expect(pidfd.ended).toBe(false);
    pidfd.signal(0);
    pidfd.signal(15);
    expect(await exit).toEqual([null, "SIGTERM"]);
    expect(pidfd.ended).toBe(true);
    expect(() => pidfd.signal(15)).toThrow(expect.objectContaining({ code: "ESRCH" }));
    expect(() => Pidfd.open(2 ** 22 + 1)).toThrow(
      expect.objectContaining({ code: "ESRCH", syscall: "pidfd_open" }),
    );
  });

  it("locks a file, once", () => {
    const path = join(directory, "lock");
    const [one, other] = [openSync(path, "w"), openSync(path, "w")];
    expect(flock(one, "exclusive")).toBe(true);
    expect(flock(other, "exclusive")).toBe(false);
    expect(flock(other, "shared")).toBe(false);
    expect(flock(one, "shared")).toBe(true);
    expect(flock(other, "shared")).toBe(true);
    expect(flock(one, "unlock")).toBe(true);
    expect(flock(other, "exclusive")).toBe(true);
    closeSync(one);
    closeSync(other);
  });

  it("opens nothing outside of a directory", () => {
    mkdirSync(join(directory, "inside"));
    writeFileSync(join(directory, "inside/file"), "");
    writeFileSync(join(directory, "outside"), "");
    symlinkSync("file", join(directory, "inside/link"));
    const inside = openSync(join(directory, "inside"), constants.O_RDONLY | constants.O_DIRECTORY);
    const fd = openBeneath(inside, "file", constants.O_RDONLY);
    expect(fstatSync(fd).isFile()).toBe(true);
    expect(isCloexec(fd)).toBe(true);
    closeSync(fd);
    closeSync(openBeneath(inside, "new", constants.O_WRONLY | constants.O_CREAT, 0o600));
    const opening = (path: string) => () => openBeneath(inside, path, constants.O_RDONLY);
    expect(opening("../outside")).toThrow(expect.objectContaining({ code: "EXDEV" }));
    expect(opening("/etc/passwd")).toThrow(expect.objectContaining({ code: "EXDEV" }));
    expect(opening("link")).toThrow(expect.objectContaining({ code: "ELOOP" }));
    expect(opening("nothing")).toThrow(expect.objectContaining({ code: "ENOENT", syscall: "openat2" }));
    closeSync(inside);
  });

  it("keeps packets apart, long ones too, and says when one is there", async () => {
    const { ours, theirs } = Seqpacket.pair();
    using socket = ours;
    expect([isCloexec(socket.fd), isCloexec(theirs)]).toEqual([true, true]);
    expect(socket.receive()).toBeUndefined();
    const long = Buffer.alloc(100_000, "x");
    // The other side: reads what comes, and sends two packets back, the last one with a descriptor.
    const code = `import socket, array, os
s = socket.socket(fileno=3)
first = s.recv(200000)
s.send(b"%d bytes" % len(first))
s.sendmsg([b"z" * 50000], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [os.open("/etc/hostname", os.O_RDONLY)]))])`;
    const child = spawn("/usr/bin/python3", ["-c", code], {
      stdio: ["ignore", "inherit", "inherit", theirs],
    });
    closeSync(theirs);
    socket.send(long);
    const packets: { text: string; fds: number[] }[] = [];
    await new Promise<void>((resolve) => {
      socket.onReadable(() => {
        for (let packet = socket.receive(); packet; packet = socket.receive()) {
          packets.push({ text: packet.data.toString("latin1"), fds: [...packet.fds] });
          if (packet.data.length > 0) continue;
          socket.ended();
          resolve();
          return;
        }
      });
    });
    await once(child, "exit");
    expect(packets.map(({ text }) => text)).toEqual(["100000 bytes", "z".repeat(50_000), ""]);
    expect(packets.map(({ fds }) => fds.length)).toEqual([0, 1, 0]);
    const [passed] = packets[1]!.fds;
    expect(isCloexec(passed!)).toBe(true);
    expect(fstatSync(passed!).isFile()).toBe(true);
    closeSync(passed!);
    expect(() => socket.send(long)).toThrow(expect.objectContaining({ code: "EPIPE", syscall: "send" }));
  });

  it("refuses a packet that doesn't fit, and takes an abrupt end for an end", () => {
    const { ours, theirs } = Seqpacket.pair();
    using socket = ours;
    expect(() => socket.send(Buffer.alloc(1_000_000))).toThrow(expect.objectContaining({ code: "EMSGSIZE" }));
    socket.send(Buffer.from("never read"));
    closeSync(theirs);
    expect(socket.receive()).toEqual({ data: Buffer.alloc(0), fds: [] });
  });

  it("watches no longer than it is told to, in a worker thread too", async () => {
    const { ours, theirs } = Seqpacket.pair();
    let calls = 0;
    ours.onReadable(() => {
      calls++;
      ours[Symbol.dispose]();
    });
    closeSync(theirs);
    await until(() => calls > 0);
    await new Promise((resolve) => setImmediate(resolve));
    expect(calls).toBe(1);
    // A thread that ends with a socket watched must not take Node with it.
    const module = JSON.stringify(join(import.meta.dirname, "../../src/linux/addon.ts"));
    const code = `const { Seqpacket } = await import(${module});
      const { ours } = Seqpacket.pair();
      ours.onReadable(() => {});
      (await import("node:worker_threads")).parentPort.postMessage("watching");`;
    const worker = new Worker(code, { eval: true, execArgv: [] });
    await once(worker, "message");
    expect(await worker.terminate()).toBe(1);
  });

  it("names a wrong argument instead of guessing", () => {
    expect(() => peerCredentials(-1)).toThrow(TypeError);
    expect(() => peerCredentials(1.5)).toThrow("fd must be an integer");
    expect(() => peerCredentials(undefined as unknown as number)).toThrow(TypeError);
    expect(() => Pidfd.open(0)).toThrow("pid must be an integer of at least 1");
    expect(() => openBeneath(0, "a\0b", 0)).toThrow("NUL");
    const { ours, theirs } = Seqpacket.pair();
    expect(() => ours.onReadable(undefined as never)).toThrow("callback must be a function");
    expect(() => ours.send("text" as never)).toThrow("packet must be a Uint8Array");
    ours[Symbol.dispose]();
    closeSync(theirs);
  });

  it("swaps two entries in one step, and replaces nothing that is there", () => {
    const fd = openSync(directory, constants.O_RDONLY | constants.O_DIRECTORY);
    writeFileSync(join(directory, "a"), "1");
    writeFileSync(join(directory, "b"), "2");
    renameAt([fd, "a"], [fd, "b"], "exchange");
    expect(readFileSync(join(directory, "a"), "utf8")).toBe("2");
    expect(() => renameAt([fd, "a"], [fd, "b"], "noReplace")).toThrow(
      expect.objectContaining({ code: "EEXIST", syscall: "renameat2" }),
    );
    renameAt([fd, "a"], [fd, "c"], "noReplace");
    expect(readFileSync(join(directory, "c"), "utf8")).toBe("2");
    closeSync(fd);
  });

  it("finds the holes of a file", () => {
    const fd = openSync(join(directory, "sparse"), "w+");
    writeSync(fd, "x", 1 << 20);
    ftruncateSync(fd, 3 << 20);
    expect(seek(fd, "data", 0)).toBe(1 << 20);
    expect(seek(fd, "hole", 1 << 20)).toBeLessThan(2 << 20);
    expect(seek(fd, "data", 2 << 20)).toBeUndefined();
    closeSync(fd);
  });

  it("reads and writes extended attributes with any bytes", () => {
    const path = join(directory, "file");
    writeFileSync(path, "");
    setXattr(path, "user.some", Buffer.from([0, 255, 10]));
    expect(listXattrs(path)).toContain("user.some");
    expect(getXattr(path, "user.some")).toEqual(Buffer.from([0, 255, 10]));
    removeXattr(path, "user.some");
    expect(getXattr(path, "user.some")).toBeUndefined();
  });

  it("sets times to the nanosecond, of a link itself and before 1970 too", () => {
    const path = join(directory, "link");
    symlinkSync("nowhere", path);
    for (const time of [1_700_000_000_123_456_789n, -1_500_000_001n]) {
      setTimes(path, time);
      expect(lstatSync(path, { bigint: true }).mtimeNs).toBe(time);
    }
  });

  it("makes a FIFO with a name that is not UTF-8", () => {
    const path = Buffer.from(join(directory, "fifo-\xff"), "latin1");
    makeNode(path, constants.S_IFIFO | 0o600);
    expect(lstatSync(path).isFIFO()).toBe(true);
    expect(readFileNames(directory)).toContain("fifo-\xff");
  });
});

it("says what to do when the addon is missing", () => {
  const code = `import { peerCredentials } from ${JSON.stringify(join(import.meta.dirname, "../../src/linux/addon.ts"))};
    try { peerCredentials(0) } catch (err) { console.log(err.name, err.message) }`;
  const { stdout } = spawnSync(process.execPath, ["--input-type=module", "-e", code], {
    encoding: "utf8",
    env: { PATH: process.env.PATH, CEDANA_ADDON: "/nowhere/cedana.node" },
  });
  expect(stdout).toContain("Unavailable load the native addon /nowhere/cedana.node");
});

const readFileNames = (path: string) =>
  readdirSync(path, { encoding: "buffer" }).map((name) => name.toString("latin1"));
