import { describe, expect, it } from "vitest";
import { Context, type PreflightInput } from "../../../src/checkpoint/preflight/context.ts";
import { externalMounts, memoryToDump, mountsOfContainer } from "../../../src/checkpoint/preflight/facts.ts";
import { checkFiles, isOvermounted } from "../../../src/checkpoint/preflight/files.ts";
import { checkMounts } from "../../../src/checkpoint/preflight/mounts.ts";
import { checkNamespaces, checkOutside } from "../../../src/checkpoint/preflight/processes.ts";
import { checkCriu } from "../../../src/checkpoint/preflight/resources.ts";
import { checkSockets } from "../../../src/checkpoint/preflight/sockets.ts";
import { parseFdInfo } from "../../../src/linux/fdinfo.ts";
import type { Inventory, OpenFile, ProcessInventory } from "../../../src/linux/inventory.ts";
import { parseFileMapping } from "../../../src/linux/maps.ts";
import { type MountInfo, parseMountInfoLine } from "../../../src/linux/mount-options.ts";
import type { DiagnosedSocket } from "../../../src/linux/sock-diag.ts";
import { compareVersions } from "../../../src/linux/versions.ts";

const own = {
  mnt: 1,
  pid: 2,
  pid_for_children: 2,
  net: 3,
  ipc: 4,
  uts: 5,
  user: 6,
  cgroup: 7,
  time: 8,
  time_for_children: 8,
};

function process_(pid: number, parentPid: number, more: Partial<ProcessInventory> = {}): ProcessInventory {
  return {
    pid,
    pidInContainer: pid - 99,
    stat: {
      pid,
      comm: "program",
      state: "S",
      parentPid,
      processGroup: pid,
      session: pid,
      terminal: 0,
      startTime: pid,
    },
    status: {
      tracerPid: 0,
      pidsInNamespaces: [pid],
      anonymousBytes: 1 << 20,
      sharedBytes: 0,
      swapBytes: 0,
      hugetlbBytes: 0,
      seccomp: 0,
    },
    threads: 1,
    otherThreads: [],
    namespaces: { ...own, mnt: 11, pid: 12, pid_for_children: 12, net: 13 },
    files: [],
    mappings: [],
    mappedFiles: [],
    ...more,
  };
}

const file = (fd: number, link: string, info = "flags:\t00\nmnt_id:\t50\n"): OpenFile => ({
  what: "fd",
  fd,
  link,
  info: parseFdInfo(info),
});

const mounts = (...lines: string[]): MountInfo[] => lines.map((line) => parseMountInfoLine(line)!);

const rootMounts = mounts(
  "50 40 0:30 / / rw,relatime - overlay overlay rw",
  "51 50 0:31 / /proc rw - proc proc rw",
  "52 50 0:32 / /dev rw - tmpfs tmpfs rw",
  "53 51 0:32 /null /proc/kcore rw - tmpfs tmpfs rw",
  "54 50 254:0 /srv/data /data rw - ext4 /dev/vda rw",
  "55 51 0:31 /sys /proc/sys ro - proc proc rw",
);

function context(
  processes: ProcessInventory[],
  input: Partial<PreflightInput> = {},
  { sockets = [] as DiagnosedSocket[], mounted = rootMounts } = {},
): Context {
  const inventory: Inventory = {
    processes,
    mounts: new Map([[11, mounted]]),
    sockets: new Map([
      [13, { byInode: new Map(sockets.map((socket) => [socket.inode, socket])), missing: [] }],
    ]),
    own,
    tookMs: 0,
  };
  return new Context({ pids: processes.map(({ pid }) => pid), ...input }, inventory);
}

const ids = (of: Context) => of.all().map(({ id }) => id);

describe("the tree", () => {
  it("begins with the container's init, and leaves out what came by exec", () => {
    const one = context([
      process_(100, 90),
      process_(101, 100),
      process_(102, 101),
      process_(150, 91),
      process_(151, 150),
    ]);
    expect(one.root?.pid).toBe(100);
    expect(one.tree.map(({ pid }) => pid)).toEqual([100, 101, 102]);
    checkOutside(one);
    expect(one.all().map(({ process }) => process?.pid)).toEqual([150, 151]);
  });

  it("begins with the process that is named, or with the oldest that has no parent among the others", () => {
    const processes = [process_(200, 90), process_(201, 200)];
    expect(context(processes).root?.pid).toBe(200);
    expect(context(processes, { rootPid: 201 }).root?.pid).toBe(201);
    expect(context(processes, { rootPid: 999 }).root).toBeUndefined();
  });
});

