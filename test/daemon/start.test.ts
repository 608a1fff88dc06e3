import { spawnSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";

const root = join(import.meta.dirname, "../..");
const dist = join(root, "dist");
const node = join(root, "node_modules/node/bin/node");
const flagsIn = (text: string) => text.match(/--[\w-]+(=\d+)?/g);
const script = readFileSync(join(root, "bin/cedanad"), "utf8");
const flags = flagsIn(script.slice(script.indexOf("\nexec ")))!;
const built = existsSync(join(dist, "cedanad.cjs"));

describe.skipIf(!built)("cedanad's bundles (need `npm run build`)", () => {
  /** Name of the two files that belong together, as cedanad.cjs has it. */
  const name = () =>
    /(cedanad-\w{8})\.cjs/.exec(readFileSync(join(dist, "cedanad.cjs"), "utf8").replaceAll("\\\n", ""))![1]!;

  const isRefused = (flags: readonly string[]) => {
    const program = `
      const { readFileSync } = require("node:fs");
      const { compileFunction, constants } = require("node:vm");
      const names = ["exports", "require", "module", "__filename", "__dirname"];
      const main = compileFunction(readFileSync("${name()}.cjs", "latin1"), names, {
        cachedData: readFileSync("${name()}.code"),
        importModuleDynamically: constants.USE_MAIN_CONTEXT_DEFAULT_LOADER,
      });
      process.stdout.write(String(main.cachedDataRejected));`;
    return spawnSync(node, [...flags, "-e", program], { cwd: dist, encoding: "utf8" }).stdout;
  };

  it("V8 takes the code that was made at the build, with cedanad's flags", () => {
    expect(isRefused(flags)).toBe("false");
    expect(isRefused(["--no-lazy"]), "with others it compiles").toBe("true");
  });

  it("is strict, as the modules that it is made of", () => {
    for (const file of [name(), "cedanad", "checkpoint-worker", "image-worker", "gpu-helper"])
      expect(readFileSync(join(dist, `${file}.cjs`), "latin1").slice(0, 13), file).toBe(`"use strict";`);
  });

  it("finds what it rarely needs beside itself", () => {
    const program = `Promise.all([import("./cedanad-execa.cjs"), import("./cedanad-grpc.cjs")]).then(([{ execa }, { default: grpc }]) =>
      process.stdout.write(typeof execa + " " + typeof grpc.Server))`;
    expect(spawnSync(node, ["-e", program], { cwd: dist, encoding: "utf8" }).stdout).toBe(
      "function function",
    );
  });

  it("a launcher that finds no bin/cedanad gives Node the same flags", () => {
    const c = readFileSync(join(root, "addon/keeper/daemon.c"), "utf8");
    const argv = c.slice(c.indexOf("static int daemon_command"), c.indexOf("argv[2] = "));
    expect(flagsIn(argv)).toEqual(flags);
  });
});
