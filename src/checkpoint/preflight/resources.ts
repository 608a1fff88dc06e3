import { statfs } from "node:fs/promises";
import { release } from "node:os";
import { dirname } from "node:path";
import { SyscallFailed, Unavailable } from "../../errors/index.ts";
import { answerWithin } from "../../linux/inventory.ts";
import { AF } from "../../linux/sock-diag.ts";
import { compareVersions } from "../../linux/versions.ts";
import type { Context } from "./context.ts";
import { memoryToDump } from "./facts.ts";

/** @returns bytes that are free for us; undefined when no destination is named */
export async function checkSpace(context: Context): Promise<number | undefined> {
  const { destination } = context.input;
  if (destination === undefined) return undefined;
  const freeBytes = await freeBytesAt(destination);
  const needed = memoryToDump(context);
  if (needed > freeBytes)
    context.report(
      "destination-full",
      undefined,
      `about ${inMib(needed)} to be dumped, ${inMib(freeBytes)} free at ${destination}`,
    );
  return freeBytes;
}

const inMib = (bytes: number) => `${Math.ceil(bytes / 2 ** 20)} MiB`;

/** Of the directory, or of the nearest above it that exists. */
async function freeBytesAt(path: string): Promise<number> {
  for (let directory = path; ; directory = dirname(directory)) {
    try {
      const found = await answerWithin(statfs(directory));
      if (!found)
        throw new Unavailable(`ask how much space is free at ${directory}: its file system doesn't answer`);
      return found.bavail * found.bsize;
    } catch (err) {
      const code = (err as NodeJS.ErrnoException).code;
      if ((code !== "ENOENT" && code !== "ENOTDIR") || directory === dirname(directory))
        throw SyscallFailed.from(err);
    }
  }
}

/**
 * Which kernels a CRIU is too old for.
 *
 * 6.13 moved a part of the vDSO's data into a mapping of its own, which CRIU knows from 4.1 on; 6.16 refuses SO_PASSCRED on
 * sockets that aren't unix ones, which CRIU asks every socket for until 4.2.
 */
const tooOld: readonly { kernel: string; criu: string; what: string; onlySockets?: true }[] = [
  { kernel: "6.13", criu: "4.1", what: "its vDSO" },
  { kernel: "6.16", criu: "4.2", what: "SO_PASSCRED of inet sockets", onlySockets: true },
];

export function checkCriu(context: Context, kernel = release()): void {
  const { criu } = context.input;
  if (criu === undefined) return;
  if (criu === null) {
    context.report("criu-missing", undefined, "criu is not installed");
    return;
  }
  for (const what of criu.missing ?? []) context.report("criu-lacks", undefined, what);
  const hasInet = [...context.treeSockets].some(([inode, { file }]) =>
    file.socket
      ? file.socket.family === AF.INET || file.socket.family === AF.INET6
      : /^inet/.test(context.socket(inode)?.family ?? ""),
  );
  for (const rule of tooOld)
    if (
      compareVersions(kernel, rule.kernel) >= 0 &&
      compareVersions(criu.version, rule.criu) < 0 &&
      (!rule.onlySockets || hasInet)
    )
      context.report("criu-too-old", undefined, `CRIU ${criu.version} on Linux ${kernel}: ${rule.what}`);
}
