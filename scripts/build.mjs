// `npm run build`: codecs, bundles, native programs. What has not changed is left alone.
//
//   node scripts/build.mjs [--only proto|ts|native]
//
//   proto    proto/*.proto            -> src/proto/generated/*.ts
//   ts       src                      -> dist (scripts/bundle.mjs says what)
//   native   addon/keeper, addon/gpu  -> build/keeper/cedana-keeper, bin/containerd-shim-cedana-v2, bin/cedana-runtime
//            addon/binding            -> build/binding/cedana.node
//            addon/pages              -> build/pages/libcedana-pages.so
//
// Everything is put in place by rename: a daemon or a test that runs meanwhile sees the old file or the new one. Plain
// JavaScript, because any Node from 20 on may run it; what it builds runs under the Node that the package pins.

import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import fs from "node:fs";
import path from "node:path";

const root = path.resolve(import.meta.dirname, "..");
const at = (...parts) => path.join(root, ...parts);
const { version } = JSON.parse(fs.readFileSync(at("package.json"), "utf8"));
const pinnedNode = at("node_modules/node/bin/node");

/** A chunk of an earlier build stays this long: a daemon that started from it may still load it. */
const keepChunksMs = 24 * 60 * 60 * 1000;
/** Longer than any build takes. */
const lockPatienceMs = 120_000;

class BuildFailed extends Error {}

async function main(args) {
  const only = args[0] === "--only" ? args[1] : undefined;
  if (args.length > 0 && !["proto", "ts", "native"].includes(only)) {
    throw new BuildFailed("usage: node scripts/build.mjs [--only proto|ts|native]");
  }
  if (!fs.existsSync(pinnedNode)) throw new BuildFailed("node_modules/node is missing: run `npm ci`");
  const release = await lock(at("build/lock"));
  try {
    if (!only || only === "proto") await buildProto();
    if (!only || only === "ts") await buildTypeScript();
    if (!only || only === "native") {
      buildBinding();
      buildPages();
      buildGpu();
      buildKeeper();
    }
  } finally {
    release();
  }
}

async function buildProto() {
  const schemas = list(at("proto/criu"), /\.proto$/);
  const inputs = [...list(at("proto"), /\.proto$/), ...schemas, at("scripts/proto.mjs")];
  const generated = at("src/proto/generated");
  const codecs = list(at("proto"), /\.proto$/).map((file) => path.basename(file, ".proto"));
  const tables = schemas.map((file) => `criu_${path.basename(file, ".proto")}`);
  const outputs = [...codecs, ...tables].map((name) => path.join(generated, `${name}.ts`));
  if (!changed("proto", inputs, outputs)) return;
  const { generate } = await import("./proto.mjs");
  const modules = generate(at("proto"), generated);
  remember("proto", inputs);
  say(`src/proto/generated: ${modules.length} codecs`);
}

async function buildTypeScript() {
  const { bundle } = await import("./bundle.mjs").catch((error) => {
    if (error.code !== "ERR_MODULE_NOT_FOUND") throw error;
    throw new BuildFailed("esbuild is missing: run `npm ci`");
  });
  const files = await bundle(version, pinnedNode).catch((error) => {
    throw new BuildFailed(`bundle: ${error.message}`);
  });
  const written = new Set(files.map((file) => path.basename(file.path)));
  let news = 0;
  for (const file of files)
    if (writeIfChanged(file.path, file.contents) && !/\.(map|txt)$/.test(file.path)) news++;
  for (const file of list(at("dist"), /./)) {
    if (!written.has(path.basename(file)) && fs.statSync(file).mtimeMs < Date.now() - keepChunksMs)
      fs.rmSync(file);
  }
  if (news > 0) say(`dist: ${news} bundles`);
}

function buildKeeper() {
  if (!fs.existsSync(at("addon/keeper/Makefile"))) return;
  make("addon/keeper", [
    `OUT=${at("build/keeper")}`,
    `NODE=${pinnedNode}`,
    `DAEMON_JS=${at("dist/cedanad.cjs")}`,
    `VERSION=${version}`,
    `REVISION=${revision()}`,
  ]);
  const program = fs.readFileSync(at("build/keeper/cedana-keeper"));
  for (const name of ["containerd-shim-cedana-v2", "cedana-runtime"]) {
    if (writeIfChanged(at("bin", name), program, 0o755)) say(`bin/${name}`);
  }
}

function buildGpu() {
  if (fs.existsSync(at("addon/gpu/Makefile")))
    make("addon/gpu", [`OUT=${at("build/gpu")}`, `VERSION=${version}`]);
}

