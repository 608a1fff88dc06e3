import fs from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";
import * as keeper from "../src/shim/keeper-protocol.ts";

const root = path.resolve(import.meta.dirname, "..");
const source = path.join(root, "src");

/**
 * The folders of src/, and what each may import besides itself. From top to bottom: a folder names only folders below it, so
 * there is no way up and no way around in a circle. Folders on one level don't know each other.
 */
const below = {
  errors: [],
  features: ["errors"],
  proto: ["errors"],
  linux: ["proto", "errors"],
  ttrpc: ["proto", "errors"],
  criu: ["linux", "proto", "errors"],
  checkpoint: ["criu", "linux", "proto", "features", "errors"],
  runtime: ["checkpoint", "criu", "linux", "proto", "features", "errors"],
  shim: ["runtime", "checkpoint", "criu", "linux", "ttrpc", "proto", "features", "errors"],
  gpu: ["runtime", "checkpoint", "criu", "linux", "proto", "features", "errors"],
  vm: ["runtime", "checkpoint", "criu", "linux", "ttrpc", "proto", "features", "errors"],
  plugins: [
    "shim",
    "gpu",
    "vm",
    "runtime",
    "checkpoint",
    "criu",
    "linux",
    "ttrpc",
    "proto",
    "features",
    "errors",
  ],
  daemon: [
    "plugins",
    "shim",
    "gpu",
    "vm",
    "runtime",
    "checkpoint",
    "criu",
    "linux",
    "ttrpc",
    "proto",
    "features",
    "errors",
  ],
  // The command line asks plugins nothing by itself: cedanad does.
  cli: ["daemon", "shim", "gpu", "vm", "runtime", "checkpoint", "criu", "linux", "ttrpc", "proto", "errors"],
} as const satisfies Record<string, readonly string[]>;

function sourceFiles(): string[] {
  return fs
    .readdirSync(source, { recursive: true, encoding: "utf8" })
    .filter((file) => file.endsWith(".ts") && !file.startsWith("proto/generated/"));
}

