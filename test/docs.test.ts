import fs from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { dumpSteps } from "../src/checkpoint/dump.ts";
import { restoreSteps } from "../src/checkpoint/restore.ts";
import { commands } from "../src/cli/commands.ts";
import * as errors from "../src/errors/index.ts";
import { Management } from "../src/proto/generated/cedana_api.ts";

/*
 * What the code reads and what the documents say of it are one list: whoever adds a key, a variable, a command, a method, an error or a
 * step finds here where it is to be written down, and whoever removes one, where it still stands.
 */

const root = path.resolve(import.meta.dirname, "..");
const read = (file: string) => fs.readFileSync(path.join(root, file), "utf8");

function filesBelow(directory: string, wanted: RegExp): string[] {
  return fs
    .readdirSync(path.join(root, directory), { recursive: true, encoding: "utf8" })
    .filter((file) => wanted.test(file) && !/(^|\/)(node_modules|generated|build)\//.test(file))
    .map((file) => path.join(directory, file));
}

const documents = [
  "README.md",
  "ARCHITECTURE.md",
  ...["docs", "src", "addon", "proto", "test"].flatMap((directory) => filesBelow(directory, /\.md$/)),
];
const sources = [...filesBelow("src", /\.ts$/), ...filesBelow("addon", /\.(c|h|cc)$/)];

/** What stands in the first column of a document's tables, in code marks. */
function firstColumn(document: string): Set<string> {
  const cells = [...read(document).matchAll(/^\|([^|]*)\|/gm)].map((match) => match[1]!);
  return new Set(cells.flatMap((cell) => [...cell.matchAll(/`([^`]+)`/g)].map((match) => match[1]!)));
}

/** The strings of a list in a source, by what stands before and after it. */
function stringsBetween(file: string, begin: RegExp, end: string): string[] {
  const text = read(file);
  const from = begin.exec(text);
  if (!from) throw new Error(`${file} has no ${begin}`);
  const list = text.slice(from.index + from[0].length, text.indexOf(end, from.index + from[0].length));
  return [...list.matchAll(/"([^"]+)"/g)].map((match) => match[1]!);
}

describe("docs/annotations.md", () => {
  const ofPolicies = [
    ...read("src/runtime/spec.ts")
      .split("const policies = [")[1]!
      .split("] as const satisfies")[0]!
      .matchAll(/\[\s*"([a-z-]+)",\s*"[a-zA-Z]+"/g),
  ].map((match) => match[1]!);
  const parts = ["signal", "grace", "escalation"];
  const ofSignals = parts.flatMap((part) => [`kill-${part}`, `exec-kill-${part}`]);
  const ofHooks = stringsBetween("src/runtime/hooks.ts", /hookNames: readonly HookName\[\] = \[/, "]").map(
    (name) => `hook.${name}`,
  );
  const keys = [...ofPolicies, ...ofSignals, ...ofHooks, "hook-timeout"].toSorted();

  it("has every annotation that is read, and no other", () => {
    expect(ofPolicies.length).toBeGreaterThan(15);
    expect(ofHooks).toHaveLength(2);
    const documented = [...firstColumn("docs/annotations.md")].filter(
      (cell) => !cell.includes(".k") && !cell.startsWith("io.") && !cell.startsWith("cdi."),
    );
    expect(documented.toSorted()).toEqual(keys);
  });

  it("has every annotation that is written anywhere, so that none is misspelt", () => {
    const named = /cedana\.io\/([a-z]+(?:[.-][a-z]+)*)/g;
    const unknown: string[] = [];
    // KEY.CONTAINER, "kill-…", and in documents `checkpoint-…` for several
    for (const file of [
      ...sources,
      ...documents,
      ...filesBelow("packaging", /./).filter((one) => fs.statSync(path.join(root, one)).isFile()),
    ])
      for (const [, key = ""] of read(file).matchAll(named))
        if (!keys.some((known) => key === known || key.startsWith(`${known}.`) || known.startsWith(key)))
          unknown.push(`${file}: cedana.io/${key}`);
    expect(unknown).toEqual([]);
  });

  it("is in step with what makes cedana-runtime ask cedanad", () => {
    const acting = stringsBetween("addon/keeper/runtime.c", /acting\[\] = \{/, "}");
    expect(acting).toContain("restore-from");
    const [row = ""] = /^\| `create`, `run` \|.*$/m.exec(read("docs/runtime.md")) ?? [];
    for (const key of acting)
      expect(row, `docs/runtime.md says of create and run nothing of ${key}`).toContain(
        key.replace(/^kill-.*/, "kill-…"),
      );
  });
});

describe("docs/configuration.md", () => {
  const documented = firstColumn("docs/configuration.md");

  it("has every key of config.json, and no other", () => {
    const text = read("src/runtime/configuration.ts");
    const groups = new Map(
      [...text.matchAll(/object\((?:json|top\.\w+), "([^"]+)", \[([^\]]*)\]/g)].map(
        ([, name = "", list = ""]) => [name, [...list.matchAll(/"(\w+)"/g)].map((match) => match[1]!)],
      ),
    );
    const keys = groups
      .get("the file")!
      .flatMap((key) => groups.get(key)?.map((one) => `${key}.${one}`) ?? [key]);
    expect(keys.length).toBeGreaterThan(15);
    const isKey = (cell: string) =>
      /^(annotations|checkpoints|restore|gpu|plugins)\.\w+$|^restoreFromPaths$/.test(cell);
    expect([...documented].filter(isKey).toSorted()).toEqual(keys.toSorted());
  });

  it("has every key of runtime.json", () => {
    const keys = [
      "engine",
      ...stringsBetween("addon/keeper/runtime-config.c", /\} settings\[\] = \{/, ";").filter(
        (name) => !name.startsWith("CEDANA_"),
      ),
    ];
    expect(keys).toHaveLength(4);
    for (const key of keys) expect([...documented], key).toContain(key);
  });

  it("has every environment variable of ours that is read, and no other", () => {
    // Marks around headers are no variables, CEDANA_BUILD is put in by the build, and what begins with CEDANA_TEST_ is the tests' own.
    const isVariable = (name: string) => !/(_H|_)$|^CEDANA_(BUILD$|TEST_)/.test(name);
    const named = (files: readonly string[]) =>
      new Set(files.flatMap((file) => read(file).match(/CEDANA_[A-Z_]+/g) ?? []).filter(isVariable));
    const used = named([...sources, "scripts/setup.sh", "bin/cedana", "bin/cedanad"]);
    for (const part of ["SIGNAL", "GRACE", "ESCALATION"]) used.add(`CEDANA_KILL_${part}`);
    expect([...documented].filter((cell) => /^CEDANA_/.test(cell)).toSorted()).toEqual([...used].toSorted());
  });
});

describe("docs/cli.md", () => {
  const names = Object.keys(commands).map((id) => id.replace(":", " "));

  it("has every command", () => {
    const text = read("docs/cli.md");
    for (const name of names) expect(text, `cedana ${name}`).toMatch(new RegExp(`\`cedana ${name}[\` ]`));
  });

  it("names no command, and no flag of one, that there isn't; nor does another document", () => {
    const wrong: string[] = [];
    for (const file of documents)
      for (const [line] of read(file).matchAll(/(?<=[`\s(])cedana [a-z]+(?: [a-z]+)?[^`\n#]*/g)) {
        const [, first = "", second = ""] = /^cedana ([a-z]+)(?: ([a-z]+)\b)?/.exec(line)!;
        if (!names.some((name) => name.split(" ")[0] === first)) continue; // prose: "cedana is …"
        const name = names.find((one) => one === `${first} ${second}`) ?? names.find((one) => one === first);
        const isTopic = second === "" || !/^[a-z]+$/.test(second);
        if (name === undefined) {
          if (!isTopic) wrong.push(`${file}: ${line}`);
          continue;
        }
        const { flags = {} } = commands[name.replace(" ", ":") as keyof typeof commands] as {
          flags?: object;
        };
        const known = ["help", ...Object.keys(flags)];
        for (const [, flag = ""] of line.matchAll(/(?<=\s|\[)--(?:no-)?([a-z-]+[a-z])/g))
          if (!known.includes(flag)) wrong.push(`${file}: --${flag} of ${line}`);
      }
    expect(wrong).toEqual([]);
  });
});

describe("the help", () => {
  it("says of each command, argument and flag what it is", () => {
    for (const [id, command] of Object.entries(commands)) {
      expect(command.summary, id).toMatch(/^[A-Z].{10,90}[^.]$/);
      if (command.description !== undefined) expect(command.description, id).toMatch(/^[^\n]*\.$/);
      for (const [name, one] of [
        ...Object.entries(command.args ?? {}),
        ...Object.entries(command.flags ?? {}),
      ])
        expect((one as { description?: string }).description, `${id}: ${name}`).toMatch(/^.+[^.]$/);
      const { flags = {}, args = {} } = command;
      if (Object.keys({ ...flags, ...args }).length > 0)
        for (const example of command.examples as string[])
          expect(example, id).toMatch(
            new RegExp(
              `^cedana (${Object.entries(commands)
                .filter(([, one]) => one === command)
                .map(([name]) => name.replace(":", " "))
                .join("|")
                .replace("checkpoint decode", "image decode")})( |$)`,
            ),
          );
    }
  });

  it("says of each group of commands what it is", () => {
    const { topics } = JSON.parse(read("package.json")).oclif as { topics: Record<string, unknown> };
    const groups = Object.keys(commands).flatMap((id) => (id.includes(":") ? [id.split(":")[0]!] : []));
    expect(Object.keys(topics).toSorted()).toEqual([...new Set(groups)].toSorted());
  });
});

it("docs/troubleshooting.md has errors as they are", () => {
  const text = sources.map(read).join("\n");
  const [, table = ""] = read("docs/troubleshooting.md").split("| error, or a part of it |");
  const rows = [...table.matchAll(/^\|([^|]*)\|/gm)]
    .map((match) => match[1]!)
    .filter((cell) => cell.includes("`"));
  expect(rows.length).toBeGreaterThan(15);
  const unknown = rows
    .flatMap((cell) => [...cell.matchAll(/`([^`]+)`/g)].flatMap((match) => match[1]!.split("…")))
    .map((part) => part.replaceAll(/^[\s:,]+|[\s:,]+$/g, ""))
    .filter((part) => part.length > 11 && !text.includes(part));
  expect(unknown).toEqual([]);
});

it("ARCHITECTURE.md has every face of the native program", () => {
  const faces = [...read("addon/keeper/main.c").matchAll(/strcmp\(name, "([^"]+)"\)/g)].map(
    (match) => match[1]!,
  );
  expect(faces.length).toBeGreaterThan(2);
  for (const face of faces) expect([...firstColumn("ARCHITECTURE.md")]).toContain(face);
});

it("docs/api.md has every method and every error", () => {
  const documented = [...firstColumn("docs/api.md")];
  for (const method of Object.keys(Management.methods)) expect(documented).toContain(method);
  for (const [name, one] of Object.entries(errors))
    if (typeof one === "function" && one.prototype instanceof Error) expect(documented).toContain(name);
});

it("ARCHITECTURE.md has every step of a dump and of a restore, in order", () => {
  const text = read("ARCHITECTURE.md");
  for (const steps of [dumpSteps, restoreSteps]) {
    const names = steps.map(({ name }) => name);
    const places = names.map((name) => text.indexOf(`\`${name}\``));
    for (const [at, place] of places.entries()) expect(place, `${names[at]} is missing`).toBeGreaterThan(-1);
    expect(places, "they stand in another order").toEqual(places.toSorted((a, b) => a - b));
  }
});

