// A plugin from outside of the tree: an npm package that the administrator names. Its adapters really run in a dump, and can refuse it.

import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { isControl, Live } from "./harness/live.ts";
import type { LiveTask } from "./harness/task.ts";

const CONFIGURATION = "/run/cedana-plugins-test.json";

/** Notes what it saw in the checkpoint; refuses what a file beside it says. */
const AUDIT = `
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
const here = import.meta.dirname;
const note = (dump, name, value) => writeFileSync(join(dump.directory, "audit-" + name + ".json"), JSON.stringify(value));
const refuse = (where) => {
  if (existsSync(join(here, "refuse-" + where))) throw new Error("not today: " + where);
};
const stateOf = (pid) => readFileSync("/proc/" + pid + "/wchan", "utf8") + " " + readFileSync("/proc/" + pid + "/stat", "utf8").split(") ")[1][0];
export const plugin = {
  name: "audit",
  features: {
    dumpMiddleware: [
      { name: "note", async run(dump, next) {
        refuse("early");
        note(dump, "early", { id: dump.containerId, engine: dump.engine.name, pids: await dump.pids(), initPid: dump.initPid, state: stateOf(dump.initPid) });
        await next();
        note(dump, "done", {});
      } },
      { name: "never", when: () => false, async run() { throw new Error("was asked all the same"); } },
    ],
    dumpMiddlewareLate: [{ name: "look", async run(dump, next) {
      refuse("late");
      note(dump, "late", { state: stateOf(dump.initPid) });
      await next();
    } }],
    restoreMiddleware: [{ name: "gate", async run(restore, next) {
      refuse("restore");
      if (restore.dumped === undefined || !existsSync(join(restore.imagePath, "inventory.img"))) throw new Error("what is it?");
      writeFileSync(join(here, "restored"), restore.dumped.containerId + " into " + restore.what);
      await next();
      writeFileSync(join(here, "runs"), "");
    } }],
    healthChecks: [{ name: "audit trail", run: async () => ({ status: "warning", summary: "it is short", advice: "make it longer" }) }],
  },
};
`;

