import { kill } from "../../criu/leftovers.ts";
import { TimedOut } from "../../errors/index.ts";
import { Cgroup } from "../../linux/cgroup.ts";
import { namespaceInode } from "../../linux/proc.ts";
import { cgroupPathV2, type OciSpec } from "../spec.ts";

const EMPTY_MS = 5_000;

/**
 * What a failed restore has left in the container's cgroup: of a CRIU that was killed at its end, the engine finds no process that is the
 * container's already. A cgroup may be others', too: who was there before stays, with what he starts meanwhile. That is told by the mount
 * namespace: engines make one for each container.
 */
export class CgroupOfRestore {
  readonly #path: string | undefined;
  /** mount namespaces of others */
  readonly #theirs: ReadonlySet<number | undefined>;
  readonly #isNew: boolean;
  readonly #isScope: boolean;

  private constructor(path: string | undefined, before: readonly number[], isNew: boolean, isScope: boolean) {
    this.#isScope = isScope;
    this.#path = path;
    this.#theirs = new Set(before.map((pid) => namespaceInode(pid, "mnt")));
    this.#isNew = isNew;
  }

  #isLeft(pid: number): boolean {
    const namespace = namespaceInode(pid, "mnt");
    return namespace !== undefined && !this.#theirs.has(namespace); // undefined: it has ended
  }

  /** Before the engine starts. */
  static async before(spec: OciSpec, id: string, systemd: boolean): Promise<CgroupOfRestore> {
    const path = cgroupPathV2(spec, id, systemd);
    const cgroup = path === undefined ? undefined : await Cgroup.at(path);
    const isNew = cgroup === undefined || cgroup.paths.size === 0;
    return new CgroupOfRestore(path, isNew ? [] : await cgroup.pids(), isNew, systemd);
  }

  /** @throws TimedOut when something stays */
  async empty(): Promise<void> {
    if (this.#path === undefined) return; // an engine's own way to name it
    const cgroup = await Cgroup.at(this.#path);
    if (cgroup.paths.size === 0) return;
    await cgroup.thaw().catch(() => {}); // NotFound: removed meanwhile; else what is frozen shows below
    for (const until = Date.now() + EMPTY_MS; ; await new Promise((resolve) => setTimeout(resolve, 10))) {
      const left = (await cgroup.pids()).filter((pid) => this.#isLeft(pid));
      if (left.length === 0) break;
      if (Date.now() >= until)
        throw new TimedOut(`processes ${left} of a failed restore don't end, in cgroup ${this.#path}`);
      for (const pid of left) kill(pid);
    }
    if (!this.#isNew) return;
    if (this.#isScope) await cgroup.leaveToSystemd();
    await cgroup.removeLeft();
  }
}
