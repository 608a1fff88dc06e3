import { execFile } from "node:child_process";
import { stat } from "node:fs/promises";
import { promisify } from "node:util";

const run = promisify(execFile);
const TIMEOUT_MS = 10_000;

let known: { file: string; version: Promise<string | undefined> } | undefined;

/**
 * Version of the CRIU that engines find in PATH, as `criu --version` says it ("4.2.1"); asked once for each file.
 * @returns undefined when there is none or it doesn't say
 */
export async function criuVersion(): Promise<string | undefined> {
  for (const directory of (process.env.PATH ?? "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin").split(
    ":",
  )) {
    const path = `${directory}/criu`;
    const found = await stat(path, { bigint: true }).catch(() => undefined);
    if (!found) continue;
    const file = `${path} ${found.dev} ${found.ino} ${found.mtimeNs}`;
    if (known?.file !== file)
      known = {
        file,
        version: run(path, ["--version"], { timeout: TIMEOUT_MS }).then(
          ({ stdout }) => /^Version:\s*(\S+)/m.exec(stdout)?.[1],
          () => undefined, // it is the engine's to complain when it can't run
        ),
      };
    return await known.version;
  }
  return undefined;
}
