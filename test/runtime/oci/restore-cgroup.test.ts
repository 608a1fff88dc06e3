import { describe, expect, it } from "vitest";
import { criuConfig } from "../../../src/criu/option-file.ts";
import { InvalidRequest } from "../../../src/errors/index.ts";
import { hostCgroupVersion } from "../../../src/linux/cgroup-hierarchy.ts";
import { restoreCgroup } from "../../../src/runtime/oci/restore-cgroup.ts";

const hostile = '/pod/x"\naction-script "/tmp/evil';

describe("the cgroup of a restore", () => {
  it("never lets a path become another option of CRIU", async () => {
    expect(() => criuConfig({ cgroupRoots: [["", hostile]] })).toThrow(InvalidRequest);
    const restoring = restoreCgroup({ linux: { cgroupsPath: hostile } }, undefined, process.pid);
    // On a host of version 1 CRIU is told nothing of cgroups.
    if ((await hostCgroupVersion()) === 2) await expect(restoring).rejects.toBeInstanceOf(InvalidRequest);
    else expect((await restoring).lines).toEqual([]);
  });
});
