/*
 * What plugins can do, as typed exports. A feature is declared by the folder that uses it, in a `features.ts` of its own; a plugin exports
 * a value of the feature's type; whoever uses it asks here and never names a plugin's module:
 *
 *   dumpFeatures.dumpMiddleware.ifAvailable("gpu", (adapters) => …)
 *   for (const [plugin, checks] of healthChecks.all()) …
 *
 * Plugins are loaded when the first feature of theirs is wanted: `await pluginsLoaded()` before asking. Who loads them is told by
 * cedanad at its start; a program that tells nobody (a test, the command line) has none.
 */

export class Feature<T> {
  /** as the matrix has it */
  readonly title: string;
  /** What is wrong with a value that isn't of our type; undefined: nothing. Plugins from outside aren't checked by our compiler. */
  readonly faultOf: (value: unknown) => string | undefined;
  readonly #exports = new Map<string, T>();

  constructor(title: string, faultOf: (value: unknown) => string | undefined) {
    this.title = title;
    this.faultOf = faultOf;
  }

  /** @throws TypeError for a plugin that has it already, or a value that is not of the feature's type */
  provide(plugin: string, value: T): void {
    const fault = this.faultOf(value);
    if (fault !== undefined) throw new TypeError(`${plugin}: ${this.title}: ${fault}`);
    if (this.#exports.has(plugin)) throw new TypeError(`${plugin} exports ${this.title} twice`);
    this.#exports.set(plugin, value);
  }

  /** The plugin exports it no more. */
  withdraw(plugin: string): void {
    this.#exports.delete(plugin);
  }

  isAvailable(plugin: string): boolean {
    return this.#exports.has(plugin);
  }

  /** @returns what `use` does; undefined when the plugin doesn't export the feature, or isn't there */
  ifAvailable<R>(plugin: string, use: (value: T) => R): R | undefined {
    const value = this.#exports.get(plugin);
    return value === undefined ? undefined : use(value);
  }

  /** Of every plugin, in the order in which they were loaded. */
  all(): [plugin: string, value: T][] {
    return [...this.#exports];
  }
}

const versions = new Map<string, string>();

/** Notes a plugin that is loaded. */
export function notePlugin(name: string, version: string): void {
  versions.set(name, version);
}

/** "" for one that isn't loaded */
export function pluginVersion(name: string): string {
  return versions.get(name) ?? "";
}

let load: (() => Promise<void>) | undefined;
let loaded: Promise<void> | undefined;

/** Says how plugins are loaded when they are wanted. */
export function setPluginLoader(loader: () => Promise<void>): void {
  load = loader;
  loaded = undefined;
}

/** Waits until all plugins are loaded, or known not to be. Never fails: what is wrong with a plugin is its own affair. */
export async function pluginsLoaded(): Promise<void> {
  if (!load) return;
  loaded ??= load();
  await loaded;
}

// ---- checks of values from outside -------------------------------------------------------------------------------------

export const isFunction = (value: unknown) => (typeof value === "function" ? undefined : "is not a function");

/** A list of objects that have these members. */
export function isListOf(
  members: Readonly<Record<string, "string" | "function">>,
): (value: unknown) => string | undefined {
  return (value) => {
    if (!Array.isArray(value)) return "is not a list";
    for (const [index, one] of value.entries()) {
      if (typeof one !== "object" || one === null) return `entry ${index} is not an object`;
      for (const [name, type] of Object.entries(members))
        if (typeof (one as Record<string, unknown>)[name] !== type)
          return `entry ${index} has no ${type} ${name}`;
    }
    return undefined;
  };
}
