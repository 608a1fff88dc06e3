import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { setFlagsFromString } from "node:v8";
import { compileFunction, constants } from "node:vm";

/*
 * Runs cedanad's bundle with the code that V8 had made of it when it was built (scripts/bundle.mjs): compiling it would be 15 ms that
 * somebody waits for. V8 refuses code of another version or other flags and compiles then; that code and source belong together is in
 * their names.
 */

/** From the build: the name of both files, without an ending, and Node's modules that are needed sooner or later. */
declare const MAIN: string;
declare const MODULES_OF_NODE: readonly string[];

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
const require = createRequire(filename);
for (const name of MODULES_OF_NODE) require(name);
main(module.exports, require, module, filename, import.meta.dirname);

/*
 * Nothing here lives on allocating or computing fast, and memory shall stay flat over thousands of containers: old objects are looked through
 * in small steps when the heap has gone a fifth of the way to its limit. TurboFan, and Maglev's inlining, would fill malloc's heap with some
 * MiB for a moment each time, some of which never go back, and bring 5 MB of Node's own code into memory; without them cedanad needs 7 % more
 * CPU. With these flags V8 refuses all code that was made beforehand, that of Node's own modules, too: 30 ms more, were they there before.
 */
for (const flag of [
  "optimize-for-size",
  "incremental-marking-soft-trigger=20",
  "no-turbofan",
  "no-maglev-inlining",
])
  setFlagsFromString(`--${flag}`);
