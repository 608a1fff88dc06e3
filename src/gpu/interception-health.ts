import { execFile } from "node:child_process";
import { existsSync } from "node:fs";
import { messageOf } from "../errors/index.ts";
import { findGpuFile } from "../runtime/gpu-injection.ts";
import type { GpuHealthRow } from "./health.ts";

/** Where a node has its driver; what is in a container may lie elsewhere. */
const driverPlaces = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/run/nvidia/driver/usr/lib64"];
const PATIENCE_MS = 5_000;
const MAX_LISTED = 5;

/** Whether the interception library is installed, and knows every entry point of this node's driver. */
export async function interceptionHealth(): Promise<GpuHealthRow> {
  const name = "GPU interception";
  let program: string;
  try {
    findGpuFile("libcuda.so.1");
    program = findGpuFile("cedana-gpu-control");
  } catch (error) {
    return {
      name,
      status: "failed",
      summary: messageOf(error),
      advice: "containers with cedana.io/gpu: intercept can't be created",
    };
  }
  const driver = findDriver();
  if (driver === undefined)
    return { name, status: "ok", summary: "installed; there is no driver to compare it with" };
  const { status, stdout, stderr } = await new Promise<{
    status: number | null;
    stdout: string;
    stderr: string;
  }>((resolve) => {
    const child = execFile(
      program,
      ["names", driver],
      { timeout: PATIENCE_MS, encoding: "utf8" },
      (_error, out, err) => resolve({ status: child.exitCode, stdout: out, stderr: err }),
    );
  });
  if (status === 0) return { name, status: "ok", summary: `knows every entry point of ${driver}` };
  const names = stdout.split("\n").filter(Boolean);
  if (names.length === 0)
    return { name, status: "warning", summary: `can't be compared with ${driver}: ${stderr.trim()}` };
  const more = names.length > MAX_LISTED ? ` and ${names.length - MAX_LISTED} more` : "";
  return {
    name,
    status: "warning",
    summary: `${driver} has entry points that it doesn't know: ${names.slice(0, MAX_LISTED).join(", ")}${more}`,
    advice:
      "programs that link with these by name don't start with cedana.io/gpu: intercept; those that ask by cuGetProcAddress do",
  };
}

function findDriver(): string | undefined {
  const told = process.env.CEDANA_GPU_DRIVER;
  return [...(told ? [told] : []), ...driverPlaces.map((place) => `${place}/libcuda.so.1`)].find((path) =>
    existsSync(path),
  );
}