/** Without node-gyp: one compiler call, headers from the two packages, symbols from the Node that loads it. */
function buildBinding() {
  const sources = list(at("addon/binding"), /\.cc$/);
  if (sources.length === 0) return;
  const target = at("build/binding/cedana.node");
  const flags = [
    ...["-std=c++20", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden"],
    ...["-DNAPI_VERSION=9", "-DNODE_ADDON_API_CPP_EXCEPTIONS", "-D_GNU_SOURCE"],
    ...[
      "-isystem",
      at("node_modules/node-addon-api"),
      "-isystem",
      at("node_modules/node-api-headers/include"),
    ],
  ];
  const inputs = [...sources, ...list(at("addon/binding"), /\.h$/)];
  if (!changed("binding", inputs, [target], flags)) return;
  fs.mkdirSync(path.dirname(target), { recursive: true });
  run(
    process.env.CXX || "g++",
    [...flags, ...sources, "-o", `${target}.new`],
    "a C++ compiler and the header of xxHash: apt-get install g++ libxxhash-dev",
  );
  fs.renameSync(`${target}.new`, target);
  remember("binding", inputs, flags);
  say("build/binding/cedana.node");
}

/** With the system's own compiler: CRIU, into which it is loaded, has the system's C library. */
function buildPages() {
  const source = at("addon/pages/pages.c");
  const target = at("build/pages/libcedana-pages.so");
  const flags = [
    ...[
      "-std=c11",
      "-Os",
      "-Wall",
      "-Wextra",
      "-Wshadow",
      "-Wstrict-prototypes",
      "-Wmissing-prototypes",
      "-Wvla",
    ],
    ...["-Werror", "-fPIC", "-shared", "-fvisibility=hidden", "-s"],
  ];
  if (!changed("pages", [source], [target], flags)) return;
  fs.mkdirSync(path.dirname(target), { recursive: true });
  run("cc", [...flags, source, "-o", `${target}.new`], "a C compiler: apt-get install gcc");
  fs.renameSync(`${target}.new`, target);
  remember("pages", [source], flags);
  say("build/pages/libcedana-pages.so");
}

function make(directory, settings) {
  run(
    "make",
    ["--no-print-directory", "-s", "-C", at(directory), ...settings],
    "make: apt-get install make gcc musl-tools",
  );
}

/** The commit that is built, `unknown` outside of a repository. */
function revision() {
  try {
    return execFileSync("git", ["-C", root, "rev-parse", "--short", "HEAD"], {
      stdio: ["ignore", "pipe", "ignore"],
    })
      .toString()
      .trim();
  } catch {
    return "unknown"; // an unpacked archive has no history, a small machine no git
  }
}

function run(command, args, missing) {
  const { error, status, signal } = spawnSync(command, args, {
    cwd: root,
    stdio: ["ignore", "inherit", "inherit"],
  });
  if (error?.code === "ENOENT")
    throw new BuildFailed(`\`${command}\` is not installed; the build needs ${missing}`);
  if (error) throw new BuildFailed(`${command}: ${error.message}`);
  if (status !== 0) throw new BuildFailed(`${command} failed (${signal ?? `exit status ${status}`})`);
}

/** Whether the inputs (or the settings) are others than at the last `remember`, or an output is missing. */
function changed(step, inputs, outputs, settings = []) {
  if (!outputs.every((file) => fs.existsSync(file))) return true;
  const stamp = at("build/stamps", step);
  return !fs.existsSync(stamp) || fs.readFileSync(stamp, "utf8") !== digest(inputs, settings);
}

function remember(step, inputs, settings = []) {
  fs.mkdirSync(at("build/stamps"), { recursive: true });
  fs.writeFileSync(at("build/stamps", step), digest(inputs, settings));
}

/** By content, because a checkout changes times. */
function digest(inputs, settings) {
  const hash = createHash("sha256").update(JSON.stringify(settings));
  for (const file of inputs) hash.update(`\0${file}\0`).update(fs.readFileSync(file));
  return hash.digest("hex");
}

function list(directory, pattern) {
  if (!fs.existsSync(directory)) return [];
  return fs
    .readdirSync(directory, { withFileTypes: true })
    .filter((entry) => entry.isFile() && pattern.test(entry.name))
    .map((entry) => path.join(directory, entry.name))
    .sort();
}

/** @returns whether there was something to write */
function writeIfChanged(file, contents, mode = 0o644) {
  const old = fs.existsSync(file) ? fs.readFileSync(file) : undefined;
  if (old?.equals(contents) && (fs.statSync(file).mode & 0o777) === mode) return false;
  fs.mkdirSync(path.dirname(file), { recursive: true });
  fs.writeFileSync(`${file}.new`, contents);
  fs.chmodSync(`${file}.new`, mode);
  fs.renameSync(`${file}.new`, file);
  return true;
}

/**
 * One build at a time in a checkout. The lock is a file with the pid of who holds it; one whose process is gone counts for nothing.
 * @returns what releases it
 */
async function lock(file) {
  fs.mkdirSync(path.dirname(file), { recursive: true });
  const giveUpAt = Date.now() + lockPatienceMs;
  for (let waited = false; ; waited = true) {
    try {
      fs.writeFileSync(file, `${process.pid}`, { flag: "wx" });
      return () => fs.rmSync(file, { force: true });
    } catch (error) {
      if (error.code !== "EEXIST") throw error;
    }
    const holder = Number(readIfThere(file));
    if (holder > 0 && !isAlive(holder)) {
      fs.rmSync(file, { force: true });
      continue;
    }
    if (Date.now() > giveUpAt) throw new BuildFailed(`another build (process ${holder}) holds ${file}`);
    if (!waited) say(`waiting for another build (process ${holder || "unknown"})`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

function readIfThere(file) {
  try {
    return fs.readFileSync(file, "utf8");
  } catch {
    return ""; // released between our two looks
  }
}

function isAlive(pid) {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return error.code === "EPERM";
  }
}

function say(text) {
  console.log(`build: ${text}`);
}

try {
  await main(process.argv.slice(2));
} catch (error) {
  if (!(error instanceof BuildFailed)) throw error;
  console.error(`build: ${error.message}`);
  process.exitCode = 1;
}
