import { readFileSync, rmdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { findHierarchies, parseMembership, resolve } from "../linux/cgroup-hierarchy.ts";
import { parseMountInfo } from "../linux/mount-options.ts";

/** cedanad's own cgroups are named so by whoever starts it (addon/keeper/PROTOCOL.md). */
const OWN_CGROUP = /\/cedanad-[0-9a-f]{16}$/;

/**
 * At our end: moves us out of the cgroups that were made for us and removes them. Another process in there (a tool that we
 * started) keeps its cgroup; the next cedanad uses it again.
 */
export function leaveOwnCgroups(): void {
  // Synchronously, and looked up anew: nothing else of ours runs any more.
  const hierarchies = findHierarchies(parseMountInfo(readFileSync("/proc/self/mountinfo", "utf8"), "cgroup"));
  const { paths } = resolve(parseMembership(readFileSync("/proc/self/cgroup", "utf8")), hierarchies);
  for (const directory of new Set(paths.values())) {
    if (!OWN_CGROUP.test(directory)) continue;
    try {
      writeFileSync(join(dirname(directory), "cgroup.procs"), `${process.pid}`);
      rmdirSync(directory);
    } catch {
      // EBUSY: somebody else is in it; EROFS: it isn't ours to remove. Nothing depends on it.
    }
  }
}
