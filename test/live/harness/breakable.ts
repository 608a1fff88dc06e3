// A cedanad that doesn't come up as long as a file exists.

import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { repository } from "./programs.ts";

export class BreakableDaemon {
  /** for CEDANA_DAEMON */
  readonly program: string;
  readonly #directory = mkdtempSync(join(tmpdir(), "cedanad-"));
  readonly #broken = join(this.#directory, "broken");

  constructor() {
    this.program = join(this.#directory, "cedanad");
    const script = `#!/bin/sh\n[ -e ${this.#broken} ] && exit 1\nexec ${repository}/bin/cedanad\n`;
    writeFileSync(this.program, script, { mode: 0o755 });
  }

  break(): void {
    writeFileSync(this.#broken, "");
  }

  mend(): void {
    rmSync(this.#broken, { force: true });
  }

  [Symbol.dispose](): void {
    rmSync(this.#directory, { recursive: true, force: true });
  }
}
