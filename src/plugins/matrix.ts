import { type FeatureName, features, knownPlugins } from "./features.ts";
import type { PluginState } from "./plugin.ts";

/** ✔ exported · • not exported · — no such plugin here · ✖ it can't be loaded */
export type Cell = "available" | "missing" | "absent" | "broken";

export interface Matrix {
  readonly columns: readonly string[];
  readonly rows: readonly {
    readonly feature: FeatureName;
    readonly title: string;
    readonly cells: readonly Cell[];
  }[];
}

/** Every feature against every plugin, from what the plugins have exported. */
export function featureMatrix(states: readonly PluginState[]): Matrix {
  const byName = new Map(states.map((state) => [state.name, state]));
  const columns = [...new Set([...knownPlugins, ...byName.keys()])];
  const cell = (feature: FeatureName, plugin: string): Cell => {
    const state = byName.get(plugin);
    if (!state) return "absent";
    if (state.fault !== undefined) return "broken";
    return features[feature].isAvailable(plugin) ? "available" : "missing";
  };
  const rows = (Object.keys(features) as FeatureName[]).map((feature) => ({
    feature,
    title: features[feature].title,
    cells: columns.map((plugin) => cell(feature, plugin)),
  }));
  return { columns, rows };
}
