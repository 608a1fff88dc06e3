import { mkdirSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { InvalidRequest, NotFound, PermissionDenied } from "../../src/errors/index.ts";
import {
  annotationsOf,
  cedanaAnnotations,
  cgroupName,
  cgroupPathV2,
  groupOf,
  isSandboxContainer,
  movedFrom,
  namesScope,
  type OciSpec,
  ownsNetworkNamespace,
  parseSpec,
  podNameOf,
  podNamespaceOf,
  processLike,
  readSpec,
  sharesPidNamespace,
} from "../../src/runtime/spec.ts";

let bundle: string;
beforeEach(() => {
  bundle = mkdtempSync(join(tmpdir(), "cedana-bundle-"));
});
afterEach(() => rmSync(bundle, { recursive: true }));

describe("readSpec", () => {
  it("reads a bundle's config.json", async () => {
    writeFileSync(
      join(bundle, "config.json"),
      JSON.stringify({ ociVersion: "1.1.0", process: { args: ["sh"] } }),
    );
    expect((await readSpec(bundle)).process?.args).toEqual(["sh"]);
  });

  it("tells a missing bundle from a broken one", async () => {
    await expect(readSpec(bundle)).rejects.toThrow(NotFound);
    await expect(readSpec(`${bundle}/nothing`)).rejects.toThrow(NotFound);
    writeFileSync(join(bundle, "config.json"), '{"ociVersion":');
    await expect(readSpec(bundle)).rejects.toThrow(InvalidRequest);
    await expect(readSpec(bundle)).rejects.toThrow(`${bundle}/config.json is not JSON`);
    rmSync(join(bundle, "config.json"));
    mkdirSync(join(bundle, "config.json"));
    await expect(readSpec(bundle)).rejects.toThrow("is a directory");
  });

  it("does not read a file without bounds", async () => {
    writeFileSync(join(bundle, "config.json"), "");
    truncateSync(join(bundle, "config.json"), 11 * 1024 * 1024);
    await expect(readSpec(bundle)).rejects.toThrow("more than");
  });

  it.each([
    ["[]", "not an object"],
    ["null", "not an object"],
    ['{"annotations":[]}', "annotations is not an object"],
    ['{"annotations":{"a":1}}', "annotation a is not a string"],
    ['{"linux":{"namespaces":{}}}', "linux.namespaces is not a list"],
    ['{"mounts":["x"]}', "mounts is not a list"],
    ['{"process":"sh"}', "process is not an object"],
  ])("refuses %s", (text, message) => {
    expect(() => parseSpec(text, "config.json")).toThrow(message);
  });

  it("takes Go's null for what is missing", () => {
    const spec = parseSpec(
      '{"annotations":null,"linux":{"namespaces":null},"mounts":null,"process":null}',
      "x",
    );
    expect(annotationsOf(spec)).toEqual({});
    expect(sharesPidNamespace(spec)).toBe(true);
    expect(cedanaAnnotations(spec)).toEqual({});
  });
});

it("knows whether the kernel ends the container with its init", () => {
  const withPid = (namespace?: { path?: string }): OciSpec => ({
    linux: {
      namespaces: [{ type: "mount" }, ...(namespace ? [{ type: "pid" as const, ...namespace }] : [])],
    },
  });
  expect(sharesPidNamespace(withPid({}))).toBe(false);
  expect(sharesPidNamespace(withPid({ path: "" }))).toBe(false);
  expect(sharesPidNamespace(withPid({ path: "/proc/7/ns/pid" }))).toBe(true);
  expect(sharesPidNamespace(withPid())).toBe(true);
  expect(sharesPidNamespace({})).toBe(true);
});

it("knows what the engines call the container's cgroup", () => {
  const name = (cgroupsPath?: string) =>
    cgroupName(cgroupsPath === undefined ? {} : { linux: { cgroupsPath } }, "c1");
  expect(name()).toBe("c1");
  expect(name("")).toBe("c1");
  expect(name("/default/web")).toBe("web");
  expect(name("kubepods/pod1/abc/")).toBe("abc");
  expect(name("system.slice:cri-containerd:abc")).toBe("cri-containerd-abc.scope");
  expect(name(":cri-containerd:abc")).toBe("cri-containerd-abc.scope");
  expect(name("x.slice::abc")).toBe("abc.scope");
  expect(name("x.slice:y:z.slice")).toBe("z.slice");
  expect(name("/a:b:c/d")).toBe("d");
  const withCrun = (annotations: Record<string, string> = {}) =>
    cgroupName({ linux: { cgroupsPath: "x.slice:y:abc" }, annotations }, "c1", "crun");
  expect(withCrun()).toBe("y-abc.scope/container");
  expect(withCrun({ "run.oci.systemd.subgroup": "own" })).toBe("y-abc.scope/own");
  expect(withCrun({ "run.oci.systemd.subgroup": "" })).toBe("y-abc.scope");
  expect(cgroupName({ linux: { cgroupsPath: "/default/web" } }, "c1", "crun")).toBe("web");
});

it("groups containers of a pod", () => {
  const group = (annotations: Record<string, string>) => groupOf({ annotations });
  expect(group({ "io.kubernetes.cri.sandbox-id": "pod" })).toBe("pod");
  expect(group({ "io.kubernetes.cri.sandbox-id": "pod", "io.containerd.runc.v2.group": "mine" })).toBe(
    "mine",
  );
  expect(group({ "io.kubernetes.cri.sandbox-id": "" })).toBeUndefined();
  expect(groupOf({})).toBeUndefined();
});

describe("a process like the container's first", () => {
  it("has its user, directory, limits and environment, but no terminal", () => {
    const text = `{"process":{"terminal":true,"consoleSize":{"width":80,"height":25},"user":{"uid":1000,"gid":5},"cwd":"/app",
      "args":["server"],"env":["A=1"],"noNewPrivileges":true,"rlimits":[{"type":"RLIMIT_AS","hard":18446744073709551615,"soft":1}]}}`;
    const made = processLike(text, { args: ["sh", "-c", "x"], env: ["B=2"] });
    expect(made).toContain('"hard":18446744073709551615');
    expect(JSON.parse(made)).toMatchObject({
      terminal: false,
      user: { uid: 1000, gid: 5 },
      cwd: "/app",
      args: ["sh", "-c", "x"],
      env: ["A=1", "B=2"],
      noNewPrivileges: true,
    });
    expect(made).not.toContain("consoleSize");
    expect(() => processLike("[]", { args: ["x"], env: [] })).toThrow(InvalidRequest);
  });
});

describe("the network namespace", () => {
  it.each([
    ["none", [], false],
    ["a new one", [{ type: "network" }], true],
    ["one to join", [{ type: "network", path: "/run/netns/pod" }], false],
  ] as const)("is the container's own or not: %s", (_what, namespaces, own) => {
    expect(ownsNetworkNamespace({ linux: { namespaces } })).toBe(own);
  });
});

describe("the path of the version 2 cgroup", () => {
  it.each([
    ["/pod/c1", false, "/pod/c1"],
    ["/pod//c1/", false, "/pod/c1"],
    ["pod/c1", false, undefined],
    ["", false, undefined],
    ["/", false, undefined],
    ["user-a-b.slice:cri:c1", true, "/user.slice/user-a.slice/user-a-b.slice/cri-c1.scope"],
    [":cri:c1", true, "/system.slice/cri-c1.scope"],
    ["-.slice:cri:c1", true, "/cri-c1.scope"],
    ["a.slice:cri:b.slice", true, undefined],
    ["/pod/c1", true, undefined],
  ])("%j, systemd %s: %s", (cgroupsPath, systemd, path) => {
    expect(cgroupPathV2({ linux: { cgroupsPath } }, "c1", systemd)).toBe(path);
  });

  it("of a scope without a path is named after the engine", () => {
    expect(cgroupPathV2({}, "c1", true)).toBeUndefined();
    expect(cgroupPathV2({}, "c1", true, "runc")).toBe("/system.slice/runc-c1.scope");
    expect(cgroupPathV2({}, "c1", true, "crun")).toBe("/system.slice/crun-c1.scope/container");
    expect(cgroupPathV2({ linux: { cgroupsPath: "a.slice::" } }, "c1", true, "runc")).toBeUndefined();
  });
});

describe("a cgroup path that names a scope of systemd's", () => {
  it.each([
    ["system.slice:docker:c1", true],
    [":docker:c1", true],
    ["kubepods-pod1.slice:cri-containerd:c1", true],
    ["/default/c1", false],
    ["/a:b:c", false],
    ["a.slice/b:c:d", false],
    ["a.slice:b", false],
    ["", false],
  ])("%j: %s", (cgroupsPath, expected) => {
    expect(namesScope({ linux: { cgroupsPath } })).toBe(expected);
  });
});

describe("checkpoint policy in annotations", () => {
  const policy = (annotations: Record<string, string>, name?: string) =>
    cedanaAnnotations({ annotations }, { containerName: name });

  it("is empty where nothing is said", () => {
    expect(policy({ "cedana.io/other": "x", "io.kubernetes.cri.container-type": "container" })).toEqual({});
  });

  it("has values for every key", () => {
    expect(
      policy({
        "cedana.io/tcp": "skip-in-flight",
        "cedana.io/file-locks": "true",
        "cedana.io/ext-unix": "false",
        "cedana.io/shell-job": "true",
        "cedana.io/lazy": "true",
      }),
    ).toEqual({ tcp: "skip-in-flight", fileLocks: true, extUnix: false, shellJob: true, lazy: true });
  });

  it("of one container goes before that of the pod", () => {
    const annotations = {
      "cedana.io/tcp": "keep",
      "cedana.io/tcp.web": "close",
      "cedana.io/file-locks.db": "true",
      "io.kubernetes.cri.container-name": "web",
    };
    expect(policy(annotations)).toEqual({ tcp: "close" });
    expect(policy(annotations, "db")).toEqual({ tcp: "keep", fileLocks: true });
  });

  it("is not for the sandbox container", () => {
    const spec = {
      annotations: { "io.kubernetes.cri.container-type": "sandbox", "cedana.io/tcp": "nonsense" },
    };
    expect(isSandboxContainer(spec)).toBe(true);
    expect(cedanaAnnotations(spec)).toEqual({});
  });

  it.each([
    [
      { "cedana.io/tcp": "drop" },
      'annotation cedana.io/tcp is "drop"; it may be keep, close, skip-in-flight',
    ],
    [{ "cedana.io/shell-job": "yes" }, 'annotation cedana.io/shell-job is "yes"; it may be true, false'],
    [{ "cedana.io/ext-unix": "" }, 'annotation cedana.io/ext-unix is ""; it may be true, false'],
    [{ "cedana.io/tcp": "toString" }, "it may be keep"],
  ])("names what is wrong with %j", (annotations, message) => {
    expect(() => policy(annotations as Record<string, string>)).toThrow(InvalidRequest);
    expect(() => policy(annotations as Record<string, string>)).toThrow(message);
  });

  it("is refused where the administrator denies a key, whatever the key says", () => {
    const web = (key: string) => ({
      annotations: { "io.kubernetes.cri.container-name": "web", [`cedana.io/${key}`]: "TERM" },
    });
    for (const key of [
      "kill-signal",
      "exec-kill-signal",
      "kill-signal.web",
      "checkpoint-on",
      "hook.pre-dump.web",
    ])
      expect(() => cedanaAnnotations(web(key), { denied: [key.replace(/\.web$/, "")] }), key).toThrow(
        `annotation cedana.io/${key} is denied by this node's configuration`,
      );
    const others = { denied: ["kill-signal", "tcp"] };
    expect(cedanaAnnotations(web("kill-signal.db"), others)).toEqual({}); // another container's
    expect(cedanaAnnotations(web("kill-grace"), others)).toEqual({});
    const sandbox = {
      annotations: { ...web("tcp").annotations, "io.kubernetes.cri.container-type": "sandbox" },
    };
    expect(cedanaAnnotations(sandbox, others)).toEqual({});
  });

  it("names the annotation that it read", () => {
    expect(() => policy({ "cedana.io/tcp": "keep", "cedana.io/tcp.web": "x" }, "web")).toThrow(
      "cedana.io/tcp.web",
    );
  });
});

describe("the pod of a container", () => {
  const crio = { "io.kubernetes.cri-o.SandboxName": "k8s_web-0_shop_8d1c-uid_0" };
  it("is what containerd or CRI-O says of it, not what it says itself", () => {
    expect(podNamespaceOf({ annotations: crio })).toBe("shop");
    expect(podNameOf({ annotations: crio })).toBe("web-0");
    expect(podNamespaceOf({ annotations: { "io.kubernetes.cri.sandbox-namespace": "a" } })).toBe("a");
    expect(podNamespaceOf({})).toBeUndefined();
    expect(() =>
      podNamespaceOf({ annotations: { ...crio, "io.kubernetes.cri.sandbox-namespace": "other" } }),
    ).toThrow(PermissionDenied);
  });
});

it("a copy of a configuration in another directory means the same, to the last digit", () => {
  const text = `{"root": {"path": "rootfs"}, "linux": {"resources": {"memory": {"limit": 18446744073709551615}}},
    "mounts": [{"destination": "/a", "source": "files", "options": ["rbind"]}, {"destination": "/p", "type": "proc", "source": "proc"}]}`;
  const moved = movedFrom("/bundle", text);
  expect(moved).toContain("18446744073709551615");
  const spec = JSON.parse(moved);
  expect(spec.root.path).toBe("/bundle/rootfs");
  expect(spec.mounts.map(({ source }: { source: string }) => source)).toEqual(["/bundle/files", "proc"]);
});
