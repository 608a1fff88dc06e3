import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { InvalidRequest } from "../../src/errors/index.ts";
import { configForRestore } from "../../src/runtime/restore-configuration.ts";
import { parseSpec } from "../../src/runtime/spec.ts";

let bundle: string;
beforeEach(() => {
  bundle = fs.mkdtempSync(path.join(os.tmpdir(), "restore-configuration-"));
});
afterEach(() => fs.rmSync(bundle, { recursive: true }));

async function changed(text: string, engine: "runc" | "crun" = "runc"): Promise<string | undefined> {
  const file = path.join(bundle, "config.json");
  return await configForRestore(parseSpec(text, file), text, {
    bundle,
    path: file,
    engine,
    program: "/bin/k",
  });
}

describe("the configuration that an engine's restore reads", () => {
  const hook = { path: "/bin/k", args: ["cedana-loopback"], timeout: 10 };
  const ownNetwork = '"linux":{"namespaces":[{"type":"network"}]}';

  it("has a hook first of its stage for lo, and limits beyond 2^53 exactly as they were written", async () => {
    const text =
      await changed(`{"process":{"rlimits":[{"type":"RLIMIT_AS","hard":18446744073709551615,"soft":1.5}]},
      "hooks":{"createRuntime":[{"path":"/bin/old"}],"poststop":[{"path":"/bin/end"}]},${ownNetwork}}`);
    expect(text).toContain('"hard":18446744073709551615,"soft":1.5');
    expect(JSON.parse(text!).hooks).toEqual({
      createRuntime: [hook, { path: "/bin/old" }],
      poststop: [{ path: "/bin/end" }],
    });
    expect(JSON.parse((await changed(`{"hooks":null,${ownNetwork}}`))!).hooks).toEqual({
      createRuntime: [hook],
    });
  });

  it("stays as it is with an engine that sets lo up, and without a network namespace of its own", async () => {
    expect(await changed(`{${ownNetwork}}`, "crun")).toBeUndefined();
    expect(
      await changed('{"mounts":[{"destination":"/proc","type":"proc","source":"proc"}]}'),
    ).toBeUndefined();
  });

  it("names what the links lead to that bind mounts have for sources, as the kernel follows them", async () => {
    fs.mkdirSync(path.join(bundle, "data"));
    fs.symlinkSync("data", path.join(bundle, "link"));
    fs.symlinkSync("nowhere", path.join(bundle, "dangling"));
    const mounts = [
      { destination: "/absolute", type: "bind", source: path.join(bundle, "link"), options: ["rbind"] },
      { destination: "/relative", source: "link", options: ["bind", "ro"] },
      { destination: "/plain", type: "bind", source: path.join(bundle, "data") },
      { destination: "/dangling", type: "bind", source: "dangling" },
      { destination: "/no-bind", type: "tmpfs", source: "link" },
    ];
    const text = await changed(JSON.stringify({ mounts }), "crun");
    const data = path.join(fs.realpathSync(bundle), "data");
    expect(JSON.parse(text!)).toEqual({
      mounts: [{ ...mounts[0], source: data }, { ...mounts[1], source: data }, ...mounts.slice(2)],
    });
  });

  it("must be a spec", async () => {
    const wrong = configForRestore({ linux: { namespaces: [{ type: "network" }] } }, "[]", {
      bundle,
      path: "config.json",
      engine: "runc",
      program: "/bin/k",
    });
    await expect(wrong).rejects.toThrow(InvalidRequest);
  });
});
