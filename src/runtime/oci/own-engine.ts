import { type ChildProcess, spawn } from "node:child_process";
import { closeSync, openSync } from "node:fs";
import { SyscallFailed } from "../../errors/index.ts";
import type { RunOptions } from "./call.ts";

/**
 * Runs an engine as our own child, where nobody has to be the container's ancestor.
 * @param signal  aborting kills it
 * @returns exit status, 137 for one that was killed. @throws SyscallFailed when it could not be started
 */
export async function runEngineHere(
  argv: readonly string[],
  { env, outputPath, signal }: RunOptions & { signal?: AbortSignal } = {},
): Promise<number> {
  const output = openSync(outputPath ?? "/dev/null", "w", 0o600);
  try {
    const [file, ...rest] = argv;
    return await endOf(
      spawn(file!, rest, {
        env: { PATH: process.env.PATH, ...env },
        stdio: ["ignore", output, output],
        ...(signal && { signal, killSignal: "SIGKILL" }),
      }),
    );
  } finally {
    closeSync(output);
  }
}

/** Exit status, 137 for one that was killed. @throws SyscallFailed when it could not be started */
export async function endOf(child: ChildProcess): Promise<number> {
  return await new Promise((resolve, reject) => {
    child.once("error", (error) => reject(SyscallFailed.from(error)));
    child.once("close", (code, name) => resolve(name === null ? code! : 137));
  });
}
