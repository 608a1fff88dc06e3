import { mkdir, readFile, rmdir } from "node:fs/promises";
import { posix } from "node:path";
import { hostCgroupVersion, parseMembership } from "../../linux/cgroup.ts";
import type { OciSpec } from "../spec.ts";

const mountPoint = "/sys/fs/cgroup";

export interface RestoreCgroup {
  /** lines for CRIU's configuration file */
  readonly lines: string[];
  /** after a restore that failed */
  remove(): Promise<void>;
}

/**
 * Where a restore's cgroups go on a host of version 2: runc leaves the processes in the cgroup of the container that was dumped, and
 * crun turns every hierarchy to the new container's path, version 1 ones beside it, too. CRIU is told for each hierarchy: the
 * container's own cgroup in that of version 2, and in others the one where the caller is.
 *
 * Nothing where that depends on what only the engine knows: version 1, a relative path, systemd's scopes.
 * @param pid  the wrapper
 */
export async function restoreCgroup(
  spec: OciSpec,
  cgroupsMode: string | undefined,
  pid: number,
): Promise<RestoreCgroup> {
  const path = posix.normalize(spec.linux?.cgroupsPath ?? "").replace(/\/$/, "");
  const ours =
    ["soft", "ignore", undefined].includes(cgroupsMode) &&
    path.startsWith("/") &&
    (await hostCgroupVersion()) === 2;
  if (!ours) return { lines: [], remove: async () => {} };
  const made = await mkdir(`${mountPoint}${path}`, { recursive: true }); // the engine gives it the container's limits
  const membership = parseMembership(await readFile(`/proc/${pid}/cgroup`, "utf8"));
  return {
    lines: [...membership].map(
      ([controller, at]) => `cgroup-root "${controller}:${controller === "" ? path : at}"`,
    ),
    remove: async () => {
      if (made) await rmdir(`${mountPoint}${path}`).catch(() => {}); // EBUSY, ENOENT: the engine's to remove, or done by it
    },
  };
}
