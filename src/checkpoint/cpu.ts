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
