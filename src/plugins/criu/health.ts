import { Unavailable } from "../../errors/index.ts";
import type { HealthCheck, HealthRow } from "../health.ts";

export const criuChecks: readonly HealthCheck[] = [
  { name: "CRIU", run: checkVersion },
  { name: "CRIU on this kernel", run: checkKernel },
  { name: "dump of a process with sockets", run: trialDump },
];

/** Before it, nothing can be dumped on kernels from 6.15 on: their vDSO has another layout. */
const OLDEST_FOR_NEW_KERNELS = 40_100;

async function checkVersion(): Promise<HealthRow> {
  const { probeCriu } = await import("../../criu/index.ts");
  try {
    const { path, version, lazyPages } = await probeCriu();
    const summary = `${version.text}, ${path}${lazyPages ? ", lazy restores" : ", no lazy restores on this kernel"}`;
    if (version.number >= OLDEST_FOR_NEW_KERNELS) return { status: "ok", summary };
    return {
      status: "warning",
      summary: `${summary}: can't dump on kernels from 6.15 on`,
      advice: "install CRIU 4.2 or newer",
    };
  } catch (error) {
    if (!(error instanceof Unavailable)) throw error;
    return {
      status: "failed",
      summary: error.message,
      advice: "install CRIU 4.2 or newer, and have it in cedanad's PATH",
    };
  }
}

async function checkKernel(): Promise<HealthRow> {
  const { checkCriu } = await import("../../criu/index.ts");
  try {
    const { ok, usable, errors, warnings } = await checkCriu();
    if (ok) return { status: "ok", summary: "criu check --all finds all there" };
    const found = [...new Set([...errors, ...warnings])].slice(0, 3).join("; ");
    if (usable)
      return {
        status: "ok",
        summary: `what CRIU needs is there; of the rest it lacks: ${found || "something"}`,
      };
    return {
      status: "failed",
      summary: `criu check: ${found || "it says no more"}`,
      advice: "run `criu check -v4` for what is missing",
    };
  } catch (error) {
    if (!(error instanceof Unavailable)) throw error;
    return { status: "absent", summary: "there is no CRIU" };
  }
}

async function trialDump(signal: AbortSignal): Promise<HealthRow> {
  const { dumpTrial } = await import("./trial.ts");
  return await dumpTrial(signal);
}
