import { mkdirSync, mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { InvalidRequest } from "../../src/errors/index.ts";
import { pathInRoot } from "../../src/linux/root-path.ts";

describe("a path in a root directory", () => {
  const root = mkdtempSync(join(tmpdir(), "root-"));
  afterAll(() => rmSync(root, { recursive: true }));
  mkdirSync(join(root, "a/b"), { recursive: true });
  symlinkSync("/etc", join(root, "absolute"));
  symlinkSync("../../../../../etc", join(root, "a/relative"));
  symlinkSync("b", join(root, "a/near"));
  symlinkSync("/a/near/../relative", join(root, "chain"));
  symlinkSync("circle", join(root, "circle"));

  it.each([
    ["", ""],
    ["/", ""],
    ["a/b", "a/b"],
    ["//a/./b/", "a/b"],
    ["../../a", "a"],
    ["a/near/x", "a/b/x"],
    ["absolute/passwd", "etc/passwd"],
    ["a/relative/passwd", "etc/passwd"],
    ["chain", "etc"],
    ["no/such/..", "no"],
  ])("%j stays in it", async (path, expected) => {
    expect(await pathInRoot(root, path)).toBe(join(root, expected));
  });

  it("may lead in a circle, which is refused", async () => {
    await expect(pathInRoot(root, "circle/x")).rejects.toThrow(InvalidRequest);
  });
});
