import { mkdir, readFile, rmdir } from "node:fs/promises";
import { dirname } from "node:path";
import { hostCgroupVersion, parseMembership, unifiedPath } from "../linux/cgroup-hierarchy.ts";
import type { EngineName } from "./engine.ts";
import { cgroupPathV2, type OciSpec } from "./spec.ts";

export interface RestoredInto {
  readonly spec: OciSpec;
  readonly id: string;
  readonly engine: EngineName;
  /** the engine was told to have systemd make its cgroups */
  readonly systemd: boolean;
  /** whoever starts the engine, and is not in the container's cgroup */
  readonly parent: number;
}

/**
 * Where a restore's cgroups go on a host of version 2. Told nothing, runc leaves the processes in the cgroup of the container that was
 * dumped, or makes that again (of a scope, without systemd, which then never removes it), and crun turns every hierarchy to the new
 * container's path, version 1 ones beside it, too. CRIU is told for each hierarchy: the container's own cgroup in that of version 2, and
 * in others the one where the parent is.
 *
 * Nothing where that depends on what only the engine knows (a relative path), and with version 1, where the engines are right.
 */
export class RestoreCgroup {
  /** for CRIU's configuration: `cgroup-root` by controller, "" for version 2; undefined: CRIU is told nothing */
  readonly roots: readonly (readonly [controller: string, path: string])[] | undefined;
  readonly #directory: string | undefined;
  #made: string | undefined;

  private constructor(roots?: RestoreCgroup["roots"], directory?: string) {
    this.roots = roots;
    this.#directory = directory;
  }

  /** there are hierarchies besides that of version 2, which aren't the container's */
  get hasOtherHierarchies(): boolean {
    return this.roots?.some(([controller]) => controller !== "") ?? false;
  }

  static async of({ spec, id, engine, systemd, parent }: RestoredInto): Promise<RestoreCgroup> {
    const path = (await hostCgroupVersion()) === 2 ? cgroupPathV2(spec, id, systemd, engine) : undefined;
    if (path === undefined) return new RestoreCgroup();
    const membership = parseMembership(await readFile(`/proc/${parent}/cgroup`, "utf8"));
    const roots = [...membership].map(
      ([controller, at]) => [controller, controller === "" ? path : at] as const,
    );
    return new RestoreCgroup(roots, systemd ? undefined : await unifiedPath(path)); // a scope is systemd's to make
  }

  /**
   * Before the engine starts: where the cgroup is there, CRIU gives it no limits of the dump; the engine gives it the new container's. In
   * the modes `full` and `strict` they shall be the dump's.
   */
  async make(cgroupsMode: string): Promise<void> {
    if (this.#directory === undefined || ["full", "strict"].includes(cgroupsMode)) return;
    this.#made ??= await mkdir(this.#directory, { recursive: true });
  }

  /** After a restore that failed: what `make` has made, from below. A cgroup that somebody else has come to use meanwhile stays. */
  async remove(): Promise<void> {
    if (this.#directory === undefined || this.#made === undefined) return;
    for (let at = this.#directory; at.length >= this.#made.length; at = dirname(at)) {
      const error = await rmdir(at).catch((error: NodeJS.ErrnoException) => error);
      if (error && error.code !== "ENOENT") return; // EBUSY
    }
    this.#made = undefined;
  }
}
