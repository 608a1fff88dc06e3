import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { InvalidRequest, NotFound } from "../../src/errors/index.ts";
import { pack, runcOptions, runtimeOptions } from "../../src/proto/index.ts";
import { decodeCheckpointOptions, decodeOptions, parseOptionsTable } from "../../src/runtime/options.ts";

const inVain = "CriuPath /usr/sbin/criu has no effect: CRIU is looked up in PATH";
const everything = {
  noPivotRoot: true,
  noNewKeyring: true,
  shimCgroup: "/pods",
  ioUid: 1000,
  ioGid: 4294967295,
  binaryName: "/usr/bin/crun",
  root: "/run/own",
  criuPath: "/usr/sbin/criu",
  systemdCgroup: true,
  criuImagePath: "/images",
  criuWorkPath: "/work",
};

const nothing = {
  noPivotRoot: false,
  noNewKeyring: false,
  shimCgroup: "",
  ioUid: 0,
  ioGid: 0,
  binaryName: "",
  root: "",
  criuPath: "",
  systemdCgroup: false,
  criuImagePath: "",
  criuWorkPath: "",
  warnings: [],
};

const generic = (options: runtimeOptions.OptionsInit) => decodeOptions(pack(runtimeOptions.Options, options));
const table = (text: string) => generic({ configBody: Buffer.from(text) });

describe("runtime options", () => {
  it("are the defaults where none came", async () => {
    for (const any of [undefined, null, {}, { typeUrl: "" }])
      expect(await decodeOptions(any)).toEqual(nothing);
    expect(await decodeOptions({ typeUrl: "containerd.runc.v1.Options" })).toEqual(nothing);
  });

  it("of runc's type keep every field", async () => {
    expect(await decodeOptions(pack(runcOptions.Options, everything))).toEqual({
      ...everything,
      warnings: [inVain],
    });
  });

  it("of runc's type are what containerd's bytes say", async () => {
    // `ctr run --runc-binary crun --runc-systemd-cgroup`: fields 6 and 9
    const value = Buffer.from("32046372756e4801", "hex");
    expect(await decodeOptions({ typeUrl: "containerd.runc.v1.Options", value })).toEqual({
      ...nothing,
      binaryName: "crun",
      systemdCgroup: true,
    });
  });

  it("may have a prefix before their type", async () => {
    const { value } = pack(runcOptions.Options, everything);
    expect(
      (await decodeOptions({ typeUrl: "types.containerd.io/containerd.runc.v1.Options", value })).root,
    ).toBe("/run/own");
  });

  it("of the generic type are the table of containerd's configuration", async () => {
    const options = await table(`
      BinaryName = "crun"
      Root = "/run/own"
      SystemdCgroup = true
      NoPivotRoot = true
      NoNewKeyring = true
      ShimCgroup = "/pods"
      IoUid = 1000
      IoGid = 7
      CriuImagePath = "/images"
      CriuWorkPath = "/work"
      CriuPath = "/usr/sbin/criu"
    `);
    expect(options).toEqual({ ...everything, binaryName: "crun", ioGid: 7, warnings: [inVain] });
  });

  it("are told apart without case and underscores, and unknown ones are named", async () => {
    expect(await table('binary_name = "crun"\nBinarName = "x"\nTypeUrl = ""\n')).toEqual({
      ...nothing,
      binaryName: "crun",
      warnings: ["the runtime's options: unknown option BinarName"],
    });
    expect(await table("")).toEqual(nothing);
  });

  it("may lie in a file", async () => {
    const directory = mkdtempSync(join(tmpdir(), "cedana-options-"));
    try {
      const configPath = join(directory, "options.toml");
      await expect(generic({ configPath })).rejects.toThrow(NotFound);
      writeFileSync(configPath, 'Root = "/run/own"\nUnknown = 1\n');
      expect(await generic({ configPath })).toEqual({
        ...nothing,
        root: "/run/own",
        warnings: [`${configPath}: unknown option Unknown`],
      });
      await expect(generic({ configPath: directory })).rejects.toThrow(InvalidRequest);
      const fifo = join(directory, "fifo");
      spawnSync("mkfifo", [fifo]);
      await expect(generic({ configPath: fifo })).rejects.toThrow("no small file");
    } finally {
      rmSync(directory, { recursive: true });
    }
  });

  it("are refused when they are something else", async () => {
    const other = { typeUrl: "containerd.kata.v2.Options", value: new Uint8Array() };
    await expect(decodeOptions(other)).rejects.toThrow(InvalidRequest);
    await expect(decodeOptions(other)).rejects.toThrow("containerd.kata.v2.Options");
    await expect(generic({ typeUrl: "runsc.v1.Options", configBody: Buffer.from("") })).rejects.toThrow(
      "runsc.v1.Options",
    );
    expect(await generic({ typeUrl: "types.containerd.io/containerd.runc.v1.Options" })).toEqual(nothing);
    await expect(
      decodeOptions({ typeUrl: "containerd.runc.v1.Options", value: Buffer.from("0aff", "hex") }),
    ).rejects.toThrow("content of containerd.runc.v1.Options is broken");
  });

  it.each([
    ["Root = 1", "Root is 1; it must be a string"],
    ['SystemdCgroup = "yes"', 'SystemdCgroup is "yes"; it must be true or false'],
    ["IoUid = -1", "IoUid is -1; it must be a number from 0"],
    ["IoUid = 1.5", "IoUid is 1.5"],
    ["Root = ", "the runtime's options"],
  ])("say what is wrong with `%s`", async (text, message) => {
    await expect(table(text)).rejects.toThrow(InvalidRequest);
    await expect(table(text)).rejects.toThrow(message);
  });

  it("can be written to a journal and read back", async () => {
    const options = parseOptionsTable('Root = "/run/own"', "x");
    expect(JSON.parse(JSON.stringify(options))).toEqual(options);
  });
});

describe("checkpoint options", () => {
  const all = {
    exit: true,
    openTcp: true,
    externalUnixSockets: true,
    terminal: true,
    fileLocks: true,
    emptyNamespaces: ["network", "ipc"],
    cgroupsMode: "ignore",
    imagePath: "/images",
    workPath: "/work",
    parentPath: "../parent",
  };

  it("keep every field", () => {
    expect(decodeCheckpointOptions(pack(runcOptions.CheckpointOptions, all))).toEqual(all);
  });

  it("are the defaults where none came", () => {
    const none = decodeCheckpointOptions(undefined);
    expect(none).toMatchObject({ exit: false, emptyNamespaces: [], imagePath: "", parentPath: "" });
    expect(decodeCheckpointOptions({ typeUrl: "", value: new Uint8Array() })).toEqual(none);
  });

  it("are refused when they are something else", () => {
    expect(() => decodeCheckpointOptions({ typeUrl: "containerd.runc.v1.Options" })).toThrow(InvalidRequest);
  });
});
