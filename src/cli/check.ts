import { Flags } from "@oclif/core";
import type { CheckEvent } from "../proto/generated/cedana_api.ts";
import { CedanaCommand, ProgressLine } from "./command.ts";
import { jsonFlag } from "./flags.ts";

const marks: Readonly<Record<string, string>> = { ok: "✔", warning: "!", failed: "✖", absent: "—" };
/** The worst last. */
const severities = ["absent", "ok", "warning", "failed"];

export class Check extends CedanaCommand {
  static override summary = "Say whether this node has what checkpoints need";
  static override description =
    "Under a row that isn't well stands what to do. Exit code 0: all is well, or there are warnings; 2: a row fails.";
  static override examples = ["cedana check", "cedana check --full --json"];
  static override flags = {
    full: Flags.boolean({ description: "also what takes seconds or touches devices: GPUs" }),
    plugin: Flags.string({
      helpValue: "NAME",
      description: "only the checks of this plugin; may be repeated",
      multiple: true,
    }),
    ...jsonFlag,
  };

  async run(): Promise<void> {
    const { flags } = await this.parse(Check);
    const { Api } = await import("./api.ts");
    using api = await Api.open();
    const rows: CheckEvent[] = [];
    {
      using progress = new ProgressLine();
      const request = { full: flags.full, plugins: flags.plugin };
      for await (const row of api.events("Check", request, this.interruptible())) {
        rows.push(row);
        progress.show({ step: `${row.plugin}: ${row.name}` });
      }
    }
    // They come as they are ready; people compare two runs.
    rows.sort((a, b) => a.plugin.localeCompare(b.plugin) || a.name.localeCompare(b.name));
    const worst = Math.max(0, ...rows.map(({ status }) => severities.indexOf(status)));
    const ok = severities[worst] !== "failed";
    if (flags.json) this.printJson({ ok, rows });
    else for (const row of rows) this.printRow(row);
    if (!ok) this.exit(2);
  }

  private printRow({ plugin, name, status, summary, advice }: CheckEvent): void {
    this.log(`${marks[status] ?? status} ${plugin.padEnd(10)} ${name}: ${summary}`);
    if (advice !== "" && status !== "ok") this.log(`             → ${advice}`);
  }
}
