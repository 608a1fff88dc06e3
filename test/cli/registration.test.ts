import { execFileSync } from "node:child_process";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { parse } from "smol-toml";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { apply, type Place, planRegistration, planUndo, unifiedDiff } from "../../src/cli/registration.ts";
import { type Target, targets } from "../../src/cli/targets.ts";

let place: Place;
beforeEach(() => {
  place = {
    root: mkdtempSync(join(tmpdir(), "cedana-setup-")),
    programs: "/opt/cedana/bin",
    packaging: resolve(import.meta.dirname, "../../packaging"),
    stateDirectory: "/var/lib/cedana",
  };
});
afterEach(() => rmSync(place.root, { recursive: true, force: true }));

const paths: Record<Target, string> = {
  containerd: "etc/containerd/config.toml",
  crio: "etc/crio/crio.conf.d/50-cedana.conf",
  podman: "etc/containers/containers.conf.d/50-cedana.conf",
  docker: "etc/docker/daemon.json",
};
const at = (path: string) => join(place.root, path);
function put(path: string, text: string, mode = 0o644): void {
  mkdirSync(dirname(at(path)), { recursive: true });
  writeFileSync(at(path), text);
  chmodSync(at(path), mode);
}
const read = (path: string) => readFileSync(at(path), "utf8");
const tree = () =>
  execFileSync("find", [place.root, "-printf", "%P %m\n"], { encoding: "utf8" }).split("\n").sort();

function register(target: Target): string {
  const change = planRegistration(target, place);
  if (change.before !== change.after) apply(target, place, change, false);
  return change.after!;
}
function undo(target: Target): void {
  const change = planUndo(target, place);
  if (change.before !== change.after) apply(target, place, change, true);
}

describe.each(targets)("setup for %s", (target) => {
  it("writes where nothing is, twice the same, and takes back all of it", () => {
    const before = tree();
    const text = register(target);
    expect(read(paths[target])).toBe(text);
    expect(text).toContain(
      target === "containerd" ? "io.containerd.cedana.v2" : "/opt/cedana/bin/cedana-runtime",
    );
    expect(unifiedDiff(planRegistration(target, place))).toBe("");
    register(target);
    expect(read(paths[target])).toBe(text);
    undo(target);
    expect(existsSync(at(dirname(paths[target])))).toBe(false);
    // What is left is our own state directory, empty.
    const left = tree().filter((line) => !before.includes(line));
    expect(
      left.filter((line) => !/^var(\/lib(\/cedana(\/setup)?)?)? /.test(line) && !/^etc /.test(line)),
    ).toEqual([]);
    expect(unifiedDiff(planUndo(target, place))).toBe("");
  });

  it("changes nothing by planning", () => {
    const before = tree();
    expect(unifiedDiff(planRegistration(target, place))).toMatch(/^--- \/dev\/null\n\+\+\+ /);
    planUndo(target, place);
    expect(tree()).toEqual(before);
  });
});

it("what Podman gets, Podman 4.3 of Debian 12 reads, too: arrays of strings alone", () => {
  const { engine } = parse(register("podman")) as { engine: Record<string, unknown> };
  expect(engine.runtime_supports_json).toEqual(expect.arrayContaining(["runc", "crun", "cedana"]));
  for (const value of Object.values(engine).filter(Array.isArray))
    for (const one of value) expect(one).toBeTypeOf("string");
});

const containerd2 = `# somebody's\nversion = 2\nroot = "/data"\n[plugins."io.containerd.grpc.v1.cri"]\n  sandbox_image = "pause"\n  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]\n    runtime_type = "io.containerd.runc.v2"\n`;
const docker = `{\n    "log-driver": "local",\n    "runtimes": {"kata": {"path": "/usr/bin/kata"}}\n}`;

