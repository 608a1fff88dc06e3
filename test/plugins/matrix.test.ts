// The matrix says what is really there: whatever has a ✔ is code, or a command, that can be loaded.

import { pino } from "pino";
import { beforeAll, describe, expect, it } from "vitest";
import { commands } from "../../src/cli/commands.ts";
import { matrixText } from "../../src/cli/plugin.ts";
import { type FeatureName, features, knownPlugins } from "../../src/plugins/features.ts";
import { loadPlugins, pluginStates } from "../../src/plugins/load.ts";
import { featureMatrix, type Matrix } from "../../src/plugins/matrix.ts";

let matrix: Matrix;
beforeAll(async () => {
  process.env.CEDANA_CONFIG = "/nonexistent/cedana.json";
  await loadPlugins(pino({ level: "silent" }), "0.0.0");
  matrix = featureMatrix(pluginStates());
});

/** The rows of Cedana's own matrix, first and later ones. */
const rows = [
  ...["Dump command", "Restore command", "Run command", "Manage command", "Query command", "Helper command"],
  ...[
    "Dump middleware",
    "Restore middleware",
    "Dump VM middleware",
    "Dump VM handler",
    "Restore VM middleware",
  ],
  ...["Restore VM handler", "Run handler", "Run middleware", "Manage handler", "Custom kill signal"],
  ...["GPU interception", "Checkpoint inspect", "Checkpoint decode", "Checkpoint encode", "Query handler"],
  ...[
    "Health checks",
    "Freeze command",
    "Unfreeze command",
    "Freeze handler",
    "Unfreeze handler",
    "Dump handler",
  ],
  ...["Restore handler", "Restore middleware (late)", "Run middleware (late)", "Run handler (serverless)"],
  ...["Custom cleanup", "Custom reaper", "GPU interception restore", "GPU tracing", "GPU tracing restore"],
  ...["Checkpoint storage", "Slurm", "Asynchronous checkpoint", "Dump VM command"],
];

describe("the feature matrix", () => {
  it("has every row and the columns that people look for", () => {
    expect(matrix.rows.map(({ title }) => title)).toEqual(expect.arrayContaining(rows));
    expect(matrix.columns).toEqual(expect.arrayContaining([...knownPlugins]));
    expect(new Set(matrix.rows.map(({ title }) => title)).size).toBe(matrix.rows.length);
  });

  it("has a ✔ only for a command that there is, code that can be loaded, or a value of the feature's type", async () => {
    let ticks = 0;
    for (const { feature, cells } of matrix.rows)
      for (const [at, cell] of cells.entries()) {
        if (cell !== "available") continue;
        ticks++;
        await expectReal(feature, matrix.columns[at]!);
      }
    expect(ticks).toBeGreaterThan(30);
  });

  async function expectReal(feature: FeatureName, plugin: string): Promise<void> {
    const what = `${plugin}: ${feature}`;
    const value = features[feature].ifAvailable<unknown>(plugin, (one: unknown) => one);
    expect(features[feature].faultOf(value), what).toBeUndefined();
    if (typeof value === "string") expect(Object.keys(commands), what).toContain(value);
    else if (typeof value === "function") expect(typeof (await value()), what).toBe("function");
    else expect((value as unknown[]).length, what).toBeGreaterThan(0);
  }

  it("tells what isn't installed from what isn't implemented and from what is broken", () => {
    const { columns, rows } = featureMatrix([
      ...pluginStates(),
      { name: "mine", origin: "/opt/mine", version: "", fault: "too old" },
    ]);
    const cell = (feature: FeatureName, plugin: string) =>
      rows.find((row) => row.feature === feature)!.cells[columns.indexOf(plugin)];
    expect(cell("dumpHandler", "runc")).toBe("available");
    expect(cell("dumpVmHandler", "runc")).toBe("missing");
    expect(cell("dumpVmHandler", "kata")).toBe("absent");
    expect(cell("dumpHandler", "mine")).toBe("broken");
  });

  it("is printed with each mark under its plugin", () => {
    const text = matrixText({
      columns: ["runc", "cloud-hypervisor"],
      rows: [
        { feature: "a", title: "Dump command", cells: ["available", "absent"] },
        { feature: "b", title: "X", cells: ["missing", "broken"] },
      ],
    });
    expect(text.split("\n").slice(0, 3)).toEqual([
      "Feature       runc  cloud-hypervisor",
      "Dump command   ✔           —",
      "X              •           ✖",
    ]);
    expect(text).toMatch(/✔ available {2}• not supported {2}— not installed {2}✖ incompatible$/);
  });
});
