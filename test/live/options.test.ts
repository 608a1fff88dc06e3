// The runtime's options, in each form in which they come, and where the shim's processes live.

import { readFileSync, rmdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import { describe, expect, it } from "vitest";
import { isControl, Live } from "./harness/live.ts";
import { oursOnly, skipUnless } from "./harness/matrix.ts";
import { type Any, anyOf } from "./harness/proto.ts";
import { liveFor } from "./harness/suite.ts";
import { cgroupRoots, entries } from "./harness/system.ts";

const RUNC_OPTIONS = "containerd.runc.v1.Options";

describe("runtime options", () => {
  let live: Live;
  /** An engine that notes its command lines. */
  let engine: string;
  let notes: string;
  liveFor({}, async (started) => {
    live = started;
    engine = join(live.dir, "noting-runc");
    notes = join(live.dir, "notes");
    writeFileSync(engine, `#!/bin/sh\necho "$*" >>${notes}\nexec runc "$@"\n`, { mode: 0o755 });
  });

  /** The flags of `create`, of a container's life with these options. */
  async function flagsOf(runtimeOptions: Any): Promise<string[]> {
    writeFileSync(notes, "");
    const { status } = await live.runToEnd(["sh", "-c", "exit 3"], { runtimeOptions });
    expect(status).toBe(3);
    const lines = readFileSync(notes, "utf8").trim().split("\n");
    for (const verb of ["create", "start", "delete"])
      expect(lines.filter((line) => line.split(" ").includes(verb))).not.toEqual([]);
    return lines.find((line) => line.split(" ").includes("create"))!.split(" ");
  }

  it("name the engine, its root, and flags of `create`", async () => {
    const root = join(live.dir, "engine-root");
    const plain = await flagsOf(anyOf(RUNC_OPTIONS, { binaryName: engine }));
    expect(plain[plain.indexOf("--root") + 1]).toBe(`/run/containerd/runc/${live.namespace}`);
    for (const flag of ["--no-pivot", "--no-new-keyring", "--systemd-cgroup"])
      expect(plain).not.toContain(flag);
    const options = { binaryName: engine, root, noPivotRoot: true, noNewKeyring: true };
    const flags = await flagsOf(anyOf(RUNC_OPTIONS, options));
    expect(flags[flags.indexOf("--root") + 1]).toBe(`${root}/${live.namespace}`);
    expect(flags).toEqual(expect.arrayContaining(["--no-pivot", "--no-new-keyring"]));
    expect(entries(join(root, live.namespace))).toEqual([]);
  });

  it("may come as TOML, as the CRI plugin sends them for a runtime of another name", async (context) => {
    oursOnly(context, "takes only its own options");
    const root = join(live.dir, "toml-root");
    const table = `BinaryName = "${engine}"\nRoot = "${root}"\nNoPivotRoot = true\nIoUid = 12\n`;
    const body = anyOf("runtimeoptions.v1.Options", { configBody: Buffer.from(table) });
    const flags = await flagsOf(body);
    expect(flags[flags.indexOf("--root") + 1]).toBe(`${root}/${live.namespace}`);
    expect(flags).toContain("--no-pivot");
    const path = join(live.dir, "options.toml");
    writeFileSync(path, table);
    expect(
      await flagsOf(anyOf("runtimeoptions.v1.Options", { configPath: path, typeUrl: RUNC_OPTIONS })),
    ).toEqual(expect.arrayContaining(["--no-pivot"]));
    const broken = anyOf("runtimeoptions.v1.Options", { configBody: Buffer.from("BinaryName = 7") });
    await expect(live.run(["true"], { runtimeOptions: broken })).rejects.toThrow(
      /BinaryName is 7; it must be a string/,
    );
    const missing = anyOf("runtimeoptions.v1.Options", { configPath: join(live.dir, "none.toml") });
    await expect(live.run(["true"], { runtimeOptions: missing })).rejects.toThrow(/none\.toml/);
  });

  it("of an engine that isn't there, or of an unknown type, are refused by name", async () => {
    const absent = live.run(["true"], {
      runtimeOptions: anyOf(RUNC_OPTIONS, { binaryName: "no-such-engine" }),
    });
    await expect(absent).rejects.toThrow(/no-such-engine/);
    if (isControl) return;
    const strange = live.run(["true"], {
      runtimeOptions: { typeUrl: "strange.Options", value: Buffer.alloc(0) },
    });
    await expect(strange).rejects.toThrow(/strange\.Options/);
  });

  it("give the pipes of stdio to an owner, those of an exec too", async () => {
    const runtimeOptions = anyOf(RUNC_OPTIONS, { ioUid: 1234, ioGid: 2345 });
    // runc gives the pipes to the process's own user afterwards, and leaves the group.
    const script = "for fd in 0 1 2; do stat -L -c %g /proc/self/fd/$fd; done; exec sleeper";
    await using task = await live.run(["sh", "-c", script], { runtimeOptions, stdin: true });
    for (let fd = 0; fd < 3; fd++) expect(await task.stdout.line()).toBe("2345");
    const { stdout } = await task.execToEnd(["stat", "-L", "-c", "%g", "/proc/self/fd/1"]);
    expect(stdout).toBe("2345\n");
  });

  it("put the shim into a cgroup", async (context) => {
    oursOnly(context, "wants the cgroup to exist");
    const name = `${live.namespace}-shim`;
    try {
      await using task = await live.run(["sleeper"], {
        runtimeOptions: anyOf(RUNC_OPTIONS, { shimCgroup: `/${name}` }),
      });
      const cgroups = readFileSync(`/proc/${live.shimOf(task.id).pid}/cgroup`, "utf8");
      const memory = cgroups.split("\n").find((line) => /:memory:|^0::/.test(line));
      expect(memory).toMatch(new RegExp(`:/${name}$`));
      expect(readFileSync(`/proc/${task.pid}/cgroup`, "utf8")).not.toContain(name);
    } finally {
      for (const root of cgroupRoots())
        try {
          rmdirSync(join(root, name));
        } catch {
          // no such cgroup in this hierarchy
        }
    }
  });

  it("asking for systemd's cgroups are refused with the reason where systemd doesn't run", async (context) => {
    skipUnless(context, !readFileSync("/proc/1/comm", "utf8").startsWith("systemd"), "systemd runs here");
    const runtimeOptions = anyOf(RUNC_OPTIONS, { systemdCgroup: true });
    await expect(live.run(["true"], { runtimeOptions })).rejects.toThrow(/systemd/);
  });

  it("leave the shim a score by which the kernel takes it before containerd, never cedanad before it", async () => {
    const score = (pid: number) => Number(readFileSync(`/proc/${pid}/oom_score_adj`, "utf8"));
    const before = score(live.containerdPid);
    writeFileSync(`/proc/${live.containerdPid}/oom_score_adj`, "100");
    try {
      await using task = await live.run(["sleeper"]);
      expect(score(live.shimOf(task.id).pid)).toBe(101);
      if (!isControl) expect(score(live.cedanad()!.pid)).toBeLessThanOrEqual(0);
    } finally {
      try {
        writeFileSync(`/proc/${live.containerdPid}/oom_score_adj`, String(before));
      } catch {
        // EACCES: lowering takes CAP_SYS_RESOURCE; this containerd is ours alone
      }
    }
  });
});

it("core scheduling, asked for, is no obstacle where the kernel has none", async (context) => {
  oursOnly(context, "fails then");
  skipUnless(context, kernelConfig("CONFIG_SCHED_CORE") !== "y", "the kernel has core scheduling");
  await using live = await Live.start({ env: { SCHED_CORE: "1" } });
  const { status } = await live.runToEnd(["sh", "-c", "exit 4"]);
  expect(status).toBe(4);
});

/** undefined where the kernel doesn't tell its configuration */
function kernelConfig(name: string): string | undefined {
  try {
    const text = gunzipSync(readFileSync("/proc/config.gz")).toString();
    return new RegExp(`^${name}=(.*)$`, "m").exec(text)?.[1];
  } catch {
    return undefined;
  }
}
