// What a container gets of a machine's GPUs: of the one that these tests run on (`npm run test:gpu`), or of the stand-in's, in the same words
// (test code).

import { execFileSync } from "node:child_process";
import { existsSync, readdirSync, realpathSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { splitDevice } from "../../src/linux/fdinfo.ts";
import type { RunOptions } from "../live/harness/live.ts";
import { driverEnvironment, type Gpus, LINKER } from "./harness.ts";

export interface GpuMachine {
  readonly name: string;
  /** the driver's libcuda.so.1 */
  readonly library: string;
  /** what else of the driver programs open by name */
  readonly files: readonly string[];
  readonly nodes: readonly { readonly path: string; readonly major: number; readonly minor: number }[];
  /** directories that a container has, too, at the same path */
  readonly directories: readonly string[];
  readonly containerEnv: readonly string[];
  readonly daemonEnv: Readonly<Record<string, string>>;
}

const driverLibrary = /^lib(cuda|nvidia-[a-z0-9-]+)\.so(\.[\d.]+)?$/;
const usualDirectories = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/lib/wsl/lib"];

/** This machine's own; a text says why there is none. */
export function machineWithGpu({
  dev = "/dev",
  libraries = usualDirectories,
}: {
  dev?: string;
  libraries?: readonly string[];
} = {}): GpuMachine | string {
  const names = readdirSync(dev).filter((name) => /^(nvidia(\d+|ctl|-uvm|-uvm-tools)|dxg)$/.test(name));
  if (names.length === 0)
    return `no GPU: ${dev} has no nvidiactl (is the driver loaded? nvidia-modprobe -u -c 0)`;
  const directory = libraries.find((one) => existsSync(join(one, "libcuda.so.1")));
  if (directory === undefined)
    return `no driver library: libcuda.so.1 is not in ${libraries.join(", ")} (it comes with the driver, not with a toolkit)`;
  const nodes = names.map((name) => ({
    path: `/dev/${name}`,
    ...splitDevice(statSync(join(dev, name)).rdev),
  }));
  const files = readdirSync(directory)
    .filter((name) => driverLibrary.test(name) && name !== "libcuda.so.1")
    .map((name) => join(directory, name));
  return {
    name: "this machine's driver",
    library: join(directory, "libcuda.so.1"),
    files,
    nodes,
    directories: [],
    containerEnv: [],
    daemonEnv: { CEDANA_GPU_DRIVER: join(directory, "libcuda.so.1") },
  };
}

/** The stand-in's: FUSE's device, which CRIU can't dump and anybody may open, under the names of two GPUs'. */
export function standInMachine(directory: string, gpus: Gpus): GpuMachine {
  return {
    name: "the stand-in driver",
    library: join(directory, "libcuda.so.1"),
    files: [],
    nodes: [0, 1].map((index) => ({ path: `/dev/nvidia${index}`, major: 10, minor: 229 })),
    directories: [gpus.path],
    containerEnv: [`CEDANA_TEST_GPU_DIR=${gpus.path}`],
    daemonEnv: driverEnvironment(directory, gpus),
  };
}

/** A container of the test image, which has no libraries at all: the client, the driver's files, and what both need of the host's libc. */
export function optionsOn(machine: GpuMachine, client: string, more: RunOptions = {}): RunOptions {
  const libc = [...new Set([client, machine.library].flatMap(needs))];
  const files = [...new Set([client, machine.library, ...machine.files, ...libc, LINKER])];
  const found = [...new Set([machine.library, ...libc].map((path) => dirname(path)))];
  // What is mounted is the file: CRIU doesn't follow a link.
  const bind = (path: string, ...mode: string[]) => ({
    destination: path,
    type: "bind",
    source: realpathSync(path),
    options: ["rbind", ...mode],
  });
  return {
    ...more,
    env: [`LD_LIBRARY_PATH=${found.join(":")}`, ...machine.containerEnv, ...(more.env ?? [])],
    mounts: [
      ...files.map((path) => bind(path, "ro")),
      ...machine.directories.map((path) => bind(path)),
      ...(more.mounts ?? []),
    ],
    edit: (spec) => {
      spec.linux.devices = machine.nodes.map((node) => ({ ...node, type: "c", fileMode: 0o666 }));
      for (const { major, minor } of machine.nodes)
        spec.linux.resources.devices.push({ allow: true, type: "c", major, minor, access: "rwm" });
      more.edit?.(spec);
    },
  };
}

/** Libraries of the host that a program or a library loads. */
function needs(path: string): string[] {
  const text = execFileSync("ldd", [path], { encoding: "utf8" });
  return [...text.matchAll(/=> (\/\S+)/g)].map((match) => match[1]!);
}
