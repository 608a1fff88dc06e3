import { chmodSync, copyFileSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { SealedEngines } from "../../src/runtime/sealed-engines.ts";
import { until } from "../live/harness/until.ts";

let directory: string;
let warnings: object[];
let engines: SealedEngines;
const at = (name: string) => join(directory, name);

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "cedana-engines-"));
  warnings = [];
  engines = new SealedEngines({ warn: (what: object) => warnings.push(what) } as never);
});
afterEach(() => rmSync(directory, { recursive: true }));

it("copies runc and crun at their first use, and again when the file is another one", async () => {
  copyFileSync("/bin/true", at("runc"));
  chmodSync(at("runc"), 0o755);
  expect(engines.of(at("runc"))).toBeUndefined();
  const first = await until(() => engines.of(at("runc")), { what: () => "the first copy" });
  expect(engines.of(at("runc"))).toBe(first);

  writeFileSync(at("runc"), "#!/bin/sh\n"); // what an upgrade does, or somebody who debugs
  expect(engines.of(at("runc"))).toBeUndefined();
  const second = await until(() => engines.of(at("runc")), { what: () => "the second copy" });
  expect(second.of).not.toBe(first.of);

  rmSync(at("runc"));
  expect(engines.of(at("runc"))).toBeUndefined();
  await until(() => warnings.length === 1, { what: () => "a warning" });
  expect(engines.of(at("runc"))).toBeUndefined();
});

it("tries again after a while, so that an upgrade's moment without a file costs no more than that", async () => {
  expect(engines.of(at("runc"))).toBeUndefined();
  await until(() => warnings.length === 1, { what: () => "a warning" });
  copyFileSync("/bin/true", at("runc"));
  chmodSync(at("runc"), 0o755);
  expect(engines.of(at("runc"))).toBeUndefined();
  const now = performance.now();
  vi.spyOn(performance, "now").mockReturnValue(now + 61_000);
  try {
    await until(() => engines.of(at("runc")), { what: () => "a copy" });
  } finally {
    vi.restoreAllMocks();
  }
});

it("leaves other programs alone", () => {
  for (const name of ["/bin/true", "cedana-runtime", "/opt/runc/youki"])
    expect(engines.of(name)).toBeUndefined();
});

it("goes on without a copy where there can be none", async () => {
  expect(engines.of(at("crun"))).toBeUndefined();
  await until(() => warnings.length === 1, { what: () => "a warning" });
  expect(engines.of(at("crun"))).toBeUndefined();
  expect(warnings).toMatchObject([{ engine: at("crun") }]);
});
