import { execFile } from "node:child_process";
import { createReadStream } from "node:fs";
import { access, constants, realpath, stat } from "node:fs/promises";
import { delimiter, join } from "node:path";
import { promisify } from "node:util";
import { CriuFailed, messageOf, Unavailable } from "../errors/index.ts";
import { type AnyOptions, allRpcNames, rpcNames } from "./options.ts";
import { CriuWorker } from "./worker.ts";

/*
 * What the CRIU of this machine is and can do. A probe starts CRIU twice and takes some 30 ms (100 ms for `checkCriu`), so it is done once for
 * each binary (inode, mtime, size) and kept; asking again costs one stat(2). Nothing of it is on the way of a dump: what a dump needs to know is
 * asked when cedanad has nothing else to do.
 */

const run = promisify(execFile);
/** Longer than any option's. */
const MAX_NAME_CHARS = 64;

export interface CriuProbe {
  /** with links followed */
  readonly path: string;
  readonly version: CriuVersion;
  /** memory tracking (pre-dumps that save something), userfaultfd, pidfd store */
  readonly memoryTracking: boolean;
  readonly lazyPages: boolean;
  readonly pidfdStore: boolean;
  /** see unsupportedOptions */
  readonly knowsOption: (rpcName: string) => boolean;
}

export interface CriuVersion {
  readonly major: number;
  readonly minor: number;
  readonly sublevel: number;
  /** of a build from git */
  readonly gitId: string | undefined;
  /** "4.2.1" */
  readonly text: string;
  /** as CRIU and engines compare versions: 40201 for 4.2.1 */
  readonly number: number;
}

export interface CriuCheck {
  /** everything is there */
  readonly ok: boolean;
  /** what is missing, if anything, matters to some processes only */
  readonly usable: boolean;
  readonly errors: readonly string[];
  readonly warnings: readonly string[];
}

/** Those that CRIU 4.2 can be asked for one by one, and what of ours each one carries. Source: criu check --help, cr-check.c. */
export const criuFeatures = {
  mem_dirty_track: "pre-dumps that save only what changed",
  pagemap_scan: "finding changed pages quickly",
  pagemap_scan_guard_pages: "guard pages (MADV_GUARD_INSTALL)",
  aio_remap: "asynchronous input and output (io_setup)",
  timerfd: "timerfd",
  timer_cr_ids: "POSIX timers under their old ids",
  tun: "TUN and TAP devices",
  tun_ns: "TUN devices in a network namespace",
  userns: "user namespaces",
  cgroupns: "cgroup namespaces",
  timens: "time namespaces",
  ns_pid: "pids of other pid namespaces",
  external_net_ns: "an external network namespace, as in pods",
  link_nsid: "network devices whose other end is in another namespace",
  newifindex: "network devices under their old index",
  clone3_set_tid: "pids without racing others (clone3)",
  compat_cr: "32-bit processes",
  can_map_vdso: "a vDSO at another address",
  get_rseq_conf: "restartable sequences",
  breakpoints: "quick restores (hardware breakpoints)",
  seccomp_suspend: "processes with a seccomp filter",
  loginuid: "the audit login uid",
  apparmor_stacking: "AppArmor profiles in containers",
  fdinfo_lock: "file locks",
  kcmp_epoll: "epoll of descriptors that are closed by now",
  memfd_hugetlb: "memfd of huge pages",
  openat2: "files opened below a root",
  overlayfs_maps: "files mapped from overlay file systems",
  autofs: "autofs mounts",
  tcp_half_closed: "TCP connections closed in one direction",
  sockopt_buf_lock: "socket buffers of a fixed size",
  ipv6_freebind: "IPv6 sockets bound to addresses that aren't there yet",
  net_diag_raw: "raw sockets",
  sk_ns: "sockets of other network namespaces",
  sk_unix_file: "unix sockets in files",
  network_lock_nftables: "locking the network of connections with nftables",
  has_ipt_legacy: "locking the network with legacy iptables",
  uffd: "lazy restore (userfaultfd)",
  "uffd-noncoop": "lazy restore of processes that change their mappings",
} as const satisfies Record<string, string>;

export type CriuFeature = keyof typeof criuFeatures;

interface Kept {
  readonly identity: string;
  probe: Promise<CriuProbe> | undefined;
  check: Promise<CriuCheck> | undefined;
  readonly features: Map<string, Promise<boolean>>;
}
const kept = new Map<string, Kept>();

/**
 * Version and features.
 * @param criu  name or path
 * @throws Unavailable when it isn't installed, CriuFailed when it doesn't answer
 */
export async function probeCriu(criu = "criu"): Promise<CriuProbe> {
  const { path, entry } = await find(criu);
  entry.probe ??= forgetFailure(ask(path), () => {
    entry.probe = undefined;
  });
  return await entry.probe;
}

/**
 * Options that this CRIU has never heard of, by their names in its RPC. It would ignore them without a word, as protobuf wants it.
 *
 * Not by version: distributions backport. The names of all fields that a CRIU knows are strings in its binary (protobuf-c's
 * descriptors). Of a program that isn't an ELF binary (a script around CRIU) nothing is known, and nothing said.
 */
export function unsupportedOptions(probe: CriuProbe, options: AnyOptions): string[] {
  return rpcNames(options).filter((name) => !probe.knowsOption(name));
}

