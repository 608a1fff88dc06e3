import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { Unavailable } from "../errors/index.ts";
import { checkCpu, missingFromCpu, readCpu, thisCpu } from "./cpu.ts";
import { readOne } from "./image/read.ts";
import type { Message } from "./image/value.ts";
import { installedPlugins } from "./plugins.ts";
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
  const present = installedPlugins();
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
