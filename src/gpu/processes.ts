import { existsSync, readdirSync, readFileSync, readlinkSync, statSync } from "node:fs";
import { isAbsolute } from "node:path";
import { Unsupported } from "../errors/index.ts";
import { splitDevice } from "../linux/fdinfo.ts";
import { pidsInNamespaces, processStat, startTime } from "../linux/proc.ts";
import { pathInRoot } from "../linux/root-path.ts";
import { PRELOADED } from "../runtime/gpu-injection.ts";

/** A process that may be a client of the driver. */
export interface GpuProcess {
  readonly pid: number;
  readonly startTime: number;
  /** its own number for itself, which a restore gives back */
  readonly pidInContainer: number;
  readonly comm: string;
  /** devices of the driver's that it has open, `major:minor` */
  readonly devices: readonly string[];
}

const driverFile = /\/libcuda\.so[.\d]*( \(deleted\))?$/;
const deviceLink = /^\/dev\/(nvidia|dxg)/;

/**
 * Those that have the driver's library mapped, or a device of its open. A process that has ended meanwhile is none.
 * Costs some 30 us for a small process.
 */
export function findGpuProcesses(pids: readonly number[]): GpuProcess[] {
  return pids.flatMap((pid) => {
    const devices = openDevices(pid);
    if (devices.length === 0 && !mapsDriver(pid)) return [];
    const process = describeProcess(pid);
    return process ? [{ ...process, devices: [...new Set(devices)] }] : [];
  });
}

export function describeProcess(pid: number): Omit<GpuProcess, "devices"> | undefined {
  const [started, stat, numbers] = [startTime(pid), processStat(pid), pidsInNamespaces(pid)];
  if (started === undefined || stat === undefined) return undefined;
  return { pid, startTime: started, pidInContainer: numbers.at(-1) ?? pid, comm: stat.comm };
}

function mapsDriver(pid: number): boolean {
  const text = readIfThere(`/proc/${pid}/maps`);
  // The interception library has the driver's name, and is in every process of a container that asks for it.
  return (
    text.includes("/libcuda.so") &&
    text.split("\n").some((line) => driverFile.test(line) && !line.includes(` ${PRELOADED}`))
  );
}

function openDevices(pid: number): string[] {
  const found: string[] = [];
  for (const fd of listIfThere(`/proc/${pid}/fd`)) {
    const path = `/proc/${pid}/fd/${fd}`;
    try {
      if (!deviceLink.test(readlinkSync(path))) continue;
      const { major, minor } = splitDevice(statSync(path).rdev);
      found.push(`${major}:${minor}`);
    } catch {
      // closed meanwhile
    }
  }
  return found;
}

/**
 * Refuses what the driver is known not to checkpoint, while the container runs. Managed memory, and memory shared by IPC, can only be found by
 * the driver's own refusal.
 */
export async function refuseMps({ pid, comm }: GpuProcess, what: string): Promise<void> {
  const name = `process ${pid} (${comm}) of ${what}`;
  if (comm === "nvidia-cuda-mps")
    // cut to 15 bytes: -control and -server
    throw new Unsupported(`${name} is a server of MPS: GPU state behind MPS can't be checkpointed`);
  const environment = readIfThere(`/proc/${pid}/environ`).split("\0");
  const given = environment.find((entry) => entry.startsWith("CUDA_MPS_PIPE_DIRECTORY="))?.slice(24);
  const directory = given && isAbsolute(given) ? given : "/tmp/nvidia-mps";
  if (existsSync(await pathInRoot(`/proc/${pid}/root`, `${directory}/control`)))
    throw new Unsupported(
      `${name} uses its GPU through MPS (${directory}/control): GPU state behind MPS can't be checkpointed; run it without MPS`,
    );
}

function readIfThere(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return ""; // it has ended
  }
}

function listIfThere(path: string): string[] {
  try {
    return readdirSync(path);
  } catch {
    return []; // it has ended
  }
}
