import { execFileSync, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { setTimeout } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { createArchive, writtenLayouts } from "../../../src/checkpoint/archive/index.ts";
import { writeManifest } from "../../../src/checkpoint/manifest-files.ts";
import { sampleManifest } from "../sample.ts";

// Debian's own reader of checkpoint archives, on a real dump.

const runs = (program: string, args: string[]) => spawnSync(program, args, { stdio: "ignore" }).status === 0;
const missing =
  process.getuid?.() !== 0
    ? "needs root to dump a process"
    : !runs("checkpointctl", ["--help"])
      ? "needs checkpointctl: scripts/setup.sh"
      : !runs("criu", ["--version"])
        ? "needs CRIU: scripts/setup.sh"
        : undefined;

let directory: string;
let images: string;
beforeEach(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "checkpointctl-"));
  images = path.join(directory, "web/checkpoint");
  fs.mkdirSync(images, { recursive: true });
});
afterEach(() => fs.rmSync(directory, { recursive: true, force: true }));

/** Dumps a process that sleeps; CRIU ends it. (checkpointctl 1.3 finds no names of processes in images of CRIU 4.2.) */
async function dumpSleeper(): Promise<number> {
  const sleeper = spawn("sleep", ["1000"], { detached: true, stdio: "ignore", cwd: "/" });
  try {
    await once(sleeper, "spawn");
    // Until it is sleep and not what becomes sleep.
    while (fs.readFileSync(`/proc/${sleeper.pid}/comm`, "utf8") !== "sleep\n") await setTimeout(2);
    execFileSync("criu", ["dump", "-t", `${sleeper.pid}`, "-D", images, "-o", "dump.log"], { stdio: "pipe" });
    return sleeper.pid!;
  } finally {
    sleeper.kill("SIGKILL");
  }
}

const container = {
  id: "0123456789abcdef0123456789abcdef",
  name: "web",
  image: "docker.io/library/busybox:latest",
  runtime: "runc",
  createdAt: "2026-01-02T03:04:05Z",
  checkpointedAt: "2026-01-03T03:04:05Z",
  spec: { ociVersion: "1.0.2", mounts: [{ type: "bind", source: "/srv", destination: "/data" }] },
  pod: { name: "pod-1", namespace: "prod" },
};

const checkpointctl = (...args: string[]) =>
  execFileSync("checkpointctl", args, { encoding: "utf8", stdio: "pipe" });

describe.skipIf(missing)(`checkpointctl${missing ? ` (${missing})` : ""}`, () => {
  it("shows and inspects an archive of ours, with every compression that it knows and in every layout", async () => {
    const pid = await dumpSleeper();
    for (const name of ["stats-dump", "dump.log"])
      fs.renameSync(path.join(images, name), path.join(directory, "web", name));
    fs.writeFileSync(path.join(directory, "web/deleted.files"), "[]");
    await writeManifest(path.join(directory, "web"), sampleManifest, { digests: true });
    const engines = { cedana: "containerd", podman: "Podman", crio: "CRI-O", "containerd-cri": "containerd" };
    for (const layout of writtenLayouts)
      for (const compression of layout === "cedana"
        ? (["none", "gzip", "zstd"] as const)
        : (["none"] as const)) {
        const archive = path.join(directory, `${layout}-${compression}.tar`);
        await createArchive(path.join(directory, "web"), archive, { layout, compression, container });
        const shown = checkpointctl("show", archive);
        for (const text of ["web", container.image, container.id.slice(0, 12), "runc", engines[layout]])
          expect(shown, archive).toContain(text);
        const inspected = checkpointctl("inspect", archive, "--all");
        for (const text of [
          "Process tree",
          `[${pid}]`,
          "/dev/null",
          "Engine",
          "CRIU dump statistics",
          "/data",
        ])
          expect(inspected.toLowerCase(), archive).toContain(text.toLowerCase());
      }
    // What the manifest alone knows is enough.
    const archive = path.join(directory, "manifest.tar");
    await createArchive(path.join(directory, "web"), archive);
    expect(checkpointctl("show", archive)).toContain(container.image);
    expect(checkpointctl("inspect", archive, "--ps-tree")).toContain(`[${pid}]`);
  });
});