describe("an existing configuration", () => {
  it.each<[Target, string]>([
    ["containerd", containerd2],
    ["containerd", containerd2.trimEnd()],
    [
      "containerd",
      containerd2.replace("version = 2", "version = 3").replaceAll("grpc.v1.cri", "cri.v1.runtime"),
    ],
    ["docker", docker],
    ["docker", "{}"],
    ["docker", '{\n\t"debug": true\n}\n'],
  ])("of %s keeps what it says, its mode, and comes back to the byte", (target, text) => {
    put(paths[target], text, 0o640);
    const after = register(target);
    const parsed = target === "docker" ? JSON.parse(after) : parse(after);
    expect(parsed).toMatchObject(target === "docker" ? JSON.parse(text) : parse(text));
    expect(statSync(at(paths[target])).mode & 0o777).toBe(0o640);
    undo(target);
    expect(read(paths[target])).toBe(text);
    expect(statSync(at(paths[target])).mode & 0o777).toBe(0o640);
  });

  it("that somebody changed meanwhile loses only what is ours", () => {
    put(paths.containerd, containerd2);
    put(paths.containerd, `${register("containerd")}[timeouts]\n"x" = "1s"\n`);
    undo("containerd");
    expect(read(paths.containerd)).toBe(`${containerd2}[timeouts]\n"x" = "1s"\n`);
    put(paths.docker, docker);
    put(paths.docker, JSON.stringify({ ...JSON.parse(register("docker")), debug: true }));
    undo("docker");
    expect(JSON.parse(read(paths.docker))).toEqual({ ...JSON.parse(docker), debug: true });
  });

  it("with an older block of ours gets the new one in its place", () => {
    put(paths.containerd, containerd2);
    const after = register("containerd");
    place = { ...place, programs: "/elsewhere" };
    put(paths.containerd, after.replace('"io.containerd.cedana.v2"', '"io.containerd.cedana.v1"'));
    expect(register("containerd")).toBe(after.replaceAll("/opt/cedana/bin", "/elsewhere"));
  });

  it("with older runtimes of ours gets the new ones in their place, and comes back to the byte", () => {
    put(paths.docker, docker);
    const after = register("docker");
    place = { ...place, programs: "/elsewhere" };
    expect(JSON.parse(register("docker"))).toEqual(
      JSON.parse(after.replaceAll("/opt/cedana/bin", "/elsewhere")),
    );
    undo("docker");
    expect(read(paths.docker)).toBe(docker);
  });

  it("is shown as a difference with its surroundings", () => {
    put(paths.containerd, containerd2);
    const lines = unifiedDiff(planRegistration("containerd", place)).split("\n");
    expect(lines.slice(0, 6)).toEqual([
      `--- ${at(paths.containerd)}`,
      `+++ ${at(paths.containerd)}`,
      expect.stringMatching(/^@@ -5,3 \+5,\d+ @@$/),
      '   sandbox_image = "pause"',
      '   [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]',
      '     runtime_type = "io.containerd.runc.v2"',
    ]);
    expect(lines.filter((line) => line.startsWith("-")).length).toBe(1);
  });

  it.each<[Target, string, RegExp]>([
    ["containerd", "version = 1\n", /is of version 1/],
    ["containerd", 'root = "/x"\n', /is of version 1/],
    ["containerd", "version = [\n", /is not TOML/],
    [
      "containerd",
      'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.cedana]\n',
      /has a runtime "cedana" already/,
    ],
    [
      "containerd",
      'version = 2\n[plugins]\n"io.containerd.grpc.v1.cri" = { containerd = {} }\n',
      /can't take the runtime.*by hand/s,
    ],
    ["docker", "[]", /is not a JSON object/],
    ["docker", "{", /is not JSON/],
    ["docker", '{"runtimes": []}', /"runtimes" is not an object/],
    ["docker", '{"runtimes": {"cedana": {"path": "/else"}}}', /has a runtime "cedana" already/],
    ["crio", "theirs\n", /is there already/],
    ["podman", "theirs\n", /is there already/],
  ])("of %s that can't be added to is left alone: %j", (target, text, words) => {
    put(paths[target], text);
    expect(() => register(target)).toThrow(words);
    expect(read(paths[target])).toBe(text);
  });
});
