import { Flags } from "@oclif/core";
import type { ListPluginsResponse } from "../proto/generated/cedana_api.ts";
import { CedanaCommand } from "./command.ts";
import { jsonFlag } from "./flags.ts";

// `cedana plugin …`, `cedana features`: what plugins there are, and what each can do.

async function askForPlugins(): Promise<ListPluginsResponse> {
  const { Api } = await import("./api.ts");
  using api = await Api.open();
  return await api.call("ListPlugins", {});
}

const marks: Readonly<Record<string, string>> = { available: "✔", missing: "•", absent: "—", broken: "✖" };

/** The matrix as people read it: a line for each feature, a column for each plugin. */
export function matrixText({ columns, rows }: Pick<ListPluginsResponse, "columns" | "rows">): string {
  const width = Math.max("Feature".length, ...rows.map(({ title }) => title.length));
  const line = (first: string, cells: readonly string[]) =>
    [first.padEnd(width), ...cells.map((cell, at) => centred(cell, columns[at]!.length))]
      .join("  ")
      .trimEnd();
  return [
    line("Feature", columns),
    ...rows.map(({ title, cells }) =>
      line(
        title,
        cells.map((cell) => marks[cell] ?? cell),
      ),
    ),
    "",
    "✔ available  • not supported  — not installed  ✖ incompatible",
  ].join("\n");
}

function centred(text: string, width: number): string {
  const before = Math.floor((width - text.length) / 2);
  return `${" ".repeat(before)}${text}`.padEnd(width);
}

export class Features extends CedanaCommand {
  static override summary = "Show which plugin has which feature";
  static override description =
    "From what the plugins really export: ✔ available, • not supported, — not installed, ✖ incompatible.";
  static override examples = ["cedana features", "cedana features --errors"];
  static override flags = {
    errors: Flags.boolean({ description: "say why a plugin is incompatible" }),
    ...jsonFlag,
  };

  async run(): Promise<void> {
    const { flags } = await this.parse(Features);
    const answer = await askForPlugins();
    const broken = answer.plugins.filter(({ fault }) => fault !== "");
    if (flags.json) {
      const { plugins, columns, rows } = answer;
      this.printJson({
        columns,
        rows: rows.map(({ feature, title, cells }) => ({
          feature,
          title,
          plugins: Object.fromEntries(columns.map((column, at) => [column, cells[at]])),
        })),
        errors: Object.fromEntries(plugins.flatMap(({ name, fault }) => (fault ? [[name, fault]] : []))),
      });
      return;
    }
    this.log(matrixText(answer));
    if (flags.errors) {
      this.log("");
      for (const { name, fault } of broken) this.log(`${name}: ${fault}`);
      if (broken.length === 0) this.log("every plugin is loaded");
    } else if (broken.length > 0) this.log(`${broken.length} can't be loaded: --errors says why`);
  }
}

export class PluginList extends CedanaCommand {
  static override summary = "List the plugins: where each is from, and what is wrong with it";
  static override examples = ["cedana plugin list"];
  static override flags = jsonFlag;

  async run(): Promise<void> {
    const { flags } = await this.parse(PluginList);
    const { plugins } = await askForPlugins();
    if (flags.json) {
      this.printJson(plugins);
      return;
    }
    this.printTable(
      ["PLUGIN", "VERSION", "FEATURES", "FROM"],
      plugins.map(({ name, version, origin, features, fault }) => [
        name,
        version || "-",
        fault === "" ? String(features.length) : "✖",
        fault === "" ? origin : fault,
      ]),
    );
  }
}
