import { readdirSync } from "node:fs";

/** Where CRIU looks for plugins by itself, as it was built. Source: its Makefile, PLUGINDIR. */
const builtIn = ["/usr/lib/criu", "/usr/local/lib/criu", "/usr/lib64/criu"];

/**
 * Where CRIU is told to look for plugins instead; undefined: nowhere else. CRIU's own variable counts where we have it; cedanad's environment
 * has nothing but what begins with CEDANA_.
 */
export function toldPluginDirectory(env: NodeJS.ProcessEnv = process.env): string | undefined {
  return env.CEDANA_CRIU_PLUGINS || env.CRIU_LIBS_DIR || undefined;
}

/** Names of the plugins that CRIU would load, and their directories. */
export function installedPlugins(env: NodeJS.ProcessEnv = process.env): ReadonlyMap<string, string> {
  const told = toldPluginDirectory(env);
  return new Map(
    (told === undefined ? builtIn.toReversed() : [told]).flatMap((directory) =>
      entries(directory)
        .filter((name) => name.endsWith(".so"))
        .map((name) => [name.slice(0, -".so".length), directory]),
    ),
  );
}

function entries(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return []; // Debian's CRIU has no plugins
    throw error;
  }
}
