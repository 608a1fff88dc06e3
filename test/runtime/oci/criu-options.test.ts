import { describe, expect, it } from "vitest";
import type { CheckpointManifest } from "../../../src/checkpoint/manifest.ts";
import { InvalidRequest, Unsupported } from "../../../src/errors/index.ts";
import type { EngineFeatures } from "../../../src/runtime/engine.ts";
import { Options } from "../../../src/runtime/oci/call.ts";
import { dumpPolicy, engineArguments, restorePolicy } from "../../../src/runtime/oci/criu-options.ts";

const both =
  "image-path work-path tcp-established ext-unix-sk shell-job file-locks manage-cgroups-mode".split(" ");
const runc: EngineFeatures = {
  name: "runc",
  version: "1.1.15",
  checkpoint: new Set([
    ...both,
    ..."parent-path leave-running lazy-pages status-fd page-server pre-dump empty-ns auto-dedup".split(" "),
  ]),
  restore: new Set([
    ...both,
    ..."bundle detach pid-file console-socket no-subreaper no-pivot empty-ns lazy-pages auto-dedup".split(
      " ",
    ),
  ]),
};
const crun: EngineFeatures = {
  name: "crun",
  version: "1.21",
  checkpoint: new Set([...both, ..."parent-path leave-running pre-dump network-lock".split(" ")]),
  restore: new Set([
    ...both,
    ..."bundle detach pid-file console-socket network-lock lsm-profile lsm-mount-context".split(" "),
  ]),
};

const dump = (features: EngineFeatures, argv: string[], annotations: Record<string, string> = {}) => {
  const options = new Options([...argv, "--", "c"]);
  return engineArguments("checkpoint", features, options, dumpPolicy(options, { annotations }), [
    "image-path",
    "work-path",
  ]);
};
const restore = (
  features: EngineFeatures,
  argv: string[],
  used: Partial<CheckpointManifest["options"]> = {},
) => {
  const options = new Options([...argv, "--", "c"]);
  const manifest = {
    options: { fileLocks: false, extUnix: false, shellJob: false, emptyNamespaces: [], ...used },
  };
  const policy = restorePolicy(options, {}, manifest as unknown as CheckpointManifest);
  return engineArguments("restore", features, options, policy, ["image-path", "work-path", "bundle"]);
};

describe("options of the wrapper", () => {
  it("are read in the one form that the wrapper gives", () => {
    const options = new Options([
      "--leave-running",
      "--empty-ns=network",
      "--empty-ns=ipc",
      "--work-path=",
      "--",
      "--id",
    ]);
    expect(options.has("leave-running")).toBe(true);
    expect(options.values("empty-ns")).toEqual(["network", "ipc"]);
    expect(options.value("empty-ns")).toBe("ipc");
    expect(options.value("work-path")).toBeUndefined();
    expect(() => new Options(["leave-running"])).toThrow(InvalidRequest);
  });
});

describe("a dump's options", () => {
  it("are handed on to an engine that has them", () => {
    const argv = [
      "--image-path=/i",
      "--leave-running",
      "--parent-path=../p",
      "--tcp-established",
      "--file-locks",
      "--status-fd=5",
    ];
    expect(dump(runc, argv)).toEqual({
      argv: ["--tcp-established", "--file-locks", "--leave-running", "--parent-path=../p", "--status-fd=5"],
      criuConfig: [],
    });
  });

  it("reach CRIU by its configuration where the engine has none", () => {
    expect(dump(runc, ["--tcp-close"])).toEqual({ argv: [], criuConfig: ["tcp-close"] });
    expect(dump(crun, ["--tcp-skip-in-flight", "--link-remap", "--auto-dedup"])).toEqual({
      argv: ["--tcp-established"],
      criuConfig: ["skip-in-flight", "link-remap", "auto-dedup"],
    });
    // crun has the option, and takes no value for it.
    for (const engine of [runc, crun])
      expect(dump(engine, ["--network-lock=nftables"])).toEqual({
        argv: [],
        criuConfig: ["network-lock nftables"],
      });
    expect(() => dump(crun, ["--network-lock=rm -rf"])).toThrow(/it may be iptables, nftables or skip/);
  });

  it("are refused by name where nobody has them", () => {
    expect(() => dump(crun, ["--lazy-pages"])).toThrow(Unsupported);
    expect(() => dump(crun, ["--lazy-pages"])).toThrow("crun 1.21 checkpoint --lazy-pages");
    expect(() => dump(crun, ["--page-server=1.2.3.4:5"])).toThrow("crun 1.21 checkpoint --page-server");
  });

  it("are overruled by the container's annotations", () => {
    expect(dump(runc, ["--tcp-established"], { "cedana.io/tcp": "close" })).toEqual({
      argv: [],
      criuConfig: ["tcp-close"],
    });
    expect(dump(runc, ["--file-locks"], { "cedana.io/file-locks": "false" }).argv).toEqual([]);
    expect(dump(runc, [], { "cedana.io/shell-job": "true", "cedana.io/ext-unix": "true" }).argv).toEqual([
      "--ext-unix-sk",
      "--shell-job",
    ]);
    expect(() => dump(runc, [], { "cedana.io/tcp": "perhaps" })).toThrow(InvalidRequest);
  });
});

describe("a restore's options", () => {
  it("are those of the dump, though the caller passes none", () => {
    expect(
      restore(runc, ["--detach"], {
        tcp: "keep",
        fileLocks: true,
        emptyNamespaces: ["network"],
        cgroupsMode: "soft",
      }).argv,
    ).toEqual([
      "--tcp-established",
      "--file-locks",
      "--empty-ns=network",
      "--manage-cgroups-mode=soft",
      "--detach",
    ]);
  });

  it("let the caller close what was kept, but not keep what was closed", () => {
    expect(restore(runc, ["--tcp-close"], { tcp: "keep" })).toEqual({ argv: [], criuConfig: ["tcp-close"] });
    expect(restore(runc, ["--tcp-established"], { tcp: "close" })).toEqual({
      argv: [],
      criuConfig: ["tcp-close"],
    });
  });

  it("leave out what an engine never does, and what is empty", () => {
    expect(restore(crun, ["--no-subreaper", "--no-new-keyring", "--detach"]).argv).toEqual(["--detach"]);
    expect(restore(runc, ["--lsm-profile=", "--lsm-mount-context="]).argv).toEqual([]);
    expect(() => restore(runc, ["--lsm-mount-context=x"])).toThrow("runc 1.1.15 restore --lsm-mount-context");
    expect(restore(crun, ["--lsm-mount-context=x"]).argv).toEqual(["--lsm-mount-context=x"]);
  });
});