/** `criu check`: is all there that CRIU ever needs? @throws Unavailable */
export async function checkCriu(criu = "criu"): Promise<CriuCheck> {
  const { path, entry } = await find(criu);
  entry.check ??= forgetFailure(check(path), () => {
    entry.check = undefined;
  });
  return await entry.check;
}

/** Whether CRIU and kernel have a feature; one that this CRIU hasn't heard of, it doesn't have. @throws Unavailable */
export async function hasCriuFeature(feature: CriuFeature, criu = "criu"): Promise<boolean> {
  const { path, entry } = await find(criu);
  let answer = entry.features.get(feature);
  if (!answer) {
    answer = forgetFailure(
      runCheck(path, ["--feature", feature]).then(
        () => true,
        (error: { code?: unknown }) => {
          if (typeof error.code === "number") return false;
          throw new CriuFailed(`ask CRIU (${path}) for its feature ${feature}: ${messageOf(error)}`, {
            cause: error,
          });
        },
      ),
      () => entry.features.delete(feature),
    );
    entry.features.set(feature, answer);
  }
  return await answer;
}

/** What failed is tried again the next time. */
function forgetFailure<T>(promise: Promise<T>, forget: () => void): Promise<T> {
  promise.catch(forget);
  return promise;
}

async function find(criu: string): Promise<{ path: string; entry: Kept }> {
  const path = await locate(criu);
  const { dev, ino, mtimeMs, size } = await stat(path);
  const identity = `${dev}:${ino}:${mtimeMs}:${size}`;
  let entry = kept.get(path);
  if (entry?.identity !== identity) {
    entry = { identity, probe: undefined, check: undefined, features: new Map() };
    kept.set(path, entry);
  }
  return { path, entry };
}

async function locate(criu: string): Promise<string> {
  const candidates = criu.includes("/")
    ? [criu]
    : (process.env.PATH ?? "").split(delimiter).map((directory) => join(directory, criu));
  for (const candidate of candidates) {
    try {
      await access(candidate, constants.X_OK);
      return await realpath(candidate);
    } catch {
      // not there: the next one
    }
  }
  throw new Unavailable(`CRIU (${criu}) is not installed, or not executable`);
}

async function ask(path: string): Promise<CriuProbe> {
  await using worker = await CriuWorker.start({ criu: path });
  const { majorNumber: major, minorNumber: minor, sublevel = 0, gitid } = await worker.version();
  const features = await worker.features();
  const names = await knownNames(path);
  return {
    knowsOption: (name) => names === undefined || names.has(name),
    path,
    version: {
      major,
      minor,
      sublevel: sublevel ?? 0,
      gitId: gitid,
      text: sublevel ? `${major}.${minor}.${sublevel}` : `${major}.${minor}`,
      number: major * 10_000 + minor * 100 + (sublevel ?? 0),
    },
    memoryTracking: features.memTrack ?? false,
    lazyPages: features.lazyPages ?? false,
    pidfdStore: features.pidfdStore ?? false,
  };
}

/** Which of our options' names are in the binary: read in pieces, so that the event loop goes on between two. */
async function knownNames(path: string): Promise<ReadonlySet<string> | undefined> {
  const known = new Set<string>();
  const ours = new Set(allRpcNames());
  let rest = "";
  for await (const chunk of createReadStream(path, { encoding: "latin1", highWaterMark: 256 * 1024 })) {
    if (known.size === 0 && rest === "" && !chunk.startsWith("\x7fELF")) return undefined;
    const text = rest + chunk;
    // The linker keeps one copy of "established" at the end of "tcp_established": both are there.
    for (const [name] of text.matchAll(/[a-z][a-z0-9_]{1,60}(?=\0)/g))
      for (let at = 0; at < name.length; at++) if (ours.has(name.slice(at))) known.add(name.slice(at));
    rest = text.slice(-MAX_NAME_CHARS); // a name may lie across two pieces
  }
  return known;
}

/**
 * `criu check`, by way of a shell: one of its tests makes a process with CLONE_PARENT, which is a child of whoever started CRIU, and
 * nobody's to wait for. The shell's end hands it to init; ours would be a zombie for as long as we live.
 */
function runCheck(path: string, options: readonly string[]): Promise<{ stdout: string; stderr: string }> {
  return run("/bin/sh", ["-c", '"$0" check "$@"; exit $?', path, ...options]);
}

/** 0: all there. 1: something is missing; the text tells whether it is essential. */
async function check(path: string): Promise<CriuCheck> {
  const result = await runCheck(path, ["--all", "-v2"]).catch(
    (error: { code?: unknown; stdout?: string; stderr?: string }) => {
      if (typeof error.code !== "number")
        throw new CriuFailed(`run \`${path} check\`: ${messageOf(error)}`, { cause: error });
      return { ...error, failed: true };
    },
  );
  const text = `${result.stdout ?? ""}\n${result.stderr ?? ""}`;
  const lines = (kind: string) =>
    [...text.matchAll(new RegExp(`${kind} +\\([^)]*\\): (.*)`, "g"))].map((match) => match[1]!);
  const ok = !("failed" in result);
  return { ok, usable: ok || /Looks good/.test(text), errors: lines("Error"), warnings: lines("Warn") };
}
