import type { FeatureValues } from "./features.ts";

/** Of what a plugin may rely on: raised when an export of before would no longer work. */
export const PLUGIN_API_VERSION = 1;

export interface Plugin {
  /** the column of the matrix */
  readonly name: string;
  readonly features: FeatureValues;
}

/** A plugin that was to be loaded. */
export interface PluginState {
  readonly name: string;
  /** "built-in", or the directory of the package */
  readonly origin: string;
  readonly version: string;
  /** why it isn't loaded */
  readonly fault?: string;
}
