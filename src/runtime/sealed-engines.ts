import { closeSync } from "node:fs";
import { basename } from "node:path";
import type { Logger } from "pino";
import { type SealedCopy, sealedCopy } from "../linux/addon.ts";
import { fileIdentity } from "../linux/file-identity.ts";
import { findBinary } from "./engine.ts";

/** More is no engine: runc has 11 MiB, crun half a one. */
const MAX_BYTES = 64 * 1024 * 1024;
const NAMES = new Set(["runc", "crun"]);
/** A keeper that has been told of a copy has fetched it long before. */
const CLOSE_AFTER_MS = 60_000;

/** What can't be copied (an upgrade is under way, or the engine isn't installed yet) is tried again. */
const AGAIN_AFTER_MS = 60_000;

/** An engine's file and its copy; or when to try again where there is none. */
type Known = { readonly path: string; readonly copy: SealedCopy } | { readonly againAtMs: number };

/**
 * Copies of the engines that cedanad's keepers execute in their place.
 *
 * runc and crun don't run a container's first process from their own file, to which the container could then write through
 * /proc/self/exe (CVE-2019-5736): each time they copy themselves into a sealed memfd first. Started from one, they see that and
 * don't: of 33 ms of `runc exec` 17 remain. A copy that nobody can change is what theirs is for, so one serves the whole node.
 *
 * A keeper executes it only where the file is still the one that was copied: an upgrade counts at once.
 */
export class SealedEngines {
  readonly #log: Pick<Logger, "warn">;
  /** undefined: a copy is being made */
  readonly #known = new Map<string, Known | undefined>();

  constructor(log: Pick<Logger, "warn">) {
    this.#log = log;
  }

  /**
   * The copy of an engine; undefined for other programs, where it can't be made, and until it has been, which the first call begins.
   * @param binary  name (looked up in PATH) or path
   */
  of(binary: string): SealedCopy | undefined {
    if (!NAMES.has(basename(binary))) return undefined;
    const known = this.#known.get(binary);
    if (known === undefined && this.#known.has(binary)) return undefined;
    if (known && "againAtMs" in known && performance.now() < known.againAtMs) return undefined;
    if (known && "copy" in known) {
      const { path, copy } = known;
      if (fileIdentity(path) === copy.of) return copy;
      setTimeout(() => closeSync(copy.fd), CLOSE_AFTER_MS).unref();
    }
    void this.#make(binary);
    return undefined;
  }

  async #make(binary: string): Promise<void> {
    this.#known.set(binary, undefined);
    try {
      const path = await findBinary(binary);
      this.#known.set(binary, { path, copy: await sealedCopy(path, basename(binary), MAX_BYTES) });
    } catch (error) {
      // Meanwhile the engine runs from its file, and makes its own copies.
      this.#known.set(binary, { againAtMs: performance.now() + AGAIN_AFTER_MS });
      this.#log.warn({ err: error, engine: binary }, "copy an engine into a sealed memfd");
    }
  }
}
