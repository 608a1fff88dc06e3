import { setTimeout as sleep } from "node:timers/promises";
import { NotFound } from "../errors/index.ts";
import { Cgroup, removeCgroup } from "../linux/cgroup.ts";
import { hostCgroupVersion } from "../linux/cgroup-hierarchy.ts";
import { cgroupName, cgroupPathV2 } from "../runtime/spec.ts";
import type { Container } from "./container.ts";
import * as events from "./events.ts";
import type { Work } from "./keeper.ts";

/** The counter of OOM kills may rise a little after the notification (cgroups version 1). */
const OOM_COUNTER_ATTEMPTS = 10;
const OOM_COUNTER_INTERVAL_MS = 20;

/**
 * The cgroup of a task's container: found by its init, watched for kills for want of memory, and removed where the engine has left it.
 */
export class ContainerCgroup {
  readonly #container: Container;
  #cgroup: Cgroup | undefined;
  #oomKills = 0;
  /** looks at the counter that are left, while somebody looks */
  #looksLeft = 0;

  constructor(container: Container) {
    this.#container = container;
  }

  /** undefined: not looked for yet, or not found */
  get known(): Cgroup | undefined {
    return this.#cgroup;
  }

  /** how many OOM kills containerd has been told of */
  get oomKills(): number {
    return this.#oomKills;
  }

  revive(oomKills: number): void {
    this.#oomKills = oomKills;
  }

  /** @throws NotFound once the container has no cgroup */
  async get(): Promise<Cgroup> {
    const { id, init } = this.#container;
    if (!this.#cgroup && (init.pid === 0 || init.exit))
      throw new NotFound(`task ${id} has no cgroup: it is not running`);
    return this.#cgroup ?? (await this.find());
  }

  /** Looks for it, by the init's pid. */
  async find(): Promise<Cgroup> {
    const { id, engine, init, knownSpec } = this.#container;
    this.#cgroup = await Cgroup.of(init.pid, knownSpec && cgroupName(knownSpec, id, engine.name));
    return this.#cgroup;
  }

  /** The container has been made: its cgroup is watched from now on. */
  async attach(work: Work): Promise<void> {
    const { id, log, pod } = this.#container;
    let cgroup: Cgroup;
    try {
      cgroup = await this.find();
    } catch (error) {
      log.warn({ err: error }, "find the cgroup of a new container"); // it may have ended already; nothing to watch then
      return;
    }
    const watch = cgroup.oomWatchPath;
    // Not waited for: the keeper takes it up before our answer.
    if (watch)
      pod.keeper
        .watchOom(work.tag("oom"), id, watch.path, watch.flags)
        .catch((error) => log.warn({ err: error }, "watch for out-of-memory kills"));
  }

  /** The keeper has noticed something: what is counted a little later is told, too. Notices of one moment are looked into together. */
  async noticeOutOfMemory(): Promise<void> {
    const isLooking = this.#looksLeft > 0;
    this.#looksLeft = OOM_COUNTER_ATTEMPTS;
    if (isLooking) return;
    while (this.#looksLeft > 0) {
      const left = --this.#looksLeft;
      const found = await this.outOfMemory();
      // A counter that has risen tells of the notices before the look. Of one that came meanwhile it may tell later.
      if (found && this.#looksLeft === left) this.#looksLeft = 0;
      if (this.#looksLeft > 0) await sleep(OOM_COUNTER_INTERVAL_MS);
    }
  }

  /** Publishes OOM kills that the cgroup counts and we haven't told of: one event, however many. @returns whether there were any */
  async outOfMemory(): Promise<boolean> {
    const count = (await this.#cgroup?.oomKills().catch(() => 0)) ?? 0; // no such file: the cgroup is gone with its counters
    if (count <= this.#oomKills) return false;
    this.#oomKills = count;
    this.#container.publish(`oom:${count}`, events.taskOom(this.#container.id));
    this.#container.record();
    return true;
  }

  /** Ends every process that is left in it. */
  async kill(): Promise<void> {
    try {
      await this.#cgroup?.kill();
    } catch (error) {
      this.#container.log.warn({ err: error }, "kill what is left of a container whose init has ended");
    }
  }

  /** Removes what the engine has left of it. */
  async remove(): Promise<void> {
    const { id, log, options } = this.#container;
    if (this.#cgroup) {
      const left = await this.#cgroup.removeLeft();
      if (left.length > 0) log.warn({ left }, "cgroups of a deleted container are still busy");
      return;
    }
    // crun forgets the cgroup of a container that it failed to make. What is busy, or of version 1, is not touched.
    if ((await hostCgroupVersion()) !== 2) return;
    const spec = await this.#container.spec().catch(() => undefined); // a bundle that is broken, or gone, must still be deletable
    const path = spec && cgroupPathV2(spec, id, options.systemdCgroup);
    if (path === undefined) return;
    if (options.systemdCgroup) await (await Cgroup.at(path)).leaveToSystemd();
    await removeCgroup(path);
  }
}
