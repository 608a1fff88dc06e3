// A plugin that holds a dump or a restore where a test wants to look at it, or kill somebody.

import { existsSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { until } from "./until.ts";

/** A dump is held on the frozen container, a restore after the checks; each once, and refused then where a test wants that. */
const CODE = `
import { existsSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
const at = (name) => join(import.meta.dirname, name);
async function hold(next) {
  if (existsSync(at("hold"))) {
    renameSync(at("hold"), at("held"));
    while (existsSync(at("held"))) await new Promise((resolve) => setTimeout(resolve, 5));
  }
  if (existsSync(at("refuse"))) {
    rmSync(at("refuse"));
    throw new Error("the test has refused it");
  }
  await next();
}
export const plugin = { name: "holder", features: {
  dumpMiddlewareLate: [{ name: "hold", run: (dump, next) => hold(next) }],
  restoreMiddleware: [{ name: "hold", run: (restore, next) => hold(next) }],
} };
`;

const NAME = "cedana-plugin-holder";

export class Holder {
  /** `plugins` of the configuration */
  readonly configuration: object;
  readonly #directory: string;

  /** Installs it. @param plugins  directory of plugins, whose parents are root's alone */
  constructor(plugins: string) {
    this.configuration = { load: [NAME], directory: plugins };
    this.#directory = join(plugins, "node_modules", NAME);
    mkdirSync(this.#directory, { recursive: true, mode: 0o755 });
    const cedana = { apiVersion: 1, entry: "index.js" };
    const description = JSON.stringify({ name: NAME, version: "1.0.0", type: "module", cedana });
    writeFileSync(this.#at("package.json"), description, { mode: 0o644 });
    writeFileSync(this.#at("index.js"), CODE, { mode: 0o644 });
  }

  #at(name: string): string {
    return join(this.#directory, name);
  }

  /** The next one. */
  hold(): void {
    writeFileSync(this.#at("hold"), "");
  }

  /** The next one, when it has been held. */
  refuse(): void {
    writeFileSync(this.#at("refuse"), "");
  }

  async isHeld(what: () => string): Promise<void> {
    await until(() => existsSync(this.#at("held")), { what });
  }

  release(): void {
    rmSync(this.#at("held"));
  }

  /** Whatever a test has left. */
  reset(): void {
    for (const name of ["hold", "held", "refuse"]) rmSync(this.#at(name), { force: true });
  }
}