describe("documents", () => {
  const words = (heading: string) =>
    heading
      .replaceAll(/`|\[([^\]]*)\]\([^)]*\)/g, "$1")
      .toLowerCase()
      .replaceAll(/[^\p{L}\p{N} _-]/gu, "")
      .replaceAll(" ", "-");
  const anchors = (file: string) =>
    new Set(
      [
        ...read(file)
          .replaceAll(/^```[\s\S]*?^```/gm, "")
          .matchAll(/^#+ (.+)$/gm),
      ].map((match) => words(match[1]!)),
    );

  it("link to what is there", () => {
    const broken: string[] = [];
    for (const file of documents)
      for (const [, target = ""] of read(file).matchAll(/\]\(([^)\s]+)\)/g)) {
        if (/^https?:/.test(target)) continue;
        const [to = "", anchor] = target.split("#");
        const linked = to === "" ? file : path.join(path.dirname(file), to);
        if (!fs.existsSync(path.join(root, linked))) broken.push(`${file}: ${target}`);
        else if (anchor !== undefined && !anchors(linked).has(anchor)) broken.push(`${file}: ${target}`);
      }
    expect(broken).toEqual([]);
  });

  it("name files of this tree that are there", () => {
    const missing: string[] = [];
    for (const file of documents)
      for (const [, named = ""] of read(file).matchAll(
        /`((?:src|test|addon|bench|scripts|packaging|proto|docs)\/[\w./-]*\w\/?)(?=`)/g,
      ))
        if (!fs.existsSync(path.join(root, named))) missing.push(`${file}: ${named}`);
    expect(missing).toEqual([]);
  });

  it("name scripts that there are", () => {
    const { scripts } = JSON.parse(read("package.json")) as { scripts: Record<string, string> };
    for (const file of documents) {
      for (const [, name = ""] of read(file).matchAll(/npm run ([a-z:-]+)/g))
        expect(Object.keys(scripts), file).toContain(name);
      for (const [, name = ""] of read(file).matchAll(/\.\/run ([a-z]+)/g))
        expect(read("run"), file).toContain(`\n  ${name}`);
    }
  });

  it("are all linked from the README", () => {
    for (const file of filesBelow("docs", /\.md$/)) expect(read("README.md")).toContain(`](${file}`);
  });

  it("have tables whose rows have as many cells as their head", () => {
    const cells = (line: string) => line.replaceAll(/\\\||`[^`]*`/g, "").split("|").length;
    const crooked: string[] = [];
    for (const file of documents) {
      const lines = read(file)
        .replaceAll(/^```[\s\S]*?^```/gm, "")
        .split("\n");
      for (const [at, line] of lines.entries())
        if (line.startsWith("|") && lines[at - 1]?.startsWith("|") && cells(line) !== cells(lines[at - 1]!))
          crooked.push(`${file}: ${line}`);
    }
    expect(crooked).toEqual([]);
  });
});
