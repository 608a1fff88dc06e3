import { readFile } from "node:fs/promises";
import { text } from "node:stream/consumers";
import { InvalidRequest } from "../errors/index.ts";

/** What archives are encrypted with: a key file's bytes, or the first line of a passphrase file ("-" is stdin). @throws InvalidRequest */
export async function secretOf(
  keyFile: string | undefined,
  passphraseFile: string | undefined,
): Promise<Uint8Array | undefined> {
  if (keyFile !== undefined) return await readNamed("key file", keyFile);
  if (passphraseFile === undefined) return undefined;
  const [line] = (
    passphraseFile === "-"
      ? await text(process.stdin)
      : (await readNamed("passphrase file", passphraseFile)).toString("utf8")
  ).split(/\r?\n/, 1);
  if (!line) throw new InvalidRequest(`passphrase file ${passphraseFile} begins with an empty line`);
  return Buffer.from(line);
}

async function readNamed(what: string, path: string): Promise<Buffer> {
  return await readFile(path).catch((error: Error) => {
    throw new InvalidRequest(`read the ${what} ${path}: ${error.message}`, { cause: error });
  });
}
