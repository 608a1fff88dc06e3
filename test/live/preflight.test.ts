// A preflight against the truth: for each thing that a checkpoint may trip over, a program that has it; the preflight must
// name it, and CRIU's dump must agree: fail, or succeed with the option, or succeed where nothing is reported.

import { type ChildProcess, execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { FindingId } from "../../src/checkpoint/preflight/catalogue.ts";
import schema from "../../src/checkpoint/preflight/preflight.schema.json" with { type: "json" };
import {
  type PreflightInput,
  type PreflightReport,
  preflight,
} from "../../src/checkpoint/preflight/preflight.ts";
import { findFault, type Schema } from "../../src/checkpoint/schema.ts";
import { explainCriuLog } from "../../src/criu/log.ts";
import { hostCgroupVersion } from "../../src/linux/cgroup-hierarchy.ts";
import { childrenOf } from "../../src/linux/proc.ts";
import { readSpec } from "../../src/runtime/spec.ts";
import type { Live, RunOptions } from "./harness/live.ts";
import { bothEngines, missingFor } from "./harness/matrix.ts";
import { compileProgram, repository } from "./harness/programs.ts";
import { liveFor } from "./harness/suite.ts";
import { pidsInCgroups } from "./harness/system.ts";
import type { LiveTask } from "./harness/task.ts";
import { until } from "./harness/until.ts";

const run = promisify(execFile);
const source = join(import.meta.dirname, "../checkpoint/preflight/programs/hold.c");

/** What the preflight says of a program, in any order, and how its dump succeeds; undefined: it can't. */
interface Case {
  says?: FindingId[];
  /** options of CRIU with which the dump succeeds */
  with?: string[];
  /** the policy that stands for those options */
  policy?: PreflightInput["policy"];
  /** it has a mount namespace of its own, whose other mounts come from outside */
  ownMounts?: true;
}

const dumps = (...says: FindingId[]): Case => ({ says, with: [] });
const never = (...says: FindingId[]): Case => ({ says });
const needs = (says: FindingId[], policy: PreflightInput["policy"], ...options: string[]): Case => ({
  says,
  policy,
  with: options,
});
const ownMounts = (one: Case): Case => ({ ...one, ownMounts: true });

const cases: Record<string, Case> = {
  // nothing to say
  clean: dumps(),
  many_kinds: dumps(),
  zombie: dumps(),
  stopped: dumps(),
  threads: dumps(),
  listening: dumps(),
  udp: dumps(),
  aio: dumps(),
  small_ghost: dumps(),
  seccomp_filter: dumps(),
  pidfd_inside: dumps(),
  pidfd_dead: dumps(),
  sysv_shm: dumps(),
  uts_own: dumps(),
  host_ns_fd: dumps(),
  device_kmsg: dumps(),
  device_mapped: dumps(),
  tun_inside: dumps(),
  console: dumps(),
  inotify_deleted: dumps(),
  inotify_cgroup: dumps(),
  inotify_file: dumps(),
  inotify_directory: dumps(),
  fanotify: dumps(),
  fanotify_fid: dumps(),
  fanotify_mount: ownMounts(dumps()),
  tty_inside: dumps(),
  ghost_sparse: dumps(),
  deleted_cwd: dumps(),
  tcp_unbound: dumps(),
  raw: dumps(),
  ping: dumps(),
  udp_corked: dumps(),
  unix_pending: dumps(),
  unix_half: dumps(),
  unix_unaccepted: dumps(),
  unix_pending_outside: dumps(),
  unix_deleted: dumps(),
  unix_fd_queued: dumps(),
  netlink_socket: dumps(),
  packet: dumps(),
  packet_ring: dumps(),
  nested_net: dumps(),
  nested_mount: dumps(),
  deadline: dumps(),
  hugetlb: dumps(),
  // what can't be seen from outside, and what CRIU loses without a word
  landlocked: dumps(),
  sem_undo: dumps(),
  ldt: dumps(),
  no_exec_memory: dumps(),
  guard_pages: dumps(),
  // notes
  id_mapped: ownMounts(dumps("id-mapped-mount")),
  foreign_unbound: dumps("foreign-socket-unbound"),
  foreign_udp: dumps("foreign-socket-unbound"),
  foreign_netlink: dumps("foreign-socket-unbound"),
  // options
  tcp: needs(["tcp-established", "tcp-established"], { tcp: "keep" }, "--tcp-established"),
  tcp_close_wait: needs(["tcp-established"], { tcp: "close" }, "--tcp-close"),
  tcp_pending: needs(
    ["tcp-in-flight", "tcp-established"],
    { tcp: "skip-in-flight" },
    "--tcp-established",
    "--skip-in-flight",
  ),
  tcp_connecting: needs(
    ["tcp-in-flight", "tcp-established", "tcp-established", "tcp-established"],
    { tcp: "skip-in-flight" },
    "--tcp-established",
    "--skip-in-flight",
  ),
  ext_unix_dgram: needs(["unix-outside"], { extUnix: true }, "--ext-unix-sk"),
  flock_lock: needs(["file-locks"], { fileLocks: true }, "--file-locks"),
  posix_lock: needs(["file-locks"], { fileLocks: true }, "--file-locks"),
  ofd_lock: needs(["file-locks"], { fileLocks: true }, "--file-locks"),
  lease: needs(["file-locks"], { fileLocks: true }, "--file-locks"),
  ext_tty: needs(["terminal-outside"], { shellJob: true }, "--shell-job"),
  no_leader: needs(["no-session-leader"], { shellJob: true }, "--shell-job"),
  ghost: needs(["ghost-file"], { ghostLimitBytes: 4 << 20 }, "--ghost-limit", "4194304"),
  ghost_mapped: needs(["ghost-file"], { ghostLimitBytes: 4 << 20 }, "--ghost-limit", "4194304"),
  link_remap: needs(["deleted-hard-link"], { linkRemap: true }, "--link-remap"),
  inotify_proc: needs(
    ["watch-unreachable"],
    { irmapScanPaths: ["/proc/sys/kernel"] },
    "--irmap-scan-path",
    "/proc/sys/kernel",
  ),
  inotify_sysfs: needs(
    ["watch-unreachable"],
    { irmapScanPaths: ["/sys/fs"] },
    "--irmap-scan-path",
    "/sys/fs",
  ),
  // blockers
  io_uring: never("io-uring"),
  io_uring_mapped: never("io-uring"),
  uffd: never("userfaultfd"),
  perf: never("perf-event"),
  perf_mapped: never("perf-event"),
  bpf_mapped: never("bpf"),
  block_mapped: never("unsupported-mapping"),
  bpf_prog: never("bpf"),
  bpf_ringbuf: never("bpf"),
  bpf_array: never("bpf"),
  device_fuse: never("device"),
  device_tun: never("device"),
  device_block: never("device"),
  serial: never("device"),
  landlock_fd: never("unsupported-file"),
  seccomp_notify: never("unsupported-file"),
  mount_fd: never("unsupported-file"),
  secretmem: never("secret-memory"),
  packet_pipe: never("packet-pipe"),
  packet_pipe_empty: never("packet-pipe"),
  pidfd_outside: never("pidfd-outside"),
  pidfd_thread: never("pidfd-thread"),
  detached_mount: never("lost-mount"),
  message_queue: never("lost-mount"),
  lazy_umount: ownMounts(never("lost-mount")),
  foreign_mount: ownMounts(never("lost-mount")),
  foreign_program: ownMounts(never("lost-mount", "lost-mount", "lost-mount")),
  overmounted: ownMounts(never("overmounted-file")),
  foreign_ns_fd: never("foreign-namespace-file"),
  inotify_foreign: ownMounts(never("watch-outside")),
  ramfs_mount: ownMounts(never("unsupported-mount")),
  fuse_mount: ownMounts(never("device", "unsupported-mount")),
  sysv_shared: never("shared-memory-outside"),
  vsock: never("unsupported-socket"),
  xdp: never("unsupported-socket"),
  mptcp: never("mptcp"),
  foreign_socket: never("foreign-socket"),
  elsewhere_unbound: never("foreign-socket"),
  foreign_packet: never("foreign-socket"),
  foreign_unix: never("foreign-socket", "foreign-socket"),
  ext_unix_pair: never("unix-connection-outside"),
  ext_unix_stream: never("unix-connection-outside"),
  ext_unix_seqpacket: never("unix-connection-outside"),
  ext_unix_nameless: never("unix-connection-outside"),
  unix_credentials_queued: never("credentials-unread"),
  netlink_queued: never("netlink-unread"),
  netlink_group: never("netlink-groups"),
  traced: never("process-traced"),
  traced_outside: never("process-traced"),
  traced_thread: never("process-traced"),
  leader_ended: never("leader-ended"),
  d_state: never("process-uninterruptible", "process-shares-memory"),
  d_thread: never("process-uninterruptible", "process-shares-memory"),
  shared_memory_space: never("process-shares-memory"),
  nested_pid: never("nested-namespace"),
  nested_user: never("nested-namespace"),
  nested_uts: never("nested-namespace"),
  nested_ipc: never("nested-namespace"),
  nested_cgroup: never("nested-namespace"),
  nested_time: never("nested-namespace"),
  // what this machine may lack
  alg: never("unsupported-socket"),
  ktls: needs(["tcp-established", "tcp-established", "kernel-tls"], { tcp: "keep" }, "--tcp-established"),
};

let directory: string;
let program: string;
beforeAll(async () => {
  directory = mkdtempSync(join(tmpdir(), "cedana-preflight-"));
  program = await compileProgram(source);
});
afterAll(() => rmSync(directory, { recursive: true, force: true }));

/** A program that holds something, and the root of the tree that is to be dumped. */
class Held implements AsyncDisposable {
  readonly child: ChildProcess;
  pid = 0;
  skipped: string | undefined;

  private constructor(child: ChildProcess) {
    this.child = child;
  }

  static async start(name: string): Promise<Held> {
    const report = join(directory, `report-${name}`);
    // Node's pipes are unix sockets, which are themselves what half of these cases are about.
    const child = spawn(program, [name], {
      stdio: "ignore",
      detached: true, // a session leader
      env: { HOLD_DIR: directory, HOLD_REPORT: report, PATH: process.env.PATH },
    });
    const held = new Held(child);
    await until(() => existsSync(report), { what: () => `the report of ${name}`, everyMs: 3 });
    const [word, rest] = readFileSync(report, "utf8").trim().split(/ (.*)/s) as [string, string];
    if (word === "ready") held.pid = Number(rest);
    else held.skipped = rest;
    return held;
  }

  get pids(): number[] {
    const below = (pid: number): number[] => [pid, ...childrenOf(pid).flatMap(below)];
    return below(this.pid);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const gone = this.child.exitCode === null && this.child.signalCode === null && once(this.child, "exit");
    for (const pid of [...(this.pid ? this.pids.reverse() : []), this.child.pid!]) kill(pid);
    await gone;
  }
}

function kill(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // it has ended with its parent
  }
}

