import { existsSync, mkdtempSync, rmSync, utimesSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, it } from "vitest";
import { type Marker, markersIn, noteEnd, readMarker, writeMarker } from "../../../src/runtime/oci/marker.ts";

const directory = mkdtempSync(join(tmpdir(), "cedana-marker-"));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

const at = (id: string) => join(directory, "oci", `0123456789abcdef-${id}`);
const marker = (id: string): Marker => ({
  version: 1,
  id,
  root: "/run/crun",
  engine: "/usr/bin/crun",
  globalArgv: [],
});

it("a container's end is noted, and forgotten with a later one's when nobody has come to delete it", async () => {
  const twoHours = 2 * 60 * 60 * 1000;
  const long = new Date(Date.now() - twoHours);
  writeMarker(at("lives"), marker("lives"));
  writeMarker(at("ended"), { ...marker("ended"), endedAtMs: Date.now() - twoHours });
  writeMarker(at("just-ended"), { ...marker("just-ended"), endedAtMs: Date.now() });
  writeFileSync(at("broken"), "{");
  for (const id of ["lives", "ended", "broken"]) utimesSync(at(id), long, long);
  await noteEnd(at("new"), { ...marker("new"), kill: { signal: 1, escalation: [] } });
  expect(readMarker(at("new"))).toMatchObject({
    id: "new",
    kill: { signal: 1 },
    endedAtMs: expect.any(Number),
  });
  expect(existsSync(at("ended"))).toBe(false);
  expect(markersIn(directory).sort()).toEqual(["broken", "just-ended", "lives", "new"].map(at));
});
