// Containers whose processes use the stand-in driver (test code).

import { basename, join } from "node:path";
import type { Live, RunOptions } from "../live/harness/live.ts";
import type { LiveTask } from "../live/harness/task.ts";
import { type Gpus, LINKER } from "./harness.ts";

const bind = (source: string, destination: string, ...more: string[]) => ({
  destination,
  type: "bind",
  source,
  options: ["rbind", ...more],
});

/**
 * What a container of a client needs: the host's dynamic linker, the stand-in as the driver, and the GPU directory at the same path. As a device
 * of the driver's it has something that CRIU can't dump and that anybody may open: FUSE's, under the name of a GPU's.
 */
export function gpuOptions(
  directory: string,
  gpus: Gpus,
  more: Partial<RunOptions> = {},
): Omit<RunOptions, "args"> {
  return {
    ...more,
    env: [`LD_LIBRARY_PATH=${directory}/rt`, `CEDANA_TEST_GPU_DIR=${gpus.path}`, ...(more.env ?? [])],
    mounts: [
      bind(join(directory, "rt", basename(LINKER)), LINKER, "ro"),
      bind(directory, directory, "ro"),
      bind(gpus.path, gpus.path, "rw"),
      ...(more.mounts ?? []),
    ],
    edit: (spec) => {
      const nodes = [0, 1].map((index) => ({
        path: `/dev/nvidia${index}`,
        type: "c",
        major: 10,
        minor: 229,
      }));
      spec.linux.devices = nodes;
      spec.linux.resources.devices.push({ allow: true, type: "c", major: 10, minor: 229, access: "rwm" });
      more.edit?.(spec);
    },
  };
}

export async function runClient(
  live: Live,
  directory: string,
  gpus: Gpus,
  args: string[] = [],
  more: Partial<RunOptions> = {},
): Promise<LiveTask> {
  return await live.run([`${directory}/client-dlsym`, ...args], gpuOptions(directory, gpus, more));
}

/** The counter in the next line of a process of that name; a line that says FAILED is thrown. */
export async function nextOf(task: LiveTask, name = "client"): Promise<number> {
  const [line, counter] = await task.stdout.lineMatching(new RegExp(`^${name} (\\d+)$|FAILED.*`));
  if (counter === undefined) throw new Error(line);
  return Number(counter);
}

/** Its next lines count on, one by one. */
export async function countsOn(task: LiveTask, name = "client", lines = 3): Promise<number> {
  let last = await nextOf(task, name);
  for (let line = 0; line < lines; line++) {
    const next = await nextOf(task, name);
    if (next !== last + 1) throw new Error(`${name} said ${next} after ${last}`);
    last = next;
  }
  return last;
}