/** @returns the error of a dump that fails */
async function dump(held: Held, options: string[]): Promise<string | undefined> {
  const images = mkdtempSync(join(directory, "images-"));
  try {
    await run("criu", [
      "dump",
      ...["--tree", String(held.pid), "--images-dir", images, "--log-file", "dump.log"],
      ...["--leave-running", "--timeout", "2", ...options],
    ]);
    return undefined;
  } catch {
    const { errors, firstError } = await explainCriuLog(join(images, "dump.log"));
    return firstError ?? errors[0] ?? "no reason";
  } finally {
    rmSync(images, { recursive: true });
  }
}

const criu = await run("criu", ["--version"]).then(
  ({ stdout }) => /Version: (\S+)/.exec(stdout)?.[1],
  () => undefined,
);

describe.skipIf(!criu || process.getuid?.() !== 0)(
  `the preflight and CRIU ${criu ?? "(not installed)"}`,
  () => {
    for (const [name, wanted] of Object.entries(cases))
      it.concurrent(`agree on ${name}`, async (context) => {
        await using held = await Held.start(name);
        if (held.skipped !== undefined) return context.skip(held.skipped);
        const input = { pids: held.pids, rootPid: held.pid, criu: { version: criu! } };
        const report = await preflight(input);
        const said = [...report.blockers, ...report.requirements, ...report.notes];
        expect(said.map(({ id }) => id).sort()).toEqual([...(wanted.says ?? [])].sort());
        const external = wanted.ownMounts ? ["--external", "mnt[]"] : [];
        const error = await dump(held, external);
        expect(error === undefined, error).toBe(report.ok);
        if (!wanted.with) expect(report.blockers.length).toBeGreaterThan(0);
        else if (wanted.with.length > 0) {
          expect(report.requirements.length).toBeGreaterThan(0);
          expect((await preflight({ ...input, policy: wanted.policy! })).ok).toBe(true);
          expect(await dump(held, [...external, ...wanted.with])).toBeUndefined();
        }
      });
  },
);

