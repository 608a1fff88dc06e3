import { readFileSync } from "node:fs";

/** Bytes that new allocations can have without swapping. Source: proc_meminfo(5), MemAvailable. */
export function availableMemory(): number {
  const [, kib = "0"] = /^MemAvailable:\s+(\d+) kB/m.exec(readFileSync("/proc/meminfo", "utf8")) ?? [];
  return Number(kib) * 1024;
}
