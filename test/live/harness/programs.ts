// Compiles the test programs and makes the test image, each once per content.

import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
} from "node:fs";
import { basename, join } from "node:path";
import { promisify } from "node:util";

const run = promisify(execFile);
export const repository = join(import.meta.dirname, "../../..");
const cache = join(repository, "node_modules/.cache/cedana-live");
const sources = join(import.meta.dirname, "../programs");

export const IMAGE = "cedana.local/busybox:latest";
/** What a pod's first container runs. */
export const PAUSE_IMAGE = "cedana.local/pause:latest";

/** Makes `<cache>/<name>-<hash>` by `make` in a directory beside it, renamed when it is whole. */
export async function cached(
  name: string,
  inputs: string[],
  make: (directory: string) => Promise<unknown>,
): Promise<string> {
  const hash = createHash("sha256");
  for (const input of inputs) hash.update(readFileSync(input));
  const path = join(cache, `${name}-${hash.digest("hex").slice(0, 12)}`);
  if (existsSync(path)) return path;
  mkdirSync(cache, { recursive: true });
  const work = mkdtempSync(join(cache, "tmp-"));
  try {
    await make(work);
    renameSync(work, path);
  } catch (error) {
    rmSync(work, { recursive: true, force: true });
    if (!existsSync(path)) throw error; // somebody else was quicker
  }
  return path;
}

async function hasCommand(name: string): Promise<boolean> {
  return await run("sh", ["-c", `command -v ${name}`]).then(
    () => true,
    () => false,
  );
}

/** Directory with the static test programs; the containers see it as /programs. */
export function programs(): Promise<string> {
  return compiled("programs", sources);
}

/** Directory with every C file of `sources` as a static program. */
export async function compiled(name: string, sources: string): Promise<string> {
  const files = readdirSync(sources).filter((name) => /\.[ch]$/.test(name));
  return await cached(
    name,
    files.map((name) => join(sources, name)),
    async (directory) => {
      const compiler = (await hasCommand("musl-gcc")) ? "musl-gcc" : "gcc";
      for (const name of files.filter((name) => name.endsWith(".c")))
        await run(compiler, [
          "-static",
          "-O1",
          "-o",
          join(directory, name.slice(0, -2)),
          join(sources, name),
        ]);
    },
  );
}

/** One static program that needs the kernel's headers, which musl's compiler doesn't see. */
export async function compileProgram(source: string): Promise<string> {
  const name = basename(source, ".c");
  const directory = await cached(name, [source], (directory) =>
    run("gcc", ["-static", "-O1", "-o", join(directory, name), source]),
  );
  return join(directory, name);
}

/** A bundle's root file system, with busybox for these programs, and a place for the test programs. */
export function busyboxRootfs(bundle: string, applets: readonly string[] = ["sh"]): void {
  const rootfs = join(bundle, "rootfs");
  for (const name of ["bin", "dev", "proc", "sys", "run", "programs"])
    mkdirSync(join(rootfs, name), { recursive: true });
  copyFileSync("/usr/bin/busybox", join(rootfs, "bin/busybox"));
  for (const applet of applets) symlinkSync("busybox", join(rootfs, "bin", applet));
}

/** The test image as a tar. */
export function imageTar(): Promise<string> {
  return madeImage("image", IMAGE, ["sh"]);
}

/** The same, but it sleeps unless it is told what to run: one process, as the pause container's, which takes no id of a pod's but 1. */
export function pauseImageTar(): Promise<string> {
  return madeImage("pause-alone", PAUSE_IMAGE, ["sleep", "1000000000"]);
}

async function madeImage(name: string, reference: string, command: string[]): Promise<string> {
  const script = join(repository, "scripts/make-image.sh");
  const directory = await cached(name, [script], (directory) =>
    run("sh", [script, join(directory, "image.tar"), reference], {
      env: { ...process.env, IMAGE_CMD: JSON.stringify(command) },
    }),
  );
  return join(directory, "image.tar");
}
