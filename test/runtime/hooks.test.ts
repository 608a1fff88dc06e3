import { constants, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { InvalidRequest, PermissionDenied, TimedOut, WrongState } from "../../src/errors/index.ts";
import { makeNode } from "../../src/linux/addon.ts";
import { checkHooks, HookOutput, hookFailure, hookOf } from "../../src/runtime/hooks.ts";
import type { OciSpec } from "../../src/runtime/spec.ts";

const directory = mkdtempSync(join(tmpdir(), "hooks-"));
const before = process.env.CEDANA_CONFIG;
const configure = (annotations: object) =>
  writeFileSync(join(directory, "config.json"), JSON.stringify({ annotations }), { mode: 0o600 });

beforeAll(() => {
  process.env.CEDANA_CONFIG = join(directory, "config.json");
  configure({ hooks: true });
});
afterAll(() => {
  if (before === undefined) delete process.env.CEDANA_CONFIG;
  else process.env.CEDANA_CONFIG = before;
  rmSync(directory, { recursive: true });
});

const annotated = (annotations: Record<string, string>): OciSpec => ({
  annotations: Object.fromEntries(
    Object.entries(annotations).map(([key, value]) => [
      key.startsWith("io.") ? key : `cedana.io/${key}`,
      value,
    ]),
  ),
});

describe("a container's hook", () => {
  it("is a command for the shell, or a list of arguments, with a time", async () => {
    expect(await hookOf(annotated({ "hook.pre-dump": "[ -e /x ]" }), "pre-dump")).toEqual({
      name: "pre-dump",
      from: "annotation cedana.io/hook.pre-dump",
      args: ["/bin/sh", "-c", "[ -e /x ]"],
      timeoutMs: 30_000,
    });
    const listed = annotated({ "hook.post-restore": ' ["/app", "--tell", ""]', "hook-timeout": "1m30s" });
    expect(await hookOf(listed, "post-restore")).toMatchObject({
      args: ["/app", "--tell", ""],
      timeoutMs: 90_000,
    });
    expect(await hookOf(listed, "pre-dump")).toBeUndefined();
  });

  it("is one container's of a pod before it is everybody's, and never the sandbox's", async () => {
    const pod = {
      "hook.pre-dump": "all",
      "hook.pre-dump.web": "web",
      "hook-timeout.web": "5",
      "io.kubernetes.cri.container-name": "web",
    };
    expect(await hookOf(annotated(pod), "pre-dump")).toMatchObject({
      args: ["/bin/sh", "-c", "web"],
      timeoutMs: 5_000,
    });
    const db = annotated({ ...pod, "io.kubernetes.cri.container-name": "db" });
    expect(await hookOf(db, "pre-dump")).toMatchObject({ args: ["/bin/sh", "-c", "all"], timeoutMs: 30_000 });
    const sandbox = annotated({ ...pod, "io.kubernetes.cri.container-type": "sandbox" });
    expect(await hookOf(sandbox, "pre-dump")).toBeUndefined();
    await checkHooks(db);
    await checkHooks(sandbox);
  });

  it.each([
    [{ "hook.pre-dump": " " }, /must be a command/],
    [{ "hook.pre-dump": "[]" }, /list of strings/],
    [{ "hook.pre-dump": '["a\\u0000"]' }, /list of strings/],
    [{ "hook.pre-dump": "x", "hook-timeout": "0" }, /up to 1h/],
    [{ "hook.pre-dump": "x", "hook-timeout": "2h" }, /up to 1h/],
    [{ "hook.predump": "x" }, /names no hook/],
  ])("is refused as %j", async (annotations, message) => {
    const refused = checkHooks(annotated(annotations as Record<string, string>));
    await expect(refused).rejects.toBeInstanceOf(InvalidRequest);
    await expect(refused).rejects.toThrow(message);
  });

  it("is the administrator's to allow, and to deny by name", async () => {
    const spec = annotated({ "hook.pre-dump": "x", "hook-timeout": "1s" });
    for (const rules of [
      {},
      { hooks: true, deny: ["hook.pre-dump"] },
      { hooks: true, deny: ["hook-timeout"] },
    ]) {
      configure(rules);
      await expect(checkHooks(spec)).rejects.toBeInstanceOf(PermissionDenied);
    }
    await checkHooks(annotated({ tcp: "close" }));
    configure({ hooks: true });
    await checkHooks(spec);
  });

  it("fails with what it said, cut at its front", () => {
    const hook = { name: "pre-dump", from: "annotation a", args: ["x"], timeoutMs: 5 } as const;
    const failure = hookFailure(hook, "task t", { exitStatus: 3, output: `${"a".repeat(2000)}end` });
    expect(failure).toBeInstanceOf(WrongState);
    expect(failure.message).toMatch(
      /^pre-dump hook of task t \(annotation a\) ended with status 3; it printed: … a{997}end$/,
    );
    expect(hookFailure(hook, "task t", { output: "" })).toBeInstanceOf(TimedOut);
    expect(
      hookFailure(hook, "task t", { exitStatus: 255, engineError: "no such file", output: "" }).message,
    ).toMatch(/could not be run: no such file/);
  });

  it("may print without end: what came last is kept", async () => {
    const path = join(directory, "output");
    makeNode(path, constants.S_IFIFO | 0o600); // from before a crash
    await using output = HookOutput.open(path);
    await writeFile(path, `${"x".repeat(100_000)}last words\n`);
    expect(await output.text()).toMatch(/^… \(\d+ bytes\) x+last words$/);
  });
});
