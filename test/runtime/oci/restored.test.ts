import { describe, expect, it } from "vitest";
import { ownGlobalArgv, withoutLog } from "../../../src/runtime/oci/call.ts";
import { createOptions, signalOfUnstarted } from "../../../src/runtime/oci/restored.ts";
import { namespaceOf } from "../../../src/runtime/oci/state.ts";

describe("the options of create and run", () => {
  it("are found in every form that callers write", () => {
    // conmon, go-runc, crun's short forms
    expect(
      Object.fromEntries(
        createOptions(["--bundle", "/b", "--pid-file=/p", "-no-pivot", "--console-socket", "/s", "-d", "id"]),
      ),
    ).toEqual({
      bundle: "/b",
      "pid-file": "/p",
      "no-pivot": true,
      "console-socket": "/s",
      detach: true,
    });
    for (const no of ["false", "F", "0"])
      expect(createOptions(["-d", "-b", "/b", `--detach=${no}`, "--", "-d"]).has("detach"), no).toBe(false);
    expect(createOptions(["--detach=T"]).has("detach")).toBe(true);
  });

  it("that nobody knows are refused, or passed over", () => {
    expect(() => createOptions(["--new-one", "id"], "refuse")).toThrow(
      /flag provided but not defined: -new-one/,
    );
    expect(createOptions(["--new-one", "--bundle=/b", "id"]).get("bundle")).toBe("/b");
    expect(() => createOptions(["--bundle"])).toThrow(/flag needs an argument/);
  });
});

it("a call of our own doesn't write into the caller's log", () => {
  expect(
    withoutLog([
      "--root",
      "/r",
      "--log",
      "/l",
      "--log-format=json",
      "--systemd-cgroup",
      "--log-level",
      "debug",
    ]),
  ).toEqual(["--root", "/r", "--systemd-cgroup"]);
});

it("a call of our own has the caller's root, whatever he calls it", () => {
  const call = { globalArgv: ["--root", "state", "--log=/l"], root: "/where/state" };
  expect(ownGlobalArgv(call)).toEqual(["--root", "state", "--root=/where/state"]);
});

it.each([
  ["/run/runc", "oci"],
  ["/run/crun/", "oci"],
  ["/run/containerd/runc/k8s.io", "k8s.io"],
  ["/var/run/docker/runtime-runc/moby", "moby"],
  ["/run/..", "oci"],
  ["/", "oci"],
])("containers below %s have the namespace %s", (root, namespace) =>
  expect(namespaceOf(root)).toBe(namespace),
);

it("what would end a container ends one that hasn't been started, and other signals wait for its start", () => {
  for (const signal of [1, 2, 3, 6, 9, 15]) expect(signalOfUnstarted(signal)).toBe(9);
  for (const signal of [10, 18, 19, 28]) expect(signalOfUnstarted(signal)).toBe(signal);
});