describe.skipIf(isControl)("a plugin from outside of the tree", () => {
  let live: Live;
  let packages: string;

  /** Makes a package below the directory of plugins. */
  function install(
    name: string,
    code: string,
    cedana: object = { apiVersion: 1, entry: "index.js" },
  ): string {
    const directory = join(packages, "node_modules", name);
    mkdirSync(directory, { recursive: true, mode: 0o755 });
    const description = { name, version: "1.2.3", type: "module", cedana };
    writeFileSync(join(directory, "package.json"), JSON.stringify(description), { mode: 0o644 });
    writeFileSync(join(directory, "index.js"), code, { mode: 0o644 });
    return directory;
  }

  beforeAll(async () => {
    live = await Live.start({ containerd: "1.7", engine: "runc", env: { CEDANA_CONFIG: CONFIGURATION } });
    packages = join(live.dir, "plugins");
    install("cedana-plugin-audit", AUDIT);
    install("cedana-plugin-old", AUDIT, { apiVersion: 0, entry: "index.js" });
    install("cedana-plugin-broken", "export const plugin = {");
    install(
      "cedana-plugin-greedy",
      `export const plugin = { name: "greedy", features: { runHandler() {} } };`,
    );
    install("cedana-plugin-impostor", `export const plugin = { name: "runc", features: {} };`);
    const load = ["audit", "old", "broken", "greedy", "impostor", "missing"].map(
      (name) => `cedana-plugin-${name}`,
    );
    writeFileSync(CONFIGURATION, JSON.stringify({ plugins: { load, directory: packages } }), { mode: 0o600 });
  });
  afterEach(() => live.expectNoLeftovers());
  afterAll(async () => {
    await live?.stop();
    rmSync(CONFIGURATION, { force: true });
  });

  async function runsOn(task: LiveTask): Promise<void> {
    expect(await task.status()).toBe("RUNNING");
    const before = await task.nextNumber();
    expect(await task.nextNumber()).toBe(before + 1);
  }

  it("takes part in a dump, before the freezer and behind it, and is in the manifest", async () => {
    await using task = await live.run(["counter"]);
    await task.nextNumber();
    const image = await task.checkpoint({ exit: false });
    await runsOn(task);
    const read = (name: string) => JSON.parse(readFileSync(join(image, name), "utf8"));
    const early = read("audit-early.json");
    expect(early).toMatchObject({ id: task.id, engine: "runc", pids: [task.pid], initPid: task.pid });
    expect(early.state).not.toMatch(/freez|refrigerator/);
    expect(read("audit-late.json").state).toMatch(/freez|refrigerator|D$/);
    expect(existsSync(join(image, "audit-done.json"))).toBe(true);
    const { files, plugins, timings } = read("cedana.json");
    expect(plugins).toContainEqual({ name: "audit", version: "1.2.3" });
    expect(Object.keys(timings)).toEqual(expect.arrayContaining(["audit:note", "audit:look"]));
    expect(files.map((file: { path: string }) => file.path)).toEqual(
      expect.arrayContaining(["audit-early.json", "audit-late.json"]),
    );
  });

  it.each(["early", "late"])("refuses a dump (%s), and the container is unharmed", async (where) => {
    await using task = await live.run(["counter"]);
    await task.nextNumber();
    const refusal = join(packages, "node_modules/cedana-plugin-audit", `refuse-${where}`);
    writeFileSync(refusal, "");
    try {
      const image = join(live.dir, `refused-${where}`);
      await expect(task.checkpoint({ exit: false, imagePath: image })).rejects.toThrow(
        new RegExp(`not today: ${where}.*audit:`),
      );
      expect(existsSync(image)).toBe(false);
      await runsOn(task);
    } finally {
      rmSync(refusal);
    }
    await task.checkpoint({ exit: false });
    await runsOn(task);
  });

  it("takes part in a restore, and can refuse it", async () => {
    const place = join(packages, "node_modules/cedana-plugin-audit");
    await using task = await live.run(["counter"]);
    const last = await task.nextNumber();
    const image = await task.checkpoint({ exit: false });
    {
      await using restored = await live.run(["counter"], { criuImagePath: image });
      expect(await restored.nextNumber()).toBeGreaterThan(last);
      expect(readFileSync(join(place, "restored"), "utf8")).toBe(`${task.id} into task ${restored.id}`);
      expect(existsSync(join(place, "runs"))).toBe(true);
    }
    writeFileSync(join(place, "refuse-restore"), "");
    try {
      await expect(live.run(["counter"], { criuImagePath: image })).rejects.toThrow(/not today: restore/);
    } finally {
      rmSync(join(place, "refuse-restore"));
    }
    await runsOn(task);
  });

  it("makes the check of the node fail while it can't be loaded; the rest of the node is well", async () => {
    const failure = (await live.cedana("check", "--json").catch((error) => error)) as {
      code: number;
      stdout: string;
    };
    expect(failure.code).toBe(2);
    const { ok, rows } = JSON.parse(failure.stdout) as {
      ok: boolean;
      rows: { plugin: string; name: string; status: string }[];
    };
    expect(ok).toBe(false);
    const failed = rows.filter(({ status }) => status === "failed");
    expect(failed.map(({ plugin, name }) => `${plugin}: ${name}`).sort()).toEqual(
      ["broken", "greedy", "impostor", "missing", "old"].map((name) => `cedana-plugin-${name}: plugin`),
    );
    const trial = rows.find(({ name }) => name === "dump of a process with sockets");
    expect(trial).toMatchObject({ plugin: "criu", status: "ok", summary: "works" });
    expect(rows.map(({ plugin }) => plugin)).toEqual(
      expect.arrayContaining(["host", "criu", "runc", "crun", "containerd", "audit"]),
    );
  });

  it("is in the matrix, and one that can't be loaded is there with its reason and harms nobody", async () => {
    const { columns, rows, errors } = JSON.parse(await live.cedana("features", "--json"));
    expect(columns).toEqual(expect.arrayContaining(["runc", "audit", "kata", "cedana-plugin-old"]));
    const row = (feature: string) => rows.find((one: { feature: string }) => one.feature === feature).plugins;
    expect(row("dumpMiddleware")).toMatchObject({ audit: "available", runc: "missing", kata: "absent" });
    expect(row("dumpMiddleware")["cedana-plugin-old"]).toBe("broken");
    expect(row("runHandler")).toMatchObject({ audit: "missing", runc: "available" });
    expect(errors).toMatchObject({
      "cedana-plugin-old": expect.stringMatching(
        /for version 0 of the plugin API; this cedana has version 1/,
      ),
      "cedana-plugin-broken": expect.stringMatching(/Unexpected end of input/),
      "cedana-plugin-greedy": expect.stringMatching(/exports runHandler; a plugin may export/),
      "cedana-plugin-impostor": expect.stringMatching(/there is a plugin runc already/),
      "cedana-plugin-missing": expect.stringMatching(/is not there/),
    });
    const text = await live.cedana("features", "--errors");
    expect(text).toMatch(/^Dump middleware .*✔/m);
    expect(text).toMatch(/^cedana-plugin-old: it is for version 0/m);
    expect(await live.cedana("plugin", "list")).toMatch(/^audit +1\.2\.3 +4 /m);
    const { rows: health } = JSON.parse(await live.cedana("check", "--plugin", "audit", "--json"));
    expect(health).toEqual([
      {
        plugin: "audit",
        name: "audit trail",
        status: "warning",
        summary: "it is short",
        advice: "make it longer",
      },
    ]);
  });
});
