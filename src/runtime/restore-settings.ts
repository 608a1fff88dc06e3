import { readFile } from "node:fs/promises";
import type { RestoreLook } from "../checkpoint/restore/checks.ts";
import { SyscallFailed } from "../errors/index.ts";
import { type Configuration, readConfiguration, unpackDirectory } from "./configuration.ts";

/** What the administrator has set for every restore. @throws as `readConfiguration` */
export async function restoreSettings(): Promise<Omit<RestoreLook, "path">> {
  const configuration = await readConfiguration();
  const { ignoreCpu, verifyDigests } = configuration.restore;
  return {
    ignoreCpu,
    verifyDigests,
    unpack: { root: unpackDirectory(), secret: () => keyOf(configuration) },
  };
}

/** What opens encrypted archives: its own key, or that with which our own are encrypted. */
async function keyOf({ checkpoints, restore }: Configuration): Promise<Uint8Array | undefined> {
  const path = restore.keyFile ?? checkpoints.keyFile;
  if (path === undefined) return undefined;
  return await readFile(path).catch((error: unknown) => {
    throw SyscallFailed.from(error);
  });
}
