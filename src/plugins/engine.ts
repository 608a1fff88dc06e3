import { Unavailable } from "../errors/index.ts";
import type { EngineName } from "../runtime/engine.ts";
import type { FeatureValues } from "./features.ts";
import { interceptionFeatures } from "./gpu-interception.ts";
import type { HealthRow } from "./health.ts";

/** What both engines do for us. */
export function engineFeatures(name: EngineName): FeatureValues {
  const engine = async () => (await import("../runtime/engine.ts")).Engine.prototype;
  return {
    dumpHandler: async () => (await engine()).checkpoint,
    restoreHandler: async () => (await engine()).restore,
    runHandler: async () => (await engine()).create,
    killSignal: async () => (await import("../runtime/kill-policy.ts")).killPolicy,
    cleanup: async () => (await engine()).delete,
    ...interceptionFeatures,
    healthChecks: [{ name: `engine ${name}`, run: () => checkEngine(name) }],
  };
}

async function checkEngine(name: EngineName): Promise<HealthRow> {
  const { engineVersion } = await import("../runtime/engine.ts");
  try {
    const { version, checkpoint, restore } = await engineVersion(name);
    const summary = `${name} ${version}`;
    if (checkpoint.size > 0 && restore.size > 0) return { status: "ok", summary };
    return {
      status: "failed",
      summary: `${summary}: built without checkpoint and restore`,
      advice:
        name === "crun"
          ? "install a crun that was built with CRIU (crun --version says +CRIU)"
          : "install runc 1.1 or newer",
    };
  } catch (error) {
    if (!(error instanceof Unavailable)) throw error;
    return { status: "absent", summary: "not installed" };
  }
}