for (const combination of bothEngines) {
  const missing = missingFor(combination);
  const { engine } = combination;
  describe.skipIf(missing)(`a container of ${engine}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor(combination, (started) => {
      live = started;
    });
    const cgroupsMode = engine === "crun" ? { cgroupsMode: "ignore" } : {};

    /** As the dump chain asks: all processes of the cgroup, and what the bundle's configuration says. */
    async function look(task: LiveTask, destination = live.dir) {
      const spec = await readSpec(task.bundle);
      return await preflight({
        pids: pidsInCgroups(`${live.namespace}/${task.id}`),
        rootPid: task.pid,
        engine,
        spec: {
          mountPoints: (spec.mounts ?? []).map((mount) => mount.destination),
          terminal: spec.process?.terminal,
        },
        destination,
        criu: { version: criu! },
      });
    }
    const said = (report: PreflightReport) =>
      [...report.blockers, ...report.requirements, ...report.notes].map(({ id }) => id);

    /** A container that holds something. */
    async function hold(name: string, options: RunOptions = {}): Promise<LiveTask> {
      const mounts = [
        { destination: "/hold", type: "bind", source: dirname(program), options: ["rbind", "ro"] },
      ];
      const task = await live.run(["/hold/hold", name], { ...options, mounts });
      await task.stdout.lineMatching(/^ready/);
      return task;
    }

    it("has nothing to be reported when it is clean", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      const report = await look(task);
      expect(said(report)).toEqual([]);
      expect(report).toMatchObject({
        ok: true,
        facts: { rootPid: task.pid, processes: 1, leftOut: 0, established: [], outsideTerminals: [] },
      });
      expect(report.facts.externalMounts).toEqual([{ mountPoint: "/programs", type: expect.any(String) }]);
      expect(report.facts.freeBytes).toBeGreaterThan(report.facts.memoryBytes);
    });

    it("is dumped with many kinds of files on its own file systems, as the preflight says", async () => {
      await using task = await hold("many_kinds");
      expect(said(await look(task))).toEqual([]);
      await task.checkpoint({ ...cgroupsMode });
    });

    it("can't be dumped with a watch on its root file system, an overlay, as the preflight says", async () => {
      await using task = await hold("inotify_directory");
      expect((await look(task)).requirements).toMatchObject([{ id: "watch-unreachable", met: false }]);
      await expect(task.checkpoint({ ...cgroupsMode })).rejects.toThrow(/handle/);
    });

    it("may have a terminal, which the engine restores", async () => {
      await using task = await live.run(["sh"], { terminal: true, stdin: true });
      task.write("echo ready\n");
      await task.stdout.lineMatching(/^ready/);
      const report = await look(task);
      expect(said(report)).toEqual([]);
      expect(report.facts.outsideTerminals).toContainEqual(
        expect.objectContaining({ pid: task.pid, path: expect.stringMatching(/^\/dev\/(pts\/0|console)$/) }),
      );
    });

    it("has nothing to be reported when it is paused", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      await task.pause();
      expect(said(await look(task))).toEqual([]);
      await task.resume();
    });

    // Not tried with runc's dump on version 1: it waits for ever.
    it("can't be dumped by runc on cgroup version 1 with a stopped process in it", async () => {
      await using task = await hold("stopped");
      const hangs = engine === "runc" && (await hostCgroupVersion()) === 1;
      expect(said(await look(task))).toEqual(hangs ? ["process-stopped"] : []);
      if (!hangs) await task.checkpoint({ ...cgroupsMode });
    });

    it("is said to lose what came by exec", async () => {
      await using task = await live.run(["counter"]);
      await task.nextNumber();
      await using exec = await task.exec(["sh", "-c", "echo in; exec sleep 1000"]);
      await exec.stdout.lineMatching(/^in/);
      const report = await look(task);
      expect(report.notes).toMatchObject([{ id: "left-out", process: { pid: exec.pid } }]);
      expect(report).toMatchObject({ ok: true, facts: { processes: 1, leftOut: 1 } });
    });

    it("can't be dumped with a large deleted file of its root file system, as the preflight says", async () => {
      await using task = await hold("ghost");
      const report = await look(task);
      expect(report.requirements).toMatchObject([{ id: "ghost-file", met: false, value: 2 << 20 }]);
      await expect(task.checkpoint({ ...cgroupsMode })).rejects.toThrow(/ghost/);
    });

    it("can't be dumped by runc with a second network namespace, as the preflight says", async () => {
      await using task = await hold("nested_net", {
        edit: (spec) => {
          for (const set of ["bounding", "effective", "permitted"])
            spec.process.capabilities[set] = ["CAP_SYS_ADMIN", "CAP_KILL"];
        },
      });
      const report = await look(task);
      expect(said(report)).toEqual(engine === "runc" ? ["nested-namespace"] : []);
      const dumped = task.checkpoint({ ...cgroupsMode });
      if (engine === "runc") await expect(dumped).rejects.toThrow();
      else await dumped;
    });

    it.skipIf(engine === "crun")("is looked at by the command line", async () => {
      await using task = await live.run(["tcp"], { annotations: { "cedana.io/tcp": "keep" } });
      await task.nextNumber();
      const cedana = (...more: string[]) =>
        run(join(repository, "bin/cedana"), ["preflight", task.id, ...more], { env: live.environment() });
      const { stdout } = await cedana("--json", "--destination", live.dir);
      const document = JSON.parse(stdout);
      expect(findFault(document, schema as Schema)).toBeUndefined();
      expect(document).toMatchObject({
        ok: true,
        requirements: [
          { id: "tcp-established", met: true },
          { id: "tcp-established", met: true },
        ],
        facts: { rootPid: task.pid, processes: 2 },
      });
      await using other = await live.run(["tcp"]);
      await other.nextNumber();
      await expect(
        run(join(repository, "bin/cedana"), ["preflight", other.id], { env: live.environment() }),
      ).rejects.toMatchObject({ code: 2, stdout: expect.stringContaining("cedana.io/tcp: keep") });
    });

    it("is told when the destination is too small", async () => {
      await using task = await hold("memory");
      const small = join(live.dir, "small");
      mkdirSync(small);
      await run("mount", ["-t", "tmpfs", "-o", "size=16m", "cedana-live", small]);
      try {
        const report = await look(task, join(small, "not/yet/there"));
        expect(report.blockers).toMatchObject([{ id: "destination-full" }]);
        expect(report.facts.memoryBytes).toBeGreaterThan(64 << 20);
        expect(report.facts.memoryBytes).toBeLessThan(70 << 20);
      } finally {
        await run("umount", [small]);
      }
    });
  });
}

it("tries everything that the program can make", () => {
  const made = [...readFileSync(source, "utf8").matchAll(/CASE\((\w+)\)/g)].map(([, name]) => name!);
  const elsewhere = ["name", "memory", "many_processes", "many_files", "many_mappings"];
  expect(Object.keys(cases).sort()).toEqual(made.filter((name) => !elsewhere.includes(name)).sort());
});