it("tells the same object in many processes once", async () => {
  const inherited = file(3, "anon_inode:[io_uring]", "flags:\t02\nmnt_id:\t17\nino:\t77\n");
  const one = context(
    [100, 101, 102].map((pid) => process_(pid, pid === 100 ? 1 : 100, { files: [inherited] })),
  );
  await checkFiles(one);
  expect(one.all()).toMatchObject([{ id: "io-uring", process: { pid: 100 }, alsoIn: 2 }]);
});

it("knows mounts that lie below others", () => {
  const all = new Map(
    mounts(
      "1 0 0:1 / / rw - ext4 a rw",
      "2 1 0:2 / /tmp/a rw - tmpfs a rw",
      "3 2 0:3 / /tmp/a rw - tmpfs b rw",
      "4 1 0:4 / /tmp/x/y rw - tmpfs c rw",
      "5 1 0:5 / /tmp/x rw - tmpfs d rw",
      "6 4 0:6 / /tmp/x/y/z rw - tmpfs e rw",
      "7 1 0:7 / /tmp/xy rw - tmpfs f rw",
    ).map((mount) => [mount.mountId, mount]),
  );
  const covered = [...all.values()]
    .filter((mount) => isOvermounted(mount, all))
    .map(({ mountId }) => mountId);
  expect(covered).toEqual([2, 4, 6]);
});

describe("mounts", () => {
  const spec = { mountPoints: ["/proc", "/dev", "/data/"] };

  it("are of the configuration, or made from what is", () => {
    const one = context([process_(100, 1)], { spec, engine: "runc" });
    expect(mountsOfContainer(one).map(({ origin }) => origin)).toEqual([
      "root",
      "configuration",
      "configuration",
      "configuration",
      "configuration",
      "configuration",
    ]);
    expect(externalMounts(one).map(({ mountPoint }) => mountPoint)).toEqual(["/data"]);
    checkMounts(one);
    expect(ids(one)).toEqual([]);
  });

  it("that somebody in the container has made are judged by what CRIU can make anew", () => {
    const mounted = [
      ...rootMounts,
      ...mounts(
        "60 50 0:40 / /mnt/fuse rw - fuse.sshfs host: rw",
        "61 50 0:41 / /mnt/tmp rw - tmpfs tmpfs rw",
        "62 50 254:0 /srv/data/sub /mnt/again rw - ext4 /dev/vda rw",
        "63 50 254:1 /part /mnt/part rw - ext4 /dev/vdb rw",
        "64 50 0:42 / /mnt/mapped rw,idmapped - tmpfs tmpfs rw",
      ),
    ];
    const one = context([process_(100, 1)], { spec, engine: "runc" }, { mounted });
    checkMounts(one);
    expect(one.all().map(({ id, what }) => [id, what])).toEqual([
      ["unsupported-mount", "/mnt/fuse (fuse.sshfs of host:)"],
      ["unsupported-mount", "/mnt/part (ext4 of /dev/vdb)"],
      ["id-mapped-mount", "/mnt/mapped (tmpfs of tmpfs)"],
    ]);
  });

  it("are CRIU's business only in another mount namespace", () => {
    const mounted = mounts("60 50 0:40 / /mnt/fuse rw - fuse.sshfs host: rw");
    const one = context([process_(100, 1, { namespaces: { ...own, mnt: 1 } })], {}, { mounted });
    checkMounts(one);
    expect(ids(one)).toEqual([]);
  });
});

it("reports a nested network namespace for runc alone, and each kind once", () => {
  const processes = [
    process_(100, 1),
    process_(101, 100, { namespaces: { ...own, mnt: 11, pid: 99, pid_for_children: 99, net: 98 } }),
  ];
  for (const [engine, expected] of [
    ["runc", ["pid namespace of its own", "net namespace of its own"]],
    ["crun", ["pid namespace of its own"]],
  ] as const) {
    const one = context(processes, { engine });
    checkNamespaces(one);
    expect(one.all().map(({ what }) => what)).toEqual(expected);
  }
});

