import { chmodSync, chownSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { loadExternal } from "../../src/plugins/external.ts";

const GOOD = `export const plugin = { name: "good", features: { healthChecks: [{ name: "a", async run() {} }] } };`;

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "cedana-plugins-"));
});
afterEach(() => rmSync(directory, { recursive: true }));

function install(name: string, code = GOOD, cedana: unknown = { apiVersion: 1, entry: "index.js" }): string {
  const place = join(directory, "node_modules", name);
  mkdirSync(place, { recursive: true, mode: 0o755 });
  writeFileSync(join(place, "package.json"), JSON.stringify({ version: "2.0.0", type: "module", cedana }));
  writeFileSync(join(place, "index.js"), code);
  return place;
}

describe("a plugin from outside", () => {
  it("is loaded by its package's name, scoped or not, and by its path", async () => {
    const place = install("good");
    install("@scope/good");
    expect(await loadExternal("good", directory)).toMatchObject({
      name: "good",
      version: "2.0.0",
      origin: place,
    });
    expect(await loadExternal("@scope/good", directory)).toMatchObject({ name: "good" });
    expect(await loadExternal(place, "/nowhere")).toMatchObject({ name: "good" });
  });

  it.each(["../good", "good/../../x", "@a/b/c", "./good", "Good", "", "good\0"])(
    "is not %j",
    async (name) => {
      install("good");
      await expect(loadExternal(name, directory)).rejects.toMatchObject({ name: "InvalidRequest" });
    },
  );

  it("must be root's, with all on the way to it and all in it", async (context) => {
    if (process.getuid!() !== 0) context.skip("only root can give files away");
    const place = install("good");
    const inside = join(place, "lib");
    mkdirSync(inside);
    writeFileSync(join(inside, "a.js"), "");
    for (const path of [place, join(place, "index.js"), join(inside, "a.js"), directory]) {
      chownSync(path, 12345, 0);
      await expect(loadExternal("good", directory), path).rejects.toThrow(/belongs to user 12345/);
      chownSync(path, 0, 0);
      const mode = path.endsWith(".js") ? 0o644 : 0o755;
      for (const bit of [0o020, 0o002]) {
        chmodSync(path, mode | bit);
        await expect(loadExternal("good", directory), path).rejects.toThrow(/can be written by others/);
      }
      chmodSync(path, mode);
    }
    expect(await loadExternal("good", directory)).toMatchObject({ name: "good" });
  });

  it("must not be a link, nor have one that leads out", async () => {
    const place = install("good");
    symlinkSync(place, join(directory, "node_modules/linked"));
    await expect(loadExternal("linked", directory)).rejects.toThrow(/is not a directory/);
    rmSync(join(directory, "node_modules/linked"));
    mkdirSync(join(directory, "node_modules/.bin"));
    symlinkSync("../good/index.js", join(directory, "node_modules/.bin/good"));
    expect(await loadExternal("good", directory)).toMatchObject({ name: "good" });
    symlinkSync("/etc/passwd", join(place, "data"));
    await expect(loadExternal("good", directory)).rejects.toThrow(/leads out of/);
  });

  it.each([
    ["no plugin of ours", GOOD, null, /has no cedana.apiVersion/],
    ["for another version", GOOD, { apiVersion: 2, entry: "index.js" }, /for version 2 of the plugin API/],
    ["without an entry", GOOD, { apiVersion: 1 }, /has no cedana.entry/],
    ["with an entry outside", GOOD, { apiVersion: 1, entry: "../x.js" }, /outside of the package/],
    ["with an absolute entry", GOOD, { apiVersion: 1, entry: "/etc/x.js" }, /outside of the package/],
    ["that throws", `throw new Error("at load");`, { apiVersion: 1, entry: "index.js" }, /at load/],
    ["that exports nothing", "", { apiVersion: 1, entry: "index.js" }, /exports no object `plugin`/],
    [
      "with a senseless name",
      `export const plugin = { name: "A B", features: {} };`,
      { apiVersion: 1, entry: "index.js" },
      /plugin.name is not/,
    ],
    [
      "with a feature that isn't open",
      `export const plugin = { name: "a", features: { reaper() {} } };`,
      { apiVersion: 1, entry: "index.js" },
      /exports reaper; a plugin may export/,
    ],
    [
      "with a feature of the wrong type",
      `export const plugin = { name: "a", features: { dumpMiddleware: [{ name: "x" }] } };`,
      { apiVersion: 1, entry: "index.js" },
      /dumpMiddleware entry 0 has no function run/,
    ],
  ])("is not loaded: %s", async (_what, code, cedana, message) => {
    install("bad", code, cedana);
    await expect(loadExternal("bad", directory)).rejects.toThrow(message);
  });
});
