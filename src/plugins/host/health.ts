import { readFile, statfs } from "node:fs/promises";
import { release } from "node:os";
import { dirname } from "node:path";
import { hostCgroupVersion } from "../../linux/cgroup-hierarchy.ts";
import { readConfiguration } from "../../runtime/configuration.ts";
import type { HealthCheck, HealthRow } from "../health.ts";

export const hostChecks: readonly HealthCheck[] = [
  { name: "kernel", run: checkKernel },
  { name: "permissions", run: checkPermissions },
  { name: "cgroups", run: checkCgroups },
  { name: "configuration", run: checkConfiguration },
  { name: "store", run: checkStore },
];

/** CRIU's own lower bound is older; pidfd_getfd and freezing by cgroup.freeze are of 5.2 to 5.6. */
const OLDEST_KERNEL = [5, 6] as const;

async function checkKernel(): Promise<HealthRow> {
  const [major = 0, minor = 0] = release().split(/[.-]/).map(Number);
  const old = major < OLDEST_KERNEL[0] || (major === OLDEST_KERNEL[0] && minor < OLDEST_KERNEL[1]);
  if (old)
    return {
      status: "failed",
      summary: `Linux ${release()}`,
      advice: `use Linux ${OLDEST_KERNEL.join(".")} or newer`,
    };
  return { status: "ok", summary: `Linux ${release()}` };
}

/** Bits of the effective set, as capabilities(7) numbers them. */
const needed = { SYS_ADMIN: 21n, SYS_PTRACE: 19n, NET_ADMIN: 12n, KILL: 5n, DAC_OVERRIDE: 1n } as const;
const helpful = {
  SYS_RESOURCE: [24n, "processes of other users can't be dumped, and a lower oom_score_adj can't be given"],
} as const;

async function checkPermissions(): Promise<HealthRow> {
  const status = await readFile("/proc/self/status", "utf8");
  const effective = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)/m.exec(status)?.[1] ?? "0"}`);
  const has = (bit: bigint) => (effective >> bit) & 1n;
  const missing = Object.entries(needed).flatMap(([name, bit]) => (has(bit) ? [] : [`CAP_${name}`]));
  if (missing.length > 0)
    return {
      status: "failed",
      summary: `cedanad lacks ${missing.join(", ")}`,
      advice: "run cedanad as root, outside of a container that takes capabilities away",
    };
  const lacking = Object.entries(helpful).flatMap(([name, [bit, what]]) =>
    has(bit) ? [] : [`CAP_${name}: ${what}`],
  );
  if (lacking.length > 0) return { status: "warning", summary: `without ${lacking.join("; ")}` };
  return { status: "ok", summary: "cedanad has the capabilities that it needs" };
}

async function checkCgroups(): Promise<HealthRow> {
  const version = await hostCgroupVersion();
  if (version === 2) return { status: "ok", summary: "version 2" };
  const mounts = await readFile("/proc/self/mountinfo", "utf8");
  if (/ - cgroup \S+ \S*\bfreezer\b/.test(mounts))
    return { status: "ok", summary: "version 1, with a freezer" };
  return {
    status: "failed",
    summary: "version 1, without a freezer: containers can't be stopped for a dump",
    advice: "mount the freezer controller",
  };
}

async function checkConfiguration(): Promise<HealthRow> {
  await readConfiguration(); // what is wrong with it is the error
  return { status: "ok", summary: "can be read and trusted" };
}

/** Less than this, and the next dump of anything but a small container fails. */
const LITTLE_BYTES = 1024 ** 3;

async function checkStore(): Promise<HealthRow> {
  const { directory } = (await readConfiguration()).checkpoints;
  const { bavail, bsize, ffree } = await statfs(await existing(directory));
  const free = bavail * bsize;
  const summary = `${directory}: ${(free / 1024 ** 3).toFixed(1)} GiB free`;
  if (free < LITTLE_BYTES || ffree === 0)
    return {
      status: free === 0 || ffree === 0 ? "failed" : "warning",
      summary,
      advice: "free some space, or set checkpoints.directory to another file system",
    };
  return { status: "ok", summary };
}

/** The directory, or the nearest above it that is there: it is made with the first checkpoint. */
async function existing(directory: string): Promise<string> {
  for (let path = directory; ; path = dirname(path)) {
    const found = await statfs(path).then(
      () => true,
      () => false,
    );
    if (found || path === "/") return path;
  }
}
