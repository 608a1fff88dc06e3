import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { compileFunction, constants } from "node:vm";

/*
 * Runs cedanad's bundle with the code that V8 had made of it when it was built (scripts/build.mjs): compiling it would be 15 ms that
 * somebody waits for. V8 refuses code of another version or other flags and compiles then; that code and source belong together is in
 * their names.
 */

/** Name of both files, without an ending; from the build. */
declare const MAIN: string;

const filename = join(import.meta.dirname, `${MAIN}.cjs`);

const main = compileFunction(
  readFileSync(filename, "latin1"), // the build writes ASCII
  ["exports", "require", "module", "__filename", "__dirname"],
  {
    filename,
    cachedData: readFileSync(join(import.meta.dirname, `${MAIN}.code`)),
    importModuleDynamically: constants.USE_MAIN_CONTEXT_DEFAULT_LOADER,
  },
);
const module = { exports: {} };
main(module.exports, createRequire(filename), module, filename, import.meta.dirname);
