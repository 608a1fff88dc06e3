import type { Logger } from "pino";
import { AlreadyExists, messageOf } from "../errors/index.ts";
import { type Feature, notePlugin } from "../features/registry.ts";
import { configurationPath, readConfiguration } from "../runtime/configuration.ts";
import { type FeatureName, features } from "./features.ts";
import type { Plugin, PluginState } from "./plugin.ts";

/** Those of our tree. A plugin is a folder; what it exports is known here and to the registry, and to nobody else. */
const builtIn: Readonly<Record<string, () => Promise<{ plugin: Plugin }>>> = {
  host: () => import("./host/index.ts"),
  criu: () => import("./criu/index.ts"),
  runc: () => import("./runc/index.ts"),
  crun: () => import("./crun/index.ts"),
  containerd: () => import("./containerd/index.ts"),
  crio: () => import("./crio/index.ts"),
  podman: () => import("./podman/index.ts"),
  docker: () => import("./docker/index.ts"),
  gpu: () => import("./gpu/index.ts"),
};

const states: PluginState[] = [];

/** What was to be loaded, in that order, and what became of it. */
export function pluginStates(): readonly PluginState[] {
  return states;
}

/**
 * Loads our plugins, then those that the administrator has named; a configuration that changes later counts for the next cedanad. One
 * that can't be loaded has exported nothing, and the others don't notice.
 */
export async function loadPlugins(log: Logger, build: string): Promise<void> {
  // Side by side: the first dump waits for it.
  const loading = await Promise.allSettled(Object.values(builtIn).map((load) => load()));
  for (const [at, name] of Object.keys(builtIn).entries()) {
    const loaded = loading[at]!;
    try {
      if (loaded.status === "rejected") throw loaded.reason; // its file has gone: an upgrade under way
      provide(loaded.value.plugin);
      notePlugin(name, build);
      states.push({ name, origin: "built-in", version: build });
    } catch (error) {
      states.push({ name, origin: "built-in", version: build, fault: messageOf(error) });
      log.error({ err: error, plugin: name }, "a plugin can't be loaded: cedanad goes on without it");
    }
  }
  const { named, directory } = await configured(log);
  if (named.length === 0) return;
  const { loadExternal } = await import("./external.ts");
  for (const one of named) {
    try {
      const plugin = await loadExternal(one, directory);
      if (states.some(({ name }) => name === plugin.name))
        throw new AlreadyExists(`there is a plugin ${plugin.name} already`);
      provide(plugin);
      notePlugin(plugin.name, plugin.version);
      states.push({ name: plugin.name, origin: plugin.origin, version: plugin.version });
      log.info(
        { plugin: plugin.name, version: plugin.version, exports: Object.keys(plugin.features) },
        "a plugin is loaded",
      );
    } catch (error) {
      states.push({ name: one, origin: one, version: "", fault: messageOf(error) });
      log.error({ err: error, plugin: one }, "a plugin can't be loaded: cedanad goes on without it");
    }
  }
}

async function configured(log: Logger): Promise<{ named: readonly string[]; directory: string }> {
  try {
    return (await readConfiguration()).plugins;
  } catch (error) {
    // Whoever uses annotations hears of it, too; which plugins there should be, nobody knows.
    log.error({ err: error }, "no plugin of the configuration is loaded: it can't be used");
    states.push({
      name: configurationPath(),
      origin: configurationPath(),
      version: "",
      fault: messageOf(error),
    });
    return { named: [], directory: "" };
  }
}

/** All of a plugin's features, or none. */
export function provide(plugin: Plugin): void {
  const provided: Feature<unknown>[] = [];
  try {
    for (const [key, value] of Object.entries(plugin.features)) {
      const feature = features[key as FeatureName] as Feature<unknown>;
      feature.provide(plugin.name, value);
      provided.push(feature);
    }
  } catch (error) {
    for (const feature of provided) feature.withdraw(plugin.name);
    throw error;
  }
}
