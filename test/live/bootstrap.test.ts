// The launcher as the versions of containerd call it. Those from 2.3 on are played by a stand-in: no release is here to test with.

import { spawn } from "node:child_process";
import { copyFileSync, mkdirSync, readFileSync, rmdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { task as api, bootstrap, google, runcOptions, types } from "../../src/proto/index.ts";
import { Client } from "../../src/ttrpc/index.ts";
import { isControl, Live } from "./harness/live.ts";
import { missingFor, skipUnless } from "./harness/matrix.ts";
import { repository } from "./harness/programs.ts";
import { containerSpec } from "./harness/spec.ts";
import { liveFor } from "./harness/suite.ts";
import { cgroupRoots } from "./harness/system.ts";

const launcher = join(repository, "bin/containerd-shim-cedana-v2");

/** Runs the launcher with these bytes on its stdin, which then ends. */
async function call(
  live: Live,
  args: string[],
  { stdin = Buffer.alloc(0) as Uint8Array, env = {}, cwd = "/", program = launcher } = {},
): Promise<{ code: number; stdout: Buffer; stderr: string }> {
  const child = spawn(program, args, { env: live.environment(env), cwd });
  const [stdout, stderr]: [Buffer[], Buffer[]] = [[], []];
  child.stdout.on("data", (chunk: Buffer) => stdout.push(chunk));
  child.stderr.on("data", (chunk: Buffer) => stderr.push(chunk));
  child.stdin.on("error", () => {}); // it may end without having read
  child.stdin.end(stdin);
  // `close` comes when nobody holds the pipes any more: the keeper mustn't.
  const code = await new Promise<number>((resolve) => child.once("close", (status) => resolve(status ?? -1)));
  return { code, stdout: Buffer.concat(stdout), stderr: Buffer.concat(stderr).toString() };
}

describe.skipIf(isControl)("the launcher", () => {
  let live: Live;
  liveFor({}, (started) => {
    live = started;
  });

  it("says its version, and refuses what it doesn't understand", async () => {
    for (const flag of ["-v", "--version"]) {
      const { code, stdout } = await call(live, [flag]);
      expect(code).toBe(0);
      expect(stdout.toString()).toMatch(/Version: +\S+\n +Revision: .*\n +Protocol: 1 to \d/);
    }
    for (const args of [["-nonsense"], ["start"], ["-namespace", "a/b", "-id", "x", "start"], ["-id"]]) {
      const { code, stdout, stderr } = await call(live, args);
      expect([code, stdout.toString()]).toEqual([1, ""]);
      expect(stderr).toMatch(/^containerd-shim-cedana-v2: .+\n$/);
    }
  });

  it("tells containerd what it and the engine are, with options and without", async () => {
    const options = google.Any.encode({
      typeUrl: "containerd.runc.v1.Options",
      value: runcOptions.Options.encode({ binaryName: "crun" }),
    });
    for (const [stdin, engine] of [
      [Buffer.alloc(0), "runc"],
      [options, "crun"],
    ] as const) {
      const { code, stdout, stderr } = await call(live, ["-info"], { stdin });
      expect([code, stderr]).toEqual([0, ""]);
      const info = types.RuntimeInfo.decode(stdout);
      expect(info.name).toBe("io.containerd.cedana.v2");
      expect(info.version!.version).not.toBe("");
      const features = JSON.parse(Buffer.from(info.features!.value).toString());
      expect(Object.keys(features.annotations ?? {}).some((key) => key.includes(engine))).toBe(true);
      expect(info.options?.typeUrl ?? "").toBe(stdin.length ? "containerd.runc.v1.Options" : "");
    }
  });

  describe("starts a keeper", () => {
    const id = "pod-of-one";

    function bundle(): string {
      const directory = join(live.dir, "bundle");
      mkdirSync(directory, { recursive: true });
      const spec = containerSpec({
        args: ["true"],
        cgroupsPath: `/${live.namespace}/${id}`,
        programs: live.programs,
      });
      writeFileSync(join(directory, "config.json"), JSON.stringify(spec));
      return directory;
    }
    const flags = (dash = "-") =>
      ["namespace", live.namespace, "id", id, "address", live.address].map((text, at) =>
        at % 2 ? text : dash + text,
      );

    /** The keeper answers there, and leaves when told. */
    async function endKeeper(address: string): Promise<void> {
      const client = await Client.connect(address.replace("unix://", ""));
      const answer = await client.call(
        "containerd.task.v3.Task",
        "Connect",
        api.ConnectRequest.encode({ id }),
      );
      const { pid } = live.shimOf(id);
      expect(api.ConnectResponse.decode(answer)).toMatchObject({ shimPid: pid, taskPid: 0 });
      await client.call("containerd.task.v3.Task", "Shutdown", api.ShutdownRequest.encode({ id }));
      client.close();
    }

    it.each([
      ["1.6 and 1.7 (no MAX_SHIM_VERSION)", {}, "plain"],
      ["a version that takes 2", { MAX_SHIM_VERSION: "2" }, "plain"],
      ["2.x (MAX_SHIM_VERSION=3)", { MAX_SHIM_VERSION: "3" }, "json"],
      ["a later one (MAX_SHIM_VERSION=4)", { MAX_SHIM_VERSION: "4" }, "json"],
    ])("and answers as %s understands", async (_name, env, form) => {
      const cwd = bundle();
      const { code, stdout, stderr } = await call(live, [...flags("--"), "-debug", "start"], { env, cwd });
      expect([code, stderr]).toEqual([0, ""]);
      const address = readFileSync(join(cwd, "address"), "utf8");
      expect(address).toMatch(/^unix:\/\/\/.+[^\n]$/);
      if (form === "plain") expect(stdout.toString()).toBe(address);
      else expect(JSON.parse(stdout.toString())).toEqual({ version: 3, address, protocol: "ttrpc" });
      // A second time: the same keeper.
      const again = await call(live, [...flags(), "start"], { env, cwd });
      expect(again.stdout).toEqual(stdout);
      expect(live.shims()).toHaveLength(1);
      await endKeeper(address);
    });

    it("for a stand-in for containerd 2.3, whose parameters and options come on stdin", async () => {
      const shimCgroup = `${live.namespace}-params`;
      const params = (instanceId: string) =>
        bootstrap.BootstrapParams.encode({
          instanceId,
          namespace: live.namespace,
          containerdVersion: "2.3.0",
          containerdGrpcAddress: live.address,
          containerdTtrpcAddress: `${live.address}.ttrpc`,
          extensions: [
            { value: { typeUrl: "some.other.Extension", value: Buffer.from("\xff\xff", "latin1") } },
            {
              value: {
                typeUrl: "types.containerd.io/containerd.runc.v1.Options",
                value: runcOptions.Options.encode({ shimCgroup }),
              },
            },
          ],
        });
      const cwd = bundle();
      const env = { MAX_SHIM_VERSION: "3" };
      try {
        const { code, stdout, stderr } = await call(live, [...flags(), "start"], {
          env,
          cwd,
          stdin: params(id),
        });
        expect([code, stderr]).toEqual([0, ""]);
        expect(readFileSync(`/proc/${live.shimOf(id).pid}/cgroup`, "utf8")).toContain(`/${shimCgroup}\n`);
        await endKeeper(JSON.parse(stdout.toString()).address);
        await live.expectNoLeftovers();
        // Parameters of somebody else are none: the bytes are taken for options, and refused as such.
        const other = await call(live, [...flags(), "start"], { env, cwd, stdin: params("somebody-else") });
        expect(other.code).toBe(1);
        expect(other.stderr).toMatch(/somebody-else/);
      } finally {
        for (const root of cgroupRoots())
          try {
            rmdirSync(join(root, shimCgroup));
          } catch {
            // no such cgroup in this hierarchy
          }
      }
    });

    it("also when its file was copied elsewhere", async () => {
      const program = join(live.dir, "containerd-shim-elsewhere-v1");
      copyFileSync(launcher, program);
      const cwd = bundle();
      const { code, stdout, stderr } = await call(live, [...flags(), "start"], { cwd, program });
      expect([code, stderr]).toEqual([0, ""]);
      await endKeeper(stdout.toString());
    });
  });
});

describe.skipIf(isControl)("containerd 2.1", () => {
  it("inspects the runtime", async (context) => {
    const missing = missingFor({ containerd: "2.1", engine: "runc" });
    skipUnless(context, !missing, missing ?? "");
    await using live = await Live.start({ containerd: "2.1" });
    const info = JSON.parse(await live.ctr("plugins", "inspect-runtime", "--runtime", live.options.runtime));
    expect(info).toMatchObject({ Name: "io.containerd.cedana.v2" });
    expect(info.Features.ociVersionMax).toMatch(/^1\./);
  });
});
