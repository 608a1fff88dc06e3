import { closeSync, constants, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { isAbsolute } from "node:path";
import { TimedOut, Unavailable, Unsupported } from "../errors/index.ts";
import { O_PATH, openApart, openInRootApart, readApart, statApart } from "../linux/apart.ts";
import { splitDevice } from "../linux/fdinfo.ts";
import { pidsInNamespaces, processStat, startTime } from "../linux/proc.ts";
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
export async function findGpuProcesses(pids: readonly number[]): Promise<GpuProcess[]> {
  const found: GpuProcess[] = [];
  for (const pid of pids) {
    const devices = await openDevices(pid);
    if (devices.length === 0 && !mapsDriver(pid)) continue;
    const process = describeProcess(pid);
    if (process) found.push({ ...process, devices: [...new Set(devices)] });
  }
  return found;
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

async function openDevices(pid: number): Promise<string[]> {
  const found: string[] = [];
  for (const fd of listIfThere(`/proc/${pid}/fd`)) {
    const path = `/proc/${pid}/fd/${fd}`;
    try {
      if (!deviceLink.test(readlinkSync(path))) continue;
      const [, rdev] = await statApart(path); // a file of the container's own may have the name, too
      const { major, minor } = splitDevice(rdev);
      found.push(`${major}:${minor}`);
    } catch (error) {
      if (error instanceof TimedOut || error instanceof Unavailable) throw error;
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
  const environment = (await environmentOfContainer(pid)).split("\0");
  const given = environment.find((entry) => entry.startsWith("CUDA_MPS_PIPE_DIRECTORY="))?.slice(24);
  const directory = given && isAbsolute(given) ? given : "/tmp/nvidia-mps";
  if (await isInContainer(pid, `${directory}/control`))
    throw new Unsupported(
      `${name} uses its GPU through MPS (${directory}/control): GPU state behind MPS can't be checkpointed; run it without MPS`,
    );
}

/** As many bytes as the kernel lets a program have, and more. */
const MAX_ENVIRONMENT_BYTES = 8 * 2 ** 20;

/** It lies in the process's memory, which may be a file's on a server that doesn't answer. */
async function environmentOfContainer(pid: number): Promise<string> {
  try {
    return (await readApart(`/proc/${pid}/environ`, MAX_ENVIRONMENT_BYTES)).toString("utf8");
  } catch (error) {
    if (error instanceof TimedOut || error instanceof Unavailable) throw error;
    return ""; // it has ended
  }
}

async function isInContainer(pid: number, path: string): Promise<boolean> {
  let root: number | undefined;
  try {
    root = await openApart(`/proc/${pid}/root`, constants.O_RDONLY | constants.O_DIRECTORY);
    closeSync(await openInRootApart(root, path, O_PATH));
    return true;
  } catch (error) {
    if (error instanceof TimedOut || error instanceof Unavailable) throw error;
    return false; // it isn't there, or it has ended
  } finally {
    if (root !== undefined) closeSync(root);
  }
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
