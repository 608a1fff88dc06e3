import { readFileSync, rmdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";

/** cedanad's own cgroups are named so by whoever starts it (addon/keeper/PROTOCOL.md). */
const OWN_CGROUP = /\/cedanad-[0-9a-f]{16}$/;

/**
 * At our end: moves us out of the cgroups that were made for us and removes them. Another process in there (a tool that we
 * started) keeps its cgroup; the next cedanad uses it again.
 */
export function leaveOwnCgroups(): void {
  const mounts = cgroupMounts();
  for (const line of readFileSync("/proc/self/cgroup", "utf8").trim().split("\n")) {
    const [, controllers = "", path = ""] = /^\d+:([^:]*):(.*)$/.exec(line) ?? [];
    if (!OWN_CGROUP.test(path)) continue;
    const mountPoint = mounts.get(controllers);
    if (mountPoint === undefined) continue;
    const directory = join(mountPoint, path);
    try {
      writeFileSync(join(dirname(directory), "cgroup.procs"), `${process.pid}`);
      rmdirSync(directory);
    } catch {
      // EBUSY: somebody else is in it; EROFS: it isn't ours to remove. Nothing depends on it.
    }
  }
}

/** controllers as /proc/self/cgroup names them → mount point; "" is the unified hierarchy. */
function cgroupMounts(): Map<string, string> {
  const mounts = new Map<string, string>();
  for (const line of readFileSync("/proc/self/mountinfo", "utf8").trim().split("\n")) {
    const [head = "", tail = ""] = line.split(" - ");
    const mountPoint = head.split(" ")[4] ?? "";
    const [type, , superOptions = ""] = tail.split(" ");
    if (type === "cgroup2") mounts.set("", mountPoint);
    if (type === "cgroup")
      mounts.set(
        superOptions
          .split(",")
          .filter((option) => option !== "rw" && option !== "ro" && !option.startsWith("xattr"))
          .join(","),
        mountPoint,
      );
  }
  return mounts;
}
