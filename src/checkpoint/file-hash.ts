import { createHash, type Hash } from "node:crypto";
import { readSync } from "node:fs";
import { Xxh128 } from "../linux/xxh128.ts";

/**
 * Digests of a checkpoint's files are there to find accidents. They are XXH3's of 128 bits, in the form that `xxh128sum` prints: no accident
 * goes unnoticed, and it costs a tenth of SHA-256, which manifests of older checkpoints have and which containerd's content store defines.
 */
export type DigestAlgorithm = "xxh128" | "sha256";

/** Of a digest as the manifest's schema allows it. */
export function algorithmOf(digest: string): DigestAlgorithm {
  return digest.startsWith("sha256:") ? "sha256" : "xxh128";
}

const SHA_BLOCK_BYTES = 1024 * 1024;

/** A digest in the making; for worker threads. */
export class FileHash {
  readonly algorithm: DigestAlgorithm;
  readonly #hash: Hash | Xxh128;
  #block: Buffer | undefined;

  constructor(algorithm: DigestAlgorithm) {
    this.algorithm = algorithm;
    this.#hash = algorithm === "sha256" ? createHash("sha256") : new Xxh128();
  }

  update(bytes: Uint8Array): void {
    this.#hash.update(bytes);
  }

  /** @returns how many bytes there were: fewer than `length` at the end of the file */
  readSync(fd: number, offset: number, length: number): number {
    if (this.#hash instanceof Xxh128) return this.#hash.readSync(fd, offset, length);
    this.#block ??= Buffer.allocUnsafeSlow(SHA_BLOCK_BYTES);
    for (let done = 0; ; ) {
      const read = readSync(fd, this.#block, 0, Math.min(SHA_BLOCK_BYTES, length - done), offset + done);
      this.#hash.update(this.#block.subarray(0, read));
      done += read;
      if (read === 0 || done === length) return done;
    }
  }

  /** `xxh128:` or `sha256:`, and hexadecimal digits */
  digest(): string {
    return `${this.algorithm}:${this.#hash instanceof Xxh128 ? this.#hash.digest() : this.#hash.digest("hex")}`;
  }
}
