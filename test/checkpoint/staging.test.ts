import { spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { writeManifest } from "../../src/checkpoint/manifest-files.ts";
import { checkName, Staging, sweep } from "../../src/checkpoint/staging.ts";
import { AlreadyExists, InvalidRequest, PermissionDenied } from "../../src/errors/index.ts";
import { sampleManifest } from "./sample.ts";

let store: string;
beforeEach(() => {
  store = fs.mkdtempSync(path.join(os.tmpdir(), "staging-"));
});
afterEach(() => fs.rmSync(store, { recursive: true, force: true }));

const at = (...parts: string[]) => path.join(store, ...parts);

/** Every file below a directory, by its path, with its contents; of a link its target. */
function tree(directory: string): Record<string, string> {
  const files: Record<string, string> = {};
  for (const name of fs.readdirSync(directory, { recursive: true, encoding: "utf8" }).sort()) {
    const found = fs.lstatSync(path.join(directory, name));
    if (found.isSymbolicLink()) files[name] = `-> ${fs.readlinkSync(path.join(directory, name))}`;
    else if (found.isFile()) files[name] = fs.readFileSync(path.join(directory, name), "utf8");
  }
  return files;
}

async function make(staging: Staging, content: string): Promise<void> {
  fs.writeFileSync(path.join(staging.path, "pages-1.img"), content);
  await writeManifest(staging.path, sampleManifest);
}

describe("a name", () => {
  it.each(["a", "web-1.2_b", "x".repeat(200)])("may be %s", (name) => expect(checkName(name)).toBe(name));
  it.each(["", ".", "..", ".hidden", "a/b", "../a", "a\0", "tmp", "-x", "é", "a b", "x".repeat(201)])(
    "may not be %j",
    (name) => expect(() => checkName(name)).toThrow(InvalidRequest),
  );
});

describe("a checkpoint in a store", () => {
  it("is there when it is whole, and nothing else is left", async () => {
    await using staging = await Staging.beside(at("store"), "web");
    expect(fs.statSync(staging.path).mode & 0o777).toBe(0o700);
    expect(path.dirname(staging.path)).toBe(at("store/tmp"));
    fs.writeFileSync(path.join(staging.path, "inventory.img"), "1");
    expect(fs.readdirSync(at("store"))).toEqual(["tmp"]);
    await staging.commit();
    expect(tree(at("store"))).toEqual({ "web/inventory.img": "1" });
    await expect(staging.commit()).rejects.toThrow(/committed/);
  });

  it("that comes to nothing leaves nothing", async () => {
    {
      await using staging = await Staging.beside(store, "web");
      fs.writeFileSync(path.join(staging.path, "half.img"), "");
    }
    expect(tree(store)).toEqual({});
    expect(fs.readdirSync(at("tmp"))).toEqual([]);
  });

  it("replaces an older one only when told to, and the older one stays until then", async () => {
    for (const round of ["1", "2"]) {
      await using staging = await Staging.beside(store, "web", { replace: true });
      fs.writeFileSync(path.join(staging.path, "round"), round);
      if (round === "2") expect(tree(at("web"))).toEqual({ round: "1" });
      await staging.commit();
      expect(tree(store)).toEqual({ "web/round": round });
    }
    await expect(Staging.beside(store, "web")).rejects.toThrow(AlreadyExists);
  });

  it("doesn't replace one that came meanwhile", async () => {
    await using first = await Staging.beside(store, "web");
    await using second = await Staging.beside(store, "web");
    await first.commit();
    await expect(second.commit()).rejects.toThrow(AlreadyExists);
  });

  it("of a killed process is swept by the next one, but not that of a living one", async () => {
    const url = JSON.stringify(path.join(import.meta.dirname, "../../src/checkpoint/staging.ts"));
    const code = `const { Staging } = await import(${url});
      const staging = await Staging.beside(${JSON.stringify(store)}, "web");
      console.log(staging.path); setInterval(() => {}, 1000);`;
    const child = spawn(process.execPath, ["--input-type=module", "-e", code], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    try {
      const [line] = (await once(child.stdout, "data")) as [Buffer];
      const left = line.toString().trim();
      await using mine = await Staging.beside(store, "mine");
      expect(await sweep(store)).toEqual([]);
      expect(fs.existsSync(left)).toBe(true);
      child.kill("SIGKILL");
      await once(child, "exit");
      expect(await sweep(store)).toEqual([left]);
      expect(fs.existsSync(mine.path)).toBe(true);
    } finally {
      child.kill("SIGKILL");
    }
  });

  it("is not made where others may write, or where tmp is a link", async () => {
    fs.chmodSync(store, 0o777);
    await expect(Staging.beside(store, "web")).rejects.toThrow(PermissionDenied);
    fs.chmodSync(store, 0o700);
    fs.mkdirSync(at("elsewhere"));
    fs.symlinkSync("elsewhere", at("tmp"));
    await expect(Staging.beside(store, "web")).rejects.toThrow(expect.objectContaining({ code: "ELOOP" }));
    expect(fs.readdirSync(at("elsewhere"))).toEqual([]);
  });

  it("in a directory of everybody's needs no store, and believes no plan of others", async () => {
    fs.chmodSync(store, 0o1777);
    const planted = at(".cedana-01234567-89ab-cdef-0123-456789abcdef");
    fs.mkdirSync(path.join(planted, "new"), { recursive: true });
    fs.writeFileSync(path.join(planted, "plan.json"), JSON.stringify({ incoming: ["victim"], outgoing: [] }));
    fs.chmodSync(planted, 0o777);
    fs.writeFileSync(at("victim"), "");
    await using staging = await Staging.beside(store, "web", { shared: true });
    fs.writeFileSync(path.join(staging.path, "a"), "1");
    await staging.commit();
    expect(fs.readdirSync(store).sort()).toEqual([path.basename(planted), "victim", "web"]);
  });

  it("is not put in place of a link's target", async () => {
    fs.mkdirSync(at("target"));
    fs.symlinkSync("target", at("web"));
    await using staging = await Staging.beside(store, "web", { replace: true });
    fs.writeFileSync(path.join(staging.path, "new"), "");
    await staging.commit();
    expect(tree(store)).toEqual({ "web/new": "" });
    expect(fs.readdirSync(at("target"))).toEqual([]);
  });

  it("keeps CRIU's link to an earlier one right", async () => {
    fs.mkdirSync(at("before"));
    await using staging = await Staging.beside(store, "web");
    const parent = path.relative(staging.path, at("before"));
    fs.symlinkSync(parent, path.join(staging.path, "parent"));
    await staging.commit();
    expect(tree(store)).toEqual({ "web/parent": "-> ../before" });
  });
});

describe("a checkpoint in a directory of the caller", () => {
  it("moves in whole, beside what was there", async () => {
    fs.writeFileSync(at("mine"), "foreign");
    await using staging = await Staging.inside(store);
    await make(staging, "1");
    expect(fs.readdirSync(store).filter((name) => !name.startsWith(".cedana-"))).toEqual(["mine"]);
    await staging.commit();
    expect(tree(store)).toMatchObject({ mine: "foreign", "pages-1.img": "1" });
    expect(fs.readdirSync(store).sort()).toEqual(["cedana.json", "mine", "pages-1.img"]);
  });

  it("that comes to nothing leaves the directory as it was, or none where it made it", async () => {
    fs.writeFileSync(at("mine"), "foreign");
    for (const directory of [store, at("a/b")]) {
      await using staging = await Staging.inside(directory);
      await make(staging, "1");
    }
    expect(fs.readdirSync(store)).toEqual(["mine"]);
  });

  it("replaces the older one that its manifest names, and nothing else", async () => {
    for (const content of ["1", "2"]) {
      await using staging = await Staging.inside(store);
      await make(staging, content);
      if (content === "1") fs.writeFileSync(path.join(staging.path, "only-first.img"), "");
      await writeManifest(staging.path, sampleManifest);
      await staging.commit();
      fs.writeFileSync(at("foreign"), "");
    }
    expect(fs.readdirSync(store).sort()).toEqual(["cedana.json", "foreign", "pages-1.img"]);
    expect(fs.readFileSync(at("pages-1.img"), "utf8")).toBe("2");
  });

  it("may be named by a link, which stays", async () => {
    fs.mkdirSync(at("real"));
    fs.symlinkSync("real", at("link"));
    await using staging = await Staging.inside(at("link"));
    await make(staging, "1");
    await staging.commit();
    expect(fs.readdirSync(at("real")).sort()).toEqual(["cedana.json", "pages-1.img"]);
    expect(fs.readlinkSync(at("link"))).toBe("real");
    fs.mkdirSync(at("parent"));
    fs.symlinkSync("parent", at("by"));
    await using beside = await Staging.beside(at("by"), "web", { shared: true });
    await beside.commit();
    expect(fs.readdirSync(at("parent"))).toEqual(["web"]);
    await expect(Staging.beside(at("by"), "web2")).rejects.toThrow(/a link to one/);
  });

  it("overwrites nothing of others, and says what is in the way", async () => {
    fs.writeFileSync(at("pages-1.img"), "foreign");
    await expect(Staging.inside(store)).rejects.toThrow(/holds pages-1.img/); // before anything is made
    fs.rmSync(at("pages-1.img"));
    {
      await using staging = await Staging.inside(store);
      await make(staging, "1");
      fs.writeFileSync(at("pages-1.img"), "foreign");
      await expect(staging.commit()).rejects.toThrow(/holds pages-1.img/);
    }
    expect(tree(store)).toEqual({ "pages-1.img": "foreign" });
  });

  it("replaces an engine's own, which has no manifest", async () => {
    for (const name of ["inventory.img", "pages-1.img", "pages-2.img", "descriptors.json", "notes"])
      fs.writeFileSync(at(name), "foreign");
    await using staging = await Staging.inside(store);
    await make(staging, "1");
    await staging.commit();
    expect(fs.readdirSync(store).sort()).toEqual(["cedana.json", "notes", "pages-1.img"]);
    expect(fs.readFileSync(at("pages-1.img"), "utf8")).toBe("1");
  });

  it("is gone on with after a crash, until it is in its place", async () => {
    {
      await using living = await Staging.inside(store);
      expect(() => Staging.resume(living.record())).toThrow(/in use/);
    }
    // As a killed process leaves it: without a lock.
    const root = at(`.cedana-${randomUUID()}`);
    for (const part of ["new", "old"]) fs.mkdirSync(path.join(root, part), { recursive: true, mode: 0o700 });
    const record = { kind: "inside", root, finalPath: store } as const;
    await using again = Staging.resume(record)!;
    expect(again.isEmpty).toBe(true);
    await make(again, "1");
    expect(again.isEmpty).toBe(false);
    await again.commit();
    expect(tree(store)).toMatchObject({ "pages-1.img": "1" });
    expect(Staging.resume(record)).toBeUndefined();
  });

  it("that can't be made again is kept past every sweep", async () => {
    const staging = await Staging.inside(store);
    await make(staging, "1");
    const kept = staging.keep();
    await staging[Symbol.asyncDispose]();
    expect(await sweep(store)).toEqual([]);
    expect(fs.readFileSync(path.join(kept, "pages-1.img"), "utf8")).toBe("1");
  });

  it.each(["relative", "/etc/passwd/x"])("can't be in %s", async (directory) => {
    await expect(Staging.inside(directory)).rejects.toThrow(InvalidRequest);
  });

  // The moves of a commit, in order; after a crash behind any of them the next sweep brings back what was there.
  const incoming = ["a.img", "pages-1.img", "cedana.json"];
  const outgoing = ["cedana.json", "pages-1.img"];
  const moves = [...outgoing.map((name) => ["", "old", name]), ...incoming.map((name) => ["new", "", name])];
  it.each(moves.map((_, count) => count).concat(moves.length))(
    "is undone after a crash behind move %i",
    async (count) => {
      const root = at(".cedana-01234567-89ab-cdef-0123-456789abcdef");
      for (const part of ["new", "old"]) fs.mkdirSync(path.join(root, part), { recursive: true });
      for (const name of incoming) fs.writeFileSync(path.join(root, "new", name), "new");
      for (const name of [...outgoing, "foreign"]) fs.writeFileSync(at(name), "old");
      const before = { "cedana.json": "old", foreign: "old", "pages-1.img": "old" };
      fs.writeFileSync(path.join(root, "plan.json"), JSON.stringify({ incoming, outgoing }));
      const place = (part: string, name: string) => (part ? path.join(root, part, name) : at(name));
      for (const [from, to, name] of moves.slice(0, count))
        fs.renameSync(place(from!, name!), place(to!, name!));
      expect(await sweep(store)).toEqual([root]);
      expect(tree(store)).toEqual(before);
    },
  );

  it("with half a plan was not begun to be moved", async () => {
    const root = at(".cedana-01234567-89ab-cdef-0123-456789abcdef");
    fs.mkdirSync(path.join(root, "new"), { recursive: true });
    fs.writeFileSync(path.join(root, "plan.json"), '{"incoming":["..');
    fs.writeFileSync(at("mine"), "");
    await sweep(store);
    expect(tree(store)).toEqual({ mine: "" });
  });
});
