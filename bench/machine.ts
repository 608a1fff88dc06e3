// What a figure was measured on.

import { execFileSync } from "node:child_process";
import { existsSync } from "node:fs";
import os from "node:os";
import { join } from "node:path";
import { repository } from "../test/live/harness/programs.ts";
import type { Bench } from "./bench.ts";

/** The line with the version in what a program says of itself; undefined when it isn't there. */
function says(command: string, ...args: string[]): string | undefined {
  try {
    return execFileSync(command, args, { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] })
      .split("\n")
      .find((line) => /\d/.test(line))
      ?.trim();
  } catch {
    return undefined; // not installed, or no repository: a fact that is missing
  }
}

export function machineFacts(bench: Bench): Record<string, string | number | undefined> {
  const { live } = bench;
  return {
    date: new Date().toISOString(),
    cpus: os.cpus().length,
    cpu: os.cpus()[0]?.model,
    memoryMiB: Math.round(os.totalmem() / 2 ** 20),
    loadAverage: os.loadavg()[0],
    kernel: os.release(),
    cgroups: live.options.cgroup === "v2" || existsSync("/sys/fs/cgroup/cgroup.controllers") ? "v2" : "v1",
    containerd: says(join(live.binaries, "containerd"), "--version"),
    engine: says(bench.engine, "--version"),
    criu: says("criu", "--version"),
    node: says(join(repository, "node_modules/node/bin/node"), "--version"),
    theirs: says("containerd-shim-runc-v2", "-v"),
    ours: says("git", "-C", repository, "describe", "--always", "--dirty"),
  };
}
