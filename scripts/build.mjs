// `npm run build`: generated codecs, bundles, native programs. Each part is skipped when nothing that it reads has changed.
//   --only proto|ts|native
import { execFileSync } from "node:child_process";
import fs from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";

const root = path.dirname(path.dirname(fileURLToPath(import.meta.url)));
const only = process.argv.includes("--only") ? process.argv[process.argv.indexOf("--only") + 1] : undefined;
const { version } = JSON.parse(fs.readFileSync(path.join(root, "package.json"), "utf8"));
const node = path.join(root, "node_modules/node/bin/node");

function run(command, args, missing) {
  try {
    execFileSync(command, args, { cwd: root, stdio: ["ignore", "inherit", "inherit"] });
  } catch (error) {
    console.error(
      error.code === "ENOENT"
        ? `build: ${command} is missing: ${missing}`
        : `build: ${command} ${args.join(" ")} failed`,
    );
    process.exit(1);
  }
}

/** Whether any of the inputs (files, or directories as a whole) is newer than the output. */
function isStale(output, inputs) {
  const built = fs.statSync(output, { throwIfNoEntry: false })?.mtimeMs ?? 0;
  const newest = (entry) => {
    const stat = fs.statSync(entry, { throwIfNoEntry: false });
    if (!stat) return 0;
    if (!stat.isDirectory()) return stat.mtimeMs;
    return Math.max(stat.mtimeMs, ...fs.readdirSync(entry).map((name) => newest(path.join(entry, name))));
  };
  return inputs.some((input) => newest(path.join(root, input)) > built);
}

async function proto() {
  const stamp = path.join(root, "src/proto/generated/.stamp");
  if (!isStale(stamp, ["proto", "scripts/proto.mjs"])) return;
  const { generate } = await import("./proto.mjs");
  const modules = generate(path.join(root, "proto"), path.join(root, "src/proto/generated"));
  fs.writeFileSync(stamp, "");
  console.log(`build: ${modules.length} codecs`);
}

async function ts() {
  const stamp = path.join(root, "dist/.stamp");
  if (!isStale(stamp, ["src", "scripts/build.mjs", "package.json"])) return;
  const { build } = await import("esbuild");
  fs.rmSync(path.join(root, "dist"), { recursive: true, force: true });
  await build({
    absWorkingDir: root,
    entryPoints: {
      cedanad: "src/daemon/main.ts",
      cedana: "src/cli/main.ts",
      commands: "src/cli/commands.ts",
    },
    outdir: "dist",
    bundle: true,
    platform: "node",
    target: "node24",
    format: "esm",
    splitting: true,
    sourcemap: true,
    external: ["@oclif/core"], // finds its plugins and our package.json by paths
    // pino and others are CommonJS and ask for Node's own modules by require.
    banner: {
      js: 'import { createRequire as __createRequire } from "node:module"; const require = __createRequire(import.meta.url);',
    },
    define: { "process.env.CEDANA_BUILD": JSON.stringify(version) },
    logLevel: "warning",
  });
  fs.writeFileSync(stamp, "");
  console.log("build: dist/cedanad.js, dist/cedana.js");
}

function native() {
  let revision = "unknown";
  try {
    revision = execFileSync("git", ["-C", root, "rev-parse", "--short", "HEAD"], {
      stdio: ["ignore", "pipe", "ignore"],
    })
      .toString()
      .trim();
  } catch {
    // an unpacked archive has no history
  }
  const keeper = path.join(root, "build/keeper/cedana-keeper");
  if (isStale(keeper, ["addon/keeper", "package.json"])) {
    run(
      "make",
      [
        "--no-print-directory",
        "-s",
        "-C",
        "addon/keeper",
        `OUT=${path.dirname(keeper)}`,
        `NODE=${node}`,
        `DAEMON_JS=${path.join(root, "dist/cedanad.js")}`,
        `VERSION=${version}`,
        `REVISION=${revision}`,
      ],
      "apt-get install make gcc musl-tools",
    );
    fs.utimesSync(keeper, new Date(), new Date());
    console.log("build: keeper");
  }
  for (const name of ["containerd-shim-cedana-v2", "cedana-runtime"]) {
    const target = path.join(root, "bin", name);
    if (!isStale(target, ["build/keeper/cedana-keeper"])) continue;
    fs.copyFileSync(keeper, `${target}.new`);
    fs.chmodSync(`${target}.new`, 0o755);
    fs.renameSync(`${target}.new`, target);
  }
  const addon = path.join(root, "build/binding/cedana.node");
  if (isStale(addon, ["addon/binding"])) {
    fs.mkdirSync(path.dirname(addon), { recursive: true });
    const sources = fs.readdirSync(path.join(root, "addon/binding")).filter((name) => name.endsWith(".cc"));
    run(
      "g++",
      [
        "-std=c++20",
        "-O2",
        "-Wall",
        "-Wextra",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-DNAPI_VERSION=9",
        "-DNODE_ADDON_API_CPP_EXCEPTIONS",
        "-Inode_modules/node-addon-api",
        "-Inode_modules/node-api-headers/include",
        ...sources.map((name) => `addon/binding/${name}`),
        "-o",
        `${addon}.new`,
      ],
      "apt-get install g++",
    );
    fs.renameSync(`${addon}.new`, addon);
    console.log("build: addon");
  }
}

if (!only || only === "proto") await proto();
if (!only || only === "ts") await ts();
if (!only || only === "native") native();
