import { Command } from "@oclif/core";
import { wrongUsage } from "./failure.ts";

/** `summary` is what the list of commands says; `description` what is to be known besides. How it fails: failure.ts. */
export abstract class CedanaCommand extends Command {
  protected override async catch(error: Error): Promise<never> {
    // Each command begins with parse.
    throw this.parsed ? error : wrongUsage(this.id ?? "", error);
  }

  /** Prints an object as JSON. Numbers keep all their digits. */
  protected printJson(value: unknown): void {
    this.log(JSON.stringify(value, (_key, one) => (typeof one === "bigint" ? Number(one) : one), 2));
  }

  /** Columns as wide as they must be; the last is as long as it is. */
  protected printTable(head: readonly string[], rows: readonly (readonly string[])[]): void {
    const lines = [head, ...rows];
    const widths = head.map((_, at) => Math.max(...lines.map((cells) => cells[at]?.length ?? 0)));
    for (const cells of lines)
      this.log(
        cells
          .map((cell, at) => cell.padEnd(at === cells.length - 1 ? 0 : widths[at]!))
          .join("  ")
          .trimEnd(),
      );
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

export const mib = (bytes: number) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
