import { mkdir, readFile, rmdir } from "node:fs/promises";
import { kill } from "../../criu/leftovers.ts";
import { criuLines } from "../../criu/option-file.ts";
import { TimedOut } from "../../errors/index.ts";
import { Cgroup } from "../../linux/cgroup.ts";
import { hostCgroupVersion, parseMembership, unifiedPath } from "../../linux/cgroup-hierarchy.ts";
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

const EMPTY_MS = 5_000;

/**
 * What a failed restore has left in the container's cgroup: of a CRIU that was killed at its end, the engine finds no process that is the
 * container's already. A cgroup may be others', too: who was there before stays.
 */
export class CgroupOfRestore {
  readonly #path: string | undefined;
  readonly #before: ReadonlySet<number>;
  readonly #isNew: boolean;

  private constructor(path: string | undefined, before: ReadonlySet<number>, isNew: boolean) {
    this.#path = path;
    this.#before = before;
    this.#isNew = isNew;
  }

  /** Before the engine starts. */
  static async before(spec: OciSpec, id: string, globalArgv: readonly string[]): Promise<CgroupOfRestore> {
    const path = cgroupPathV2(spec, id, globalArgv.includes("--systemd-cgroup"));
    const cgroup = path === undefined ? undefined : await Cgroup.at(path);
    const isNew = cgroup === undefined || cgroup.paths.size === 0;
    return new CgroupOfRestore(path, new Set(isNew ? [] : await cgroup.pids()), isNew);
  }

  /** @throws TimedOut when something stays */
  async empty(): Promise<void> {
    if (this.#path === undefined) return; // an engine's own way to name it
    const cgroup = await Cgroup.at(this.#path);
    if (cgroup.paths.size === 0) return;
    await cgroup.thaw().catch(() => {}); // NotFound: removed meanwhile; else what is frozen shows below
    for (const until = Date.now() + EMPTY_MS; ; await new Promise((resolve) => setTimeout(resolve, 10))) {
      const left = (await cgroup.pids()).filter((pid) => !this.#before.has(pid));
      if (left.length === 0) break;
      if (Date.now() >= until)
        throw new TimedOut(`processes ${left} of a failed restore don't end, in cgroup ${this.#path}`);
      for (const pid of left) kill(pid);
    }
    if (this.#isNew) await cgroup.removeLeft();
  }
}
