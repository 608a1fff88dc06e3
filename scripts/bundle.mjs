// The TypeScript part of `npm run build`: what stands in dist/.
//
//   src/daemon                 cedanad.cjs, which runs cedanad-HASH.cjs with what V8 made of it, cedanad-HASH.code
//                              cedanad-grpc.cjs, cedanad-execa.cjs: packages that it rarely needs and that take long to load
//   src/checkpoint/worker      checkpoint-worker.cjs, what worker threads of cedanad and the command line run
//   src/criu/image/worker.ts   image-worker.cjs, a thread that verifies images
//   src/gpu/helper             gpu-helper.cjs, the process that loads a GPU driver
//   src/cli                    cedana.js, commands.js, and chunks that load when a command needs them

import { execFileSync } from "node:child_process";
import fs from "node:fs";
import path from "node:path";
import * as esbuild from "esbuild";

const root = path.resolve(import.meta.dirname, "..");
const dist = path.join(root, "dist");

const rarelyNeeded = { execa: "cedanad-execa.cjs", "@grpc/grpc-js": "cedanad-grpc.cjs" };

const shared = {
  absWorkingDir: root,
  outdir: dist,
  bundle: true,
  platform: "node",
  target: "node24",
  sourcemap: "linked",
  legalComments: "linked",
  logLevel: "warning",
  write: false,
};

/**
 * What is to be written to dist/, in the order in which it is to be put there: nothing names a file that isn't there yet.
 * @param version  of the package
 * @param node     the program that will run it
 * @returns {Promise<{ path: string, contents: Uint8Array }[]>}
 * @throws when esbuild fails, which has printed why
 */
export async function bundle(version, node) {
  const define = { "process.env.CEDANA_BUILD": JSON.stringify(version) };
  const flags = daemonFlags();
  const madeFor = [execFileSync(node, ["--version"], { encoding: "utf8" }).trim(), ...flags].join(" ");
  const main = await program("src/daemon/main.ts", "cedanad-[hash]", define, madeFor);
  const source = main.find(({ path: file }) => file.endsWith(".cjs"));
  const name = path.basename(source.path, ".cjs");
  const code = path.join(dist, `${name}.code`);
  return [
    ...main,
    { path: code, contents: fs.existsSync(code) ? fs.readFileSync(code) : compiled(source, node, flags) },
    ...(
      await Promise.all(Object.entries(rarelyNeeded).map(([module, file]) => library(module, file)))
    ).flat(),
    ...(await program("src/checkpoint/worker/main.ts", "checkpoint-worker", define)),
    ...(await program("src/criu/image/worker.ts", "image-worker", define)),
    ...(await program("src/gpu/helper/main.ts", "gpu-helper", define)),
    ...(await program("src/daemon/start.ts", "cedanad", {
      MAIN: JSON.stringify(name),
      MODULES_OF_NODE: JSON.stringify(modulesOfNode(source)),
    })),
    ...(await commandLine(define)),
  ];
}

/**
 * One CommonJS file, for whose start somebody waits: as 50 ES modules it takes Node 50 ms more to find, compile and link it.
 * @param madeFor  what its name's hash covers, besides its content
 */
async function program(file, name, define, madeFor = "") {
  const { outputFiles } = await esbuild.build({
    ...shared,
    entryPoints: [file],
    entryNames: name,
    format: "cjs",
    outExtension: { ".js": ".cjs" },
    minifySyntax: true,
    minifyWhitespace: true, // a third less to read and parse; names stay, for stack traces
    lineLimit: 200,
    banner: {
      js: `"use strict"; const fileUrl$ = require("node:url").pathToFileURL(__filename).href; // ${madeFor}`,
    },
    define: {
      ...define,
      "import.meta.url": "fileUrl$",
      "import.meta.dirname": "__dirname",
      "import.meta.filename": "__filename",
    },
    plugins: [
      {
        name: "rarely needed",
        setup: ({ onResolve }) =>
          onResolve({ filter: new RegExp(`^(${Object.keys(rarelyNeeded).join("|")})$`) }, (asked) => ({
            path: `./${rarelyNeeded[asked.path]}`,
            external: true,
          })),
      },
    ],
  });
  return outputFiles;
}

async function library(module, file) {
  const { outputFiles } = await esbuild.build({
    ...shared,
    stdin: { contents: `export * from ${JSON.stringify(module)};`, resolveDir: root },
    format: "cjs",
    outdir: undefined,
    outfile: path.join(dist, file),
  });
  return outputFiles;
}

async function commandLine(define) {
  const { outputFiles } = await esbuild.build({
    ...shared,
    entryPoints: { cedana: "src/cli/main.ts", commands: "src/cli/commands.ts" },
    format: "esm",
    splitting: true,
    chunkNames: "cedana-[name]-[hash]",
    external: ["@oclif/core"], // finds its plugins, and our package.json, by paths
    // CommonJS packages (pino) ask for Node's own modules by require().
    banner: {
      js: 'import { createRequire as createRequire$ } from "node:module";\nconst require = createRequire$(import.meta.url);',
    },
    define,
  });
  const isEntry = ({ path: file }) => Number(/^(cedana|commands)\./.test(path.basename(file)));
  return outputFiles.sort((a, b) => isEntry(a) - isEntry(b));
}

function modulesOfNode({ text }) {
  return [...new Set(Array.from(text.matchAll(/\brequire\("(node:[\w/]+)"\)/g), ([, name]) => name))].sort();
}

/** V8 takes code that was made beforehand only with the flags with which it was made. */
function daemonFlags() {
  const script = fs.readFileSync(path.join(root, "bin/cedanad"), "utf8");
  return script.slice(script.indexOf("\nexec ")).match(/--[\w-]+(=\d+)?/g);
}

/** What V8 makes of a bundle, so that cedanad needn't wait for it at its start (src/daemon/start.ts): 15 of 20 ms. */
function compiled({ path: filename, contents }, node, flags) {
  const script = `
    const { readFileSync, writeSync } = require("node:fs");
    const { compileFunction, constants } = require("node:vm");
    const names = ["exports", "require", "module", "__filename", "__dirname"];
    const { cachedData } = compileFunction(readFileSync(0, "latin1"), names, {
      filename: process.argv[1],
      produceCachedData: true,
      importModuleDynamically: constants.USE_MAIN_CONTEXT_DEFAULT_LOADER,
    });
    for (let at = 0; at < cachedData.length; ) at += writeSync(1, cachedData, at);`;
  return execFileSync(node, [...flags, "-e", script, filename], {
    input: contents,
    maxBuffer: 64 * 1024 * 1024,
  });
}
