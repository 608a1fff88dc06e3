import { readdir, readFile, readlink } from "node:fs/promises";
import { isAlive, startTime } from "../linux/proc.ts";

/**
 * Waits until no process works on images any more, neither an engine that was told to nor the CRIU that it left behind: after a crash,
 * nobody else knows of them. CRIU is never ended: it holds the container's processes.
 * @param path  directory of the images, or above it; one that nobody else has, because of the uuid in it
 */
export async function endOfWriters(path: string): Promise<void> {
  for (const pid of (await readdir("/proc")).filter((name) => /^\d+$/.test(name)).map(Number)) {
    const started = startTime(pid);
    if (started === undefined || !(await worksOn(pid, path))) continue;
    while (isAlive(pid, started)) await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

async function worksOn(pid: number, path: string): Promise<boolean> {
  const command = await readFile(`/proc/${pid}/cmdline`, "utf8").catch(() => ""); // it has ended
  if (command.includes(path)) return true;
  if (!/(^|\/)criu\0/.test(command)) return false;
  for (const fd of await readdir(`/proc/${pid}/fd`).catch(() => []))
    if ((await readlink(`/proc/${pid}/fd/${fd}`).catch(() => "")).startsWith(path)) return true;
  return false;
}
