// A cedanad that doesn't come up as long as a file exists, and that may have a fault once.

import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { repository } from "./programs.ts";

export class BreakableDaemon {
  /** for CEDANA_DAEMON */
  readonly program: string;
  /** of a containerd whose cedanads end again and again: their keepers don't wait ever longer for the next one */
  readonly env: Record<string, string>;
  readonly #directory = mkdtempSync(join(tmpdir(), "cedanad-"));
  readonly #broken = join(this.#directory, "broken");
  readonly #fault = join(this.#directory, "fault");

  constructor() {
    this.program = join(this.#directory, "cedanad");
    this.env = { CEDANA_DAEMON: this.program, CEDANA_KEEPER_QUICK_MS: "0" };
    const script = [
      "#!/bin/sh",
      `[ -e ${this.#broken} ] && exit 1`,
      `if CEDANA_FAULT=$(cat ${this.#fault} 2>/dev/null); then export CEDANA_FAULT; rm ${this.#fault}; fi`,
      `exec ${repository}/bin/cedanad`,
    ];
    writeFileSync(this.program, `${script.join("\n")}\n`, { mode: 0o755 });
  }

  break(): void {
    writeFileSync(this.#broken, "");
  }

  mend(): void {
    rmSync(this.#broken, { force: true });
  }

  /** The next cedanad that is started, and only that, ends when it comes to this boundary of a chain, or takes up this call. */
  crashNextAt(name: string): void {
    writeFileSync(this.#fault, `crash:${name}`);
  }

  [Symbol.dispose](): void {
    rmSync(this.#directory, { recursive: true, force: true });
  }
}
