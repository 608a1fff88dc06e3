import { copyFileSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { formatOfName } from "../../src/criu/image/format.ts";
import { encodeMessage } from "../../src/criu/image/message.ts";
import type { Message } from "../../src/criu/image/value.ts";
import { installedPlugins } from "../../src/criu/plugins.ts";
import { findUnsuitable } from "../../src/criu/suitability.ts";
import { CriuWorker } from "../../src/criu/worker.ts";
import { Workplace, whyNoDump } from "./harness.ts";
import { imageWords, sized } from "./synthetic.ts";

const reason = whyNoDump();

describe.skipIf(reason)(`images for this machine${reason ? ` (${reason})` : ""}`, () => {
  let place: Workplace;
  beforeEach(() => {
    place = new Workplace();
    image("inventory.img", "INVENTORY", { img_version: 2 });
    image("core-1.img", "CORE", { mtype: "X86_64" });
  });
  afterEach(() => place[Symbol.dispose]());

  function image(file: string, type: string, message: Message): void {
    const format = formatOfName(type)!;
    const entry = sized(encodeMessage(format.message, message));
    writeFileSync(join(place.path, file), Buffer.concat([imageWords(format, "1.1"), entry]));
  }

  it.skipIf(process.arch !== "x64")("are those of its architecture, without missing plugins", async () => {
    expect(await findUnsuitable(place.path)).toEqual([]);
    image("core-1.img", "CORE", { mtype: "S390" });
    image("inventory.img", "INVENTORY", { img_version: 2, plugins_entry: { plugins: ["flux_plugin"] } });
    expect(await findUnsuitable(place.path)).toEqual([
      "the dump is of a S390 machine, this one is X86_64",
      "CRIU's plugin flux_plugin, which the dump needs, is not installed",
    ]);
    expect((await findUnsuitable(place.path, "/nowhere/criu")).join()).toContain("/nowhere/criu");
  });

  it.skipIf(process.arch !== "x64")("are those whose CPU it has", async () => {
    await using worker = await CriuWorker.start();
    await worker.dumpCpu({ imagesDir: place.path });
    expect(await findUnsuitable(place.path)).toEqual([]);
    const all = Array.from({ length: 19 }, () => 0xffff_ffff);
    const entry = {
      vendor_id: "INTEL",
      cpu_family: 6,
      model: 1,
      stepping: 1,
      capability_ver: 2,
      capability: all,
    };
    image("cpuinfo.img", "CPUINFO", { x86_entry: [entry] });
    const problems = await findUnsuitable(place.path);
    expect(problems.join("\n")).toMatch(/CPU feature \S+ is missing here/);
    expect(problems.at(-1)).toMatch(/cpuinfo check failed/);
  });

  it("need plugins where CRIU looks for them", async () => {
    const directory = join(place.path, "plugins");
    mkdirSync(directory);
    copyFileSync(join(place.path, "core-1.img"), join(directory, "cuda_plugin.so"));
    writeFileSync(join(directory, "README"), "");
    for (const told of ["CRIU_LIBS_DIR", "CEDANA_CRIU_PLUGINS"])
      expect([...installedPlugins({ [told]: directory })], told).toEqual([["cuda_plugin", directory]]);
    expect([...installedPlugins({ CRIU_LIBS_DIR: join(place.path, "none") })]).toEqual([]);
  });
});
