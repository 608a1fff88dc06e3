import { constants } from "node:fs";
import { access, readFile } from "node:fs/promises";
import { delimiter, join } from "node:path";
import type { FeatureValues } from "./features.ts";
import { interceptionFeatures } from "./gpu-interception.ts";
import type { HealthRow } from "./health.ts";

/** What cedana-runtime does for an engine above it that runs OCI runtimes. */
export function callerFeatures(caller: Caller): FeatureValues {
  const life = async () => await import("../runtime/oci/life.ts");
  return {
    helperCommand: "setup",
    dumpHandler: async () => (await import("../runtime/oci/checkpoint.ts")).checkpoint,
    restoreHandler: async () => (await import("../runtime/oci/restore.ts")).restore,
    runHandler: async () => (await life()).create,
    killSignal: async () => (await life()).kill,
    cleanup: async () => (await life()).remove,
    ...interceptionFeatures,
    healthChecks: [{ name: caller.title, run: () => checkCaller(caller) }],
  };
}

interface Caller {
  readonly title: string;
  /** any of them, in the PATH */
  readonly programs: readonly string[];
  /** where it looks for runtimes: `cedana setup --target` writes the last */
  readonly configuration: readonly string[];
  readonly target: string;
}

async function checkCaller({ title, programs, configuration, target }: Caller): Promise<HealthRow> {
  if (!(await isInstalled(programs))) return { status: "absent", summary: "not installed" };
  for (const path of configuration) {
    const text = await readFile(path, "utf8").catch(() => ""); // ENOENT: it is not configured there
    if (/cedana-runtime|containerd-shim-cedana/.test(text))
      return { status: "ok", summary: `knows cedana, by ${path}` };
  }
  return {
    status: "warning",
    summary: `${title} doesn't know cedana's runtime`,
    advice: `cedana setup --target ${target}`,
  };
}

async function isInstalled(programs: readonly string[]): Promise<boolean> {
  // cedanad's own PATH may be short; services live in these.
  const directories = [
    ...(process.env.PATH ?? "").split(delimiter),
    "/usr/sbin",
    "/usr/local/bin",
    "/usr/bin",
  ];
  for (const directory of directories)
    for (const program of programs)
      if (
        await access(join(directory, program), constants.X_OK).then(
          () => true,
          () => false,
        )
      )
        return true;
  return false;
}
