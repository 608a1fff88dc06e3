import { readFile } from "node:fs/promises";
import { arch } from "node:os";

/** What a restore elsewhere must find: programs remember which instructions they may use. */
export interface CpuFacts {
  /** as Node names it: x64, arm64 */
  architecture: string;
  model?: string;
  /** as /proc/cpuinfo lists them, sorted */
  features: string[];
}

/** Of this machine. A machine with unlike cores is described by its first. */
export async function cpuFacts(): Promise<CpuFacts> {
  return parseCpuInfo(await readFile("/proc/cpuinfo", "utf8"), arch());
}

/** Source: proc_cpuinfo(5); `flags` on x86, `Features` on ARM. */
export function parseCpuInfo(text: string, architecture: string): CpuFacts {
  const field = (name: string) => new RegExp(`^${name}\\s*: (.*)$`, "m").exec(text)?.[1]?.trim();
  const model = field("model name");
  const features = (field("flags") ?? field("Features") ?? "").split(/\s+/).filter(Boolean).sort();
  return { architecture, ...(model !== undefined && { model }), features };
}

/**
 * Flags of /proc/cpuinfo on x86 that stand for instructions a program may run: compilers and libraries choose their code by them once, at
 * the start. The rest is about the kernel, virtualisation and power.
 */
const x86Instructions =
  /^(?:cx8|cx16|cmov|fxsr|mmx|mmxext|3dnow|3dnowext|sse|sse2|pni|ssse3|sse4_1|sse4_2|sse4a|misalignsse|avx|avx2|avx_.*|avx512.*|amx_.*|fma|fma4|xop|tbm|f16c|aes|vaes|pclmulqdq|vpclmulqdq|gfni|sha_ni|sha512|sm3|sm4|popcnt|abm|bmi1|bmi2|adx|movbe|lahf_lm|rdrand|rdseed|rdtscp|rdpid|fsgsbase|xsave|xsaveopt|xsavec|xgetbv1|mpx|pku|ospke|rtm|hle|clflushopt|clwb|cldemote|movdiri|movdir64b|serialize|waitpkg|enqcmd|user_shstk|lwp|clzero|monitorx|mwaitx|cmpccxadd|raoint|prefetchi|uintr)$/;

/** Instructions of one CPU that another lacks. On ARM every feature is about them. */
export function instructionsMissing(dumped: CpuFacts, here: CpuFacts): string[] {
  const present = new Set(here.features);
  const matters = (feature: string) => dumped.architecture !== "x64" || x86Instructions.test(feature);
  return dumped.features.filter((feature) => matters(feature) && !present.has(feature));
}