/** The modules that a file names, of types too: to know a folder's types is to know the folder. */
function importsOf(file: string): string[] {
  const text = fs.readFileSync(path.join(source, file), "utf8").replaceAll(/^\s*(\/\/|\*).*$/gm, "");
  return [...text.matchAll(/(?:\bfrom|\bimport)\s*\(?\s*"([^"]+)"/g)].map((match) => match[1]!);
}

describe("the folders of src/", () => {
  it("are all in the table, which has no way up", () => {
    const names = Object.keys(below);
    const folders = fs.readdirSync(source, { withFileTypes: true }).filter((entry) => entry.isDirectory());
    for (const { name } of folders)
      expect(names, `src/${name} has no place in this file's table`).toContain(name);
    for (const [index, name] of names.entries())
      for (const lower of below[name as keyof typeof below])
        expect(names.indexOf(lower), `${name} and ${lower}`).toBeLessThan(index);
  });

  it("import only what is below them", () => {
    const upward: string[] = [];
    for (const file of sourceFiles()) {
      const [folder] = file.split("/") as [keyof typeof below];
      for (const name of importsOf(file)) {
        if (!name.startsWith(".")) continue;
        const target = path.relative(source, path.resolve(source, path.dirname(file), name));
        const [other] = target.split("/") as [string];
        const allowed: readonly string[] = below[folder] ?? [];
        if (other !== folder && !allowed.includes(other)) upward.push(`src/${file} imports ${target}`);
      }
    }
    expect(upward).toEqual([]);
  });

  it("hold no files that import each other in a circle", () => {
    const files = new Set(sourceFiles());
    const importsIn = (file: string) =>
      importsOf(file)
        .filter((name) => name.startsWith("."))
        .map((name) => path.relative(source, path.resolve(source, path.dirname(file), name)))
        .filter((target) => files.has(target));
    const seen = new Set<string>();
    const circles: string[] = [];
    const visit = (file: string, way: readonly string[]) => {
      if (way.includes(file)) circles.push([...way.slice(way.indexOf(file)), file].join(" → "));
      if (seen.has(file)) return;
      seen.add(file);
      for (const target of importsIn(file)) visit(target, [...way, file]);
    };
    for (const file of files) visit(file, []);
    expect(circles).toEqual([]);
  });

  it("ask the registry, and import no plugin", () => {
    const shared = /^plugins\/(?:features|health|load|matrix|plugin)\.ts$/;
    const direct = sourceFiles().flatMap((file) =>
      importsOf(file)
        .filter((name) => name.startsWith("."))
        .map((name) => path.relative(source, path.resolve(source, path.dirname(file), name)))
        .filter(
          (target) => target.startsWith("plugins/") && !file.startsWith("plugins/") && !shared.test(target),
        )
        .map((target) => `src/${file} imports ${target}`),
    );
    expect(direct).toEqual([]);
    // A plugin is known to the loader and to nobody else; two plugins don't know each other.
    const folderOf = (file: string) => /^plugins\/([^/]+)\//.exec(file)?.[1];
    const crosswise = sourceFiles().flatMap((file) =>
      importsOf(file)
        .filter((name) => name.startsWith("."))
        .map((name) => path.relative(source, path.resolve(source, path.dirname(file), name)))
        .filter(
          (target) => folderOf(target) && folderOf(file) !== folderOf(target) && file !== "plugins/load.ts",
        )
        .map((target) => `src/${file} imports ${target}`),
    );
    expect(crosswise).toEqual([]);
  });

  it("load gRPC, stores and the command line's framework only when they are needed", () => {
    // cedanad answers its first call of a shim before any of these is loaded; `await import()` is how.
    const heavy = /^(?:@grpc\/|@oclif\/|tar-stream|execa)/;
    const eager = sourceFiles().flatMap((file) => {
      if (!/^(?:daemon|shim|runtime|checkpoint|criu|linux|ttrpc|proto|errors)\//.test(file)) return [];
      const text = fs.readFileSync(path.join(source, file), "utf8");
      const names = [...text.matchAll(/^(?:import|export)\s+(?!type\b)[^;]*?\bfrom\s+"([^"]+)"/gm)].map(
        (match) => match[1]!,
      );
      return names.filter((name) => heavy.test(name)).map((name) => `src/${file} imports ${name}`);
    });
    expect(eager).toEqual([]);
  });
});

describe("the keeper's protocol", () => {
  const document = fs.readFileSync(path.join(root, "addon/keeper/PROTOCOL.md"), "utf8");
  const header = fs.readFileSync(path.join(root, "addon/keeper/protocol.h"), "utf8");

  /** The rows of the table under a heading, as cells. */
  function table(heading: string): string[][] {
    const section = document.split(new RegExp(`^## ${heading}$`, "m"))[1]!.split(/^## /m)[0]!;
    const rows = section.split("\n").filter((line) => /^\| \d+ \|/.test(line));
    return rows.map((row) =>
      row
        .split("|")
        .slice(1, -1)
        .map((cell) => cell.trim()),
    );
  }

  /** `PREFIX_SOME_NAME = 5` of the C header. */
  function enumOf(prefix: string): Record<string, number> {
    const members = [...header.matchAll(new RegExp(`\\b${prefix}_([A-Z0-9_]+)\\s*=\\s*(\\d+)`, "g"))];
    return Object.fromEntries(members.map((match) => [match[1]!, Number(match[2])]));
  }

  const fieldRows = table("Fields");
  const messageRows = table("Messages");
  const fields = Object.fromEntries(fieldRows.map(([key, name]) => [name!, Number(key)]));
  // `SPAWN` `T` (version 2): the name is the first word.
  const messages = Object.fromEntries(
    messageRows.map(([type, name]) => [name!.split(" ")[0]!, Number(type)]),
  );
  const upperSnake = (name: string) => name.replaceAll(/[A-Z]/g, (letter) => `_${letter}`).toUpperCase();

  it("has one number for each name, and one name for each number", () => {
    for (const numbers of [fields, messages])
      expect(new Set(Object.values(numbers)).size).toBe(Object.keys(numbers).length);
    expect(fieldRows.length).toBe(Object.keys(fields).length);
    expect(messageRows.length).toBe(Object.keys(messages).length);
    expect(fieldRows.length).toBeGreaterThan(60);
    expect(messageRows.length).toBeGreaterThan(30);
  });

  it("has the same fields in its table, in C and in TypeScript", () => {
    expect(keeper.fieldKey).toEqual(fields);
    expect(enumOf("FIELD")).toEqual(
      Object.fromEntries(Object.entries(fields).map(([name, key]) => [upperSnake(name), key])),
    );
  });

  it("has the same messages in its table, in C and in TypeScript", () => {
    expect(keeper.messageType).toEqual(messages);
    expect(enumOf("MESSAGE")).toEqual(messages);
  });

  it("names in its messages only fields that there are", () => {
    const unknown = messageRows.flatMap(([, name, , list]) =>
      list!
        .replaceAll(/\([^)]*\)|\\?\*/g, "") // "(+ what the operation says)", "argv\*"
        .split(/\s+/)
        .filter((field) => /^[a-z]\w*$/i.test(field) && !(field in fields))
        .map((field) => `${name}: ${field}`),
    );
    expect(unknown).toEqual([]);
  });

  it("has the same limit and the same versions on both sides", () => {
    expect(header).toMatch(/#define OPTIONS_MAX \(10 \* MIB\)/);
    expect(header).toMatch(/#define FRAME_MAX \(OPTIONS_MAX \+ 64 \* KIB\)/);
    expect(keeper.MAX_PAYLOAD_BYTES).toBe(10 * 1024 * 1024 + 64 * 1024);
    expect(header).toMatch(new RegExp(`#define PROTOCOL_MIN ${keeper.PROTOCOL_VERSION_MIN}\\b`));
    const versions = table("Versions").map(([version]) => Number(version));
    expect(Math.max(...versions)).toBe(keeper.PROTOCOL_VERSION_MAX);
    const makefile = fs.readFileSync(path.join(root, "addon/keeper/Makefile"), "utf8");
    expect(makefile).toMatch(new RegExp(`^KEEPER_VERSION_MAX \\?= ${keeper.PROTOCOL_VERSION_MAX}$`, "m"));
  });
});
