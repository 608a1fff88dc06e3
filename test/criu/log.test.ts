import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { explainCriuLog, knownCause, knownCauses, summarizeCriuLog } from "../../src/criu/log.ts";

let directory: string;
let file: string;

beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "criu-log-"));
  file = path.join(directory, "dump.log");
});

afterEach(() => fs.rmSync(directory, { recursive: true }));

const tcpDump = `(00.000000) Version: 4.2.1 (gitid 0)
(00.000123) Running on node Linux 6.12 #1 SMP x86_64
(00.031000) Warn  (criu/net.c:3512): Unable to get a socket net namespace
(00.051234) inet: Dumping inet socket at 5
(00.051240) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.
(00.051300) ----------------------------------------
(00.051310) Error (criu/cr-dump.c:1685): Dump files (pid: 4711) failed with -1
(00.052000) Unlock network
(00.060000) Error (criu/cr-dump.c:2111): Dumping FAILED.
`;

const error = (text: string) => `Error (criu/x.c:1): ${text}`;

describe("a CRIU log", () => {
  it("is explained by its first error", async () => {
    fs.writeFileSync(file, tcpDump);
    const summary = await explainCriuLog(file);
    expect(summary.firstError).toBe(
      "Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.",
    );
    expect(summary.errors).toHaveLength(3);
    expect(summary.errors.at(-1)).toBe("Error (criu/cr-dump.c:2111): Dumping FAILED.");
    expect(summary.lastLines).toHaveLength(9);
    expect(summary.cause?.id).toBe("tcp-established");
  });

  it("names tasks and restorers before an error, or no time", () => {
    const lines = [
      `(00.061234)     42: ${error("one")}`,
      `(00.071234) pie: 1: ${error("two")}`,
      error("three"),
      `(12.071234)pie: 1: ${error("four")}`,
    ];
    expect(summarizeCriuLog(lines.join("\n")).errors).toEqual(["one", "two", "three", "four"].map(error));
  });

  it("has a last word, which is not what a container has called its files", () => {
    const outcomeOf = (...lines: string[]) => summarizeCriuLog(lines.join("\n")).outcome;
    expect(summarizeCriuLog(tcpDump).outcome).toBe("failed");
    expect(outcomeOf("(00.5) Dumping finished successfully")).toBe("finished");
    expect(
      outcomeOf(
        `(00.4) ${error("no matter")}`,
        "(00.5) Restore finished successfully. Tasks resumed.",
        "(00.6) more",
      ),
    ).toBe("finished");
    expect(outcomeOf(`(00.5) ${error("Restoring FAILED.")}`, "(00.6) more")).toBe("failed");
    expect(
      outcomeOf("(00.5) Dumping path for 3 fd via self 4 [/Dumping finished successfully]"),
    ).toBeUndefined();
    expect(outcomeOf("(00.5) Collect /tmp/Dumping FAILED.")).toBeUndefined();
  });

  it("has no error in a line that only quotes one", () => {
    const summary = summarizeCriuLog(
      "(00.1) Command line: criu dump --note Error (x): y\n(00.2)   mnt: Error (a):b\n",
    );
    expect(summary).toMatchObject({ firstError: undefined, errors: [], cause: undefined });
  });

  it("may be empty, or end in the middle of a line", async () => {
    fs.writeFileSync(file, "");
    expect(await explainCriuLog(file)).toEqual({
      firstError: undefined,
      errors: [],
      lastLines: [],
      cause: undefined,
      outcome: undefined,
    });
    fs.writeFileSync(file, `(00.1) fine\n(00.2) ${error("cut off he")}`);
    expect(await explainCriuLog(file)).toMatchObject({ firstError: error("cut off he") });
  });

  it("is searched from its beginning when it is long, wherever the error stands", async () => {
    const noise = `${"(00.000001) page-pipe: some verbose line about pages that says Error (not) of one\n".repeat(20_000)}`;
    const first = `(00.05) ${error("unix: External socket is used. Consider using --ext-unix-sk option.")}\n`;
    const last = `(00.06) ${error("Dumping FAILED.")}\n`;
    for (const shift of [0, 1, 17, 262_100, 262_143, 262_144, 262_145, 524_280]) {
      fs.writeFileSync(file, noise.slice(0, shift) + (shift ? "\n" : "") + first + noise + last);
      const summary = await explainCriuLog(file);
      expect(summary.firstError).toBe(
        error("unix: External socket is used. Consider using --ext-unix-sk option."),
      );
      expect(summary.errors).toEqual([error("Dumping FAILED.")]);
      expect(summary.cause?.id).toBe("ext-unix-sk");
    }
  });

  it("has an error that means nothing at its beginning, where limits can't be raised", async () => {
    const harmless = error("rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted");
    fs.writeFileSync(file, `${harmless}\n${tcpDump}`);
    const short = await explainCriuLog(file);
    fs.writeFileSync(file, `${harmless}\n${"(00.01) noise\n".repeat(10_000)}${tcpDump}`);
    const long = await explainCriuLog(file);
    for (const summary of [short, long]) {
      expect(summary.firstError).toMatch(/Connected TCP socket/);
      expect(summary.cause?.id).toBe("tcp-established");
    }
    expect(summarizeCriuLog(harmless)).toMatchObject({ firstError: harmless, cause: undefined });
  });

  it("is cut to what people can read", () => {
    const many = Array.from({ length: 100 }, (_, i) => `(00.1) ${error(`number ${i}`)}`).join("\n");
    const summary = summarizeCriuLog(`${many}\n(00.2) ${error(`file \u001b[31m${"x".repeat(5000)}`)}\n`);
    expect(summary.firstError).toBe(error("number 0"));
    expect(summary.errors).toHaveLength(20);
    expect(summary.lastLines).toHaveLength(10);
    expect(summary.errors.at(-1)).toMatch(/^Error \(criu\/x.c:1\): file \?\[31mx+…$/);
    expect(summary.errors.at(-1)!.length).toBeLessThan(510);
  });

  it("of one endless line doesn't eat memory", async () => {
    fs.writeFileSync(file, "x".repeat(3_000_000));
    expect(await explainCriuLog(file)).toMatchObject({ firstError: undefined });
  });

  it("that is missing is an error of open", async () => {
    await expect(explainCriuLog(path.join(directory, "none"))).rejects.toMatchObject({ code: "ENOENT" });
  });
});

describe("known causes", () => {
  it.each([
    ["inet: Connected TCP socket in image", "tcp-established"],
    ["inet: In-flight connection (l) for 5", "tcp-in-flight"],
    ["unix: External socket is used. Consider using --ext-unix-sk option.", "ext-unix-sk"],
    ["Some file locks are hold by dumping tasks! You can try --file-locks to dump them.", "file-locks"],
    ["tty: Found dangling tty with sid 1 pgid 1 (pts) on peer fd 0.", "shell-job"],
    ["Can't dump ghost file /tmp/x of 2097152 size, increase limit", "ghost-limit"],
    ["Can't create link remap for /tmp/x. Use link-remap option.", "link-remap"],
    ["Can't dump file 5 of that type [0] (anon_inode:[io_uring] /dev)", "unsupported-file"],
    ["Unseizable non-zombie 42 found, state T, err -1/1", "ptrace"],
    ["Timeout reached. Try to interrupt: 0", "freezer"],
    [
      "mnt: Mount 1133 ./sys (master_id: 26 shared_id: 0) has unreachable sharing. Try --enable-external-masters.",
      "external-mounts",
    ],
    ["Can't lookup mount=54 for fd=3 path=/x", "lost-mount"],
    ["File /lib/libc.so.6 has bad size 5 (expect 6)", "file-changed"],
    ["Can't open file data/x on restore: No such file or directory", "file-missing"],
    ["Can't fork for 42: File exists", "pid-taken"],
    ["inet: Can't bind inet socket (id 5): Cannot assign requested address", "address"],
    ["net: Locking network failed: iptables-restore returned 255.", "network-lock"],
    ["cpu: FPU feature required by image is not supported on host (fpu:1 fxsr:1 osxsave:0 xsaves:0)", "cpu"],
    ["Missing required plugin: cuda_plugin", "plugin-missing"],
    ["Magic doesn't match for inventory.img", "broken-image"],
    ["Can't write pages: No space left on device", "disk-full"],
    [
      'mnt: Mount 30:./data is autodetected external mount. Try "--ext-mount-map auto" to allow them.',
      "external-mounts",
    ],
    ["Unexpected EOF on (empty-image)", "broken-image"],
    ["Missing 7f0000 in parent pagemap", "parent-missing"],
    ["Tracking memory is not available. Consider omitting --track-mem option.", "memory-tracking"],
    ["Pid-reuse detection failed: no parent inventory, check warnings in get_parent_inventory", "pid-reused"],
    ['inet: For Go programs, consider using "GODEBUG=multipathtcp=0" to disable MPTCP', "multipath-tcp"],
    ["inet: Can't dump 7 inet socket 5. Only stream, dgram and raw are supported.", "socket-kind"],
    ["inet: Can't connect inet socket back: Cannot assign requested address", "tcp-restore"],
    ["fsnotify: \tCan't dump that handle", "inotify"],
    ["cg: Can't move 1 into cpuset//docker/1/cgroup.procs (-1/6): No space left on device", "cpuset"],
    ["cg: Can't move 1 into unified//libpod/container/cgroup.procs (-1/-1): Bad file descriptor", "cgroup"],
    ["cg: All tasks in criu's cgroups. Nothing to dump.", "own-cgroup"],
    ["The criu itself is within dumped tree.", "own-cgroup"],
    ["mnt: The root task has another root than mntns: /srv", "restore-root"],
    ["Task 7 with SysVIPC shmem map @7f00 doesn't live in IPC ns", "nested-namespace"],
    ["Can't dump a pid namespace without the process init", "pid-namespace-init"],
    ["Current sid 7 intersects with pid (7) in images", "session-conflict"],
    ["mnt: Unable to dump a file system for 30:/tmp", "file-system"],
    ["mnt: Can't mount at ./data: No such file or directory", "mount-failed"],
    ["Can't link dev/null.cr.1.ghost -> dev/null: File exists", "leftover-file"],
    ["epoll: Escaped/closed fd descriptor 5 on pid 7", "epoll-escaped"],
    ["tty: Found slave peer index 3 without correspond master peer", "external-terminal"],
    ["Zombies with threads are not supported", "stopped-threads"],
    ["The packetized mode for pipes is not supported yet", "pipe-packets"],
    ["7 has rseq but kernel lacks get_rseq_conf feature", "rseq"],
    ["Dumping seccomp filters not supported: Invalid argument", "seccomp"],
    ["Can't fixup vdso VMAs (pid: 7)", "vdso"],
    ["PID 7 has uprobes vma. Consider using --allow-uprobes.", "uprobes"],
    ["Time namespaces are not supported", "time-namespace"],
    ["apparmor LSM specified but apparmor not supported by kernel", "security-module"],
    ["Non-cooperative UFFD is not supported", "lazy-pages"],
    ["Can't connect to server 10.0.0.1:27: Connection refused", "page-server"],
    ["Can't infect (pid: 7) with parasite", "parasite"],
    ["net: IP tool failed on addr save (null) (null)", "network-device"],
    ["7 killed by signal 9: Killed", "killed"],
    ["7 killed by signal 11: Segmentation fault", "crashed"],
    ["Can't find task with pid 7", "no-such-process"],
    ["can't dump unprivileged task whose /proc doesn't belong to it", "unprivileged"],
    ["Can't mmap section: Cannot allocate memory", "out-of-memory"],
  ])("know %j", (text, id) => {
    expect(knownCause(error(text))?.id).toBe(id);
  });

  it("are at least 25, each with its own name and something to do", () => {
    const ids = knownCauses.map((cause) => cause.id);
    expect(new Set(ids).size).toBe(ids.length);
    expect(ids.length).toBeGreaterThanOrEqual(50);
    for (const { advice } of knownCauses) expect(advice.length).toBeGreaterThan(30);
  });

  it("are unknown otherwise", () => {
    expect(knownCause(error("something new"))).toBeUndefined();
    expect(knownCause(undefined)).toBeUndefined();
  });

  it("that say little are named only where nothing else is known", () => {
    const vague = error("Can't open /proc/1: Operation not permitted");
    expect(summarizeCriuLog(vague).cause?.id).toBe("capability");
    expect(summarizeCriuLog([vague, error("File /x has bad size 1 (expect 2)")].join("\n")).cause?.id).toBe(
      "file-changed",
    );
  });

  it("are found behind a first error that says nothing", () => {
    const text = [error("Can't do it"), error("File /x has bad size 1 (expect 2)")].join("\n");
    expect(summarizeCriuLog(text)).toMatchObject({
      firstError: error("Can't do it"),
      cause: { id: "file-changed" },
    });
  });
});
