import { readFile } from "node:fs/promises";
import { text } from "node:stream/consumers";
import { InvalidRequest } from "../errors/index.ts";

/** What archives are encrypted with: a key file's bytes, or the first line of a passphrase file ("-" is stdin). */
export async function secretOf(
  keyFile: string | undefined,
  passphraseFile: string | undefined,
): Promise<Uint8Array | undefined> {
  if (keyFile !== undefined) return await readFile(keyFile);
  if (passphraseFile === undefined) return undefined;
  const [line] = (
    passphraseFile === "-" ? await text(process.stdin) : await readFile(passphraseFile, "utf8")
  ).split(/\r?\n/, 1);
  if (!line) throw new InvalidRequest(`passphrase file ${passphraseFile} begins with an empty line`);
  return Buffer.from(line);
}
