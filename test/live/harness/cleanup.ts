// Ends everything of an instance and removes its traces. Safe to run twice, and from another process than the one
// that made the instance.

import { execFileSync } from "node:child_process";
import { rmSync } from "node:fs";
import {
  entries,
  type Instance,
  isAlive,
  mountsBelow,
  pidsInCgroups,
  processesOf,
  removeCgroups,
  thaw,
} from "./system.ts";
import { until } from "./until.ts";

/** cedanad's own cgroup: 64-bit FNV-1a of its run directory. */
export function cedanadCgroup(runDir: string): string {
  let hash = 0xcbf29ce484222325n;
  for (const byte of Buffer.from(runDir)) hash = BigInt.asUintN(64, (hash ^ BigInt(byte)) * 0x100000001b3n);
  return `cedanad-${hash.toString(16).padStart(16, "0")}`;
}

function kill(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch {
    // it has ended already
  }
}

export async function cleanUp(instance: Instance): Promise<void> {
  const { dir, namespace } = instance;
  // Whoever starts others goes first: containerd, then the shims, then cedanad, which may say goodbye.
  thaw(namespace);
  const living = () => processesOf(instance).filter((info) => info.state !== "Z");
  for (const kind of ["containerd", "shim", "container"] as const)
    for (const info of living()) if (info.kind === kind) kill(info.pid, "SIGKILL");
  const daemons = living().filter((info) => info.kind === "cedanad");
  for (const info of daemons) kill(info.pid, "SIGTERM");
  await until(() => daemons.every((info) => !isAlive(info.pid)), { timeoutMs: 2_000 }).catch(() => {});
  await until(
    () => {
      thaw(namespace);
      for (const pid of pidsInCgroups(namespace)) kill(pid, "SIGKILL");
      for (const info of living()) kill(info.pid, "SIGKILL");
      return living().length === 0;
    },
    {
      timeoutMs: 10_000,
      everyMs: 20,
      what: () => `the end of ${living().map((info) => info.argv.join(" "))}`,
    },
  ).catch((error: Error) => console.error(error.message));

  for (const path of mountsBelow(dir, "self").reverse()) execQuietly("umount", ["-l", path]);
  execQuietly("umount", ["-l", dir]);
  for (const name of [namespace, cedanadCgroup(`${dir}/run`)])
    await until(
      () => {
        removeCgroups(name);
        return pidsInCgroups(name).length === 0;
      },
      { timeoutMs: 2_000 },
    ).catch(() => {});
  for (const path of [`/run/containerd/runc/${namespace}`, dir])
    rmSync(path, { recursive: true, force: true, maxRetries: 3 });
  if (entries(dir).length > 0) console.error(`${dir} could not be removed`);
}

function execQuietly(command: string, args: string[]): void {
  try {
    execFileSync(command, args, { stdio: "ignore" });
  } catch {
    // not mounted any more
  }
}
