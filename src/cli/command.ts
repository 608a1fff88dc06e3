import { Command } from "@oclif/core";
import { messageOf, toExitCode } from "../errors/index.ts";

/** A command whose errors are one line for people; the exit code is `toExitCode`'s (docs/cli.md). */
export abstract class CedanaCommand extends Command {
  protected override async catch(error: Error & { oclif?: unknown }): Promise<never> {
    if (error.oclif !== undefined) throw error; // oclif's own: flags that it doesn't know, and so on
    return this.error(messageOf(error), { exit: toExitCode(error) });
  }

  /** Prints an object as JSON. Numbers keep all their digits. */
  protected printJson(value: unknown): void {
    this.log(JSON.stringify(value, (_key, one) => (typeof one === "bigint" ? Number(one) : one), 2));
  }

  /** Aborted by Ctrl-C, so that what runs in cedanad for us ends, too. A second one kills us. */
  protected interruptible(): AbortSignal {
    const stop = new AbortController();
    process.once("SIGINT", () => stop.abort());
    return stop.signal;
  }
}

/** A line on a terminal's stderr that is replaced as work goes on; nothing elsewhere, so that logs hold results only. */
export class ProgressLine implements Disposable {
  readonly #enabled: boolean;

  constructor(enabled = process.stderr.isTTY === true) {
    this.#enabled = enabled;
  }

  show({ step, done = 0n, total = 0n }: { step: string; done?: bigint; total?: bigint }): void {
    if (!this.#enabled) return;
    const share = total > 0n ? ` ${(done * 100n) / total} %` : "";
    process.stderr.write(`\r\x1b[K${step}${share}`.slice(0, (process.stderr.columns || 80) + 4));
  }

  [Symbol.dispose](): void {
    if (this.#enabled) process.stderr.write("\r\x1b[K");
  }
}
