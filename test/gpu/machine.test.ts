import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { machineWithGpu } from "./machine.ts";

describe("a machine for the tests on a real GPU", () => {
  let place: string;
  const tree = () => ({ dev: join(place, "dev"), libraries: [join(place, "none"), join(place, "lib")] });
  beforeEach(() => {
    place = mkdtempSync(join(tmpdir(), "cedana-machine-"));
    for (const name of ["dev", "lib"]) mkdirSync(join(place, name));
  });
  afterEach(() => rmSync(place, { recursive: true }));

  it("is told to have no GPU, or no driver's library, and where it was looked for", () => {
    symlinkSync("/dev/null", join(place, "dev/null"));
    expect(machineWithGpu(tree())).toMatch(/^no GPU: .*\/dev has no nvidiactl/);
    symlinkSync("/dev/null", join(place, "dev/nvidiactl"));
    expect(machineWithGpu(tree())).toMatch(/^no driver library: libcuda\.so\.1 is not in .*none, .*lib /);
  });

  it("gives a container its nodes, and all of the driver's libraries", () => {
    for (const name of ["nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-modeset"])
      symlinkSync("/dev/null", join(place, "dev", name));
    for (const name of ["libcuda.so.570.1", "libnvidia-ptxjitcompiler.so.570.1", "libc.so.6"])
      writeFileSync(join(place, "lib", name), "");
    for (const name of ["libcuda.so.1", "libnvidia-ptxjitcompiler.so.1"])
      symlinkSync(name.replace(/1$/, "570.1"), join(place, "lib", name));
    const machine = machineWithGpu(tree());
    if (typeof machine === "string") throw new Error(machine);
    expect(machine.nodes.map(({ path }) => path).sort()).toEqual([
      "/dev/nvidia-uvm",
      "/dev/nvidia0",
      "/dev/nvidiactl",
    ]);
    expect(machine.nodes[0]).toMatchObject({ major: 1, minor: 3 });
    expect(machine.library).toBe(join(place, "lib/libcuda.so.1"));
    expect(machine.files.map((path) => path.slice(join(place, "lib/").length)).sort()).toEqual([
      "libcuda.so.570.1",
      "libnvidia-ptxjitcompiler.so.1",
      "libnvidia-ptxjitcompiler.so.570.1",
    ]);
  });
});
