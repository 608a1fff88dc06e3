import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { Unavailable } from "../errors/index.ts";
import { checkCpu, missingFromCpu, readCpu, thisCpu } from "./cpu.ts";
import type { Message } from "./image/message.ts";
import { readOne } from "./image/read.ts";
import { probeCriu } from "./probe.ts";

// Whether this machine can restore a dump, as far as its images say: architecture, CPU, CRIU's plugins.

/** core_entry.march by Node's names of architectures. */
const machines: Readonly<Record<string, string>> = {
  x64: "X86_64",
  arm: "ARM",
  arm64: "AARCH64",
  ppc64: "PPC64",
  s390x: "S390",
  mips64el: "MIPS",
  loong64: "LOONGARCH64",
  riscv64: "RISCV64",
};

/** Where CRIU looks for plugins, unless CRIU_LIBS_DIR says otherwise. */
const PLUGIN_DIRECTORIES = ["/usr/lib/criu", "/usr/local/lib/criu"];

/**
 * What is in the way of restoring these images here, each a sentence; empty: nothing that can be told beforehand.
 * @throws ImageFault for images that are broken: verify them first
 */
export async function findUnsuitable(imagesDir: string, criu?: string): Promise<string[]> {
  const problems: string[] = [];
  const names = await readdir(imagesDir);
  const core = names.find((name) => /^core-\d+\.img$/.test(name));
  const machine = core && String((await readOne(join(imagesDir, core), "CORE")).mtype);
  if (machine !== undefined && machine !== machines[process.arch])
    problems.push(
      `the dump is of a ${machine} machine, this one is ${machines[process.arch] ?? process.arch}`,
    );
  const path = await probeCriu(criu).then(
    (probe) => probe.path,
    (error: unknown) => {
      if (!(error instanceof Unavailable)) throw error;
      problems.push(error.message);
      return undefined;
    },
  );
  const present = await installedPlugins();
  for (const plugin of await pluginsNeeded(imagesDir))
    if (!present.has(plugin))
      problems.push(`CRIU's plugin ${plugin}, which the dump needs, is not installed`);
  // CRIU writes it when it is told to look at the CPU.
  if (path !== undefined && names.includes("cpuinfo.img") && machine === machines[process.arch]) {
    const refused = await checkCpu(imagesDir, path);
    if (refused !== undefined)
      problems.push(...missingFromCpu(await readCpu(imagesDir), await thisCpu(path)), refused);
  }
  return problems;
}

/** Names of CRIU's plugins that took part in a dump. @throws ImageFault */
export async function pluginsNeeded(imagesDir: string): Promise<string[]> {
  const inventory = await readOne(join(imagesDir, "inventory.img"), "INVENTORY");
  return ((inventory.plugins_entry as Message | undefined)?.plugins ?? []) as string[];
}

/** Names of the plugins that CRIU would load. */
export async function installedPlugins(env: NodeJS.ProcessEnv = process.env): Promise<ReadonlySet<string>> {
  const directories = env.CRIU_LIBS_DIR ? [env.CRIU_LIBS_DIR] : PLUGIN_DIRECTORIES;
  const names = await Promise.all(
    directories.map((directory) => readdir(directory).catch(() => [] as string[])),
  );
  return new Set(
    names
      .flat()
      .filter((name) => name.endsWith(".so"))
      .map((name) => name.slice(0, -".so".length)),
  );
}
