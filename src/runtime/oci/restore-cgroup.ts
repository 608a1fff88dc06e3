import { mkdir, readFile, rmdir } from "node:fs/promises";
import { hostCgroupVersion, parseMembership, unifiedPath } from "../../linux/cgroup.ts";
import { criuLines } from "../engine.ts";
import { cgroupPathV2, type OciSpec } from "../spec.ts";

export interface RestoreCgroup {
  /** for CRIU's configuration file */
  readonly lines: string[];
  /** before the engine: it gives the cgroup the container's limits, where CRIU would give it those of the dump */
  make(): Promise<void>;
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
 * @throws InvalidRequest for a path that would be another option to CRIU
 */
export async function restoreCgroup(
  spec: OciSpec,
  cgroupsMode: string | undefined,
  pid: number,
): Promise<RestoreCgroup> {
  const path = cgroupPathV2(spec, "", false);
  const ours =
    ["soft", "ignore", undefined].includes(cgroupsMode) &&
    path !== undefined &&
    (await hostCgroupVersion()) === 2;
  if (!ours) return { lines: [], make: async () => {}, remove: async () => {} };
  const membership = parseMembership(await readFile(`/proc/${pid}/cgroup`, "utf8"));
  const lines = criuLines({
    cgroupRoots: [...membership].map(([controller, at]) => [controller, controller === "" ? path : at]),
  });
  const directory = await unifiedPath(path);
  let made: string | undefined;
  return {
    lines,
    make: async () => {
      made = await mkdir(directory, { recursive: true });
    },
    remove: async () => {
      if (made) await rmdir(directory).catch(() => {}); // EBUSY, ENOENT: the engine's to remove, or done by it
    },
  };
}
