import { existsSync, readdirSync, readFileSync } from "node:fs";
import { delimiter, join } from "node:path";
import { messageOf } from "../errors/index.ts";
import type { NvmlAnswer } from "../linux/cuda.ts";
import { type Deadlines, deadlines } from "./deadlines.ts";
import { availableMemory } from "./host-memory.ts";
import {
  chooseMeans,
  criuPlugin,
  DriverMeans,
  HelperKeeper,
  programPath,
  REMAP_SINCE,
  versionText,
} from "./means.ts";
import { askNvml } from "./nvml.ts";
import { mayHaveGpu } from "./present.ts";

/** A row of `cedana check --full`. */
export interface GpuHealthRow {
  readonly name: string;
  readonly status: "ok" | "warning" | "failed" | "absent";
  readonly summary: string;
  readonly advice?: string;
}

/** What GPU containers need of this node: driver, devices, what it can, memory, and what containers get to see. */
export async function gpuHealth(limits: Deadlines = deadlines()): Promise<GpuHealthRow[]> {
  if (!mayHaveGpu()) return [{ name: "GPU driver", status: "absent", summary: "there is no NVIDIA driver" }];
  await using helpers = new HelperKeeper();
  const nvml = await askNvml(helpers, limits);
  const rows = [
    driverRow(nvml),
    await meansRow(helpers, limits),
    ...deviceRows(nvml),
    memoryRow(nvml),
    librariesRow(),
  ];
  return rows.filter((row) => row !== undefined);
}

function driverRow(nvml: NvmlAnswer): GpuHealthRow {
  if (nvml.error === undefined)
    return { name: "GPU driver", status: "ok", summary: `${nvml.driver}, ${nvml.devices.length} GPUs` };
  return {
    name: "GPU driver",
    status: "warning",
    summary: `NVML can't be asked: ${nvml.error}`,
    advice:
      "without NVML, GPUs in instances (MIG) and too little host memory are found only when a checkpoint fails; install the driver's libnvidia-ml.so.1, or name it by CEDANA_GPU_NVML",
  };
}

async function meansRow(helpers: HelperKeeper, limits: Deadlines): Promise<GpuHealthRow> {
  const name = "GPU checkpoints";
  try {
    const means = await chooseMeans(helpers, limits, String);
    if (means === "criu-plugin")
      return { name, status: "ok", summary: `by CRIU's plugin ${criuPlugin()} and ${programPath()}` };
    if (!(means instanceof DriverMeans))
      return { name, status: "ok", summary: `by the program ${programPath()}` };
    const remap = means.driverVersion >= REMAP_SINCE ? "and to other GPUs" : "and to the same GPUs only";
    return {
      name,
      status: "ok",
      summary: `by the driver's interface ${versionText(means.driverVersion)}, ${remap}`,
    };
  } catch (error) {
    return {
      name,
      status: "failed",
      summary: messageOf(error),
      advice: "install a driver of r570 or newer, or NVIDIA's program cuda-checkpoint in cedanad's PATH",
    };
  }
}

function deviceRows(nvml: NvmlAnswer): GpuHealthRow[] {
  if (nvml.error !== undefined) return [];
  return nvml.devices.map(({ uuid, name, memoryBytes = 0, migMode, persistenceMode }) => {
    const summary = `${name}, ${mib(memoryBytes)} MiB`;
    if (migMode === 1)
      return {
        name: uuid,
        status: "warning",
        summary: `${summary}, divided into instances (MIG)`,
        advice:
          "what uses an instance can't be checkpointed; nvidia-smi --multi-instance-gpu 0 makes it whole again",
      };
    if (persistenceMode === 0)
      return {
        name: uuid,
        status: "warning",
        summary: `${summary}, persistence mode off`,
        advice: "restores are slower: nvidia-smi --persistence-mode 1, or nvidia-persistenced",
      };
    return { name: uuid, status: "ok", summary };
  });
}

/** A checkpoint of all that is on the GPUs now goes to host memory first. */
function memoryRow(nvml: NvmlAnswer): GpuHealthRow | undefined {
  if (nvml.error !== undefined) return undefined;
  const used = nvml.devices.reduce((sum, { usedBytes = 0 }) => sum + usedBytes, 0);
  const free = availableMemory();
  const summary = `${mib(used)} MiB are used on GPUs, ${mib(free)} MiB of host memory are available`;
  if (used <= free) return { name: "GPU memory", status: "ok", summary };
  return {
    name: "GPU memory",
    status: "warning",
    summary,
    advice: "GPU memory goes to host memory for a checkpoint: not all containers can be checkpointed at once",
  };
}

/** Who puts the driver's libraries into containers. */
function librariesRow(): GpuHealthRow {
  const name = "GPU libraries in containers";
  const specs = ["/etc/cdi", "/var/run/cdi"].flatMap((directory) =>
    entries(directory)
      .filter((file) => /\.(json|ya?ml)$/.test(file))
      .map((file) => join(directory, file))
      .filter((file) => readIfThere(file).includes("nvidia.com/")),
  );
  if (specs.length > 0) return { name, status: "ok", summary: `by CDI: ${specs.join(", ")}` };
  const hook = ["nvidia-container-runtime-hook", "nvidia-ctk"].find((program) => isInPath(program));
  if (hook) return { name, status: "ok", summary: `by ${hook}` };
  return {
    name,
    status: "warning",
    summary: "nothing here puts the driver's libraries into containers",
    advice: "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml, or mount them by hand",
  };
}

function isInPath(program: string): boolean {
  return (process.env.PATH ?? "").split(delimiter).some((directory) => existsSync(join(directory, program)));
}

function entries(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch {
    return []; // ENOENT: no CDI
  }
}

function readIfThere(file: string): string {
  try {
    return readFileSync(file, "utf8");
  } catch {
    return "";
  }
}

const mib = (bytes: number) => Math.ceil(bytes / 2 ** 20);
