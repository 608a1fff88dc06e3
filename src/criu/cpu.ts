import { cp, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CriuFailed } from "../errors/index.ts";
import { readOne } from "./image/read.ts";
import type { Message } from "./image/value.ts";
import { CriuWorker } from "./worker.ts";

// The CPU in a dump (cpuinfo.img, which CRIU writes when it is told to look at the CPU) and the one of this machine.

export interface CpuDescription {
  readonly architecture: "x86" | "ppc64" | "s390";
  /** "GenuineIntel" in words; x86 only */
  readonly vendor: string | undefined;
  readonly model: string | undefined;
  /** words of feature bits in CRIU's order: what one has set, another must have too */
  readonly capabilities: readonly bigint[];
  /** x86: components of the saved register state, and its size */
  readonly xfeatures: bigint | undefined;
  readonly xsaveBytes: number | undefined;
}

/**
 * x86 feature bits by word, as CRIU and the kernel number them, under the names of /proc/cpuinfo: those that compilers and libraries
 * choose code by. Sources: Linux cpufeatures.h, CRIU compel/arch/x86 cpu.h.
 */
const x86Features: Readonly<Record<number, Readonly<Record<number, string>>>> = {
  0: { 0: "fpu", 4: "tsc", 8: "cx8", 15: "cmov", 23: "mmx", 24: "fxsr", 25: "sse", 26: "sse2" },
  1: { 11: "syscall", 20: "nx", 26: "pdpe1gb", 27: "rdtscp", 29: "lm" },
  4: {
    ...{
      0: "pni",
      1: "pclmulqdq",
      9: "ssse3",
      12: "fma",
      13: "cx16",
      19: "sse4_1",
      20: "sse4_2",
      22: "movbe",
    },
    ...{ 23: "popcnt", 25: "aes", 26: "xsave", 28: "avx", 29: "f16c", 30: "rdrand" },
  },
  6: { 0: "lahf_lm", 5: "abm", 6: "sse4a", 7: "misalignsse" },
  9: {
    ...{
      0: "fsgsbase",
      3: "bmi1",
      5: "avx2",
      8: "bmi2",
      9: "erms",
      14: "mpx",
      16: "avx512f",
      17: "avx512dq",
    },
    ...{
      18: "rdseed",
      19: "adx",
      21: "avx512ifma",
      23: "clflushopt",
      24: "clwb",
      28: "avx512cd",
      29: "sha_ni",
    },
    ...{ 30: "avx512bw", 31: "avx512vl" },
  },
  10: { 0: "xsaveopt", 1: "xsavec", 2: "xgetbv1", 3: "xsaves" },
  11: {
    ...{ 1: "avx512vbmi", 2: "umip", 3: "pku", 6: "avx512_vbmi2", 8: "gfni", 9: "vaes", 10: "vpclmulqdq" },
    ...{ 11: "avx512_vnni", 12: "avx512_bitalg", 14: "avx512_vpopcntdq", 22: "rdpid" },
  },
  14: { 4: "fsrm" },
};

/** @throws ENOENT when the dump didn't look at the CPU; ImageFault */
export async function readCpu(imagesDir: string): Promise<CpuDescription> {
  const path = join(imagesDir, "cpuinfo.img");
  const entry = await readOne(path, "CPUINFO");
  const first = (field: string) => (entry[field] as Message[] | undefined)?.[0];
  const x86 = first("x86_entry");
  if (x86)
    return {
      architecture: "x86",
      vendor: String(x86.vendor_id),
      model: x86.model_id as string | undefined,
      capabilities: numbers(x86.capability),
      xfeatures: x86.xfeatures_mask as bigint | undefined,
      xsaveBytes: x86.xsave_size as number | undefined,
    };
  for (const architecture of ["ppc64", "s390"] as const) {
    const other = first(`${architecture}_entry`);
    const nothing = { vendor: undefined, model: undefined, xfeatures: undefined, xsaveBytes: undefined };
    if (other) return { architecture, capabilities: numbers(other.hwcap), ...nothing };
  }
  throw new CriuFailed(`${path} describes no CPU that we know`);
}

/** This machine's, as CRIU sees it. @throws Unavailable, CriuFailed */
export async function thisCpu(criu?: string): Promise<CpuDescription> {
  const directory = await mkdtemp(join(tmpdir(), "cedana-cpu-"));
  try {
    await using worker = await CriuWorker.start({ criu });
    await worker.dumpCpu({ imagesDir: directory });
    return await readCpu(directory);
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

/**
 * What of a dump's CPU this one lacks, in words; empty: processes of the one run on the other. Features without a name here are given by
 * word and bit.
 */
export function missingFromCpu(dumped: CpuDescription, here: CpuDescription): string[] {
  if (dumped.architecture !== here.architecture)
    return [`the dump is of a ${dumped.architecture} CPU, this is ${here.architecture}`];
  const missing: string[] = [];
  if (dumped.vendor !== here.vendor)
    missing.push(`the dump is of a CPU by ${dumped.vendor}, this one is by ${here.vendor}`);
  for (const [word, bits] of dumped.capabilities.entries()) {
    const lost = bits & ~(here.capabilities[word] ?? 0n);
    for (let bit = 0; bit < 64; bit++)
      if ((lost >> BigInt(bit)) & 1n)
        missing.push(`CPU feature ${nameOf(dumped, word, bit)} is missing here`);
  }
  const lost = (dumped.xfeatures ?? 0n) & ~(here.xfeatures ?? 0n);
  if (lost !== 0n) missing.push(`register state 0x${lost.toString(16)} (XSAVE) is missing here`);
  if ((dumped.xsaveBytes ?? 0) > (here.xsaveBytes ?? 0))
    missing.push(`the dump's register state has ${dumped.xsaveBytes} bytes, this CPU's ${here.xsaveBytes}`);
  return missing;
}

function nameOf({ architecture }: CpuDescription, word: number, bit: number): string {
  const name = architecture === "x86" ? x86Features[word]?.[bit] : undefined;
  return name ?? `${word}:${bit}`;
}

/**
 * CRIU's own judgement whether tasks of these images can run here.
 * @returns why not; undefined: they can. @throws ENOENT when the dump didn't look at the CPU
 */
export async function checkCpu(imagesDir: string, criu?: string): Promise<string | undefined> {
  // CRIU would write its log beside the images, which are not ours to write into.
  const directory = await mkdtemp(join(tmpdir(), "cedana-cpu-"));
  try {
    await cp(join(imagesDir, "cpuinfo.img"), join(directory, "cpuinfo.img"));
    await using worker = await CriuWorker.start({ criu });
    await worker.checkCpu({ imagesDir: directory });
    return undefined;
  } catch (error) {
    if (error instanceof CriuFailed) return error.message;
    throw error;
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

function numbers(value: Message[string] | undefined): bigint[] {
  return ((value ?? []) as (number | bigint)[]).map(BigInt);
}
