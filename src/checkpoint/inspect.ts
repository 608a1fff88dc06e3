import { stat } from "node:fs/promises";
import { join } from "node:path";
import { type Message, readImage } from "../criu/image/index.ts";

// What runs in a checkpoint, for people who ask before they restore it.

export interface CheckpointProcess {
  /** in the container */
  readonly pid: number;
  /** 0 for the first */
  readonly parentPid: number;
  readonly threads: number;
  /** the kernel's short name of the program */
  readonly command: string;
  /** pages in these images; what earlier images hold is not counted */
  readonly memoryBytes: number;
}

/**
 * The processes in a checkpoint, parents first.
 * @param imagePath  directory of CRIU's images
 * @throws BrokenImage
 */
export async function listProcesses(imagePath: string): Promise<CheckpointProcess[]> {
  const tree = await readImage(join(imagePath, "pstree.img"));
  const processes: CheckpointProcess[] = [];
  for (const entry of tree) {
    const pid = Number(entry.pid);
    processes.push({
      pid,
      parentPid: Number(entry.ppid),
      threads: Array.isArray(entry.threads) ? entry.threads.length : 1,
      command: await commandOf(imagePath, pid),
      memoryBytes: await memoryOf(imagePath, pid),
    });
  }
  return processes;
}

/** A zombie has a core, too; what the checkpoint lacks is for `verify` to say. */
async function commandOf(imagePath: string, pid: number): Promise<string> {
  const [core] = await readOptional(join(imagePath, `core-${pid}.img`));
  return String((core?.tc as Message | undefined)?.comm ?? "?");
}

async function memoryOf(imagePath: string, pid: number): Promise<number> {
  const [head] = await readOptional(join(imagePath, `pagemap-${pid}.img`));
  return head ? ((await sizeOf(join(imagePath, `pages-${Number(head.pages_id)}.img`))) ?? 0) : 0;
}

async function readOptional(path: string): Promise<Message[]> {
  return (await sizeOf(path)) === undefined ? [] : await readImage(path);
}

async function sizeOf(path: string): Promise<number | undefined> {
  return await stat(path).then(
    ({ size }) => size,
    () => undefined, // what is wrong with a file that is there shows when it is read
  );
}
