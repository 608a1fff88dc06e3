import { createReadStream, createWriteStream, type Stats } from "node:fs";
import { mkdir, open, readdir, rename, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import {
  type DecodeOptions,
  decodeImage,
  encodeImage,
  formatOfFile,
  rawKindOf,
} from "../criu/image/index.ts";
import { InvalidRequest, NotFound } from "../errors/index.ts";

/** One image to a file or stdout. */
export async function decodeFile(
  image: string,
  output: string | undefined,
  options: DecodeOptions,
): Promise<void> {
  await write(decodeImage(image, options), output);
}

/**
 * Every image of a directory but memory pages, as <image>.json in another one.
 * @returns how many; undefined: it is no directory
 */
export async function decodeDirectory(
  directory: string,
  output: string | undefined,
  options: DecodeOptions,
): Promise<number | undefined> {
  if (!(await statOf(directory, "image")).isDirectory()) return undefined;
  if (output === undefined)
    throw new InvalidRequest(`${directory} is a directory: say with --output where to decode it to`);
  await mkdir(output, { recursive: true });
  const names = (await readdir(directory)).filter(
    (name) => formatOfFile(name) ?? rawKindOf(name) === "opaque",
  );
  for (const name of names) await decodeFile(join(directory, name), join(output, `${name}.json`), options);
  return names.length;
}

export async function encodeFile(json: string | undefined, output: string | undefined): Promise<void> {
  const isStdin = json === undefined || json === "-";
  if (!isStdin) await statOf(json, "JSON file");
  const text: AsyncIterable<Uint8Array> = isStdin ? process.stdin : createReadStream(json);
  await write(encodeImage(text), output);
}

async function statOf(path: string, what: string): Promise<Stats> {
  return await stat(path).catch((error: NodeJS.ErrnoException) => {
    throw error.code === "ENOENT" ? new NotFound(`${what} ${path} does not exist`) : error;
  });
}

/** What is written gets its name when it is whole; 0600, because images hold what processes knew. */
async function write(parts: AsyncIterable<string | Uint8Array>, output: string | undefined): Promise<void> {
  if (output === undefined) {
    await pipeline(Readable.from(parts), process.stdout, { end: false }).catch(
      (error: NodeJS.ErrnoException) => {
        if (error.code !== "EPIPE") throw error; // `| head` has seen enough
      },
    );
    return;
  }
  const unfinished = `${output}.part`;
  try {
    await pipeline(Readable.from(parts), createWriteStream(unfinished, { mode: 0o600 }));
    await using file = await open(unfinished);
    await file.sync();
    await rename(unfinished, output);
  } catch (error) {
    await rm(unfinished, { force: true });
    throw error;
  }
}
