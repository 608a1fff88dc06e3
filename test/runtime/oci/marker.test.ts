// The files of cedana-runtime's containers, beside each other in one directory.

import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, utimesSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pino } from "pino";
import { afterEach, beforeEach, expect, it } from "vitest";
import { Cgroup } from "../../../src/linux/cgroup.ts";
import { isPausedByOwner, noteFrozen, thawLeftovers } from "../../../src/runtime/oci/frozen.ts";
import {
  forgetEnds,
  type Marker,
  markersIn,
  noteEnd,
  readMarker,
  writeMarker,
} from "../../../src/runtime/oci/marker.ts";

let run: string;
beforeEach(() => {
  run = mkdtempSync(join(tmpdir(), "cedana-markers-"));
  for (const name of ["oci", "c"]) mkdirSync(join(run, name));
});
afterEach(() => rmSync(run, { recursive: true }));

const at = (id: string) => join(run, "oci", `0123456789abcdef-${id}`);
const marker = (id: string): Marker => ({ version: 1, id, root: "/r", engine: "/bin/true", globalArgv: [] });
const ids = ["c", "c.frozen", "c.dumping", "c.new"];

it("a container named like another one's note keeps its marker", async () => {
  for (const id of ids) writeMarker(at(id), marker(id));
  const cgroup = await Cgroup.of(process.pid);
  await noteFrozen(at("c"), cgroup, join(run, "c", "none"), async () => {
    expect(ids.map((id) => readMarker(at(id))?.id)).toEqual(ids);
  });
  expect(ids.map((id) => readMarker(at(id))?.id)).toEqual(ids);
  expect(markersIn(run).sort()).toEqual(ids.map(at).sort());
  await thawLeftovers(run, pino({ level: "silent" }));
  expect(ids.map((id) => readMarker(at(id))?.id)).toEqual(ids);
});

it.each(["~", "."])("notes of a dump that was cut off are taken up, with %s", async (dot) => {
  const cgroup = Cgroup.fromPaths((await Cgroup.of(process.pid)).toJSON());
  writeFileSync(at(`c${dot}frozen`), JSON.stringify(cgroup));
  const note = { cgroup, paused: true, scratch: join(run, "c", "none") };
  writeFileSync(at(`c${dot}dumping`), JSON.stringify(note));
  const leftovers = await thawLeftovers(run, pino({ level: "silent" }));
  expect(await leftovers(at("c"))).toBeUndefined();
  for (const name of ["frozen", "dumping"]) expect(existsSync(at(`c${dot}${name}`)), name).toBe(false);
});

it("a container that stands still for a dump isn't one that its owner has paused", async () => {
  const freezer = join(run, "freezer");
  mkdirSync(freezer);
  const cgroup = Cgroup.fromPaths({ version: 1, paths: { freezer } });
  for (const [before, isPaused] of [
    ["THAWED", false],
    ["FROZEN", true],
  ] as const) {
    writeFileSync(join(freezer, "freezer.state"), before);
    await noteFrozen(at("c"), cgroup, join(run, "c", "none"), async () => {
      writeFileSync(join(freezer, "freezer.state"), "FROZEN");
      expect(isPausedByOwner(at("c")), before).toBe(isPaused);
    });
    expect(isPausedByOwner(at("c")), before).toBe(true);
  }
});

it("a container doesn't stand still for a dump of which nothing can be made out any more", async () => {
  const [freezer, scratch] = [join(run, "freezer"), join(run, "c", "scratch")];
  for (const directory of [freezer, scratch]) mkdirSync(directory);
  writeFileSync(join(freezer, "freezer.state"), "FROZEN");
  writeFileSync(join(scratch, "checkpoint-attempt.json"), "{");
  const cgroup = { version: 1, paths: { freezer } };
  writeFileSync(at("c~dumping"), JSON.stringify({ cgroup, paused: false, scratch }));
  const leftovers = await thawLeftovers(run, pino({ level: "silent" }));
  expect(await leftovers(at("c"))).toBeUndefined();
  expect(readFileSync(join(freezer, "freezer.state"), "utf8")).toBe("THAWED");
  expect(existsSync(at("c~dumping"))).toBe(false);
});

it("a paused container that ran for its hook when its dump was cut off is paused again", async () => {
  const [freezer, scratch] = [join(run, "freezer"), join(run, "c", "scratch")];
  for (const directory of [freezer, scratch]) mkdirSync(directory);
  writeFileSync(join(freezer, "freezer.state"), "THAWED");
  writeFileSync(join(freezer, "cgroup.procs"), "1\n");
  writeFileSync(join(scratch, "cedana-hook-ran"), "k\n");
  const cgroup = { version: 1, paths: { freezer } };
  writeFileSync(at("c~dumping"), JSON.stringify({ cgroup, paused: true, scratch }));
  const leftovers = await thawLeftovers(run, pino({ level: "silent" }));
  await leftovers(at("c"));
  expect(readFileSync(join(freezer, "freezer.state"), "utf8")).toBe("FROZEN");
  expect(existsSync(scratch)).toBe(false);
});

it("a container's end is noted, and forgotten with a later one's when nobody has come to delete it", async () => {
  const twoHours = 2 * 60 * 60 * 1000;
  const long = new Date(Date.now() - twoHours);
  writeMarker(at("lives"), marker("lives"));
  writeMarker(at("ended"), { ...marker("ended"), endedAtMs: Date.now() - twoHours });
  writeMarker(at("just-ended"), { ...marker("just-ended"), endedAtMs: Date.now() });
  writeFileSync(at("broken"), "{");
  for (const id of ["lives", "ended", "broken"]) utimesSync(at(id), long, long);
  noteEnd(at("new"), { ...marker("new"), kill: { signal: 1, escalation: [] } });
  expect(readMarker(at("new"))).toMatchObject({
    id: "new",
    kill: { signal: 1 },
    endedAtMs: expect.any(Number),
  });
  await forgetEnds(run);
  expect(existsSync(at("ended"))).toBe(false);
  expect(readFileSync(at("broken"), "utf8")).toBe("{");
  expect(markersIn(run).sort()).toEqual(["broken", "just-ended", "lives", "new"].map(at));
});
