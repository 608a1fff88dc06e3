import { engineFeatures } from "../engine.ts";
import type { Plugin } from "../plugin.ts";

export const plugin: Plugin = { name: "runc", features: engineFeatures("runc") };
