import { chmodSync, chownSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { InvalidRequest, PermissionDenied } from "../../src/errors/index.ts";
import { parseConfiguration, readConfiguration } from "../../src/runtime/configuration.ts";

let directory: string;
let path: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "configuration-"));
  path = join(directory, "config.json");
});
afterEach(() => rmSync(directory, { recursive: true }));

describe("the administrator's configuration", () => {
  it("is careful when there is none", async () => {
    expect(await readConfiguration(path)).toEqual({
      annotations: { deny: [], hooks: false },
      restoreFromPaths: [],
      plugins: { named: [], directory: expect.stringMatching(/\/plugins$/) },
      checkpoints: {
        directory: expect.stringMatching(/\/checkpoints$/),
        keepLast: 3,
        shortestIntervalMs: 10_000,
        rootfsExclude: [],
        rootfsMaxBytes: 4 * 2 ** 30,
      },
      gpu: {
        tracing: false,
        traceMaxBytes: 64 * 2 ** 20,
        tracesMaxBytes: 8 * 2 ** 30,
        tracesMaxAgeMs: 30 * 86_400_000,
      },
      restore: { verifyDigests: false, ignoreCpu: false },
    });
  });

  it("is read again when it has changed", async () => {
    writeFileSync(path, "{}");
    expect((await readConfiguration(path)).annotations.hooks).toBe(false);
    writeFileSync(path, `{ "annotations": { "hooks": true } }`);
    expect((await readConfiguration(path)).annotations.hooks).toBe(true);
  });

  it("takes paths as they are meant", () => {
    const text = `{ "restoreFromPaths": ["/srv//a/../b/"], "checkpoints": { "directory": "/x/", "keepLast": 7 } }`;
    expect(parseConfiguration(text, path)).toMatchObject({
      restoreFromPaths: ["/srv/b"],
      checkpoints: { directory: "/x", keepLast: 7 },
    });
  });

  it.each([
    ["not JSON", "{", /not JSON/],
    ["a list", "[]", /the file is not an object/],
    ["an unknown key", `{ "anotations": {} }`, /has "anotations"; it may have annotations/],
    ["a relative path", `{ "restoreFromPaths": ["a"] }`, /"a" is not an absolute path/],
    ["a number for a switch", `{ "annotations": { "hooks": 1 } }`, /neither true nor false/],
    ["a text for a list", `{ "annotations": { "deny": "tcp" } }`, /not a list/],
    ["no time", `{ "checkpoints": { "shortestInterval": "5 s" } }`, /not a time/],
    ["an unknown compression", `{ "checkpoints": { "compression": "xz" } }`, /none, gzip, lz4, zstd/],
    ["a key for nothing", `{ "checkpoints": { "keyFile": "/k" } }`, /encrypts archives/],
    ["no size", `{ "checkpoints": { "rootfsMaxBytes": "much" } }`, /not a size/],
    ["a text for the switch of tracing", `{ "gpu": { "tracing": "yes" } }`, /gpu.tracing is neither/],
    ["no size of traces", `{ "gpu": { "traceMaxBytes": 5 } }`, /gpu.traceMaxBytes is not a string/],
    ["no size of all traces", `{ "gpu": { "tracesMaxBytes": "all" } }`, /gpu.tracesMaxBytes is not a size/],
    ["no age of traces", `{ "gpu": { "tracesMaxAge": "old" } }`, /gpu.tracesMaxAge is not a time/],
    ["a text for a switch", `{ "restore": { "ignoreCpu": "yes" } }`, /ignoreCpu is neither/],
    ["a key that is nowhere", `{ "restore": { "keyFile": "key" } }`, /"key" is not an absolute path/],
    ["nothing to keep", `{ "checkpoints": { "keepLast": 0 } }`, /from 1 to 1000/],
  ])("refuses %s", (_what, text, message) => {
    expect(() => parseConfiguration(text, path)).toThrow(InvalidRequest);
    expect(() => parseConfiguration(text, path)).toThrow(message);
  });

  it.skipIf(process.getuid!() !== 0)("refuses a file that others could have written", async () => {
    writeFileSync(path, "{}");
    chmodSync(path, 0o666);
    await expect(readConfiguration(path)).rejects.toThrow(PermissionDenied);
    chmodSync(path, 0o600);
    chownSync(path, 1000, 1000);
    await expect(readConfiguration(path)).rejects.toThrow(/belongs to user 1000/);
  });
});