describe("sockets", () => {
  const held = (...inodes: number[]) =>
    process_(100, 1, { files: inodes.map((inode, i) => file(i + 3, `socket:[${inode}]`)) });
  const tcp = (
    inode: number,
    state: "LISTEN" | "ESTABLISHED" | "CLOSE",
    receiveQueue = 0,
  ): DiagnosedSocket => ({
    family: "inet",
    protocol: "tcp",
    inode,
    state,
    local: "10.0.0.1:80",
    remote: "10.0.0.2:5000",
    receiveQueue,
    sendQueue: 0,
  });
  const unix = (inode: number, type: string, peerInode?: number): DiagnosedSocket => ({
    family: "unix",
    type,
    inode,
    state: "ESTABLISHED",
    ...(peerInode !== undefined && { peerInode }),
    pendingInodes: [],
    receiveQueue: 0,
  });

  it.each([
    [undefined, false, false],
    ["keep", true, false],
    ["close", true, false],
    ["skip-in-flight", true, true],
  ] as const)(
    "of TCP need an option that the policy %s has or hasn't",
    async (policy, established, inFlight) => {
      const one = context(
        [held(1, 2, 3)],
        { policy: { tcp: policy } },
        { sockets: [tcp(1, "LISTEN", 2), tcp(2, "ESTABLISHED"), tcp(3, "CLOSE")] },
      );
      await checkSockets(one);
      expect(one.all()).toMatchObject([
        { id: "tcp-in-flight", met: inFlight },
        { id: "tcp-established", met: established },
      ]);
    },
  );

  it("of unix with a peer outside are a matter of datagrams to a name, or not", async () => {
    const sockets = [
      unix(1, "stream", 2),
      unix(2, "stream", 1),
      unix(3, "stream", 90),
      unix(4, "dgram", 91),
      unix(5, "stream", 0),
      unix(6, "dgram", 92),
      { ...unix(91, "dgram"), name: "/dev/log" } as DiagnosedSocket,
    ];
    const one = context([held(1, 2, 3, 4, 5, 6)], { policy: { extUnix: true } }, { sockets });
    await checkSockets(one);
    expect(one.all()).toMatchObject([
      { id: "unix-connection-outside", what: "fd 5: socket:[3] (stream, to socket 90 outside)" },
      { id: "unix-outside", what: "fd 6: socket:[4] (dgram, to /dev/log)", met: true },
      { id: "unix-connection-outside", what: "fd 8: socket:[6] (dgram, to socket 92 outside)" },
    ]);
  });

  it("with kernel TLS are noted", async () => {
    const one = context(
      [held(1)],
      {},
      { sockets: [{ ...tcp(1, "ESTABLISHED"), upperProtocol: "tls" } as DiagnosedSocket] },
    );
    await checkSockets(one);
    expect(ids(one)).toEqual(["tcp-established", "kernel-tls"]);
  });
});

describe("CRIU's version", () => {
  it("is compared by numbers", () => {
    expect(compareVersions("4.2.1", "4.2")).toBe(1);
    expect(compareVersions("4.2", "4.2.0")).toBe(0);
    expect(compareVersions("3.17.1", "4.1")).toBe(-1);
    expect(compareVersions("6.18.44-fc", "6.9")).toBe(1);
  });

  it.each([
    ["6.18.44", "4.2.1", []],
    ["6.18.44", "4.1.1", ["criu-too-old"]],
    ["6.18.44", "3.17.1", ["criu-too-old", "criu-too-old"]],
    ["6.12.1", "3.17.1", []],
    ["6.14.0", "4.1.1", []],
  ])("on Linux %s, %s", (kernel, version, expected) => {
    const socket: DiagnosedSocket = {
      family: "inet",
      protocol: "udp",
      inode: 1,
      state: "CLOSE",
      local: "",
      remote: "",
      receiveQueue: 0,
      sendQueue: 0,
    };
    const files = [file(3, "socket:[1]")];
    const one = context([process_(100, 1, { files })], { criu: { version } }, { sockets: [socket] });
    checkCriu(one, kernel);
    expect(ids(one)).toEqual(expected);
  });

  it("is not all that counts: what criu check misses is passed on", () => {
    const one = context([process_(100, 1)], {
      criu: { version: "4.2.1", missing: ["prctl: PR_SET_MM_MAP"] },
    });
    checkCriu(one, "6.18");
    expect(one.all()).toMatchObject([{ id: "criu-lacks", what: "prctl: PR_SET_MM_MAP" }]);
  });

  it("matters also when there is none", () => {
    const one = context([process_(100, 1)], { criu: null });
    checkCriu(one);
    expect(ids(one)).toEqual(["criu-missing"]);
  });
});

it("counts shared memory once, private memory for each process, and deleted files", () => {
  const mapping = parseFileMapping("7f0000000000-7f0000200000 rw-s 00000000 00:01 33 /memfd:x (deleted)")!;
  const status = { ...process_(100, 1).status, sharedBytes: 2 << 20 };
  const deleted: OpenFile = {
    ...file(3, "/tmp/x (deleted)"),
    stat: { type: "file", device: 0, links: 0, bytes: 1 << 30, allocatedBytes: 4096 },
  };
  const processes = [100, 101, 102].map((pid) =>
    process_(pid, pid === 100 ? 1 : 100, { status, mappings: [mapping], files: [deleted] }),
  );
  expect(memoryToDump(context(processes))).toBe((3 << 20) + (2 << 20) + 4096);
});
