import { InvalidRequest, messageOf } from "../../errors/index.ts";
import { pluginsLoaded } from "../../features/registry.ts";
import { type FeatureName, features } from "../../plugins/features.ts";
import type { HealthCheck, HealthRow } from "../../plugins/health.ts";
import { pluginStates } from "../../plugins/load.ts";
import { featureMatrix } from "../../plugins/matrix.ts";
import type {
  CheckEventInit,
  CheckRequest,
  ListPluginsResponseInit,
} from "../../proto/generated/cedana_api.ts";
import type { ApiCall } from "./context.ts";

export async function listPlugins(): Promise<ListPluginsResponseInit> {
  await pluginsLoaded();
  const states = pluginStates();
  const names = Object.keys(features) as FeatureName[];
  return {
    plugins: states.map((state) => ({
      ...state,
      features: names.filter((name) => features[name].isAvailable(state.name)),
    })),
    ...featureMatrix(states),
  };
}

/** A check that waits for ever is a finding, too. */
const CHECK_PATIENCE_MS = 60_000;

/** Runs every plugin's checks side by side. */
export async function check(
  request: CheckRequest,
  { signal }: ApiCall,
  send: (event: CheckEventInit) => Promise<void>,
): Promise<void> {
  await pluginsLoaded();
  const known = pluginStates();
  const unknown = request.plugins.filter((name) => !known.some((state) => state.name === name));
  if (unknown.length > 0)
    throw new InvalidRequest(
      `there is no plugin ${unknown.join(", ")}: there are ${known.map(({ name }) => name).join(", ")}`,
    );
  const wanted = (plugin: string) => request.plugins.length === 0 || request.plugins.includes(plugin);
  const faults = known.filter(({ name, fault }) => fault !== undefined && wanted(name));
  for (const { name, fault } of faults)
    await send({
      plugin: name,
      name: "plugin",
      status: "failed",
      summary: fault,
      advice: "see docs/plugins.md",
    });
  const checks = features.healthChecks
    .all()
    .filter(([plugin]) => wanted(plugin))
    .flatMap(([plugin, list]) => list.map((one) => ({ plugin, one })))
    .filter(({ one }) => request.full || !one.full);
  await Promise.all(
    checks.map(async ({ plugin, one }) => {
      for (const row of await rowsOf(one, signal)) await send({ plugin, ...row, name: row.name ?? one.name });
    }),
  );
}

async function rowsOf(check: HealthCheck, signal: AbortSignal): Promise<readonly HealthRow[]> {
  const patience = AbortSignal.timeout(CHECK_PATIENCE_MS);
  const either = AbortSignal.any([signal, patience]);
  const late = new Promise<never>((_, reject) =>
    either.addEventListener("abort", () => reject(either.reason), { once: true }),
  );
  late.catch(() => {}); // looked at in the race
  try {
    const found = await Promise.race([check.run(either), late]);
    return Array.isArray(found) ? found : [found as HealthRow];
  } catch (error) {
    signal.throwIfAborted();
    const summary = patience.aborted ? `no answer within ${CHECK_PATIENCE_MS / 1000} s` : messageOf(error);
    return [{ status: "failed", summary }];
  }
}
